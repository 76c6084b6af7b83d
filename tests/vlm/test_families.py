"""What every intervention owes every family: the same answer however it is generated, and an untouched model after."""

import pytest
import torch

from saccade.errors import ConfigError
from saccade.vlm import ACT, GIFT, PAI, VAF, VAR, VHR, intervene, read_facts
from tests.vlm.tiny_models import FAMILIES, generate, tiny

DEFAULT = ("llava", "gemma3")
EVERY = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in FAMILIES]
# Stock models whose prompts can be cut: not those whose image tokens or prompts see later tokens.
CHUNKED = set(FAMILIES) - {"paligemma", "gemma3", "blip_2", "instructblip"}
TEXTS = [11, 12, 13, 14, 15], [21, 22, 23]


def even_but_last(text, ranges):
    """Choose every second token, never the last: the prompt can be divided before it."""
    return [i % 2 == 0 and i < len(ranges) - 1 for i in range(len(ranges))]


SINKS = {"sink_channels": (1, 2, 3), "tau": 1.5, "min_nonsink_share": 0.0, "min_visual_mass": 0.0, "last_layer": True}
METHODS = {
    "var": VAR(move_fraction=0.9, **SINKS),
    "gift_above": GIFT((0,), (1, 2, 3), 3.0, content_tokens="all"),
    "gift_last": GIFT((1,), (0, 1, 2, 3), 3.0, content_tokens="all"),
    "gift_below": GIFT((1,), (0, 1, 2, 3), 3.0, content_tokens=even_but_last),
    "vhr": VHR(),
    "act": ACT({1: (0, 1), 3: (3,)}, threshold=0.05),
    "pai": PAI(0.8, layers=(1, 2)),
    "vaf": VAF(2.0, 0.5, layers=(1, 2)),
}
NEUTRAL = {
    "var": VAR(move_fraction=0.0, **SINKS),
    "gift": GIFT((2,), (0, 1, 2, 3), 0.0, content_tokens="all"),
    "vhr": VHR(alpha=1.0),
    "act": ACT({1: (0, 1)}, beta=1.0, threshold=0.05),
    "pai": PAI(0.0, layers=(1, 2)),
    "vaf": VAF(1.0, 1.0, layers=(1, 2)),
}


class Letters:
    """A tokenizer with a letter for every token."""

    all_special_ids = (0, 1, 2)
    chat_template = None

    def decode(self, ids, **options):
        return "".join(chr(64 + i) for i in ids)


def edited(found, method, inputs, **options):
    """Return tokens and logits under a method."""
    with intervene(found.model, method, tokenizer=Letters()):
        return generate(found, inputs, **options)


def close(got, expected):
    """Whether two runs chose the same tokens by the same logits."""
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=2e-4)
    return bool((got[0] == expected[0]).all())


def methods(family):
    """Return the methods that fit a family."""
    return {name: m for name, m in METHODS.items() if not (family == "gemma3" and name == "act")}


@pytest.mark.parametrize("family", EVERY)
def test_neutral_parameters_change_nothing_and_the_model_is_itself_afterwards(family):
    found = tiny(family)
    inputs = found.inputs(*TEXTS)
    plain = generate(found, inputs)
    before = vars(found.model).keys(), found.model.config.to_dict()
    for name, method in NEUTRAL.items():
        assert close(edited(found, method, inputs), plain), name
    assert (vars(found.model).keys(), found.model.config.to_dict()) == before
    after = generate(found, inputs)
    assert torch.equal(after[1], plain[1])


@pytest.mark.parametrize("family", EVERY)
def test_answers_do_not_depend_on_batch_padding_or_way_of_decoding(family):
    found = tiny(family)
    batch = found.inputs(*TEXTS)
    plain = generate(found, batch)
    for name, method in methods(family).items():
        answer = edited(found, method, batch)
        assert not torch.allclose(answer[1], plain[1], atol=1e-3), f"{name} changed nothing"
        assert close(edited(found, method, batch), answer), f"{name}: a second run differs"
        assert close(edited(found, method, found.inputs(*TEXTS, padding=3)), answer), f"{name}: more padding"
        for sample, text in enumerate(TEXTS):
            single = edited(found, method, found.inputs(text))
            assert close(single, (answer[0][sample : sample + 1], answer[1][sample : sample + 1])), f"{name}: single"
        ways = [{"cache_implementation": "static", "disable_compile": True}]
        if not found.own_generate and name != "act":
            ways.append({"use_cache": False})
        if family in CHUNKED and name not in ("vhr", "act", "gift_last"):
            ways.append({"prefill_chunk_size": 7})
        for way in ways:
            assert close(edited(found, method, batch, **way), answer), f"{name}: {way}"


@pytest.mark.parametrize("family", EVERY)
def test_beams_and_several_answers(family):
    found = tiny(family)
    batch = found.inputs(*TEXTS)
    for name, method in methods(family).items():
        if name == "act":
            with pytest.raises(ConfigError, match="ACT keeps figures about generated tokens"):
                edited(found, method, batch, num_beams=2)
            continue
        together = edited(found, method, batch, num_beams=3, num_return_sequences=2)[0]
        apart = [edited(found, method, found.inputs(t), num_beams=3, num_return_sequences=2)[0] for t in TEXTS]
        assert torch.equal(together, torch.cat(apart)), name
        torch.manual_seed(5)
        sampled = edited(found, method, batch, do_sample=True, top_k=5, num_return_sequences=2)[0]
        assert sampled.shape[0] == 4


@pytest.mark.parametrize("family", EVERY)
def test_facts(family):
    facts = read_facts(tiny(family).model)
    assert facts.num_layers == 4
    assert facts.num_heads == 4
    assert 119 in facts.visual_token_ids
    assert facts.causal == (family != "paligemma")
    assert [facts.sliding(layer) for layer in range(4)] == [family == "gemma3" and layer % 2 == 0 for layer in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps(family):
    from transformers import CompileConfig

    found = tiny.__wrapped__(family)  # transformers keeps what it compiled on the model
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    batch = found.inputs(*TEXTS)
    for name in ("var", "gift_below", "vhr"):
        answer = edited(found, METHODS[name], batch)
        got = edited(found, METHODS[name], batch, cache_implementation="static", compile_config=config)
        assert close(got, answer), name
    torch._dynamo.reset()
