import pytest
import torch

from saccade.errors import ConfigError
from saccade.vlm import ACT, GIFT, PAI, VAF, VAR, VHR, intervene, prompt_attention
from tests.helpers import assert_close
from tests.vlm.test_families import Letters
from tests.vlm.tiny_models import tiny as tiny_family

METHODS = {
    "var": (VAR(move_fraction=0.9, sink_channels=(1, 2, 3), tau=1.5, min_nonsink_share=0.0, min_visual_mass=0.0),),
    "gift": (GIFT((1,), (0, 1, 2, 3), 3.0, content_tokens="all"),),
    "vhr": (VHR(),),
    "act": (ACT({1: (0, 1), 3: (3,)}, threshold=0.05),),
    "pai": (PAI(0.8, layers=(1, 2)),),
    "vaf": (VAF(2.0, 0.5, layers=(1, 2)),),
}
METHODS["several"] = (*METHODS["pai"], *METHODS["var"], *METHODS["vhr"])


@pytest.fixture
def tiny():
    return tiny_family("llava")


@pytest.mark.parametrize("name", METHODS)
def test_weights_times_values_are_the_output_of_the_heads(tiny, name):
    """The input of the output projection, last row, is what the weights make of the values."""
    inputs = tiny.inputs([20, 21, 22, 23, 24], [30, 31, 32])
    values, outputs = [], []
    handles = []
    for layer in tiny.model.model.language_model.layers:
        attention = layer.self_attn
        handles.append(attention.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out)))
        handles.append(attention.o_proj.register_forward_pre_hook(lambda _m, args: outputs.append(args[0][:, -1])))
    try:
        found = prompt_attention(tiny.model, inputs, *METHODS[name], tokenizer=Letters())
    finally:
        for handle in handles:
            handle.remove()
    layers, _, heads, tokens = found.weights.shape
    assert tokens == inputs["input_ids"].shape[1]
    # Passes over a part of the prompt come first: the last one has the last row, and together they are the prompt.
    per_layer = len(values) // layers
    for layer in range(layers):
        parts = values[layer::layers]
        whole = parts[-1] if parts[-1].shape[1] == tokens else torch.cat(parts[-2:], 1)
        value = whole.unflatten(-1, (-1, whole.shape[-1] // (heads // groups(tiny)))).transpose(1, 2)
        value = value.repeat_interleave(groups(tiny), 1)
        expected = outputs[layers * (per_layer - 1) + layer].unflatten(-1, (heads, -1))
        assert_close(torch.einsum("bhn,bhnd->bhd", found.weights[layer], value), expected)
    plain = prompt_attention(tiny.model, inputs)
    assert (found.weights - plain.weights).abs().max() > 1e-3, "the method changed nothing"


def groups(tiny):
    """Return how many heads share keys and values."""
    config = tiny.model.config.text_config
    return config.num_attention_heads // config.num_key_value_heads


def test_without_interventions_these_are_the_models_own_weights(tiny):
    inputs = tiny.inputs([20, 21, 22], [30, 31, 32, 33])
    found = prompt_attention(tiny.model, inputs)
    before = tiny.model.config._attn_implementation
    tiny.model.set_attn_implementation("eager")
    try:
        eager = tiny.model(**inputs, output_attentions=True).attentions
    finally:
        tiny.model.set_attn_implementation(before)
    assert_close(found.weights, torch.stack([layer[:, :, -1] for layer in eager]))
    assert_close(found.weights.sum(-1), torch.ones(found.weights.shape[:3]))
    mask = (inputs["input_ids"] == tiny.model.config.image_token_id)[None, :, None]
    assert_close(found.image_mass, (found.weights * mask).sum(-1))


def test_reading_twice_and_inside_a_block_changes_nothing(tiny):
    inputs = tiny.inputs([20, 21, 22, 23, 24])
    (var,) = METHODS["var"]
    first, second = (prompt_attention(tiny.model, inputs, var).weights for _ in range(2))
    assert torch.equal(first, second)
    with intervene(tiny.model, var):
        nested = prompt_attention(tiny.model, inputs, *METHODS["pai"])
        assert torch.equal(prompt_attention(tiny.model, inputs).weights, first)
    assert torch.equal(nested.weights, prompt_attention(tiny.model, inputs, var, *METHODS["pai"]).weights)


def test_prompts_padded_on_the_right_are_refused(tiny):
    inputs = tiny.inputs([20, 21, 22, 23], [30, 31, 32, 33])
    inputs["attention_mask"][0, -1] = 0
    with pytest.raises(ConfigError, match="pad them on the left"):
        prompt_attention(tiny.model, inputs)
