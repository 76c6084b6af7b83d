"""Softmax attention as one flash pass, forward and backward, over all keys or over parts of them.

The parts of the keys are one more axis of the launch. Keys of a part are read through a permutation, tile by tile, so
that nothing is gathered in memory, and each part is normalised by itself. Plain attention is one part that holds all
keys in their own order. Three kernels: results; gradient of the query; gradients of key, value and key bias. Each
element of a gradient is summed by one program in a fixed order. :mod:`saccade.attention.flash` launches them.

Scores are kept in units of log2. ``i`` and ``j`` are indices of queries and keys, a place is an index into ``order``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from saccade.attention.kernels.runtime import INTERPRETING, Build

__all__ = [
    "BUILDS",
    "FORWARD",
    "KEY_GRADIENT",
    "QUERY_GRADIENT",
    "forward_kernel",
    "key_gradient_kernel",
    "launch_options",
    "query_gradient_kernel",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UPCAST = tl.constexpr(INTERPRETING)  # the interpreter cannot compute in bfloat16
LEAST, MOST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)  # beyond every position


# Queries and keys in a block, warps and stages, by bytes of an element and padded width; chosen by registers (BUILDS).
Table = dict[int, dict[int, tuple[int, int, int, int]]]
FORWARD: Table = {
    2: {32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    4: {32: (64, 32, 8, 2), 64: (64, 32, 8, 2), 128: (64, 16, 8, 2), 256: (32, 16, 8, 2)},
}
QUERY_GRADIENT: Table = {
    2: {32: (64, 64, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    4: {32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 2)},
}
KEY_GRADIENT: Table = {
    2: {32: (64, 64, 4, 2), 64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    4: {32: (32, 64, 8, 2), 64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
}


def launch_options(table: Table, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the sizes of blocks and launch options for a padded width of at most 256."""
    row = table[dtype.itemsize][max(32, width)]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), row, strict=True))


