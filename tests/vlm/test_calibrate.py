"""Settings found by running a model, on models where the answer is known."""

import copy

import pytest
import torch

from saccade.errors import ConfigError
from saccade.vlm import GIFT, VAR, find_sink_channels, intervene, select_gift_layers
from tests.vlm.tiny_models import generate, tiny


def with_sinks(channels):
    """Return tiny LLaVA whose first token is huge in some channels from the second layer on."""
    found = copy.deepcopy(tiny("llava"))
    model = found.model
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[1, list(channels)] = 60.0
    return found


def test_sink_channels_of_the_first_token():
    found = with_sinks((7, 19))
    prompts = [found.inputs([11, 12], [13]), found.inputs([14, 15, 16])]
    assert find_sink_channels(found.model, prompts, tau=3.0) == (7, 19)
    with intervene(found.model, VAR(sink_channels=(7, 19), tau=3.0)) as ctx:
        generate(found, prompts[0])
    sinks = ctx.stats["var"]["sinks"][2]
    assert sinks.nonzero().tolist() == [[0, 0], [1, 1]]  # the first token of each, behind its padding
    with pytest.raises(ConfigError, match="No channel of LlavaForConditionalGeneration"):
        find_sink_channels(found.model, prompts, tau=5.6)


def test_layers_for_gift():
    found = tiny("llava")
    prompts = [found.inputs([11, 12, 13], [14, 15]), found.inputs([16, 17, 18])]
    layers = select_gift_layers(found.model, prompts)
    assert layers.saliency_layers == (int(layers.rise.argmax()),)
    assert set(layers.enhancement_layers) <= {1, 2}
    for share in (layers.visual_share, layers.question_share):
        assert ((share > 0) & (share < 1)).all()
    single = select_gift_layers(found.model, [found.inputs([16, 17, 18], padding=4)])
    torch.testing.assert_close(single.rise, select_gift_layers(found.model, prompts[1:]).rise, rtol=1e-4, atol=1e-5)
    gift = GIFT(layers.saliency_layers, layers.enhancement_layers, 2.0, content_tokens="all")
    with intervene(found.model, gift):
        generate(found, prompts[0])
