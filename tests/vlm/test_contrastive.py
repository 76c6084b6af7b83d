"""Contrastive decoding in one batch against two models side by side."""

import math

import pytest
import torch

from saccade.errors import ConfigError, ShapeError
from saccade.vlm import VHR, intervene
from saccade.vlm.contrastive import VCD, CoDa, ImageGuidance, contrast_logits, contrastive_generate, diffusion_noise
from tests.vlm.tiny_models import IMAGE, tiny


def side_by_side(model, inputs, contrast, rule, count):
    """Return greedy tokens of one sample, every step computed anew by two calls."""
    tokens = []
    for _ in range(count):
        last = []
        for branch in (inputs, contrast):
            more = torch.tensor([tokens], dtype=torch.long).reshape(1, -1)
            ids = torch.cat([branch["input_ids"], more], 1)
            call = {**branch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            last.append(model(**call).logits[:, -1])
        tokens.append(int(rule.combine(*last).argmax()))
    return tokens


def without_image(inputs):
    ids = inputs["input_ids"]
    kept = ids[ids != IMAGE].view(len(ids), -1)
    return {"input_ids": kept, "attention_mask": torch.ones_like(kept)}


@pytest.mark.parametrize("rule", [VCD(), ImageGuidance(gamma=1.5), CoDa()], ids=lambda rule: type(rule).__name__)
def test_one_batch_is_two_models(rule):
    model = tiny("llava").model
    answers = []
    for text in ([11, 12, 13], [14, 15, 16]):
        inputs = tiny("llava").inputs(text)
        noisy = {
            **inputs,
            "pixel_values": diffusion_noise(inputs["pixel_values"], generator=torch.Generator().manual_seed(0)),
        }
        contrast = noisy if isinstance(rule, VCD) else without_image(inputs)
        answers.append((inputs, contrast, side_by_side(model, inputs, contrast, rule, 5)))
        assert contrastive_generate(model, inputs, contrast, rule, max_new_tokens=5)[0].tolist() == answers[-1][2]
    both = [{key: torch.cat([a[i][key] for a in answers]) for key in answers[0][i]} for i in (0, 1)]
    together = contrastive_generate(model, *both, rule, max_new_tokens=5)
    assert together.tolist() == [tokens for *_, tokens in answers]


def test_sampling_gives_both_branches_one_token_and_interventions_hold():
    found = tiny("llava")
    inputs = found.inputs([11, 12, 13])
    noisy = {**inputs, "pixel_values": -inputs["pixel_values"]}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(
            contrastive_generate(found.model, inputs, noisy, VCD(beta=1e-6), max_new_tokens=8, temperature=3.0)
        )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    plain = contrastive_generate(found.model, inputs, noisy, VCD(), max_new_tokens=8)
    with intervene(found.model, VHR()):
        assert not torch.equal(contrastive_generate(found.model, inputs, noisy, VCD(), max_new_tokens=8), plain)


def test_rules_by_hand():
    logits, contrast = torch.tensor([[2.0, 1.0, -5.0]]), torch.tensor([[1.0, 2.0, 9.0]])
    got = contrast_logits(logits, contrast, alpha=1.0, cutoff=math.log(0.1))
    assert got.tolist() == [[3.0, 0.0, -math.inf]]
    p = logits.log_softmax(-1)
    assert torch.equal(CoDa().combine(logits, contrast), p)  # what escapes is less likely than what the other has
    # Here it is more likely than the least of the other branch's two tokens.
    wide, other = torch.tensor([[2.0, 1.0, -5.0, -5.0]]), torch.tensor([[-9.0, -9.0, 4.0, 0.0]])
    escaped = wide.log_softmax(-1)[:, :2] - other.log_softmax(-1)[:, 3:]
    assert torch.allclose(CoDa().combine(wide, other)[:, :2], escaped)
    assert torch.equal(CoDa().combine(logits, logits), p)
    assert torch.allclose(ImageGuidance(gamma=1.0).combine(logits, contrast)[:, :2], p[:, :2])


def test_noise():
    pixels = torch.ones(1, 3, 64, 64)
    little, much = (diffusion_noise(pixels, step, generator=torch.Generator().manual_seed(0)) for step in (0, 999))
    assert float((little - pixels).std()) < 0.01
    assert abs(float(much.mean())) < 0.4
    assert 0.8 < float(much.std()) < 1.1
    with pytest.raises(ConfigError, match=r"step must be in 0\.\.999; got 1000"):
        diffusion_noise(pixels, 1000)
    two = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ShapeError, match="got 2 and 1"):
        contrastive_generate(tiny("llava").model, two, {"input_ids": two["input_ids"][:1]}, VCD())