@triton.jit
def load_rows(pointer, offsets, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """Load rows at ``offsets``, ``WIDTH`` elements ``stride`` apart, zeros beyond and where not ``inside``."""
    columns = tl.arange(0, BLOCK)[None, :]
    pointers = pointer + offsets[:, None] + columns * stride
    if WIDTH == BLOCK:
        loaded = tl.load(pointers, mask=inside[:, None], other=0.0) if RAGGED else tl.load(pointers)
    elif RAGGED:
        loaded = tl.load(pointers, mask=inside[:, None] & (columns < WIDTH), other=0.0)
    else:
        loaded = tl.load(pointers, mask=columns < WIDTH, other=0.0)
    return loaded.to(tl.float32) if UPCAST else loaded


@triton.jit
def positions_of(positions, indices, inside, default):
    """Return the positions of queries or keys, int32."""
    return indices + default if positions is None else tl.load(positions + indices, mask=inside, other=0).to(tl.int32)


@triton.jit
def visible_end(order, positions, low, high, position):
    """Return the first place in ``low .. high`` whose key comes after ``position``, by bisection; ``high`` if none."""
    while low < high:
        middle = (low + high) // 2
        index = tl.load(order + middle)
        seen = (index if positions is None else tl.load(positions + index)) <= position
        low = tl.where(seen, middle + 1, low)
        high = tl.where(seen, high, middle)
    return low


@triton.jit
def key_range(order, bounds, key_positions, source, keys, lowest, highest, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return three places: where a part begins, whole blocks that all queries see end, and keys any query sees end."""
    if order is None:
        first = 0
        last = keys
        full = keys
        if CAUSAL:
            last = tl.minimum(keys, tl.maximum(highest + 1, 0))
            full = tl.minimum(keys, tl.maximum(lowest + 1, 0))
    else:
        first = tl.load(bounds + source)
        last = tl.load(bounds + source + 1)
        full = last
        if CAUSAL:
            last = visible_end(order, key_positions, first, last, highest)
            full = visible_end(order, key_positions, first, last, lowest)
    return first, first + (full - first) // BLOCK_N * BLOCK_N, last


@triton.jit
def load_keys(key, value, order, start, last, key_s, key_d, value_s, value_d,
              D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
              BLOCK_N: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Load the keys and values at the places from ``start``; also which lie before ``last``, and their indices."""
    places = start + tl.arange(0, BLOCK_N)
    inside = places < last
    if order is None:  # offsets within a block fit into 32 bits, which saves registers
        j = places
        key += tl.cast(start, tl.int64) * key_s
        value += tl.cast(start, tl.int64) * value_s
        rows = tl.arange(0, BLOCK_N)
    else:
        j = tl.load(order + places, mask=inside, other=0)
        rows = j.to(tl.int64)
    k = load_rows(key, rows * key_s, key_d, inside, D, BLOCK_D, RAGGED)
    v = load_rows(value, rows * value_s, value_d, inside, DV, BLOCK_DV, RAGGED)
    return k, v, j, inside


@triton.jit
def masked_scores(products, i, j, i_inside, j_inside, query_position, key_position, weight,
                  mask, mask_l, mask_s, bias, bias_l, bias_s,
                  scale, CAUSAL: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """Return scores from products, ``-inf`` where invisible; whatever belongs to ``i`` or ``j`` broadcasts to them."""
    scores = products * (scale * LOG2E)
    if weight is not None:
        scores += weight * LOG2E
    inside = i_inside & j_inside
    if bias is not None:
        added = tl.load(bias + i.to(tl.int64) * bias_l + j.to(tl.int64) * bias_s, mask=inside, other=0.0)
        scores += added.to(tl.float32) * LOG2E
    if mask is not None:
        seen = tl.load(mask + i.to(tl.int64) * mask_l + j.to(tl.int64) * mask_s, mask=inside, other=0)
        scores = tl.where(seen != 0, scores, -float("inf"))
    if BOUNDARY:
        scores = tl.where(j_inside, scores, -float("inf"))
        if CAUSAL:
            scores = tl.where(key_position <= query_position, scores, -float("inf"))
    return scores


@triton.jit
def forward_kernel(
    query, key, value, mask, bias, order, bounds, query_positions, key_positions, key_bias, out, lse, entropy,
    query_b, query_h, query_l, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    mask_b, mask_h, mask_l, mask_s, bias_b, bias_h, bias_l, bias_s, out_b, out_h, out_p, out_l,
    query_positions_b, key_positions_b, heads, group, order_heads, queries, keys, parts, weighted_part, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries, one part."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    results = parts if key_bias is None else parts + 1
    part = program // blocks % results
    batch_head = program // blocks // results
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    i = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i_inside = i < queries
    query += batch * query_b + head * query_h
    key += batch * key_b + head // group * key_h
    value += batch * value_b + head // group * value_h
    order_row = batch * order_heads + head % order_heads
    if order is not None:
        order += order_row * keys
        bounds += order_row * (parts + 1)
    if key_bias is not None:
        key_bias += order_row * keys
    if query_positions is not None:
        query_positions += batch * query_positions_b
    if key_positions is not None:
        key_positions += batch * key_positions_b
    if mask is not None:
        mask += batch * mask_b + head * mask_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    source = part
    if key_bias is not None:
        source = tl.where(part == parts, weighted_part, part)
    query_position = positions_of(query_positions, i, i_inside, keys - queries)
    highest = tl.max(tl.where(i_inside, query_position, LEAST), 0)
    lowest = tl.min(tl.where(i_inside, query_position, MOST), 0)
    first, full, last = key_range(order, bounds, key_positions, source, keys, lowest, highest, CAUSAL, BLOCK_N)

    q = load_rows(query, i.to(tl.int64) * query_l, query_d, i_inside, D, BLOCK_D, True)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)  # sum of exp2(score - peak) * (score - peak)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for BOUNDARY in tl.static_range(2):
        for start in range(full if BOUNDARY else first, last if BOUNDARY else full, BLOCK_N):
            k, v, j, inside = load_keys(
                key, value, order, start, last, key_s, key_d, value_s, value_d,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BOUNDARY,
            )  # fmt: skip
            weight = None
            if key_bias is not None:
                weight = tl.load(key_bias + j, mask=inside & (part == parts), other=0.0)[None, :]
            scores = masked_scores(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), i[:, None], j[None, :],
                i_inside[:, None], inside[None, :], query_position[:, None],
                positions_of(key_positions, j, inside, 0)[None, :], weight,
                mask, mask_l, mask_s, bias, bias_l, bias_s, scale, CAUSAL, BOUNDARY,
            )  # fmt: skip
            higher = tl.maximum(peak, tl.max(scores, 1))
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            shifted = scores - safe[:, None]
            weights = tl.exp2(shifted)
            decay = tl.exp2(peak - safe)
            if entropy is not None:
                rise = tl.where(peak == -float("inf"), 0.0, peak - safe)
                finite = tl.where(shifted == -float("inf"), 0.0, shifted)
                moment = (moment + rise * total) * decay + tl.sum(weights * finite, 1)
            total = total * decay + tl.sum(weights, 1)
            sums = sums * decay[:, None]
            sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
            peak = higher

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    logarithm = tl.log2(total)
    wide = tl.arange(0, BLOCK_DV)[None, :]
    out += batch * out_b + head * out_h + part.to(tl.int64) * out_p
    sums = sums / total[:, None]
    tl.store(
        out + i.to(tl.int64)[:, None] * out_l + wide, sums.to(out.dtype.element_ty), i_inside[:, None] & (wide < DV)
    )
    line = (batch_head.to(tl.int64) * results + part) * queries + i
    tl.store(lse + line, tl.where(blind, -float("inf"), (peak + logarithm) * LN2), i_inside)
    if entropy is not None:
        tl.store(entropy + line, tl.where(blind, 0.0, tl.maximum((logarithm - moment / total) * LN2, 0.0)), i_inside)


@triton.jit
def derivative(scores, products, normaliser, delta, row_entropy, grad_entropy):
    """Return ``p = exp(score - lse)`` and the derivative of the scores, from ``dO v^T`` and per-row numbers.

    ``normaliser`` is the log-sum-exp in units of log2, and ``inf`` for a row that sees nothing, so that p is 0 there.
    """
    shifted = scores - normaliser
    weights = tl.exp2(shifted)
    slope = products - delta
    if row_entropy is not None:  # d entropy_i / d score_ij = -p_ij * (score_ij - lse_i + entropy_i)
        slope -= grad_entropy * (tl.where(shifted == -float("inf"), 0.0, shifted * LN2) + row_entropy)
    return weights, weights * slope


@triton.jit
def load_normaliser(lse, line, inside):
    """Return the log-sum-exp of rows in units of log2; ``inf`` outside and where nothing is visible."""
    loaded = tl.load(lse + line, mask=inside, other=float("inf")) * LOG2E
    return tl.where(loaded == -float("inf"), float("inf"), loaded)


@triton.jit
def query_gradient_kernel(
    query, key, value, mask, bias, order, bounds, query_positions, key_positions, key_bias, out, lse, entropy,
    grad_out, grad_lse, grad_entropy, delta, grad_query,
    query_b, query_h, query_l, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    mask_b, mask_h, mask_l, mask_s, bias_b, bias_h, bias_l, bias_s, out_b, out_h, out_p, out_l,
    query_positions_b, key_positions_b, heads, group, order_heads, queries, keys, parts, weighted_part, scale,
    grad_out_b, grad_out_h, grad_out_p, grad_out_l, grad_out_d,
    CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries, all parts; also writes ``delta = rowsum(dO * O) - dL`` for the other kernel."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    batch_head = program // blocks
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    i = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i_inside = i < queries
    query += batch * query_b + head * query_h
    key += batch * key_b + head // group * key_h
    value += batch * value_b + head // group * value_h
    order_row = batch * order_heads + head % order_heads
    if order is not None:
        order += order_row * keys
        bounds += order_row * (parts + 1)
    if key_bias is not None:
        key_bias += order_row * keys
    if query_positions is not None:
        query_positions += batch * query_positions_b
    if key_positions is not None:
        key_positions += batch * key_positions_b
    if mask is not None:
        mask += batch * mask_b + head * mask_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    query_position = positions_of(query_positions, i, i_inside, keys - queries)
    highest = tl.max(tl.where(i_inside, query_position, LEAST), 0)
    lowest = tl.min(tl.where(i_inside, query_position, MOST), 0)

    q = load_rows(query, i.to(tl.int64) * query_l, query_d, i_inside, D, BLOCK_D, True)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    results = parts if key_bias is None else parts + 1
    for part in range(1 if order is None else results):
        source = part
        if key_bias is not None:
            source = tl.where(part == parts, weighted_part, part)
        first, full, last = key_range(order, bounds, key_positions, source, keys, lowest, highest, CAUSAL, BLOCK_N)
        here = batch * out_b + head * out_h + tl.cast(part, tl.int64) * out_p
        grad_here = batch * grad_out_b + head * grad_out_h + tl.cast(part, tl.int64) * grad_out_p
        o = load_rows(out + here, i.to(tl.int64) * out_l, 1, i_inside, DV, BLOCK_DV, True)
        do = load_rows(grad_out + grad_here, i.to(tl.int64) * grad_out_l, grad_out_d, i_inside, DV, BLOCK_DV, True)
        line = (batch_head.to(tl.int64) * results + part) * queries + i
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        normaliser = load_normaliser(lse, line, i_inside)
        row_delta -= tl.load(grad_lse + line, mask=i_inside & (normaliser < float("inf")), other=0.0)
        tl.store(delta + line, row_delta, i_inside)
        row_entropy, row_grad = None, None
        if entropy is not None:
            row_entropy = tl.load(entropy + line, mask=i_inside, other=0.0)[:, None]
            row_grad = tl.load(grad_entropy + line, mask=i_inside, other=0.0)[:, None]
        for BOUNDARY in tl.static_range(2):
            for start in range(full if BOUNDARY else first, last if BOUNDARY else full, BLOCK_N):
                k, v, j, inside = load_keys(
                    key, value, order, start, last, key_s, key_d, value_s, value_d,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BOUNDARY,
                )  # fmt: skip
                weight = None
                if key_bias is not None:
                    weight = tl.load(key_bias + j, mask=inside & (part == parts), other=0.0)[None, :]
                scores = masked_scores(
                    tl.dot(q, tl.trans(k), input_precision=PRECISION), i[:, None], j[None, :],
                    i_inside[:, None], inside[None, :], query_position[:, None],
                    positions_of(key_positions, j, inside, 0)[None, :], weight,
                    mask, mask_l, mask_s, bias, bias_l, bias_s, scale, CAUSAL, BOUNDARY,
                )  # fmt: skip
                products = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                _, slope = derivative(scores, products, normaliser[:, None], row_delta[:, None], row_entropy, row_grad)
                sums = tl.dot(slope.to(k.dtype), k, sums, input_precision=PRECISION)
    wide = tl.arange(0, BLOCK_D)[None, :]
    grad_query += (batch_head.to(tl.int64) * queries + i.to(tl.int64))[:, None] * D + wide
    tl.store(grad_query, (sums * scale).to(grad_query.dtype.element_ty), i_inside[:, None] & (wide < D))


@triton.jit
def key_gradient_kernel(
    query, key, value, mask, bias, order, bounds, query_positions, key_positions, key_bias, lse, entropy,
    grad_out, grad_entropy, delta, grad_key, grad_value, grad_key_bias,
    query_b, query_h, query_l, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    mask_b, mask_h, mask_l, mask_s, bias_b, bias_h, bias_l, bias_s,
    query_positions_b, key_positions_b, heads, group, order_heads, queries, keys, parts, weighted_part, scale,
    grad_out_b, grad_out_h, grad_out_p, grad_out_l, grad_out_d, owners,
    CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a block of keys of one part and one of ``owners`` heads of the gradients; the query heads of it."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    part = program // blocks % parts
    batch_owner = program // blocks // parts
    batch, owner = (batch_owner // owners).to(tl.int64), (batch_owner % owners).to(tl.int64)
    share = heads // owners
    order_row = batch * order_heads + owner * share % order_heads
    if order is not None:
        order += order_row * keys
        bounds += order_row * (parts + 1)
    if key_bias is not None:
        key_bias += order_row * keys
    if query_positions is not None:
        query_positions += batch * query_positions_b
    if key_positions is not None:
        key_positions += batch * key_positions_b
    first, last = 0, keys
    if order is not None:
        first, last = tl.load(bounds + part), tl.load(bounds + part + 1)
    first += program % blocks * BLOCK_N
    if first >= last:
        return
    key += batch * key_b + owner * share // group * key_h
    value += batch * value_b + owner * share // group * value_h
    k, v, j, inside = load_keys(
        key, value, order, first, last, key_s, key_d, value_s, value_d, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True
    )  # fmt: skip
    key_position = positions_of(key_positions, j, inside, 0)

    # Queries before ``begin`` see none of these keys, those from ``full`` on see all.
    begin, full = 0, 0
    if CAUSAL:
        full = queries
        if query_positions is None:
            lead = queries - keys
            lowest = tl.min(tl.where(inside, key_position, MOST), 0)
            highest = tl.max(tl.where(inside, key_position, LEAST), 0)
            begin = tl.maximum(lowest + lead, 0) // BLOCK_M * BLOCK_M
            full = tl.maximum(tl.cdiv(tl.maximum(highest + lead, 0), BLOCK_M) * BLOCK_M, begin)
    full = tl.where(first + BLOCK_N > last, queries, full)
    key_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    bias_sums = tl.zeros([BLOCK_N], tl.float32)
    results = parts if key_bias is None else parts + 1
    rounds = 1
    if key_bias is not None:
        rounds = tl.where(part == weighted_part, 2, 1)
    for WHOLE in tl.static_range(2):
        origin = full if WHOLE else begin
        count = tl.cdiv(tl.maximum((queries if WHOLE else tl.minimum(full, queries)) - origin, 0), BLOCK_M)
        for step in range(count * share * rounds):  # one loop over blocks of all heads needs the fewest registers
            turn, start = step // count, origin + step % count * BLOCK_M
            head, extra = owner * share + turn // rounds, turn % rounds
            result = tl.where(extra == 1, parts, part).to(tl.int64)
            i = start + tl.arange(0, BLOCK_M)
            i_inside = i < queries
            near, far = tl.arange(0, BLOCK_M), tl.cast(start, tl.int64)
            here = query + batch * query_b + head * query_h + far * query_l
            q = load_rows(here, near * query_l, query_d, i_inside, D, BLOCK_D, True)
            here = grad_out + batch * grad_out_b + head * grad_out_h + result * grad_out_p + far * grad_out_l
            do = load_rows(here, near * grad_out_l, grad_out_d, i_inside, DV, BLOCK_DV, True)
            weight = None
            if key_bias is not None:
                weight = tl.load(key_bias + j, mask=inside & (extra == 1), other=0.0)[:, None]
            head_mask, head_bias = mask, bias
            if mask is not None:
                head_mask += batch * mask_b + head * mask_h
            if bias is not None:
                head_bias += batch * bias_b + head * bias_h
            scores = masked_scores(
                tl.dot(k, tl.trans(q), input_precision=PRECISION), i[None, :], j[:, None],
                i_inside[None, :], inside[:, None],
                positions_of(query_positions, i, i_inside, keys - queries)[None, :], key_position[:, None], weight,
                head_mask, mask_l, mask_s, head_bias, bias_l, bias_s, scale, CAUSAL, not WHOLE,
            )  # fmt: skip
            products = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            line = ((batch * heads + head) * results + result) * queries + i
            row_entropy, row_grad = None, None
            if entropy is not None:
                row_entropy = tl.load(entropy + line, mask=i_inside, other=0.0)[None, :]
                row_grad = tl.load(grad_entropy + line, mask=i_inside, other=0.0)[None, :]
            row_delta = tl.load(delta + line, mask=i_inside, other=0.0)[None, :]
            normaliser = load_normaliser(lse, line, i_inside)[None, :]
            weights, slope = derivative(scores, products, normaliser, row_delta, row_entropy, row_grad)
            value_sums = tl.dot(weights.to(do.dtype), do, value_sums, input_precision=PRECISION)
            key_sums = tl.dot(slope.to(q.dtype), q, key_sums, input_precision=PRECISION)
            if key_bias is not None:
                bias_sums += tl.sum(slope, 1) * extra
    line = batch_owner.to(tl.int64) * keys + j
    wide = tl.arange(0, BLOCK_D)[None, :]
    grad_key += line[:, None] * D + wide
    tl.store(grad_key, (key_sums * scale).to(grad_key.dtype.element_ty), inside[:, None] & (wide < D))
    wide = tl.arange(0, BLOCK_DV)[None, :]
    grad_value += line[:, None] * DV + wide
    tl.store(grad_value, value_sums.to(grad_value.dtype.element_ty), inside[:, None] & (wide < DV))
    if key_bias is not None:
        tl.store(grad_key_bias + line, bias_sums, inside)


def build(kernel: Any, width: int, element: str, variant: str) -> Build:  # noqa: ANN401 (a jitted function)
    """Return what a causal call of one width compiles: ``"plain"``, ``"entropy"`` or weighted ``"parts"``."""
    optional = {"mask": None, "bias": None}
    if variant != "parts":
        optional |= dict.fromkeys(["order", "bounds", "query_positions", "key_positions", "key_bias", "grad_key_bias"])
    if variant != "entropy":
        optional |= dict.fromkeys(["entropy", "grad_entropy"])
    if variant == "parts":
        optional |= {"query_positions": None, "key_positions": None}
    table = {forward_kernel: FORWARD, query_gradient_kernel: QUERY_GRADIENT, key_gradient_kernel: KEY_GRADIENT}[kernel]
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    launch = launch_options(table, width, dtype)
    constants = {
        "CAUSAL": True, "D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "PRECISION": "ieee",
        "BLOCK_M": launch["BLOCK_M"], "BLOCK_N": launch["BLOCK_N"],
        **dict.fromkeys(["query_d", "key_d", "value_d", "grad_out_d"], 1),
        **dict.fromkeys(["mask_b", "mask_h", "mask_l", "mask_s", "bias_b", "bias_h", "bias_l", "bias_s"], 0),
    }  # fmt: skip
    constants = {name: constant for name, constant in (optional | constants).items() if name in kernel.arg_names}
    types = {
        **dict.fromkeys(["query", "key", "value", "out", "grad_out"], "*" + element),
        **dict.fromkeys(["grad_query", "grad_key", "grad_value"], "*" + element),
        **dict.fromkeys(["lse", "entropy", "key_bias", "delta", "grad_lse", "grad_entropy", "grad_key_bias"], "*fp32"),
        **dict.fromkeys(["order", "bounds"], "*i32"),
        **dict.fromkeys(["heads", "group", "order_heads", "owners", "queries", "keys", "parts"], "i32"),
        **dict.fromkeys(["weighted_part", "query_positions_b", "key_positions_b"], "i32"),
        "scale": "fp32",
    }  # fmt: skip
    signature = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
    # At width 128 the blocks that never spill are half as large, and rescale or reload twice as often. Triton 3.6 needs
    # a few registers more for the gradient of keys read through an order.
    spill_bytes = 128 if (width, element) == (128, "bf16") else 104 if kernel is key_gradient_kernel else 0
    return Build(kernel, signature, constants, launch["num_warps"], launch["num_stages"], spill_bytes)


BUILDS = [
    build(kernel, width, element, variant)
    for kernel in (forward_kernel, query_gradient_kernel, key_gradient_kernel)
    for width, element, variant in [
        (32, "bf16", "plain"), (64, "bf16", "plain"), (128, "bf16", "plain"),
        (32, "fp32", "plain"), (64, "fp32", "plain"), (128, "fp32", "plain"),
        (64, "bf16", "entropy"), (128, "bf16", "parts"),
    ]
]  # fmt: skip
