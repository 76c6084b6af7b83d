"""Settings found by running a model, on models where the answer is known."""

import copy
from contextlib import nullcontext

import pytest
import torch

from saccade.errors import ConfigError
from saccade.vlm import (
    ACT,
    GIFT,
    VAR,
    find_act_heads,
    find_sink_channels,
    intervene,
    make_intervention,
    select_gift_layers,
)
from saccade.vlm.interventions.act import read_act_heads
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


def test_heads_of_act():
    """Each figure is the log-probability of the answer with one head calibrated, less that without."""
    found = tiny("llava")
    prompts = [found.inputs([11, 12, 13]), found.inputs([14, 15])]
    answers = [torch.tensor([21, 22]), torch.tensor([23])]
    act = ACT(threshold=0.05)
    result = find_act_heads(found.model, prompts, answers, act=act, layers=(1, 2))
    assert result.gain[[0, 3]].isnan().all()
    assert set(result.heads) <= {1, 2}
    assert result.heads == {
        layer: heads for layer in (1, 2) if (heads := tuple(head for head in range(4) if result.gain[layer, head] > 0))
    }

    def log_probability(*methods):
        means = []
        for inputs, ids in zip(prompts, answers, strict=True):
            call = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids[None]], 1)}
            call["attention_mask"] = torch.ones_like(call["input_ids"])
            with intervene(found.model, *methods) if methods else nullcontext():
                logits = found.model(**call).logits[0].double().log_softmax(-1)
            start = inputs["input_ids"].shape[1] - 1
            means.append(float(torch.stack([logits[start + i, t] for i, t in enumerate(ids)]).mean().detach()))
        return sum(means) / 2

    plain = log_probability()
    assert result.plain == pytest.approx(plain, abs=1e-9)
    for layer, head in ((1, 0), (2, 3)):
        one = log_probability(ACT({layer: (head,)}, threshold=0.05))
        assert float(result.gain[layer, head]) == pytest.approx(one - plain, abs=1e-6)
    with pytest.raises(ConfigError, match="an answer each; got 2 and 1"):
        find_act_heads(found.model, prompts, answers[:1])


def test_files_of_heads(tmp_path):
    file = tmp_path / "heads.json"
    forms = {
        '{"2": [0, 3], "3": []}': "",
        '{"model": "x", "heads": {"2": [0, 3]}}': "",
        "[[0, 3], []]": "",
        '{"about": "two lists", "chat": [[0, 3]], "other": [[1]]}': "#chat",
    }
    for text, name in forms.items():
        file.write_text(text)
        assert read_act_heads(f"{file}{name}") == {2: (0, 3)}
    with pytest.raises(ConfigError, match=r"has no 'caht'\. Did you mean 'chat'"):
        read_act_heads(f"{file}#caht")
    with pytest.raises(ConfigError, match="for one of several"):
        read_act_heads(file)
    with pytest.raises(ConfigError, match="cannot read heads"):
        read_act_heads(tmp_path / "none.json")
    file.write_text('{"2": [0, 3]}')
    found = tiny("llava")
    results = []
    for heads in (str(file), {2: (0, 3)}):
        with intervene(found.model, make_intervention("act", {"heads": heads, "threshold": 0.05})):
            results.append(generate(found, found.inputs([11, 12]))[1])
    assert torch.equal(*results)
