"""The figures of ``saccade.attention.analysis`` against their definitions on whole maps, and their streaming."""

import math

import pytest
import torch
from torch import nn

from saccade.attention import (
    attention,
    attention_statistics,
    attention_statistics_from_maps,
    gate_statistics,
    head_importance,
    reference,
    sink_norm_ratio,
    tiles,
)
from saccade.errors import ShapeError
from tests.attention.cases import SHAPES, Shape, make, visible
from tests.attention.test_softmax import NoScores
from tests.helpers import assert_close, randn

SHAPES = [shape for shape in SHAPES if shape.batch and shape.queries and shape.keys]


def by_definition(maps, seen, scores):
    """Every figure from the whole maps, written as its definition says."""
    rows = seen.any(-1)
    queries, keys = maps.shape[2:]
    plain = torch.where(maps > 0, -maps * maps.log(), 0.0).sum(-1)
    focus = torch.full((*maps.shape[:2], 4), math.nan, dtype=maps.dtype)
    for n in range(4):
        own = [(i, i + keys - queries - n) for i in range(queries) if i + keys - queries - n >= 0]
        if own:
            focus[..., n] = torch.stack([maps[:, :, i, j] for i, j in own]).mean(0)
    return {
        "key_mass": maps.sum(2) / rows.sum(-1, keepdim=True).clamp(min=1),
        "importance": maps.sum(2) / seen.sum(2).clamp(min=1),
        "row_entropy": plain,
        "visible_keys": seen.sum(-1),
        "concentration": maps.flatten(2).norm(dim=-1),
        "head_diversity": maps.var(1, correction=0).sqrt().sum((1, 2)) / seen.any(1).sum((1, 2)).clamp(min=1),
        "local_focus": focus,
        "max_logit": scores.flatten(2).amax(-1),
        "lse": scores.logsumexp(-1),
    }


@pytest.mark.parametrize("elements", [60, 1 << 20], ids="tile{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definitions(shape, elements, monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", elements)
    (query, key, _), options = make(shape, torch.float64)
    seen = visible(shape, options)
    products = query @ key.repeat_interleave(shape.heads // shape.kv_heads, 1).transpose(-1, -2) * options["scale"]
    scores = (products + options.get("bias", 0.0)).masked_fill(~seen, -torch.inf).detach()
    maps, _ = reference.softmax_weights(
        query, key, options.get("mask"), options.get("bias"), shape.causal, options["scale"]
    )
    found = attention_statistics(query, key, **options)
    for name, expected in by_definition(maps.detach(), seen, scores).items():
        got = getattr(found, name)
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, equal_nan=True, check_dtype=False)


def test_half_precision_is_widened():
    (query, key, _), _ = make(Shape(17, 17, 8, 8), torch.bfloat16)
    found = attention_statistics(query, key)
    assert found.row_entropy.dtype == torch.float32
    assert_close(found.row_entropy, attention_statistics(query.double(), key.double()).row_entropy)


def test_maps_and_query_and_key_say_the_same():
    (query, key, _), options = make(Shape(12, 12, 8, 8, causal=True, mask="padding"), torch.float64)
    maps, _ = reference.softmax_weights(query, key, options["mask"], None, True, options["scale"])
    found = attention_statistics(query, key, **options, grid=(2, 5), prefix_tokens=2)
    same = attention_statistics_from_maps(maps, mask=options["mask"], causal=True, grid=(2, 5), prefix_tokens=2)
    for name in ("key_mass", "importance", "row_entropy", "visible_keys", "head_diversity", "mean_distance"):
        assert_close(getattr(same, name).double(), getattr(found, name))


def test_a_visible_key_of_weight_zero_stays_visible():
    maps = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    found = attention_statistics_from_maps(maps)
    assert found.visible_keys.unique().tolist() == [2]
    assert found.importance[0, 0].tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("elements", [10, 1 << 20])
