"""Triton kernels of ``prefix_softmax_mean``: each program walks over the tokens of one head, for a block of columns.

The tokens of a head are taken one chunk after the other, so the device is filled by heads, samples and column blocks;
scores and values are read once in each direction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import INTERPRETING, Build, dot_precision, padded

__all__ = ["BUILDS", "backward", "forward"]

CHUNK = 32
BLOCK = 64  # at most so many value columns in one program


@triton.jit
def forward_kernel(
    scores, value, out, lse,
    scores_batch, scores_head, scores_row, value_batch, value_head, value_row, value_column,
    heads, length, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Carry mean and log-sum-exp (in base 2) of the tokens so far through the chunks of one head."""
    row = tl.program_id(0).to(tl.int64)
    scores += row // heads * scores_batch + row % heads * scores_head
    value += row // heads * value_batch + row % heads * value_head
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    steps = tl.arange(0, CHUNK)
    mean = tl.zeros([BLOCK], tl.float32)
    before = tl.full([1], float("-inf"), tl.float32)
    for chunk in range(tl.cdiv(length, CHUNK)):
        tokens = (chunk * CHUNK + steps).to(tl.int64)
        inside = tokens < length
        score = tl.load(scores + tokens * scores_row, mask=inside, other=float("-inf")).to(tl.float32)
        score *= 1.4426950408889634
        pointers = value + tokens[:, None] * value_row + columns[None, :] * value_column
        within = inside[:, None] & (columns[None, :] < width)
        values = tl.load(pointers, mask=within, other=0.0)
        if UPCAST:
            values = values.to(tl.float32)
        seen = tl.where(steps[:, None] >= steps[None, :], score[None, :], float("-inf"))
        peak = tl.maximum(tl.max(seen, 1), before)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(seen - peak[:, None])
        old = tl.exp2(before - peak)
        total = tl.sum(weights, 1) + old
        sums = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION) + old[:, None] * mean[None, :]
        means = sums / tl.where(total == 0, 1.0, total)[:, None]
        ends = tl.where(total == 0, float("-inf"), peak + tl.log2(tl.where(total == 0, 1.0, total)))
        tl.store(
            out + (row * length + tokens[:, None]) * width + columns[None, :],
            means.to(out.dtype.element_ty),
            mask=within,
        )
        if tl.program_id(1) == 0:
            tl.store(lse + row * length + tokens, ends * 0.6931471805599453, mask=inside)
        mean = tl.sum(tl.where(steps[:, None] == CHUNK - 1, means, 0.0), 0)
        before = tl.max(tl.where(steps == CHUNK - 1, ends, float("-inf")), 0, keep_dims=True)


