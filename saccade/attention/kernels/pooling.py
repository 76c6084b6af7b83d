"""Weighted sums over very many instances in Triton, split over them into partial sums that are added in a fixed order.

The values are read once forward and once backward, in their own dtype; the weights are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import Build, dot_precision
from saccade.attention.recompute import register_backward

__all__ = ["BUILDS", "pool_values"]

BRANCHES, INSTANCES, COLUMNS = 16, 64, 64  # tile of a sum
GRAD_INSTANCES = 32  # in its gradient, which holds more
SPLIT = 64 * INSTANCES  # instances of one partial sum


@triton.jit
def weighted_sum_kernel(
    weights, value, partial, value_b, value_n, value_d, M, N, D, SPLITS,
    SPLIT: tl.constexpr, BRANCHES: tl.constexpr, INSTANCES: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``(B, SPLITS, M, D)``: what the instances of one split add to the sums ``weights value``."""
    b = tl.program_id(2).to(tl.int64)
    split, branch = tl.program_id(1) % SPLITS, tl.program_id(1) // SPLITS
    m = branch * BRANCHES + tl.arange(0, BRANCHES)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([BRANCHES, COLUMNS], tl.float32)
    for start in range(split * SPLIT, min((split + 1) * SPLIT, N), INSTANCES):
        n = (start + tl.arange(0, INSTANCES)).to(tl.int64)
        at = weights + (b * M + m)[:, None] * N + n[None, :]
        w = tl.load(at, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        at = value + b * value_b + n[:, None] * value_n + d.to(tl.int64)[None, :] * value_d
        v = tl.load(at, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(w, v, acc, input_precision=PRECISION)
    at = partial + ((b * SPLITS + split) * M + m)[:, None] * D + d[None, :]
    tl.store(at, acc, mask=(m < M)[:, None] & (d < D)[None, :])


@triton.jit
def weighted_sum_grad_kernel(
    weights, value, grad_out, grad_weights, grad_value, value_b, value_n, value_d, M, N, D,
    BRANCHES: tl.constexpr, INSTANCES: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of weights ``(B, M, N)`` and value ``(B, N, D)`` for a block of instances."""
    b = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) * INSTANCES + tl.arange(0, INSTANCES)).to(tl.int64)
    for first in range(0, M, BRANCHES):
        m = first + tl.arange(0, BRANCHES)
        acc = tl.zeros([INSTANCES, BRANCHES], tl.float32)
        for start in range(0, D, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            at = value + b * value_b + n[:, None] * value_n + d.to(tl.int64)[None, :] * value_d
            v = tl.load(at, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            at = grad_out + (b * M + m)[None, :] * D + d[:, None]
            grad = tl.load(at, mask=(m < M)[None, :] & (d < D)[:, None], other=0.0).to(tl.float32)
            acc = tl.dot(v, grad, acc, input_precision=PRECISION)
        at = grad_weights + (b * M + m)[None, :] * N + n[:, None]
        tl.store(at, acc, mask=(m < M)[None, :] & (n < N)[:, None])
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        acc = tl.zeros([INSTANCES, COLUMNS], tl.float32)
        for first in range(0, M, BRANCHES):
            m = first + tl.arange(0, BRANCHES)
            at = weights + (b * M + m)[None, :] * N + n[:, None]
            w = tl.load(at, mask=(m < M)[None, :] & (n < N)[:, None], other=0.0)
            at = grad_out + (b * M + m)[:, None] * D + d[None, :]
            grad = tl.load(at, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            acc = tl.dot(w, grad, acc, input_precision=PRECISION)
        tl.store(grad_value + (b * N + n)[:, None] * D + d[None, :], acc, mask=(n < N)[:, None] & (d < D)[None, :])


@torch.library.custom_op("saccade::triton_pool_values", mutates_args=())
def pool_values(weights: Tensor, value: Tensor) -> Tensor:
    """Launch the weighted sum of value ``(B, N, D)``, any strides, by weights ``(B, M, N)``, float32, contiguous."""
    batch, branches, instances = weights.shape
    columns = value.shape[2]
    splits = triton.cdiv(instances, SPLIT)
    partial = torch.empty(batch, splits, branches, columns, dtype=torch.float32, device=value.device)
    if partial.numel() > 0:
        grid = (triton.cdiv(columns, COLUMNS), splits * triton.cdiv(branches, BRANCHES), batch)
        weighted_sum_kernel[grid](
            weights, value, partial, *value.stride(), branches, instances, columns, splits,
            SPLIT, BRANCHES, INSTANCES, COLUMNS, precision(value.dtype),
        )  # fmt: skip
    return partial.sum(1).to(value.dtype)


def precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` of products with float32 weights: half values fit in TF32, three terms hold those."""
    return dot_precision(dtype) if dtype == torch.float32 else "tf32x3"


@pool_values.register_fake
def pool_values_fake(weights: Tensor, value: Tensor) -> Tensor:
    """Return a result of the right shape, dtype and strides."""
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2])


@torch.library.custom_op("saccade::triton_pool_values_backward", mutates_args=())
def pool_values_backward(grad_out: Tensor, weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel of both gradients."""
    batch, branches, instances = weights.shape
    grad_weights = torch.zeros_like(weights)
    grad_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    if weights.numel() > 0 and value.numel() > 0:
        weighted_sum_grad_kernel[(triton.cdiv(instances, GRAD_INSTANCES), batch)](
            weights, value, grad_out.contiguous(), grad_weights, grad_value, *value.stride(),
            branches, instances, value.shape[2], BRANCHES, GRAD_INSTANCES, COLUMNS, precision(value.dtype),
        )  # fmt: skip
    return grad_weights, grad_value


register_backward(pool_values, pool_values_backward)


def build(kernel, dtype: str, products: str, **constants: int) -> Build:
    """Return one build of a kernel: value, its gradient and that of the output of one type, the rest float32."""
    fixed = {"BRANCHES": BRANCHES, "COLUMNS": COLUMNS, "PRECISION": products, **constants}
    narrow, wide = {"value", "grad_out", "grad_value"}, {"weights", "grad_weights", "partial"}
    names = [name for name in kernel.arg_names if name not in fixed]
    kinds = {name: f"*{dtype}" if name in narrow else "*fp32" if name in wide else "i32" for name in names}
    # On sm_80 alone a few registers more than there are: 16 bytes for bf16, 56 for float32 without TF32.
    return Build(kernel, kinds, fixed, spill_bytes=56)


TYPES = (("bf16", "tf32x3"), ("fp32", "ieee"), ("fp32", "tf32"))
BUILDS = [
    *(build(weighted_sum_kernel, *types, SPLIT=SPLIT, INSTANCES=INSTANCES) for types in TYPES),
    *(build(weighted_sum_grad_kernel, *types, INSTANCES=GRAD_INSTANCES) for types in TYPES),
]
