"""The Triton kernels of ``attention_diversification``: interpreted on the CPU, and on a GPU where there is one."""

import importlib.util

import pytest
import torch

from saccade.attention import attention_diversification, attention_lse, explain
from tests.attention.test_diversification import Layer, make, run
from tests.helpers import assert_close

LAYERS = [
    Layer(1, threshold=0.5),
    Layer(16, width=24, heads=6, key_heads=2),
    Layer(65, width=64, heads=2, key_heads=2, batch=1),
    Layer(70, width=8, heads=4, key_heads=1, prefix=3),
    Layer(33, width=200, heads=1, key_heads=1, threshold=1.5),
]
cuda = torch.cuda.is_available()
interpreted = pytest.mark.skipif(cuda or importlib.util.find_spec("triton") is None, reason="needs Triton and no GPU")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not cuda, reason="needs a CUDA device")]


def compare(layer, dtype, device):
    """Compare the kernels with the literal form in float64, relative to the largest element."""
    tensors, options = make(layer, dtype)
    expected = run([tensor.detach().double().requires_grad_() for tensor in tensors], options, "reference")
    tensors = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
    loss, *grads = run(tensors, options, "triton")
    assert expected[0] > 0.05
    assert loss.dtype == torch.float32
    assert_close(loss, expected[0], rtol=1e-3 if device == "cuda" else 1e-5)
    # Weights times G are rounded to the input dtype before the products with q and k; the interpreter truncates.
    share = {torch.float32: 2e-3 if device == "cuda" else 1e-5, torch.float16: 8e-3, torch.bfloat16: 2e-2}[dtype]
    for got, want, tensor in zip(grads, expected[1:], tensors, strict=True):
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert_close(got, want, rtol=0, atol=share * want.abs().max().item())


@interpreted
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_interpreted(layer):
    compare(layer, torch.float32, "cpu")


@interpreted
def test_interpreted_in_half_precision():
    compare(LAYERS[2], torch.float16, "cpu")


@interpreted
def test_a_given_log_sum_exp_saves_a_pass_and_is_not_differentiated():
    tensors, options = make(LAYERS[2], torch.float32)
    expected = run(tensors, options, "triton")
    _, lse = attention_lse(*tensors, tensors[1])
    for got, want in zip(run(tensors, {**options, "lse": lse.detach().double()}, "triton"), expected, strict=True):
        assert_close(got, want)
    shifted = attention_diversification(*tensors, lse=lse + 1.0, backend="triton")  # it is taken at its word
    assert not torch.allclose(shifted, expected[0], rtol=1e-2)
    loss = attention_diversification(*tensors, lse=lse, backend="torch")
    for got, want in zip(torch.autograd.grad(loss, tensors), expected[1:], strict=True):
        assert_close(got, want)


@interpreted
def test_interpreter_is_never_automatic_and_backward_is_deterministic():
    tensors, options = make(Layer(20), torch.float32)
    assert explain(attention_diversification, *tensors, **options).chosen == "torch"
    first, second = run(tensors, options, "triton"), run(tensors, options, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    from saccade.attention.kernels.diversification import (
        diversification_kernels,
        diversification_kernels_backward,
        row_lse,
    )

    (query, key), _ = make(Layer(9, heads=2, key_heads=1), torch.float32)
    torch.library.opcheck(row_lse, (query.detach(), key.detach(), 0.3))
    lse = row_lse(query.detach(), key.detach(), 0.3)
    torch.library.opcheck(diversification_kernels, (query, key, lse, 2.0, 0.3))
    query, key = query.detach(), key.detach()
    loss, statistics = diversification_kernels(query, key, lse, 2.0, 0.3)
    torch.library.opcheck(diversification_kernels_backward, (loss, query, key, lse, statistics, 2.0, 0.3))


def on(*marks):
    """Apply several marks."""

    def apply(function):
        for mark in marks:
            function = mark(function)
        return function

    return apply


@on(*on_gpu)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [*LAYERS, Layer(197, width=64, heads=8, key_heads=8)], ids=str)
def test_on_cuda(layer, dtype):
    compare(layer, dtype, "cuda")


@on(*on_gpu)
def test_backward_on_cuda_is_deterministic_and_large_maps_are_not_held():
    query, key = (torch.randn(1, 8, 4096, 64, device="cuda").requires_grad_() for _ in range(2))
    assert explain(attention_diversification, query, key).chosen == "triton"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first, second = (torch.autograd.grad(attention_diversification(query, key), [query, key]) for _ in range(2))
    assert torch.cuda.max_memory_allocated() - before < 4 * 8 * 4096 * 4096  # one map
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
