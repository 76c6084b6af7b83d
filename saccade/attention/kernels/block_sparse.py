"""Block-sparse attention: forward, gradient of the query, and gradients of key and value.

Nothing is gathered: a program holds a tile of the queries of one block and walks the list of key blocks they read.
Place ``e`` of a walk is token ``e % block_k`` of entry ``e // block_k``, so a tile spans several small blocks, and
a large block takes several tiles. The gradients of keys walk the inverted list, the query blocks that read a block,
in the same way; each element of a gradient is summed by one program in a fixed order.

Lists hold codes ``2 * block + (1 if only some keys are forced)``. Scores are kept in units of log2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.blocks import BlockGeometry, BlockSelection
from saccade.attention.kernels.runtime import INTERPRETING, Build, dot_precision, padded

__all__ = ["BUILDS", "backward", "forward"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UPCAST = tl.constexpr(INTERPRETING)  # the interpreter cannot compute in bfloat16


@triton.jit
def load_rows(pointer, rows, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of ``WIDTH`` adjacent elements, zeros beyond and where not ``inside``."""
    columns = tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] if WIDTH == BLOCK else inside[:, None] & (columns < WIDTH)
    loaded = tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns, mask=mask, other=0.0)
    return loaded.to(tl.float32) if UPCAST else loaded