@triton.jit
def backward_kernel(
    grad_out, delta, scores, value, lse, grad_scores, grad_value,
    grad_batch, grad_head, grad_row, grad_column, scores_batch, scores_head, scores_row,
    value_batch, value_head, value_row, value_column,
    rows, heads, length, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Carry what later tokens add to the gradients, relative to the log-sum-exp before them, from the end."""
    row = tl.program_id(0).to(tl.int64)
    grad_out += row // heads * grad_batch + row % heads * grad_head
    scores += row // heads * scores_batch + row % heads * scores_head
    value += row // heads * value_batch + row % heads * value_head
    lse += row * length
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    steps = tl.arange(0, CHUNK)
    later = tl.zeros([BLOCK], tl.float32)
    later_delta = tl.zeros([1], tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        start = (chunks - 1 - step) * CHUNK
        tokens = (start + steps).to(tl.int64)
        inside = tokens < length
        within = inside[:, None] & (columns[None, :] < width)
        score = tl.load(scores + tokens * scores_row, mask=inside, other=float("-inf")).to(tl.float32)
        ends = tl.load(lse + tokens, mask=inside, other=float("inf"))  # so that all weights below are 0 outside
        ends = tl.where(ends == float("-inf"), 0.0, ends)
        last = tl.load(lse + tl.minimum(start + CHUNK, length) - 1)
        last = tl.where(last == float("-inf"), 0.0, last)
        deltas = tl.load(delta + row * length + tokens, mask=inside, other=0.0)
        pointers = grad_out + tokens[:, None] * grad_row + columns[None, :] * grad_column
        grads = tl.load(pointers, mask=within, other=0.0)
        values = tl.load(value + tokens[:, None] * value_row + columns[None, :] * value_column, mask=within, other=0.0)
        if UPCAST:
            grads = grads.to(tl.float32)
        # weights[j, i]: token j in the mean of token i
        exponents = tl.where(steps[:, None] <= steps[None, :], score[:, None] - ends[None, :], float("-inf"))
        weights = tl.exp2(exponents * 1.4426950408889634)
        weight_later = tl.exp2((score - last) * 1.4426950408889634)
        sums = tl.dot(weights.to(grads.dtype), grads, input_precision=PRECISION)
        sums += weight_later[:, None] * later[None, :]
        target = grad_value + (row * length + tokens[:, None]) * width + columns[None, :]
        tl.store(target, sums.to(grad_value.dtype.element_ty), mask=within)
        partial = tl.sum(values.to(tl.float32) * sums, 1)
        if tl.program_id(1) == 0:
            partial -= tl.sum(weights * deltas[None, :], 1) + weight_later * later_delta
        tl.store(grad_scores + (tl.program_id(1) * rows + row) * length + tokens, partial, mask=inside)
        before = tl.load(lse + start - 1, mask=start > 0, other=float("-inf"))
        passed = tl.exp2((before - ends) * 1.4426950408889634)
        end = tl.exp2((before - last) * 1.4426950408889634)
        later = end * later + tl.sum(passed[:, None] * grads.to(tl.float32), 0)
        later_delta = end * later_delta + tl.sum(passed * deltas, 0)


def forward(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and log-sum-exp; arguments as ``saccade::prefix_mean``."""
    batch, heads, length, width = value.shape
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    lse = scores.new_empty(scores.shape, dtype=torch.float32)
    block = min(BLOCK, padded(width))
    forward_kernel[(batch * heads, triton.cdiv(width, block))](
        scores, value, out, lse, *scores.stride(), *value.stride(), heads, length, width,
        CHUNK=CHUNK, BLOCK=block, PRECISION=dot_precision(value.dtype), UPCAST=INTERPRETING,
    )  # fmt: skip
    return out, lse


def backward(grad_out: Tensor, delta: Tensor, scores: Tensor, value: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of scores and value; ``delta`` is ``rowsum(dO * O) - dL``."""
    batch, heads, length, width = value.shape
    block = min(BLOCK, padded(width))
    blocks = triton.cdiv(width, block)
    parts = scores.new_empty(blocks, *scores.shape, dtype=torch.float32)  # of the columns, to be added
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    backward_kernel[(batch * heads, blocks)](
        grad_out, delta.contiguous(), scores, value, lse, parts, grad_value,
        *grad_out.stride(), *scores.stride(), *value.stride(), batch * heads, heads, length, width,
        CHUNK=CHUNK, BLOCK=block, PRECISION=dot_precision(value.dtype), UPCAST=INTERPRETING,
    )  # fmt: skip
    return parts.sum(0).to(scores.dtype), grad_value


def signature(dtype: str, *wide: str) -> dict[str, str]:
    """Return the types of the arguments that both kernels have, for rows without gaps."""
    strides = [f"{name}_{axis}" for name in ("scores", "value") for axis in ("batch", "head", "row")]
    types = dict.fromkeys(("scores", "value"), dtype) | dict.fromkeys(("lse", *wide), "*fp32")
    return types | dict.fromkeys([*strides, "width"], "i32:16") | dict.fromkeys(("heads", "length"), "i32")


CONSTANTS = {"CHUNK": CHUNK, "PRECISION": "ieee", "UPCAST": False, "value_column": 1}
SHAPES = [("*bf16", 32), ("*bf16", 64), ("*fp32", 32), ("*fp32", 64)]
BUILDS = [
    *[
        Build(forward_kernel, signature(dtype) | {"out": dtype}, CONSTANTS | {"BLOCK": block})
        for dtype, block in SHAPES
    ],
    *[
        Build(
            backward_kernel,
            signature(dtype, "delta", "grad_scores")
            | dict.fromkeys(("grad_out", "grad_value"), dtype)
            | dict.fromkeys(("grad_batch", "grad_head", "grad_row"), "i32:16")
            | {"rows": "i32"},
            CONSTANTS | {"BLOCK": block, "grad_column": 1},
        )
        for dtype, block in SHAPES
    ],
]
