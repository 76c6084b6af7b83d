"""Triton kernels of ``linear_attention``: one recurrence for the output and for every gradient.

A sequence is cut into segments, as many as fill the device. Each program walks over one segment in chunks of tokens
with the state in registers. If there are several segments, a first pass computes what each adds to the state, a short
scan makes of it the state that enters each, and the second pass writes the outputs; so keys and values are read twice,
and once if heads and samples alone fill the device. No state is stored for the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.pointwise import load_tile
from saccade.attention.kernels.runtime import INTERPRETING, Build, dot_precision, padded

__all__ = ["BUILDS", "backward", "forward"]

PROGRAMS = 264  # enough to fill a device twice: 132 multiprocessors


@triton.jit
def recurrence_kernel(
    a, b, c, log_decay, entering, out, last,
    a_batch, a_head, a_row, a_column, b_batch, b_head, b_row, b_column, c_batch, c_head, c_row, c_column,
    state_head, state_segment, state_row, state_column,
    heads, a_group, bc_group, a_length, length, segments, chunks, state_width, out_width, scale,
    OUT: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, LAST: tl.constexpr,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STATE_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walk over one segment of one head, for one block of output columns.

    ``out = (a b^T * D) c + decay * a state`` and ``state = decay * state + (decay * b)^T c``; without OUT the state
    alone, from zero; without CAUSAL the state that enters is that of all keys and does not change.
    """
    row = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    batch, head = (row // heads).to(tl.int64), row % heads
    a += batch * a_batch + (head // a_group).to(tl.int64) * a_head
    b += batch * b_batch + (head // bc_group).to(tl.int64) * b_head
    c += batch * c_batch + (head // bc_group).to(tl.int64) * c_head
    rate = tl.load(log_decay + head).to(tl.float32) * 1.4426950408889634  # exp2 below
    steps = tl.arange(0, CHUNK)
    inner = tl.arange(0, WIDTH)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if OUT:
        entering += row.to(tl.int64) * state_head + segment.to(tl.int64) * state_segment
        state = load_tile(entering, inner, columns, state_row, state_column, state_width, out_width, False)
    else:
        state = tl.zeros([WIDTH, BLOCK], tl.float32)
    distance = steps[:, None] - steps[None, :]
    if REVERSE:
        distance = -distance
    decay = tl.where(distance >= 0, tl.exp2(rate * tl.maximum(distance, 0).to(tl.float32)), 0.0)
    since_start = tl.exp2(rate * (steps + 1).to(tl.float32))
    for step in range(chunks):
        index = segment * chunks + (chunks - 1 - step if REVERSE else step)
        rows = index * CHUNK + steps
        count = tl.minimum(tl.maximum(length - index * CHUNK, 0), CHUNK)  # 0 beyond the end: nothing changes
        until_end = tl.exp2(rate * tl.maximum(count - 1 - steps, 0).to(tl.float32))
        if CAUSAL or not OUT:
            right = load_tile(b, rows, inner, b_row, b_column, length, state_width, UPCAST)
            third = load_tile(c, rows, columns, c_row, c_column, length, out_width, UPCAST)
        if OUT:
            left = load_tile(a, rows, inner, a_row, a_column, a_length, state_width, UPCAST)
            result = tl.dot(left.to(tl.float32), state, input_precision=STATE_PRECISION)
            if CAUSAL:
                weights = tl.dot(left, tl.trans(right), input_precision=PRECISION) * decay
                inside = tl.dot(weights.to(third.dtype), third, input_precision=PRECISION)
                if REVERSE:
                    result = result * until_end[:, None] + scale * inside
                else:
                    result = scale * (result * since_start[:, None] + inside)
            elif not REVERSE:
                result = scale * result
            out_pointers = out + (row.to(tl.int64) * a_length + rows.to(tl.int64)[:, None]) * out_width + columns
            inside_out = (rows[:, None] < a_length) & (columns[None, :] < out_width)
            tl.store(out_pointers, result.to(out.dtype.element_ty), mask=inside_out)
        if CAUSAL or not OUT:
            faded = right.to(tl.float32) * (since_start if REVERSE else until_end)[:, None]
            added = tl.dot(tl.trans(faded.to(third.dtype)), third, input_precision=PRECISION)
            state = state * tl.exp2(rate * count.to(tl.float32)) + (scale * added if REVERSE else added)
    if LAST:
        target = row if OUT else row * segments + segment
        last_pointers = last + (target.to(tl.int64) * state_width + inner.to(tl.int64)[:, None]) * out_width + columns
        within = (inner[:, None] < state_width) & (columns[None, :] < out_width)
        if OUT:
            within = within & (segment == (0 if REVERSE else segments - 1))
        tl.store(last_pointers, state, mask=within)


@triton.jit
def scan_kernel(
    added, first, log_decay, heads, segments, chunks, length, size,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace what each segment adds to the state by the state that enters it."""
    row = tl.program_id(0)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    rate = tl.load(log_decay + row % heads).to(tl.float32) * 1.4426950408889634
    state = tl.load(first + row.to(tl.int64) * size + elements, mask=inside, other=0.0)
    for step in range(segments):
        segment = segments - 1 - step if REVERSE else step
        pointers = added + (row.to(tl.int64) * segments + segment) * size + elements
        more = tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, state, mask=inside)
        count = tl.minimum(tl.maximum(length - segment * chunks * CHUNK, 0), chunks * CHUNK)
        state = state * tl.exp2(rate * count.to(tl.float32)) + more


class Plan(NamedTuple):
    """How one call is cut up and computed, the same for all its launches."""

    chunk: int
    block: int  # output columns of one program
    warps: int
    precision: str  # of products of inputs
    state_precision: str  # of products with a state
    upcast: bool  # make float32 of what is loaded


def plan(width: int, dtypes: set[torch.dtype]) -> Plan:
    """Choose tiles for states of up to ``width`` rows and columns: what sm_80 and sm_90 hold without spilling."""
    width = padded(width)
    wide = dot_precision(torch.float32)
    if torch.float32 not in dtypes:
        chunk, block, warps = (64, min(width, 64), 4 if width <= 32 else 8) if width <= 64 else (32, 32, 8)
        return Plan(chunk, block, warps, "ieee", "tf32", INTERPRETING)
    chunk, block, warps = (32, min(width, 32), 4 if width <= 32 else 8) if width <= 64 else (16, 16, 8)
    # A float32 gradient beside half-precision inputs, as of normalised attention, is computed with in TF32.
    precision = "tf32" if len(dtypes) > 1 else wide
    return Plan(chunk, block, warps, precision, precision, INTERPRETING or len(dtypes) > 1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor, causal: bool, scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output in ``dtype`` and the last state; arguments as ``saccade::linear_recurrence``."""
    cut = plan(max(state.shape[2:]), {query.dtype})
    entering, last = states(cut, key, value, log_decay, state, causal, scale, False)
    out = query.new_empty(*query.shape[:3], value.shape[3], dtype=dtype)
    launch(cut, query, key, value, log_decay, entering, out, last if causal else None, causal, scale, False)
    return out, last


def backward(
    grad_out: Tensor, grad_state: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, of key and value for each query head, and of the first state."""
    heads = query.shape[1]
    grouped = torch.float32 if key.shape[1] < heads else key.dtype  # to be summed over the heads of a group
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = key.new_empty(key.shape[0], heads, *key.shape[2:], dtype=grouped)
    grad_value = value.new_empty(value.shape[0], heads, *value.shape[2:], dtype=grouped)
    cut = plan(max(state.shape[2:]), {query.dtype, grad_out.dtype})
    entering, _ = states(cut, key, value, log_decay, state, causal, scale, False)
    launch(cut, grad_out, value, key, log_decay, entering.mT, grad_query, None, causal, scale, False)
    entering, first = states(cut, query, grad_out, log_decay, grad_state, causal, scale, True)
    launch(cut, value, grad_out, query, log_decay, entering.mT, grad_key, None, causal, scale, True)
    launch(cut, key, query, grad_out, log_decay, entering, grad_value, first if causal else None, causal, scale, True)
    return grad_query, grad_key, grad_value, first


def states(
    cut: Plan, left: Tensor, right: Tensor, log_decay: Tensor, first: Tensor, causal: bool, scale: float, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the states that enter the segments, ``(B, H, segments, D, Dv)``, and room for the last one.

    Without ``causal`` the last one is already written, and is what enters everywhere.
    """
    batch, heads, width, out_width = first.shape
    first = first.contiguous()
    length, size = left.shape[2], width * out_width
    segments = number_of_segments(cut, batch * heads, out_width, length)
    if causal and segments == 1:
        return first.unsqueeze(2), torch.empty_like(first)
    added = first.new_empty(batch, heads, segments, width, out_width)
    launch(cut, left, left, right, log_decay, first.unsqueeze(2), None, added, causal, scale, reverse)
    if not causal:
        last = first + added.sum(2)
        return last.unsqueeze(2), last
    block = min(1024, padded(size))
    each = chunks_each(cut, length, segments)
    scan_kernel[(batch * heads, triton.cdiv(size, block))](
        added, first, log_decay, heads, segments, each, length, size, REVERSE=reverse, CHUNK=cut.chunk, BLOCK=block
    )
    return added, torch.empty_like(first)


def number_of_segments(cut: Plan, rows: int, out_width: int, length: int) -> int:
    """Return the least number of segments that fills the device, and none that is empty."""
    chunks = triton.cdiv(length, cut.chunk)
    wanted = min(chunks, triton.cdiv(PROGRAMS, rows * triton.cdiv(out_width, cut.block)))
    return int(triton.cdiv(chunks, triton.cdiv(chunks, wanted)))


def chunks_each(cut: Plan, length: int, segments: int) -> int:
    """Return the number of chunks in every segment but the last, which may have fewer."""
    return int(triton.cdiv(triton.cdiv(length, cut.chunk), segments))


def launch(
    cut: Plan, a: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, entering: Tensor, out: Tensor | None,
    last: Tensor | None, causal: bool, scale: float, reverse: bool,
) -> None:  # fmt: skip
    """Launch ``recurrence_kernel``; the segments are those of the states that it reads, or else writes."""
    batch, heads = entering.shape[:2]
    width, out_width = entering.shape[3:]
    length = a.shape[2]
    if out is not None and not causal:  # queries share one state, so they are cut by themselves
        segments = number_of_segments(cut, batch * heads, out_width, length)
    else:
        segments = entering.shape[2] if last is None or out is not None else last.shape[2]
    grid = (batch * heads * segments, triton.cdiv(out_width, cut.block))
    recurrence_kernel[grid](
        a, b, c, log_decay, entering, entering if out is None else out, entering if last is None else last,
        *a.stride(), *b.stride(), *c.stride(),
        entering.stride(1), entering.stride(2) if causal else 0, entering.stride(3), entering.stride(4),
        heads, heads // a.shape[1], heads // b.shape[1], length, b.shape[2],
        segments, chunks_each(cut, length, segments), width, out_width, scale,
        OUT=out is not None, CAUSAL=causal, REVERSE=reverse, LAST=last is not None,
        CHUNK=cut.chunk, WIDTH=padded(width), BLOCK=min(cut.block, padded(out_width)),
        PRECISION=cut.precision, STATE_PRECISION=cut.state_precision, UPCAST=cut.upcast,
        num_warps=cut.warps, num_stages=1,
    )  # fmt: skip


def build_recurrence_kernel(dtype: torch.dtype, width: int, mode: dict[str, bool], spill_bytes: int = 16) -> Build:
    """Describe one build of ``recurrence_kernel`` for square states and rows without gaps."""
    cut = plan(width, {dtype})
    kind = "*fp32" if dtype == torch.float32 else "*bf16"
    strides = [f"{name}_{axis}" for name in "abc" for axis in ("batch", "head", "row")]
    state = ["state_head", "state_segment", "state_row", "state_width", "out_width"]
    sizes = ["heads", "a_group", "bc_group", "a_length", "length", "segments", "chunks"]
    signature = dict.fromkeys(("a", "b", "c", "out"), kind) | dict.fromkeys(("log_decay", "entering", "last"), "*fp32")
    signature |= dict.fromkeys([*strides, *state], "i32:16") | dict.fromkeys(sizes, "i32") | {"scale": "fp32"}
    constants: dict[str, object] = {"a_column": 1, "b_column": 1, "c_column": 1, "state_column": 1, **mode}
    constants |= {"CHUNK": cut.chunk, "WIDTH": padded(width), "BLOCK": cut.block, "UPCAST": False}
    constants |= {"PRECISION": cut.precision, "STATE_PRECISION": cut.state_precision}
    return Build(recurrence_kernel, signature, constants, cut.warps, 1, spill_bytes)


OUTPUTS = {"OUT": True, "CAUSAL": True, "REVERSE": False, "LAST": True}
FROM_THE_END = {**OUTPUTS, "REVERSE": True}
STATES = {**OUTPUTS, "OUT": False}
ALL_KEYS = {**OUTPUTS, "CAUSAL": False, "LAST": False}
BUILDS = [
    *[
        build_recurrence_kernel(torch.bfloat16, width, mode)
        for width in (32, 64, 128)
        for mode in (OUTPUTS, FROM_THE_END)
    ],
    *[build_recurrence_kernel(torch.float32, width, FROM_THE_END) for width in (32, 64, 128)],
    *[build_recurrence_kernel(torch.bfloat16, 64, mode) for mode in (STATES, ALL_KEYS)],
    build_recurrence_kernel(torch.float32, 64, STATES),
    # 256 rows of state and of both tiles do not fit the registers; smaller tiles spill as much
    build_recurrence_kernel(torch.bfloat16, 256, FROM_THE_END, spill_bytes=416),
    build_recurrence_kernel(torch.float32, 256, FROM_THE_END, spill_bytes=448),
    Build(
        scan_kernel,
        dict.fromkeys(("added", "first", "log_decay"), "*fp32")
        | dict.fromkeys(("heads", "segments", "chunks", "length", "size"), "i32"),
        {"REVERSE": False, "CHUNK": 64, "BLOCK": 1024},
    ),
]