@triton.jit
def store_rows(pointer, rows, stride, inside, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows of ``WIDTH`` adjacent elements in the dtype of the memory."""
    columns = tl.arange(0, BLOCK)[None, :]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + columns
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH))


@triton.jit
def walk(codes, first, total, block_size, length, BLOCK: tl.constexpr):
    """Return the tokens at places ``first ...`` of a walk, which of them there are, and whether their block is forced.

    Args:
        codes: Start of the list.
        first: First place.
        total: Places in all, entries times block size.
        block_size: Tokens in a block.
        length: Tokens in all; the last block may be shorter.
        BLOCK: Places to return.
    """
    places = first + tl.arange(0, BLOCK)
    entry = places // block_size
    code = tl.load(codes + entry, mask=places < total, other=-1)
    token = (code >> 1) * block_size + places - entry * block_size
    return token, (code >= 0) & (token < length), (code & 1) == 1


@triton.jit
def may_see(i, j, inside, forced, q_offset, sink, window, CAUSAL: tl.constexpr, FORCED: tl.constexpr):
    """Return which pairs count; all arguments broadcast to the tile."""
    distance = q_offset + i - j
    visible = inside
    if FORCED:
        near = tl.maximum(distance, -distance) < window
        visible = visible & ((forced == 0) | (j < sink) | near)
    if CAUSAL:
        visible = visible & (distance >= 0)
    return visible


@triton.jit
def key_is_valid(key_valid, j, inside):
    """Leave out the keys that the caller excluded."""
    if key_valid is not None:
        inside = inside & (tl.load(key_valid + j, mask=inside, other=0) != 0)
    return inside


@triton.jit
def query_program(heads, list_heads, blocks, block_q, L, BLOCK_M: tl.constexpr):
    """Return what a program of a query tile works on: sample, head, list, and its queries with those that exist."""
    program = tl.program_id(0)
    tiles = tl.cdiv(block_q, BLOCK_M)
    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    block = program // tiles % blocks
    head = program // (tiles * blocks)
    b = (head // heads).to(tl.int64)
    h = head % heads
    rows = (b * list_heads + h // (heads // list_heads)) * blocks + block
    i = block * block_q + row
    return b, h, rows, i, (row < block_q) & (i < L)


@triton.jit
def forward_kernel(
    query, key, value, entries, ends, key_valid, out, lse,
    query_b, query_h, query_l, key_b, key_h, key_s, value_b, value_h, value_s, out_b, out_h, out_l,
    heads, kv_heads, list_heads, blocks, longest, L, S, block_q, block_k, q_offset, sink, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of one tile of queries."""
    b, h, rows, i, i_inside = query_program(heads, list_heads, blocks, block_q, L, BLOCK_M)
    kv_head = h // (heads // kv_heads)
    key += b * key_b + kv_head.to(tl.int64) * key_h
    value += b * value_b + kv_head.to(tl.int64) * value_h
    if key_valid is not None:
        key_valid += b * S
    q = load_rows(query + b * query_b + h.to(tl.int64) * query_h, i, query_l, i_inside, D, BLOCK_D)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    places = tl.load(ends + rows) * block_k
    for first in range(0, places, BLOCK_N):
        j, inside, forced = walk(entries + rows * longest, first, places, block_k, S, BLOCK_N)
        inside = key_is_valid(key_valid, j, inside)
        k = load_rows(key, j, key_s, inside, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        visible = may_see(
            i[:, None], j[None, :], inside[None, :], forced[None, :], q_offset, sink, window, CAUSAL, FORCED
        )
        scores = tl.where(visible, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(p, 1)
        v = load_rows(value, j, value_s, inside, DV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    sums = tl.where(blind, -float("inf"), (peak + tl.log2(tl.where(blind, 1.0, total))) * LN2)
    store_rows(out + b * out_b + h.to(tl.int64) * out_h, i, out_l, i_inside, acc, DV, BLOCK_DV)
    tl.store(lse + (b * heads + h) * L + i, sums, mask=i_inside)


@triton.jit
def query_gradient_kernel(
    query, key, value, entries, ends, key_valid, out, lse, grad_out, grad_lse, grad_query, delta,
    query_b, query_h, query_l, key_b, key_h, key_s, value_b, value_h, value_s, out_b, out_h, out_l,
    grad_b, grad_h, grad_l, into_b, into_h, into_l,
    heads, kv_heads, list_heads, blocks, longest, L, S, block_q, block_k, q_offset, sink, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile of queries, and ``delta = rowsum(dO * O) - dL`` for the kernel of the keys."""
    b, h, rows, i, i_inside = query_program(heads, list_heads, blocks, block_q, L, BLOCK_M)
    kv_head = h // (heads // kv_heads)
    key += b * key_b + kv_head.to(tl.int64) * key_h
    value += b * value_b + kv_head.to(tl.int64) * value_h
    if key_valid is not None:
        key_valid += b * S
    q = load_rows(query + b * query_b + h.to(tl.int64) * query_h, i, query_l, i_inside, D, BLOCK_D)
    do = load_rows(grad_out + b * grad_b + h.to(tl.int64) * grad_h, i, grad_l, i_inside, DV, BLOCK_DV)
    o = load_rows(out + b * out_b + h.to(tl.int64) * out_h, i, out_l, i_inside, DV, BLOCK_DV)
    here = (b * heads + h) * L + i
    sums = tl.load(lse + here, mask=i_inside, other=0.0) * LOG2E
    sums = tl.where(sums == -float("inf"), 0.0, sums)
    shift = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if grad_lse is not None:
        shift -= tl.load(grad_lse + here, mask=i_inside, other=0.0)
    tl.store(delta + here, shift, mask=i_inside)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    places = tl.load(ends + rows) * block_k
    for first in range(0, places, BLOCK_N):
        j, inside, forced = walk(entries + rows * longest, first, places, block_k, S, BLOCK_N)
        inside = key_is_valid(key_valid, j, inside)
        k = load_rows(key, j, key_s, inside, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        visible = may_see(
            i[:, None], j[None, :], inside[None, :], forced[None, :], q_offset, sink, window, CAUSAL, FORCED
        )
        p = tl.exp2(tl.where(visible, scores - sums[:, None], -float("inf")))
        v = load_rows(value, j, value_s, inside, DV, BLOCK_DV)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - shift[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    store_rows(grad_query + b * into_b + h.to(tl.int64) * into_h, i, into_l, i_inside, acc * scale, D, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    query, key, value, sources, offsets, key_valid, lse, grad_out, delta, grad_key, grad_value,
    query_b, query_h, query_l, key_b, key_h, key_s, value_b, value_h, value_s, grad_b, grad_h, grad_l,
    into_key_b, into_key_h, into_key_s, into_value_b, into_value_h, into_value_s,
    heads, kv_heads, list_heads, blocks, longest, L, S, block_q, block_k, q_offset, sink, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile of a key block, zeros if no query block reads it.

    ``sources`` holds for each list head codes of query blocks, sorted by the key block that they read, ``longest`` in
    all; ``offsets`` where those of each of the ``blocks`` key blocks begin.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(block_k, BLOCK_N)
    row = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    block = program // tiles % blocks
    kv_head = program // (tiles * blocks) % kv_heads
    b = (program // (tiles * blocks * kv_heads)).to(tl.int64)
    j = block * block_k + row
    j_inside = (row < block_k) & (j < S)
    if key_valid is not None:
        key_valid += b * S
    valid = key_is_valid(key_valid, j, j_inside)
    k = load_rows(key + b * key_b + kv_head.to(tl.int64) * key_h, j, key_s, valid, D, BLOCK_D)
    v = load_rows(value + b * value_b + kv_head.to(tl.int64) * value_h, j, value_s, valid, DV, BLOCK_DV)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    group = heads // kv_heads
    for h in range(kv_head * group, kv_head * group + group):
        rows = b * list_heads + h // (heads // list_heads)
        start = tl.load(offsets + rows * (blocks + 1) + block)
        places = (tl.load(offsets + rows * (blocks + 1) + block + 1) - start) * block_q
        queries = query + b * query_b + tl.cast(h, tl.int64) * query_h
        grads = grad_out + b * grad_b + tl.cast(h, tl.int64) * grad_h
        for first in range(0, places, BLOCK_M):
            i, inside, forced = walk(sources + rows * longest + start, first, places, block_q, L, BLOCK_M)
            q = load_rows(queries, i, query_l, inside, D, BLOCK_D)
            do = load_rows(grads, i, grad_l, inside, DV, BLOCK_DV)
            here = (b * heads + h) * L + i
            sums = tl.load(lse + here, mask=inside, other=0.0) * LOG2E
            sums = tl.where(sums == -float("inf"), 0.0, sums)
            shift = tl.load(delta + here, mask=inside, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            visible = may_see(
                i[None, :], j[:, None], valid[:, None] & inside[None, :], forced[None, :],
                q_offset, sink, window, CAUSAL, FORCED,
            )  # fmt: skip
            p = tl.exp2(tl.where(visible, scores - sums[None, :], -float("inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - shift[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    into_key = grad_key + b * into_key_b + kv_head.to(tl.int64) * into_key_h
    into_value = grad_value + b * into_value_b + kv_head.to(tl.int64) * into_value_h
    store_rows(into_key, j, into_key_s, j_inside, dk * scale, D, BLOCK_D)
    store_rows(into_value, j, into_value_s, j_inside, dv, DV, BLOCK_DV)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    key_valid: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill ``out`` and ``lse``.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        selection: With codes ``(B, Hs, NQ, E)`` as indices, see :func:`saccade.attention.blocks.block_entries`.
        key_valid: Bool ``(B, S)``.
        scale: Factor of the products.
        out: ``(B, H, L, Dv)``.
        lse: ``(B, H, L)``, float32, contiguous.
    """
    query, key, value = (with_adjacent_columns(tensor) for tensor in (query, key, value))
    key_valid = None if key_valid is None else key_valid.contiguous()
    entries = selection.indices.to(torch.int32).contiguous()
    tiles = tiles_for(query, value, selection, holds_keys=False)
    grid = (
        query.shape[0] * query.shape[1] * entries.shape[2] * triton.cdiv(selection.geometry.block_q, tiles["BLOCK_M"]),
    )
    forward_kernel[grid](
        query, key, value, entries, ends(entries), key_valid, out, lse,
        *strides(query, key, value, out), *sizes(query, key, selection, entries.shape[2], entries.shape[3]), scale,
        **tiles, **constants(query, value, selection),
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    key_valid: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Fill the gradients; arguments as :func:`forward`, ``grad_lse`` ``(B, H, L)`` or ``None``."""
    query, key, value, grad_out = (with_adjacent_columns(tensor) for tensor in (query, key, value, grad_out))
    key_valid = None if key_valid is None else key_valid.contiguous()
    entries = selection.indices.to(torch.int32).contiguous()
    geometry = selection.geometry
    delta = torch.empty_like(lse)
    tiles = tiles_for(query, value, selection, holds_keys=False)
    shared = constants(query, value, selection)
    grid = (query.shape[0] * query.shape[1] * entries.shape[2] * triton.cdiv(geometry.block_q, tiles["BLOCK_M"]),)
    query_gradient_kernel[grid](
        query, key, value, entries, ends(entries), key_valid, out, lse,
        grad_out, None if grad_lse is None else grad_lse.contiguous(), grad_query, delta,
        *strides(query, key, value, out, grad_out, grad_query),
        *sizes(query, key, selection, entries.shape[2], entries.shape[3]), scale, **tiles, **shared,
    )  # fmt: skip
    sources, offsets = inverted(entries, geometry.k_blocks)
    tiles = tiles_for(query, value, selection, holds_keys=True)
    grid = (key.shape[0] * key.shape[1] * geometry.k_blocks * triton.cdiv(geometry.block_k, tiles["BLOCK_N"]),)
    key_gradient_kernel[grid](
        query, key, value, sources, offsets, key_valid, lse, grad_out, delta, grad_key, grad_value,
        *strides(query, key, value, grad_out, grad_key, grad_value),
        *sizes(query, key, selection, geometry.k_blocks, sources.shape[2]), scale, **tiles, **shared,
    )  # fmt: skip


def ends(entries: Tensor) -> Tensor:
    """Return how many leading entries of each list hold all that is something, int32 ``(B, Hs, NQ)``."""
    places = torch.arange(1, entries.shape[-1] + 1, device=entries.device, dtype=torch.int32)
    return torch.where(entries >= 0, places, 0).amax(-1)


def inverted(entries: Tensor, k_blocks: int) -> tuple[Tensor, Tensor]:
    """Return for each key block the query blocks that read it.

    Args:
        entries: Codes of key blocks, ``(B, Hs, NQ, E)``.
        k_blocks: NB, number of key blocks.

    Returns:
        Codes of query blocks, int32 ``(B, Hs, NQ * E)``, sorted by key block, and the place where each key block's
        begin, int32 ``(B, Hs, NB + 1)``.
    """
    flat = entries.flatten(2)
    block, order = torch.where(flat >= 0, flat >> 1, k_blocks).sort(dim=-1, stable=True)
    sources = 2 * (order // entries.shape[3]) + (flat.gather(-1, order) & 1)
    edges = torch.arange(k_blocks + 1, device=entries.device, dtype=block.dtype).expand(*block.shape[:2], -1)
    return sources.to(torch.int32), torch.searchsorted(block, edges.contiguous(), out_int32=True)


def with_adjacent_columns(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if the elements of a row do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of all axes but the last."""
    return tuple(tensor.stride(axis) for tensor in tensors for axis in range(3))


def sizes(query: Tensor, key: Tensor, selection: BlockSelection, blocks: int, longest: int) -> tuple[int, ...]:
    """Return the whole numbers that all kernels take, in their order."""
    g = selection.geometry
    heads = (query.shape[1], key.shape[1], selection.indices.shape[1])
    return (
        *heads,
        blocks,
        longest,
        g.q_len,
        g.kv_len,
        g.block_q,
        g.block_k,
        g.q_offset,
        selection.sink,
        selection.window,
    )


def constants(query: Tensor, value: Tensor, selection: BlockSelection) -> dict[str, Any]:
    """Return the constants that do not concern tiles."""
    return {
        "D": query.shape[-1],
        "DV": value.shape[-1],
        "BLOCK_D": padded(query.shape[-1]),
        "BLOCK_DV": padded(value.shape[-1]),
        "CAUSAL": selection.geometry.causal,
        "FORCED": selection.sink > 0 or selection.window > 0,
        "PRECISION": dot_precision(query.dtype),
    }


# Bytes of an element and padded width (at least 32): queries, keys and warps of a program; first of the kernels that
# hold queries, then of the one that holds keys. Found by what compiles for sm_80 and sm_90 without spilling registers.
TILES = {
    (2, 32): ((64, 64, 4), (64, 32, 4)),
    (2, 64): ((64, 64, 8), (64, 32, 4)),
    (2, 128): ((64, 64, 8), (64, 32, 8)),
    (2, 256): ((32, 32, 8), (32, 32, 8)),
    (4, 32): ((64, 32, 8), (32, 32, 4)),
    (4, 64): ((32, 32, 4), (32, 16, 4)),
    (4, 128): ((32, 16, 8), (32, 16, 8)),
    (4, 256): ((16, 16, 8), (16, 16, 8)),
}


def tiles_for(query: Tensor, value: Tensor, selection: BlockSelection, holds_keys: bool) -> dict[str, int]:
    """Return the launch options of a kernel; a tile is no larger than the block it is part of."""
    width = max(32, padded(query.shape[-1]), padded(value.shape[-1]))
    block_m, block_n, warps = TILES[query.element_size(), width][int(holds_keys)]
    if holds_keys:
        block_n = min(block_n, padded(selection.geometry.block_k))
    else:
        block_m = min(block_m, padded(selection.geometry.block_q))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 2}


def build(kernel: Any, kind: str, width: int, block: int, plain: bool) -> Build:  # noqa: ANN401
    """Describe a kernel for one dtype, head width and size of blocks; ``plain`` = no mask, sink, window or causality.

    Up to four registers are accepted on the stack: the compiler puts counters of the walk there, outside the loop.
    """
    token = torch.empty(1, 1, 1, width, dtype=torch.bfloat16 if kind == "bf16" else torch.float32, device="meta")
    geometry = BlockGeometry(block, block, block, block, causal=not plain)
    selection = BlockSelection(token, token, geometry, sink=0 if plain else 4)
    fixed: dict[str, Any] = tiles_for(token, token, selection, kernel is key_gradient_kernel)
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    fixed |= constants(token, token, selection) | ({"key_valid": None} if plain else {})
    return Build(kernel, signature(kernel, kind, fixed), fixed, spill_bytes=24, **options)


def signature(kernel: Any, kind: str, fixed: dict[str, Any]) -> dict[str, str]:  # noqa: ANN401
    """Return the types of a kernel's arguments but the constants; strides count as multiples of 16."""
    lists, sums = ("entries", "ends", "sources", "offsets"), ("lse", "grad_lse", "delta")
    tensors = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
    known = {"scale": "fp32", "key_valid": "*i1"} | dict.fromkeys(lists, "*i32") | dict.fromkeys(sums, "*fp32")
    known |= dict.fromkeys(tensors, f"*{kind}")
    axes = ("_b", "_h", "_l", "_s")
    return {
        name: known.get(name, "i32:16" if name.endswith(axes) else "i32")
        for name in kernel.arg_names
        if name not in fixed
    }


CASES = [
    ("bf16", 32, 64, True),
    ("bf16", 32, 4, True),
    ("bf16", 64, 64, False),
    ("bf16", 128, 64, False),
    ("fp32", 32, 64, False),
    ("fp32", 64, 64, False),
    ("fp32", 128, 64, False),
]
BUILDS = [
    build(kernel, *case) for case in CASES for kernel in (forward_kernel, query_gradient_kernel, key_gradient_kernel)
]
