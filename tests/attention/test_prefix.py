"""``prefix_softmax_mean``: every backend against the literal form, tokens left out, large scores, pieces."""

import pytest
import torch

from saccade.attention import AttentionLSE, explain, merge_partials, prefix_softmax_mean, reference
from saccade.attention.prefix import prefix_mean
from saccade.errors import ShapeError
from tests.attention.cases import gradients
from tests.attention.test_softmax import NoScores
from tests.helpers import assert_close, randn

SHAPES = [(2, 2, 1, 8), (2, 3, 15, 24), (1, 2, 64, 64), (2, 1, 65, 8), (1, 2, 197, 72), (2, 2, 0, 8), (0, 2, 5, 8)]


def make(shape, dtype=torch.float32, factor=1.0):
    """Return scores and values as strided views, wanting gradients; some tokens are left out."""
    batch, heads, length, width = shape
    scores = factor * randn(batch, length, heads, dtype=dtype).transpose(1, 2)
    scores = scores.masked_fill(randn(batch, heads, length, seed=2) < -1, -torch.inf)
    if batch > 1 and length > 5:
        scores[0, 0, :5] = -torch.inf  # the first means are of nothing
        scores[1, 0] = -torch.inf
    value = randn(batch, length, heads, width, seed=1, dtype=dtype).transpose(1, 2)
    return [scores.requires_grad_(), value.requires_grad_()]


def run(tensors, backend):
    outputs = list(prefix_softmax_mean(*tensors, backend=backend))
    return outputs + gradients(outputs, tensors)


def as_double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_reference(shape, dtype, factor):
    tensors = make(shape, dtype, factor)
    expected = run(as_double(tensors), "reference")
    for row in explain(prefix_softmax_mean, *tensors).rows:
        if row.ok:
            for got, want in zip(run(tensors, row.backend), expected, strict=True):
                # a score of 300 is known to 3e-5 in float32, and so is its weight; gradients are sums of such
                largest = max([1.0, *want.detach().nan_to_num(neginf=0.0).abs().flatten().tolist()])
                assert_close(got, want, **({"atol": 1e-4 * largest} if dtype == torch.float32 else {}))


def test_reference_equals_the_definition():
    scores, value = make((1, 1, 9, 3), torch.float64)
    for i in range(9):
        weights = scores[0, 0, : i + 1].exp()
        out, lse = (tensor[0, 0, i] for tensor in reference.prefix_softmax_mean(scores, value))
        assert_close(out, (weights[:, None] * value[0, 0, : i + 1]).sum(0) / weights.sum())
        assert_close(lse, weights.sum().log())


def test_where_no_token_takes_part_yet():
    tensors = make((2, 2, 70, 8))
    for backend in ("torch", "reference"):
        out, lse, grad_scores, grad_value = run(tensors, backend)
        assert not out[0, 0, :5].any()
        assert not out[1, 0].any()
        assert (lse[1, 0] == -torch.inf).all()
        assert not grad_value[1, 0].any()
        assert grad_scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype):
    tensors = make((1, 2, 197, 32), dtype)
    got, expected = run(tensors, "torch"), run(as_double(tensors), "reference")
    assert [tensor.dtype for tensor in got] == [dtype, torch.float32, dtype, dtype]
    for ours, theirs in zip(got, expected, strict=True):
        share = 1e-5 if ours.dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3
        largest = theirs.detach().nan_to_num(neginf=0.0).abs().max().item()
        assert_close(ours, theirs, rtol=0, atol=share * max(1.0, largest))


def test_a_sequence_in_pieces():
    """What follows is united with the last row of what came before."""
    scores, value = make((2, 3, 130, 8), torch.float64)
    whole = prefix_softmax_mean(scores, value)
    first = prefix_softmax_mean(scores[:, :, :50], value[:, :, :50])
    second = prefix_softmax_mean(scores[:, :, 50:], value[:, :, 50:])
    state = AttentionLSE(first.out[:, :, -1:].expand_as(second.out), first.lse[:, :, -1:].expand_as(second.lse))
    joined = merge_partials([state, second])
    assert_close(torch.cat([first.out, joined.out], 2), whole.out)
    assert_close(torch.cat([first.lse, joined.lse], 2), whole.lse)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend):
    scores, value = randn(1, 2, 5, dtype=torch.float64), randn(1, 2, 5, 3, seed=1, dtype=torch.float64)
    tensors = [scores.requires_grad_(), value.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: prefix_softmax_mean(*t, backend=backend), tensors)


def test_backward_is_deterministic():
    tensors = make((1, 2, 197, 24))
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, "torch"), run(tensors, "torch"), strict=True))


def test_never_holds_the_weights():
    tensors = [randn(1, 2, 512).requires_grad_(), randn(1, 2, 512, 8).requires_grad_()]
    with NoScores(512 * 512 // 8):
        out, lse = prefix_softmax_mean(*tensors, backend="torch")
        torch.autograd.grad(out.sum() + lse.sum(), tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 3000, 128)], ids=str)
def test_every_backend_on_cuda(shape, dtype):
    tensors = make(shape, dtype)
    expected = run(as_double(tensors), "reference")
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    share = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]  # TF32 may be on
    for row in explain(prefix_softmax_mean, *tensors).rows:
        if row.ok:
            for got, want in zip(run(tensors, row.backend), expected, strict=True):
                largest = max([1.0, *want.detach().nan_to_num(neginf=0.0).abs().flatten().tolist()])
                assert_close(got, want, rtol=0, atol=share * largest)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    tensors = [randn(2, 2, 70).requires_grad_(), randn(2, 70, 2, 4).transpose(1, 2).requires_grad_()]
    torch.library.opcheck(prefix_mean, (*tensors, False))


def test_refusals():
    scores, value = randn(2, 3, 5), randn(2, 3, 5, 8)
    for arguments, message in [
        ((scores[:, :, :4], value), r"must agree in B, H and S; got \(2, 3, 4\) and \(2, 3, 5, 8\)"),
        ((scores, value[0]), "must agree"),
        ((scores.long(), value), "must be floating point; got torch.int64"),
        ((scores.to("meta"), value), "must be on one device"),
    ]:
        with pytest.raises(ShapeError, match=message):
            prefix_softmax_mean(*arguments)
