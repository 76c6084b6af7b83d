"""Triton kernels of ``combine_heads``: transposition and product in one pass, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import Build

__all__ = ["BUILDS", "backward", "forward"]

TOKENS = 16  # of one head in one program


@triton.jit
def forward_kernel(
    out, gates, combined, out_batch, out_head, out_row, out_column, gates_batch, gates_row, gates_head, gates_column,
    heads, length, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gated output of some tokens of one head; a gate for the whole head has ``gates_column`` 0."""
    blocks = tl.cdiv(length, TOKENS)
    row = tl.program_id(0) // blocks
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    tokens = (tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    within = (tokens < length) & (columns < width)
    out += batch * out_batch + head * out_head + tokens * out_row + columns * out_column
    gates += batch * gates_batch + head * gates_head + tokens * gates_row + columns * gates_column
    product = tl.load(out, mask=within, other=0.0).to(tl.float32) * tl.load(gates, mask=within, other=0).to(tl.float32)
    combined += ((batch * length + tokens) * heads + head) * width + columns
    tl.store(combined, product.to(combined.dtype.element_ty), mask=within)


@triton.jit
def backward_kernel(
    grad, out, gates, grad_out, grad_gates,
    grad_batch, grad_row, grad_column, out_batch, out_head, out_row, out_column,
    gates_batch, gates_row, gates_head, gates_column,
    heads, length, width, HEADWISE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradients of output and gates of some tokens of one head."""
    blocks = tl.cdiv(length, TOKENS)
    row = tl.program_id(0) // blocks
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    token = (tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    tokens, columns = token[:, None], tl.arange(0, WIDTH)[None, :]
    within = (tokens < length) & (columns < width)
    grad += batch * grad_batch + tokens * grad_row + (head * width + columns) * grad_column
    out += batch * out_batch + head * out_head + tokens * out_row + columns * out_column
    gates += batch * gates_batch + head * gates_head + tokens * gates_row + columns * gates_column
    grads = tl.load(grad, mask=within, other=0.0).to(tl.float32)
    product = grads * tl.load(gates, mask=within, other=0).to(tl.float32)
    grad_out += (row.to(tl.int64) * length + tokens) * width + columns
    tl.store(grad_out, product.to(grad_out.dtype.element_ty), mask=within)
    product = grads * tl.load(out, mask=within, other=0.0).to(tl.float32)
    if HEADWISE:
        grad_gates += (batch * length + token) * heads + head
        tl.store(grad_gates, tl.sum(product, 1).to(grad_gates.dtype.element_ty), mask=token < length)
    else:
        grad_gates += ((batch * length + tokens) * heads + head) * width + columns
        tl.store(grad_gates, product.to(grad_gates.dtype.element_ty), mask=within)


def forward(out: Tensor, gates: Tensor) -> Tensor:
    """Return the gated heads side by side; arguments as ``saccade::combine_heads``."""
    batch, heads, length, width = out.shape
    combined = out.new_empty(batch, length, heads * width)
    forward_kernel[(batch * heads * triton.cdiv(length, TOKENS),)](
        out, gates, combined, *out.stride(), *gate_strides(gates), heads, length, width,
        TOKENS=TOKENS, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    return combined


def backward(grad: Tensor, out: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of out and gates; those of bool gates are written nowhere that is read."""
    batch, heads, length, width = out.shape
    grad_out = out.new_empty(out.shape)
    grad_gates = gates.new_empty(gates.shape)
    backward_kernel[(batch * heads * triton.cdiv(length, TOKENS),)](
        grad, out, gates, grad_out, grad_gates, *grad.stride(), *out.stride(), *gate_strides(gates),
        heads, length, width, HEADWISE=gates.ndim == 3, TOKENS=TOKENS, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    return grad_out, grad_gates


def gate_strides(gates: Tensor) -> tuple[int, ...]:
    """Return the strides of sample, token, head and column; the last is 0 for a gate of the whole head."""
    return gates.stride() if gates.ndim == 4 else (*gates.stride(), 0)


def signature(dtype: str, *more: str) -> dict[str, str]:
    """Return the types of the arguments of either kernel, for rows without gaps."""
    strides = ("out_batch", "out_head", "out_row", "gates_batch", "gates_row", "width")
    types = dict.fromkeys(("out", "gates", *more), dtype) | dict.fromkeys(strides, "i32:16")
    return types | dict.fromkeys(("gates_head", "heads", "length"), "i32")


HEADWISE = {"out_column": 1, "gates_column": 0, "TOKENS": TOKENS, "WIDTH": 64}
BUILDS = [
    Build(forward_kernel, signature("*bf16", "combined"), HEADWISE),
    Build(forward_kernel, signature("*fp32", "combined"), {**HEADWISE, "gates_column": 1, "WIDTH": 128}),
    *[
        Build(
            backward_kernel,
            signature(dtype, "grad", "grad_out", "grad_gates") | dict.fromkeys(("grad_batch", "grad_row"), "i32:16"),
            {**HEADWISE, "gates_column": column, "grad_column": 1, "WIDTH": width, "HEADWISE": column == 0},
        )
        for dtype, column, width in (("*bf16", 0, 64), ("*fp32", 1, 128))
    ],
]
