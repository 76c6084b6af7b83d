"""Partial results unite to the whole, in any grouping, with gradients."""

import pytest
import torch

from saccade.attention import AttentionLSE, attention_lse, merge_partials, reference
from saccade.errors import ShapeError
from tests.attention.cases import gradients
from tests.helpers import assert_close, randn


def parts(cuts, dtype=torch.float64):
    """Attention over runs of keys, and the tensors it came from."""
    query = randn(2, 3, 5, 8, dtype=dtype).requires_grad_()
    key, value = (randn(2, 3, 12, 8, seed=i, dtype=dtype).requires_grad_() for i in (1, 2))
    spans = zip([0, *cuts], [*cuts, 12], strict=True)
    results = [attention_lse(query, key[:, :, a:b], value[:, :, a:b]) for a, b in spans]
    return results, [query, key, value]


@pytest.mark.parametrize("cuts", [[], [5], [1, 2, 11], [4, 4, 12]], ids=str)
def test_parts_unite_to_the_whole(cuts):
    """Empty parts included: [4, 4, 12] has two."""
    partials, inputs = parts(cuts)
    merged = merge_partials(partials)
    expected = reference.attention_lse(*inputs)
    got_all = [*merged, *gradients(list(merged), inputs)]
    want_all = [*expected, *gradients(list(expected), inputs)]
    for got, want in zip(got_all, want_all, strict=True):
        assert_close(got, want)


def test_is_associative_and_commutative():
    (a, b, c), _ = parts([3, 9])
    flat = merge_partials([a, b, c])
    for other in (merge_partials([merge_partials([a, b]), c]), merge_partials([c, merge_partials([b, a])])):
        assert_close(other.out, flat.out)
        assert_close(other.lse, flat.lse)


def test_queries_that_saw_nothing_anywhere_stay_zero_with_zero_gradient():
    out = randn(3, 4).requires_grad_()
    lse = torch.tensor([0.3, -torch.inf, -torch.inf]).requires_grad_()
    other = torch.tensor([-torch.inf, -torch.inf, 0.1])
    merged = merge_partials([AttentionLSE(out, lse), AttentionLSE(randn(3, 4, seed=1), other)])
    assert not merged.out[1].any()
    assert merged.lse[1] == -torch.inf
    assert_close(merged.lse[[0, 2]], torch.tensor([0.3, 0.1]))
    for grad in gradients(list(merged), [out, lse]):
        assert grad.isfinite().all()
        assert not grad[1].any()


def test_gradcheck():
    tensors = [t.detach().requires_grad_() for part in parts([4])[0] for t in part]
    assert torch.autograd.gradcheck(
        lambda a, la, b, lb: merge_partials([AttentionLSE(a, la), AttentionLSE(b, lb)]), tensors
    )


def test_large_scores_do_not_overflow():
    one = AttentionLSE(torch.ones(1, 1), torch.tensor([800.0]))
    other = AttentionLSE(torch.zeros(1, 1), torch.tensor([-800.0]))
    merged = merge_partials([one, other])
    assert_close(merged.out, torch.ones(1, 1))
    assert_close(merged.lse, torch.tensor([800.0]))


def test_half_precision_parts_are_merged_in_float32():
    out = randn(2, 4, dtype=torch.bfloat16)
    merged = merge_partials([AttentionLSE(out, torch.zeros(2))] * 3)
    assert merged.out.dtype == torch.bfloat16
    assert torch.equal(merged.out, out)


def test_nothing_to_merge():
    with pytest.raises(ShapeError, match="at least one"):
        merge_partials([])
