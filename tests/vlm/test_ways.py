"""Other ways to hold and to run a model: videos, pipelines, drafts, adapters, quantised and offloaded weights."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.vlm import VAR, VHR, Answerer, GenerationOptions, Question, intervene, load_vlm
from tests.vlm.tiny_folder import write_tiny_llava
from tests.vlm.tiny_models import CLIP, END, IMAGE, START, VIDEO, Tiny, generate, llama, rough, tiny

SINKS = {"sink_channels": (1, 2, 3), "tau": 1.5, "min_nonsink_share": 0.0, "min_visual_mass": 0.0}
STRONG, NEUTRAL = VAR(move_fraction=0.9, **SINKS), VAR(move_fraction=0.0, **SINKS)
ASKED = Question("q", "a.png", "What is this?", Path("a.png"))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def acts(found, inputs, model=None, **options):
    """Check that the neutral method changes nothing and the strong one something; return the logits of the latter."""
    found = found if model is None else replace(found, model=model)
    plain = generate(found, inputs, **options)[1]
    answers = []
    for method in (NEUTRAL, STRONG):
        with intervene(found.model, method):
            answers.append(generate(found, inputs, **options)[1])
    torch.testing.assert_close(answers[0], plain, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(answers[1], plain, atol=1e-2)
    assert torch.equal(generate(found, inputs, **options)[1], plain)
    return answers[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("ways") / "llava")


def video_llava():
    import transformers as t

    config = t.VideoLlavaConfig(
        vision_config=t.CLIPVisionConfig(**CLIP),
        text_config=llama(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
    )
    return Tiny(rough(t.VideoLlavaForConditionalGeneration(config)), [], {})


def qwen_video(*frames):
    """Return visual tokens and inputs of two time steps of 2 x 2 tokens."""
    return [*frames], {"pixel_values_videos": noise(32, 96), "video_grid_thw": torch.tensor([[2, 4, 4]])}


FRAMES = [START, *[VIDEO] * 4, END]
VIDEOS = {
    "llava_onevision": ([VIDEO] * 9, {"pixel_values_videos": noise(1, 2, 3, 16, 16)}),
    "qwen2_vl": qwen_video(START, *[VIDEO] * 8, END),
    "qwen2_5_vl": qwen_video(START, *[VIDEO] * 8, END),
    "qwen3_vl": qwen_video(*FRAMES, *FRAMES),
    "video_llava": ([VIDEO] * 136, {"pixel_values_videos": noise(1, 8, 3, 16, 16)}),
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "qwen2_vl" else pytest.mark.slow) for name in VIDEOS]
)
def test_video(family):
    found = video_llava() if family == "video_llava" else tiny(family)
    visual, pixels = VIDEOS[family]
    ids = torch.tensor([[1, 5, 9, *visual, 11, 12, 13]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = 2 * (ids == VIDEO).long()
    acts(found, inputs)
    with intervene(found.model, VHR()) as ctx:
        generate(found, inputs)
    assert len(ctx.stats["vhr"]["heads"]) == 4
    with intervene(found.model, STRONG) as ctx:
        found.model(**inputs)
    assert (ctx.stats["var"]["sinks"][2] & (ids == VIDEO)).any()  # tokens of a video are visual tokens


def test_a_draft_model_writes_ahead():
    from transformers import LlamaForCausalLM

    found = tiny("llava")
    inputs = found.inputs([11, 12, 13])
    torch.manual_seed(0)
    draft = LlamaForCausalLM(llama()).eval()
    draft.generation_config.pad_token_id = 0
    with intervene(found.model, STRONG):
        alone = generate(found, inputs, count=8)[0]
        assert torch.equal(generate(found, inputs, count=8, assistant_model=draft)[0], alone)


def test_pipeline(folder):
    from transformers import pipeline

    loaded = load_vlm(f"local-dir:{folder}")
    ask = pipeline("image-text-to-text", model=loaded.model, processor=loaded.processor)
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": ASKED.prompt}]

    def answer():
        done = ask(
            text=[{"role": "user", "content": content}],
            generate_kwargs={"max_new_tokens": 6, "do_sample": False},
            return_full_text=False,
        )
        return done[0]["generated_text"].strip()

    plain = answer()
    with intervene(loaded.model, VHR()):
        changed = answer()
    (ours,) = Answerer(loaded, [VHR()], GenerationOptions(max_new_tokens=6)).answer([ASKED], [picture()])
    assert changed == ours.text
    assert changed != plain == answer()


def test_a_conversation_of_several_turns():
    """The second turn is given as a whole, and its answer is that of the same text without a first call."""
    found = tiny("llava")
    first = found.inputs([11, 12])
    with intervene(found.model, STRONG):
        said = generate(found, first)[0]
        whole = torch.cat([first["input_ids"], said, torch.tensor([[14, 15]])], 1)
        second = {**first, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        again = generate(found, second)[1]
    with intervene(found.model, STRONG):
        assert torch.equal(generate(found, second)[1], again)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers by an old name
def test_adapters_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    found = copy.deepcopy(tiny("llava"))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(found.model, config).eval()
    inputs = found.inputs([11, 12, 13])
    whole = acts(found, inputs, model)
    assert torch.equal(acts(found, inputs, model.base_model.model), whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_weights():
    found = copy.deepcopy(tiny("llava"))
    inner = found.model.model
    inner.language_model = torch.ao.quantization.quantize_dynamic(
        inner.language_model, {torch.nn.Linear}, dtype=torch.qint8
    )
    acts(found, found.inputs([11, 12, 13]))


@pytest.mark.slow
def test_weights_on_the_disk(folder, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate, which serves device_map, is not installed")
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    parts = [name for name, _ in model.model.named_children() if name != "language_model"]
    inner = [name for name, _ in model.model.language_model.named_children() if name != "layers"]
    places = dict.fromkeys(["lm_head", *(f"model.{p}" for p in parts)], "cpu")
    places |= dict.fromkeys([f"model.language_model.{p}" for p in inner], "cpu")
    places |= {f"model.language_model.layers.{layer}": "disk" if layer in (1, 2) else "cpu" for layer in range(4)}
    offloaded = LlavaForConditionalGeneration.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "weights"
    ).eval()
    loaded = load_vlm(f"local-dir:{folder}")
    answers = []
    for held in (model, offloaded):
        answerer = Answerer(replace(loaded, model=held), [STRONG], GenerationOptions(max_new_tokens=6))
        inputs = {name: tensor.cpu() for name, tensor in answerer.inputs([ASKED], [picture()]).items()}
        answers.append(answerer.generate(inputs, "q")[0])
    assert torch.equal(*answers)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="transformers' offloaded caches need an accelerator")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_cache(cache):
    found = copy.deepcopy(tiny("llava"))
    found.model.to(torch.accelerator.current_accelerator())
    inputs = {name: tensor.to(found.model.device) for name, tensor in found.inputs([11, 12, 13]).items()}
    usual = acts(found, inputs)
    offloaded = acts(found, inputs, cache_implementation=cache, disable_compile=True)
    torch.testing.assert_close(offloaded, usual, rtol=1e-4, atol=2e-4)
