"""The literal forms against the definition, written as loops over single numbers."""

import math

import pytest
import torch

from saccade.attention import reference
from tests.attention.cases import SHAPES, gradients, make, visible
from tests.helpers import assert_close, randn


def by_hand(query, key, value, seen, bias, scale):
    """One query at a time, over a list of the keys that it sees."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    out = query.new_zeros(batch, heads, queries, value.shape[-1])
    lse = query.new_full((batch, heads, queries), -torch.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                keys = [j for j in range(key.shape[2]) if seen[b, h, i, j]]
                scores = [float(scale * query[b, h, i] @ key[b, h // group, j] + bias[b, h, i, j]) for j in keys]
                total = sum(math.exp(score) for score in scores)
                for j, score in zip(keys, scores, strict=True):
                    out[b, h, i] += math.exp(score) / total * value[b, h // group, j]
                if keys:
                    lse[b, h, i] = math.log(total)
    return out, lse


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.queries * s.keys < 300], ids=str)
def test_equals_the_definition(shape):
    (query, key, value), options = make(shape, torch.float64)
    seen = visible(shape, options)
    bias = options.get("bias", torch.zeros(1, dtype=torch.float64)).detach().expand(seen.shape)
    expected_out, expected_lse = by_hand(query.detach(), key.detach(), value.detach(), seen, bias, options["scale"])
    out, lse = reference.attention_lse(query, key, value, **options)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)
    assert torch.equal(reference.attention(query, key, value, **options), out)


def test_no_gradient_is_nan_where_nothing_is_visible():
    query, key, value = (randn(1, 1, 3, 4, seed=i).requires_grad_() for i in range(3))
    mask = torch.tensor([[True], [False], [True]])
    grads = gradients(list(reference.attention_lse(query, key, value, mask)), [query, key, value])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :, 1].any()


def test_half_precision_is_computed_in_float32():
    query, key, value = (randn(1, 2, 9, 16, seed=i, dtype=torch.bfloat16) for i in range(3))
    out, lse = reference.attention_lse(query, key, value)
    wide_out, wide_lse = reference.attention_lse(query.float(), key.float(), value.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide_out.bfloat16())
    assert torch.equal(lse, wide_lse)


def test_dropout_keeps_the_mean():
    query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 20_000, 4), torch.ones(1, 1, 20_000, 4)
    torch.manual_seed(0)
    out = reference.attention(query, key, value, dropout_p=0.5)
    assert_close(out, torch.ones_like(out), atol=0.05)
    assert not torch.equal(out, torch.ones_like(out))