@pytest.mark.parametrize("prefix", [0, 3])
def test_mean_distance(prefix, elements, monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", elements)
    height, width = 3, 5
    tokens = prefix + height * width
    maps = (2 * randn(2, 3, tokens, tokens, dtype=torch.float64)).softmax(-1)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    patches = maps[:, :, prefix:, prefix:] / maps[:, :, prefix:, prefix:].sum(-1, keepdim=True)
    for i in range(height * width):
        for j in range(height * width):
            far = math.dist((i // width, i % width), (j // width, j % width))
            expected += far * patches[:, :, i, j] / (height * width)
    found = attention_statistics_from_maps(maps, grid=(height, width), prefix_tokens=prefix)
    assert_close(found.mean_distance, expected)


def test_sinks():
    """One head looks at key 3, the other at itself; padding and blind queries do not count."""
    maps = torch.stack([torch.eye(6)[torch.full((6,), 3)], torch.eye(6)])[None].repeat(4, 1, 1, 1)
    maps[0] = torch.eye(6)
    found = attention_statistics_from_maps(maps)
    assert found.sink[1:, 0].tolist() == [3, 3, 3]
    assert found.sink_rate()[0].tolist() == [0, 0, 0, 75, 0, 0]
    assert not found.sink_rate()[1].any()
    assert found.first_token_mass[0].tolist() == pytest.approx([1 / 6, 1 / 6])
    value = torch.ones(4, 1, 6, 8)
    value[:, :, 3] = 0.1
    ratio = sink_norm_ratio(value, found.sink)
    assert_close(ratio[1:, 0], torch.full((3,), 0.1 / (5.1 / 6)))


def test_entropy_figures():
    uniform, single = torch.full((6, 6), 1 / 6), torch.eye(6)
    found = attention_statistics_from_maps(torch.stack([uniform, single])[None])
    assert_close(found.effective_keys[0], torch.tensor([[6.0] * 6, [1.0] * 6]))
    assert_close(found.entropy, torch.tensor([[math.log(6), 0.0]]))
    assert found.entropy_bands.tolist() == [0.5, 0, 0, 0.5]
    causal = attention_statistics(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), causal=True)
    assert causal.normalised_entropy[0, 0, 0].isnan()
    assert_close(causal.normalised_entropy[0, 0, 1:], torch.ones(3))


def test_queries_that_see_nothing_count_nowhere():
    (query, key, _), options = make(Shape(9, 9, 8, 8, mask="rows"), torch.float64)
    blind = torch.arange(9) % 3 == 0
    found = attention_statistics(query, key, **options)
    kept = attention_statistics(query[:, :, ~blind], key, mask=options["mask"][~blind], scale=options["scale"])
    for name in ("key_mass", "importance", "head_diversity", "concentration", "entropy", "max_logit"):
        assert_close(getattr(found, name), getattr(kept, name))
    assert (found.lse[..., blind] == -torch.inf).all()
    assert_close(torch.stack(found.lse_range), torch.stack(kept.lse_range))
    assert found.entropy_bands.sum() == 1


def test_class_mass():
    maps = (2 * randn(2, 3, 5, 7, dtype=torch.float64)).softmax(-1)
    found = attention_statistics_from_maps(maps)
    labels = torch.tensor([[0, 2, 2, -1, 0, 0, 2], [1, 1, 1, 1, 1, 1, 1]])
    expected = torch.stack([(maps * (labels == c)[:, None, None]).sum(-1).mean(-1) for c in range(3)], -1)
    assert_close(found.class_mass(labels, 3), expected)
    assert_close(found.class_mass(labels[0], 3)[0], expected[0])
    with pytest.raises(ShapeError, match=r"key_class must be integers of shape \(7,\) or \(2, 7\); got torch.float32"):
        found.class_mass(torch.zeros(7), 3)
    with pytest.raises(ShapeError, match=r"key_class must be in -1\.\.1; got -1\.\.2"):
        found.class_mass(labels, 2)


def test_never_holds_a_map(monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", 4096)
    query, key = (randn(1, 2, 150, 8, seed=i) for i in range(2))
    with NoScores(150 * 150):
        attention_statistics(query, key, causal=True, grid=(15, 10))


def test_head_importance_is_the_derivative_with_respect_to_a_gate():
    query, key, value = (randn(3, 2, 5, 8, seed=i, dtype=torch.float64) for i in range(3))
    head = nn.Linear(16, 1, dtype=torch.float64)
    gates = torch.ones(3, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    out = attention(query, key, value) * gates
    out.retain_grad()
    head(out.transpose(1, 2).flatten(2)).sin().sum().backward()
    assert_close(head_importance(out, out.grad), gates.grad[..., 0, 0].abs())


def test_gate_statistics():
    gates = torch.tensor([[[0.5, 0.0, 1.0], [0.0, 0.0, 1.0]]], dtype=torch.bfloat16)
    mean, frequency = gate_statistics(gates)
    assert (mean.tolist(), frequency.tolist()) == ([0.25, 0, 1], [0.5, 0, 1])


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (9, {"grid": (3, 4)}, "makes 12 tokens; got 9 queries and 9 keys"),
        (8, {"grid": (3, 3)}, "makes 9 tokens; got 9 queries and 8 keys"),
        (0, {}, "need a sample, a query and a key"),
        (9, {"mask": torch.zeros(9, 9)}, "mask must be bool"),
    ],
)
def test_wrong_arguments(keys, options, message):
    with pytest.raises(ShapeError, match=message):
        attention_statistics(torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, keys, 8), **options)


def test_wrong_maps():
    with pytest.raises(ShapeError, match=r"maps must be floating point \(B, H, L, S\); got torch.float32 \(9, 9\)"):
        attention_statistics_from_maps(torch.zeros(9, 9))
