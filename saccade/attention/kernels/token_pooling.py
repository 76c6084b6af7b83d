"""The TAP stencil in Triton: the tokens are read where they lie, ``(B, H W, C)``.

The gradient of the tokens is the same stencil with the weight read at the neighbour.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import Build
from saccade.attention.recompute import register_backward

__all__ = ["BUILDS", "pool_tokens"]

TILE = {"POSITIONS": 16, "CHANNELS": 64}


@triton.jit
def neighbour(n, tap, dilation, H, W):
    """Return where neighbour ``tap`` of nine lies for each token, and whether it is inside the map."""
    y, x = n // W + (tap // 3 - 1) * dilation, n % W + (tap % 3 - 1) * dilation
    return (y * W + x).to(tl.int64), (y >= 0) & (y < H) & (x >= 0) & (x < W) & (n < H * W)


@triton.jit
def stencil_kernel(
    tokens, weights, out, tokens_b, tokens_n, tokens_c, H, W, C, K,
    AT_NEIGHBOUR: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write ``(B, H W, C)``; the weight ``(B, K, H W)`` is the token's own, or its neighbour's for the gradient."""
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    N = H * W
    inside = (n < N)[:, None] & (c < C)[None, :]
    image = tokens + b * tokens_b + c[None, :] * tokens_c
    table = weights + b * K * N
    own = tl.load(image + n.to(tl.int64)[:, None] * tokens_n, mask=inside, other=0.0).to(tl.float32)
    acc = own * tl.load(table + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    for dilation in range(1, K):
        box = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        for tap in range(9):
            m, there = neighbour(n, tap, dilation, H, W)
            v = tl.load(image + m[:, None] * tokens_n, mask=inside & there[:, None], other=0.0).to(tl.float32)
            if AT_NEIGHBOUR:
                v *= tl.load(table + dilation * N + m, mask=there, other=0.0).to(tl.float32)[:, None]
            box += v
        if not AT_NEIGHBOUR:
            box *= tl.load(table + dilation * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        acc += box / 9.0
    tl.store(out + b * N * C + n.to(tl.int64)[:, None] * C + c[None, :], acc, mask=inside)


@triton.jit
def stencil_weights_kernel(
    tokens, grad_out, grad_weights, tokens_b, tokens_n, tokens_c, grad_b, grad_n, grad_c, H, W, C, K,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write ``(B, K, H W)``: the product of ``grad_out`` with the box sum of one dilation, summed over channels."""
    b = tl.program_id(2).to(tl.int64)
    dilation = tl.program_id(1)  # 0: nine times the token itself
    n = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    N = H * W
    acc = tl.zeros([POSITIONS], tl.float32)
    for first in range(0, C, CHANNELS):
        c = (first + tl.arange(0, CHANNELS)).to(tl.int64)
        inside = (n < N)[:, None] & (c < C)[None, :]
        box = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        for tap in range(9):
            m, there = neighbour(n, tap, dilation, H, W)
            at = tokens + b * tokens_b + m[:, None] * tokens_n + c[None, :] * tokens_c
            box += tl.load(at, mask=inside & there[:, None], other=0.0).to(tl.float32)
        at = grad_out + b * grad_b + n.to(tl.int64)[:, None] * grad_n + c[None, :] * grad_c
        acc += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32) * box, 1)
    tl.store(grad_weights + (b * K + dilation) * N + n, acc / 9.0, mask=n < N)


@torch.library.custom_op("saccade::triton_pool_tokens", mutates_args=())
def pool_tokens(tokens: Tensor, weights: Tensor) -> Tensor:
    """Launch the stencil on tokens ``(B, H W, C)`` with weights ``(B, K, H, W)``, contiguous."""
    return stencil(tokens, weights, at_neighbour=False)


def stencil(tokens: Tensor, weights: Tensor, *, at_neighbour: bool) -> Tensor:
    """Return the weighted boxes, or their transpose with the weight read at the neighbour."""
    batch, positions, channels = tokens.shape
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    if out.numel() > 0:
        grid = (triton.cdiv(positions, TILE["POSITIONS"]), triton.cdiv(channels, TILE["CHANNELS"]), batch)
        sizes = (*weights.shape[2:], channels, weights.shape[1])
        stencil_kernel[grid](tokens, weights, out, *tokens.stride(), *sizes, AT_NEIGHBOUR=at_neighbour, **TILE)
    return out


@pool_tokens.register_fake
def pool_tokens_fake(tokens: Tensor, weights: Tensor) -> Tensor:
    """Return a result of the right shape, dtype and strides."""
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


@torch.library.custom_op("saccade::triton_pool_tokens_backward", mutates_args=())
def pool_tokens_backward(grad_out: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the stencil on the gradient, and the kernel of the weights."""
    batch, branches, height, width = weights.shape
    grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    if tokens.numel() > 0:
        grid = (triton.cdiv(height * width, TILE["POSITIONS"]), branches, batch)
        sizes = (height, width, tokens.shape[2], branches)
        stencil_weights_kernel[grid](
            tokens, grad_out, grad_weights, *tokens.stride(), *grad_out.stride(), *sizes, **TILE
        )
    return stencil(grad_out, weights, at_neighbour=True), grad_weights


register_backward(pool_tokens, pool_tokens_backward)


def build(kernel, dtype: str, **constants: object) -> Build:
    """Return one build of a kernel: every tensor of the dtype of the call, every size an integer."""
    tensors = ("tokens", "weights", "out", "grad_out", "grad_weights")
    names = [name for name in kernel.arg_names if name not in TILE and name not in constants]
    kinds = {name: f"*{dtype}" if name in tensors else "i32" for name in names}
    return Build(kernel, kinds, {**TILE, **constants})


BUILDS = [
    *(build(stencil_kernel, dtype, AT_NEIGHBOUR=at) for dtype in ("bf16", "fp32") for at in (False, True)),
    *(build(stencil_weights_kernel, dtype) for dtype in ("bf16", "fp32")),
]
