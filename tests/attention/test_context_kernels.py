"""``context_kernels``: the weights with which ``context_mixing`` mixes, got from its gradient."""

import pytest
import torch

from saccade.attention import context_kernels, context_mixing
from saccade.attention.reference import neighbours
from saccade.errors import ShapeError
from tests.helpers import assert_close, randn

B, G, C, S, K = 2, 2, 4, 3, 5


def arguments(height, width):
    return [
        randn(B, G * C, height, width, seed=1),
        3 * randn(B, G * C, 2, 3, seed=2),
        randn(S * S + K * K, 6, seed=3),
        randn(S * S + K * K, seed=4),
        randn(G, 2 * S - 1, 2 * S - 1, seed=5),
        randn(G, 2 * K - 1, 2 * K - 1, seed=6),
    ]


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@pytest.mark.parametrize("size", [(6, 9), (5, 5)])
def test_they_are_how_each_output_depends_on_each_value(size, backend):
    tensors = arguments(*size)
    kernels = context_kernels(*tensors, scale=0.7)
    assert kernels.small.shape == (B, G, S, S, *size)
    assert kernels.large.shape == (B, G, K, K, *size)
    for y, x in [(0, 0), (2, 3), (size[0] - 1, 1), (size[0] - 1, size[1] - 1)]:
        value = torch.zeros(B, 2 * G, *size, requires_grad=True)
        query, key, *rest = tensors
        out = context_mixing(query, key, value, *rest, scale=0.7, backend=backend)
        (weights,) = torch.autograd.grad(out[:, :, y, x].sum(), value)
        for half, kernel in zip(weights.chunk(2, 1), kernels, strict=True):
            rows, columns = (neighbours(n, kernel.shape[2], half.device)[i] for n, i in zip(size, (y, x), strict=True))
            expected = torch.zeros_like(half)
            expected[:, :, rows[:, None], columns] = kernel[..., y, x]
            assert_close(half, expected, atol=1e-6)


def test_half_precision_gives_float32_and_wrong_shapes_are_refused():
    tensors = arguments(6, 7)
    exact = context_kernels(*tensors, scale=0.5)
    half = context_kernels(*(tensor.bfloat16() for tensor in tensors), scale=0.5)
    assert half.large.dtype == torch.float32
    assert_close(half.large, exact.large, atol=0.05)
    with pytest.raises(ShapeError, match="no smaller than the kernels"):
        context_kernels(*arguments(6, 4), scale=0.5)
