"""``combine_heads``: every backend against the literal form, gates of every dtype, what it refuses."""

import pytest
import torch

from saccade.attention import combine_heads, explain
from saccade.attention.gates import combine_kernel
from saccade.errors import ShapeError
from tests.attention.cases import gradients
from tests.helpers import assert_close, randn

SHAPES = [(2, 3, 1, 8), (2, 4, 17, 24), (1, 2, 65, 64), (2, 1, 5, 3), (2, 3, 0, 8), (0, 2, 5, 8)]


def make(shape, channelwise, dtype=torch.float32, gate_dtype=None):
    """Return heads' outputs as a strided view, and gates."""
    batch, heads, length, width = shape
    out = randn(batch, length, heads, width, dtype=dtype).transpose(1, 2)
    gates = randn(batch, length, heads, *[width] * channelwise, seed=1, dtype=gate_dtype or dtype)
    return [out.requires_grad_(), gates.requires_grad_()]


def run(tensors, backend):
    combined = combine_heads(*tensors, backend=backend)
    return [combined, *gradients([combined], tensors)]


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_reference(shape, dtype, channelwise):
    tensors = make(shape, channelwise, dtype)
    expected = run([tensor.detach().double().requires_grad_() for tensor in tensors], "reference")
    for row in explain(combine_heads, *tensors).rows:
        if row.ok:
            for got, want in zip(run(tensors, row.backend), expected, strict=True):
                largest = max([1.0, *want.detach().abs().flatten().tolist()])
                assert_close(got, want, atol=largest * (2e-3 if dtype == torch.float16 else 1e-5))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gates_keep_their_own_dtype(gate_dtype, backend):
    tensors = make((2, 4, 17, 24), False, torch.bfloat16, gate_dtype)
    combined, grad_out, grad_gates = run(tensors, backend)
    assert combined.dtype == grad_out.dtype == torch.bfloat16
    assert grad_gates.dtype == gate_dtype
    exact = tensors[0].double().transpose(1, 2) * tensors[1].double().unsqueeze(-1)
    assert torch.equal(combined, exact.flatten(2).float().bfloat16())  # rounded once


def test_bool_gates_switch_heads_off():
    out, _ = make((2, 4, 5, 8), False)
    gates = randn(2, 5, 4) > 0
    for row in explain(combine_heads, out, gates).rows:
        if row.ok:
            combined = combine_heads(out, gates, backend=row.backend).unflatten(-1, (4, 8))
            assert torch.equal(combined[gates], out.transpose(1, 2)[gates])
            assert not combined[~gates].any()
            (grad,) = torch.autograd.grad(combined.sum(), out)
            assert torch.equal(grad.transpose(1, 2)[..., 0] > 0, gates)


def test_the_result_is_contiguous_without_another_copy():
    out, gates = make((2, 4, 17, 8), False)
    product = gates.unsqueeze(-1) * out.transpose(1, 2)
    assert product.is_contiguous()
    assert combine_heads(randn(2, 4, 17, 8), gates, backend="torch").is_contiguous()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("channelwise", [False, True])
def test_gradcheck(channelwise, backend):
    tensors = make((1, 2, 3, 4), channelwise, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: combine_heads(*t, backend=backend), tensors)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    tensors = make((1, 2, 3, 4), False)
    if explain(combine_heads, *tensors).rows[0].ok:
        torch.library.opcheck(combine_kernel, tuple(tensors))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_on_cuda(shape, dtype, channelwise):
    tensors = make(shape, channelwise, dtype)
    expected = run([tensor.detach().double().requires_grad_() for tensor in tensors], "reference")
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    for row in explain(combine_heads, *tensors).rows:
        if row.ok:
            for got, want in zip(run(tensors, row.backend), expected, strict=True):
                largest = max([1.0, *want.detach().abs().flatten().tolist()])
                share = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
                assert_close(got, want, rtol=0, atol=share * largest)


def test_refusals():
    out, gates = make((2, 4, 5, 8), False)
    for arguments, message in [
        ((out, gates.transpose(1, 2)), r"gates must be \(2, 5, 4\) or \(2, 5, 4, 8\); got .* gates \(2, 4, 5\)"),
        ((out[0], gates), r"out must be \(B, H, L, D\)"),
        ((out, gates.long()), "floating point, gates or bool"),
        ((out, gates.to("meta")), "on one device"),
    ]:
        with pytest.raises(ShapeError, match=message):
            combine_heads(*arguments)
