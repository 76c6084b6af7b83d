"""``intervene`` itself: what it refuses and why, what it leaves behind, how several interventions act together."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.errors import ConfigError, DataError, ShapeError
from saccade.vlm import ACT, GIFT, PAI, VAF, VAR, VHR, intervene, make_intervention
from tests.vlm.tiny_models import IMAGE, generate, tiny

SINKS = {"sink_channels": (1, 2, 3), "tau": 1.5, "min_nonsink_share": 0.0, "min_visual_mass": 0.0}
TEXT = [11, 12, 13, 14]


def strong_var(**settings):
    return VAR(**{"move_fraction": 0.9, **SINKS, **settings})


@pytest.fixture
def llava():
    return tiny("llava")


def logits(found, *methods, inputs=None, **options):
    """Return the logits of five steps under methods."""
    inputs = found.inputs(TEXT) if inputs is None else inputs
    if not methods:
        return generate(found, inputs, **options)[1]
    with intervene(found.model, *methods):
        return generate(found, inputs, **options)[1]


def hooks(model):
    """Return all hooks of all modules."""
    return [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in model.modules()]


class TestTheModelAfterwards:
    def test_is_bit_equal_after_an_exception_anywhere(self, llava):
        plain = logits(llava)
        model, seen = llava.model, []
        before = hooks(model)

        def fail_at_third_layer(module, args, kwargs):
            seen.append(module)
            raise KeyboardInterrupt

        handle = model.model.language_model.layers[2].register_forward_pre_hook(fail_at_third_layer, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt), intervene(model, strong_var()):
            generate(llava, llava.inputs(TEXT))
        handle.remove()
        assert seen
        assert "generate" not in vars(model)
        assert not any("saccade_engine" in vars(module) for module in model.modules())
        assert hooks(model) == before
        assert torch.equal(logits(llava), plain)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_has_the_attention_it_had(self, llava, implementation):
        model = copy.deepcopy(llava.model)
        model.set_attn_implementation(implementation)
        with intervene(model, strong_var()):
            model(**llava.inputs(TEXT))
        assert model.config.text_config._attn_implementation == implementation
        assert model.config.vision_config._attn_implementation == implementation

    def test_a_sample_knows_nothing_of_the_one_before(self, llava):
        first, second = llava.inputs(TEXT), llava.inputs([40, 41])
        alone = logits(llava, strong_var(), inputs=second)
        with intervene(llava.model, strong_var()) as ctx:
            generate(llava, first)
            after = generate(llava, second)[1]
            assert ctx.stats["var"]["sinks"][2].shape == second["input_ids"].shape
        assert torch.equal(after, alone)


class TestRefusals:
    def test_that_never_ran(self, llava):
        never = r"VAR never ran\. Inside the `with` block call the model"
        with pytest.raises(ConfigError, match=never), intervene(llava.model, strong_var()):
            pass

    def test_attention_that_is_bypassed(self, llava):
        model = copy.deepcopy(llava.model)

        def bypass(module, args):
            model.config.text_config._attn_implementation = "sdpa"  # what another package's patch amounts to

        model.register_forward_pre_hook(bypass)
        bypassed = r"VAR never ran.*by other code than transformers' registry"
        with pytest.raises(ConfigError, match=bypassed), intervene(model, strong_var()):
            model(**llava.inputs(TEXT))

    def test_no_image(self, llava):
        def call(ids):
            with intervene(llava.model, strong_var()):
                llava.model.generate(torch.tensor(ids), max_new_tokens=2)

        with pytest.raises(DataError, match="VAR needs an image, and sample 0") as caught:
            call([[1, 5, 9]])
        assert caught.value.reason == "no_image_token"
        with pytest.raises(DataError, match="sample 1 of the batch"):
            call([[1, IMAGE, 9], [1, 5, 9]])

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (VAR(), "no sink channels are published for LlavaForConditionalGeneration"),
            (VAR(sink_channels=(32,), tau=2.0), r"sink_channels must be in 0\.\.31; got \(32,\)"),
            (VAR(sink_channels=(1,)), r"tau must be below 5\.7"),
            (VAR(sink_channels=(1,), tau=2.0, move_fraction=1.5), r"move_fraction must be in 0\.\.1; got 1\.5"),
            (VAR(sink_channels=(1,), tau=2.0, layers=(4,)), r"layers must be indices from 0 to 3 .* got \[4\]"),
            (GIFT(content_tokens="all"), "no layers are published"),
            (GIFT((0,), (1,), 1.0), r"intervene\(model, GIFT\(\.\.\.\), tokenizer=processor\)"),
            (GIFT((0,), (1,), 1.0, content_tokens="nouns"), "got 'nouns'"),
            (VHR(alpha=-1.0), "alpha must not be negative"),
            (ACT(), r"the layers of heads must be indices .* got \[\]"),
            (ACT({1: (4,)}), r"heads must be in 0\.\.3; got \[4\]"),
            (VAF(), "layers must be indices from 0 to 3"),
        ],
    )
    def test_parameters_that_do_not_fit(self, llava, method, message):
        with pytest.raises(ConfigError, match=message), intervene(llava.model, method):
            pass
        assert "generate" not in vars(llava.model)

    def test_names_and_settings(self, llava):
        with pytest.raises(ConfigError, match=r"No intervention 'vaar'\. Did you mean 'var'"):
            intervene(llava.model, "vaar")
        with pytest.raises(ConfigError, match="var has no parameter 'rho'"):
            make_intervention("var", {"rho": 0.5})
        with pytest.raises(ConfigError, match="at least one"):
            intervene(llava.model)
        with pytest.raises(ConfigError, match="preset must be"):
            make_intervention("var", preset="mine")
        assert make_intervention("var", preset="released_code").move_fraction == 0.4
        assert make_intervention("pai") == PAI(alpha=0.2)

    def test_families_without_a_single_decoder(self):
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
        model = T5ForConditionalGeneration(config).eval()
        both = r"T5ForConditionalGeneration \(t5\) has an encoder and a decoder"
        with pytest.raises(ConfigError, match=both), intervene(model, "var"):
            pass

    def test_training(self, llava):
        model = copy.deepcopy(llava.model).train()
        with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"), intervene(model, strong_var()):
            pass

    def test_a_conversation_that_began_elsewhere(self, llava):
        inputs = llava.inputs(TEXT)
        cache = llava.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        kept = cache.get("cache", cache.get("past_key_values"))
        unseen = "tokens that this intervention has not seen"
        with pytest.raises(ConfigError, match=unseen), intervene(llava.model, strong_var()):
            llava.model.generate(**inputs, past_key_values=kept)

    def test_pieces_of_a_prompt(self, llava):
        for method in (VHR(), ACT({1: (0,)})):
            with pytest.raises(ConfigError, match="must see the prompt in one piece"):
                logits(llava, method, prefill_chunk_size=4)

    def test_embeddings_without_a_mask(self, llava):
        embeds = torch.zeros(1, 5, 32)
        with pytest.raises(ConfigError, match="do not say where the images are"), intervene(llava.model, strong_var()):
            llava.model(inputs_embeds=embeds)
        wrong = intervene(llava.model, strong_var(), image_mask=torch.ones(1, 5))
        with pytest.raises(ShapeError, match=r"image_mask must be bool .* \(1, 23\); got torch.float32"), wrong:
            llava.model(**llava.inputs(TEXT))

    def test_the_decoder_alone(self, llava):
        alone = r"decoder of .* was called on its own"
        with pytest.raises(ConfigError, match=alone), intervene(llava.model, strong_var()):
            llava.model.model.language_model(inputs_embeds=torch.zeros(1, 5, 32))

    def test_two_that_weigh_tokens(self, llava):
        gift = GIFT((0,), (1,), 1.0, content_tokens="all")
        with pytest.raises(ConfigError, match="GIFT and GIFT"), intervene(llava.model, gift, gift):
            pass


class TestSeveral:
    def test_nested_is_the_same_as_together_and_outer_comes_first(self, llava):
        gift = GIFT((0,), (1, 2, 3), 3.0, content_tokens="all")
        var = strong_var()
        together = logits(llava, var, gift)
        with intervene(llava.model, var):
            with intervene(llava.model, gift):
                nested = generate(llava, llava.inputs(TEXT))[1]
            outer_alone = generate(llava, llava.inputs(TEXT))[1]
        assert torch.equal(nested, together)
        assert torch.equal(outer_alone, logits(llava, var))
        assert not torch.allclose(
            logits(llava, gift, var), together, atol=1e-4
        )  # weights are edited in the order given

    def test_kinds_act_in_their_own_order(self, llava):
        methods = [VHR(), strong_var(), PAI(0.5, layers=(1, 2))]
        expected = logits(llava, *methods)
        assert torch.equal(logits(llava, *reversed(methods)), expected)

    def test_masks_belong_to_the_outermost(self, llava):
        outer = intervene(llava.model, strong_var())
        inner = intervene(llava.model, VHR(), image_mask=torch.zeros(1, 1, dtype=torch.bool))
        with pytest.raises(ConfigError, match="outermost"), outer, inner:
            pass


class TestPrompts:
    def test_two_images_and_a_mask_instead_of_tokens(self, llava):
        one = llava.inputs(TEXT)
        ids = torch.cat([one["input_ids"], torch.tensor([[30, 31, *[IMAGE] * 16, 33, 34]])], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = torch.cat([one["pixel_values"], -one["pixel_values"]])
        answer = logits(llava, strong_var(), inputs=inputs)
        with intervene(llava.model, strong_var(), image_mask=ids == IMAGE):
            assert torch.equal(generate(llava, inputs)[1], answer)
        first_only = (ids == IMAGE) & (torch.arange(ids.shape[1]) < 30)
        with intervene(llava.model, strong_var(), image_mask=first_only):
            assert not torch.allclose(generate(llava, inputs)[1], answer, atol=1e-3)

    def test_right_padding_of_a_plain_call(self, llava):
        inputs = llava.inputs(TEXT)
        ids = torch.nn.functional.pad(inputs["input_ids"], (0, 3))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3))
        for method in (strong_var(), VHR(), GIFT((0,), (1, 2), 3.0, content_tokens="all")):
            with intervene(llava.model, method):
                short = llava.model(**inputs).logits
                long = llava.model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits
            torch.testing.assert_close(long[:, : short.shape[1]], short, rtol=1e-4, atol=1e-4)

    def test_half_precision(self, llava):
        model = copy.deepcopy(llava.model).to(torch.bfloat16)
        inputs = llava.inputs(TEXT)
        with intervene(llava.model, strong_var()):
            expected = llava.model(**inputs).logits
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        plain_error = (model(**inputs).logits.float() - llava.model(**llava.inputs(TEXT)).logits).abs().max()
        with intervene(model, strong_var()):
            error = (model(**inputs).logits.float() - expected).abs().max()
        assert error < 2 * plain_error

    def test_gift_without_a_content_word_changes_nothing(self, llava):
        nothing = GIFT((1,), (0, 1, 2), 3.0, content_tokens=torch.zeros(1, 23, dtype=torch.bool))
        torch.testing.assert_close(logits(llava, nothing), logits(llava), rtol=1e-4, atol=1e-4)

    def test_streamer_and_assisted_generation(self, llava):
        from transformers.generation.streamers import BaseStreamer

        class Collector(BaseStreamer):
            def __init__(self):
                self.got = []

            def put(self, value):
                self.got += value.flatten().tolist()

            def end(self):
                pass

        inputs, streamer = llava.inputs(TEXT), Collector()
        gift = GIFT((0,), (1, 2, 3), 3.0, content_tokens="all")
        with intervene(llava.model, strong_var(), gift):
            tokens = generate(llava, inputs, count=8, streamer=streamer)[0]
            looked_up = generate(llava, inputs, count=8, prompt_lookup_num_tokens=2)[0]
        assert streamer.got[-8:] == tokens[0].tolist()
        assert torch.equal(looked_up, tokens)


class SquareTensors(TorchDispatchMode):
    """Collects operators that make a floating-point tensor of prompt x prompt."""

    def __init__(self, length):
        super().__init__()
        self.length, self.found = length, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            square = isinstance(tensor, torch.Tensor) and tuple(tensor.shape[-2:]) == (self.length, self.length)
            if square and tensor.is_floating_point():
                self.found.append(str(function))
        return out


@pytest.mark.parametrize("padding", [0, 2])
def test_no_attention_map_of_the_prompt_exists(llava, padding):
    inputs = llava.inputs([11] * 30, padding=padding)
    length = inputs["input_ids"].shape[1]
    with SquareTensors(length) as stock:  # padding makes torch's kernel write its mask as numbers
        generate(llava, inputs, count=2)
    gift = GIFT((1,), (0, 1, 2, 3), 3.0, content_tokens="all")
    for method in [strong_var(), gift, VHR(), PAI(0.5, layers=(1, 2)), VAF(1.5, 0.9, layers=(1, 2))]:
        with intervene(llava.model, method), SquareTensors(length) as mode:
            generate(llava, inputs, count=2)
        assert set(mode.found) <= set(stock.found), type(method).__name__


class TestText:
    def test_act_on_a_language_model(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(3, 50, (1, 12))
        plain = model(ids).logits
        with intervene(model, ACT({1: (0, 2)}, threshold=0.05)) as ctx:
            changed = model(ids).logits
        assert not torch.allclose(changed, plain, atol=1e-6)
        assert ctx.stats["act"]["excess"][1].shape == (1, 4, 12)
        assert not ctx.stats["act"]["excess"][1][:, [1, 3]].any()
        assert isinstance(model, nn.Module)


@pytest.mark.slow
def test_compiled_steps_are_one_graph_and_follow_a_change_of_methods():
    from transformers import CompileConfig

    def compiled(fullgraph):
        config = CompileConfig(backend="aot_eager", fullgraph=fullgraph, mode=None)
        config._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": config}

    llava = tiny.__wrapped__("llava")  # transformers keeps what it compiled on the model
    gift = GIFT((0,), (1, 2, 3), 3.0, content_tokens="all")
    for methods in [
        (),
        (strong_var(),),
        (gift,),
        (VHR(), strong_var(), PAI(0.5, layers=(1,)), gift),
        (strong_var(),),
        (),
    ]:
        torch.testing.assert_close(
            logits(llava, *methods, **compiled(True)), logits(llava, *methods), rtol=1e-4, atol=1e-4
        )
    act = ACT({1: (0, 1)}, threshold=0.05)
    torch.testing.assert_close(logits(llava, act, **compiled(False)), logits(llava, act), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
