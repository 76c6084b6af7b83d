"""Triton kernels of ``pointwise_attention``: no row depends on all keys, so tiles of weights simply add up.

One kernel has queries and walks over keys (the output; the gradient of the query), one has keys and walks over the
queries of all heads that read them (their gradients). Weights are computed again in the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import INTERPRETING, Build, dot_precision, padded

__all__ = ["BUILDS", "backward", "forward"]

EPSILON = 1e-8


@triton.jit
def load_tile(base, rows, columns, row_stride, column_stride, row_end, column_end, UPCAST: tl.constexpr):
    """Load rows x columns, zero outside."""
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    loaded = tl.load(pointers, mask=(rows[:, None] < row_end) & (columns[None, :] < column_end), other=0.0)
    return loaded.to(tl.float32) if UPCAST else loaded


@triton.jit
def tile_weights(
    q, k, rows, columns, queries, keys, scale, mask, mask_row, mask_column, bias, bias_row, bias_column,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the weights of queries x keys, 0 where a key takes no part."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = (rows[:, None] < queries) & (columns[None, :] < keys)
    if BIAS:
        pointers = bias + rows.to(tl.int64)[:, None] * bias_row + columns.to(tl.int64)[None, :] * bias_column
        scores += tl.load(pointers, mask=seen, other=0.0).to(tl.float32)
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None] + keys - queries)
    if MASK:
        pointers = mask + rows.to(tl.int64)[:, None] * mask_row + columns.to(tl.int64)[None, :] * mask_column
        seen = seen & (tl.load(pointers, mask=seen, other=0) != 0)
    if SIGMOID:
        small = tl.exp2(-tl.abs(scores) * 1.4426950408889634)
        weights = tl.where(scores >= 0, 1.0, small) / (1.0 + small)
    else:
        weights = tl.exp2(tl.minimum(scores, 0.0) * 1.4426950408889634) + tl.maximum(scores, 0.0)
    return tl.where(seen, weights, 0.0)


@triton.jit
def slope(weights, SIGMOID: tl.constexpr):
    """Return the derivative of the function from its value; 0 where the weight is."""
    return weights * (1.0 - weights) if SIGMOID else tl.minimum(weights, 1.0)


@triton.jit
def query_kernel(
    query, key, value, mask, bias, grad_out, delta, total, out,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_head, mask_row, mask_column, bias_batch, bias_head, bias_row, bias_column,
    g_batch, g_head, g_row, g_column,
    heads, group, queries, keys, width, value_width, scale, epsilon,
    GRAD: tl.constexpr, NORMALISE: tl.constexpr, SIGMOID: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write output and total of some queries of one head; with GRAD the gradient of the query instead."""
    blocks = tl.cdiv(queries, BLOCK)
    row = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    key += batch * k_batch + head // group * k_head
    value += batch * v_batch + head // group * v_head
    mask += batch * mask_batch + head * mask_head
    bias += batch * bias_batch + head * bias_head
    inner, outer = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    q = load_tile(query + batch * q_batch + head * q_head, rows, inner, q_row, q_column, queries, width, UPCAST)
    at = row.to(tl.int64) * queries + rows
    if GRAD:
        grad_out += batch * g_batch + head * g_head
        g = load_tile(grad_out, rows, outer, g_row, g_column, queries, value_width, UPCAST)
        divisor = tl.load(total + at, mask=rows < queries, other=1.0)
        if NORMALISE:
            deltas = tl.load(delta + at, mask=rows < queries, other=0.0)
        sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    else:
        sums = tl.zeros([BLOCK, VALUE_WIDTH], tl.float32)
        divisor = tl.zeros([BLOCK], tl.float32) + epsilon
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) % blocks + 1) * BLOCK + keys - queries)
    for step in range(tl.cdiv(tl.maximum(end, 0), BLOCK)):
        columns = step * BLOCK + tl.arange(0, BLOCK)
        k = load_tile(key, columns, inner, k_row, k_column, keys, width, UPCAST)
        v = load_tile(value, columns, outer, v_row, v_column, keys, value_width, UPCAST)
        weights = tile_weights(
            q, k, rows, columns, queries, keys, scale, mask, mask_row, mask_column, bias, bias_row, bias_column,
            SIGMOID, CAUSAL, MASK, BIAS, PRECISION,
        )  # fmt: skip
        if GRAD:
            grads = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            if NORMALISE:
                grads -= deltas[:, None]
            grads *= slope(weights, SIGMOID) / divisor[:, None]
            sums += tl.dot(grads.to(k.dtype), k, input_precision=PRECISION)
        else:
            sums += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            if NORMALISE:
                divisor += tl.sum(weights, 1)
    if GRAD:
        within = (rows[:, None] < queries) & (inner[None, :] < width)
        tl.store(out + at[:, None] * width + inner[None, :], (sums * scale).to(out.dtype.element_ty), mask=within)
    else:
        if NORMALISE:
            sums /= divisor[:, None]
            tl.store(total + at, divisor, mask=rows < queries)
        within = (rows[:, None] < queries) & (outer[None, :] < value_width)
        tl.store(out + at[:, None] * value_width + outer[None, :], sums.to(out.dtype.element_ty), mask=within)


@triton.jit
def key_kernel(
    query, key, value, mask, bias, grad_out, delta, total, grad_key, grad_value,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_head, mask_row, mask_column, bias_batch, bias_head, bias_row, bias_column,
    g_batch, g_head, g_row, g_column,
    heads, group, queries, keys, width, value_width, scale,
    NORMALISE: tl.constexpr, SIGMOID: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the gradients of some keys and values of one head, from all query heads that read it."""
    blocks = tl.cdiv(keys, BLOCK)
    kv_row = tl.program_id(0) // blocks
    kv_heads = heads // group
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    batch, kv_head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    inner, outer = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k = load_tile(key + batch * k_batch + kv_head * k_head, columns, inner, k_row, k_column, keys, width, UPCAST)
    v = load_tile(
        value + batch * v_batch + kv_head * v_head, columns, outer, v_row, v_column, keys, value_width, UPCAST
    )
    key_sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    value_sums = tl.zeros([BLOCK, VALUE_WIDTH], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(tl.program_id(0) % blocks * BLOCK + queries - keys, 0) // BLOCK
    steps = tl.cdiv(queries, BLOCK) - first
    for step in range(group * tl.maximum(steps, 0)):
        head = kv_head * group + step // steps
        rows = (first + step % steps) * BLOCK + tl.arange(0, BLOCK)
        q = load_tile(query + batch * q_batch + head * q_head, rows, inner, q_row, q_column, queries, width, UPCAST)
        g_base = grad_out + batch * g_batch + head * g_head
        g = load_tile(g_base, rows, outer, g_row, g_column, queries, value_width, UPCAST)
        at = (batch * heads + head) * queries + rows
        divisor = tl.load(total + at, mask=rows < queries, other=1.0)
        weights = tile_weights(
            q, k, rows, columns, queries, keys, scale,
            mask + batch * mask_batch + head * mask_head, mask_row, mask_column,
            bias + batch * bias_batch + head * bias_head, bias_row, bias_column,
            SIGMOID, CAUSAL, MASK, BIAS, PRECISION,
        )  # fmt: skip
        shares = (weights / divisor[:, None]).to(g.dtype)
        value_sums += tl.dot(tl.trans(shares), g, input_precision=PRECISION)
        grads = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if NORMALISE:
            grads -= tl.load(delta + at, mask=rows < queries, other=0.0)[:, None]
        grads *= slope(weights, SIGMOID) / divisor[:, None]
        key_sums += tl.dot(tl.trans(grads.to(q.dtype)), q, input_precision=PRECISION)
    at = (kv_row.to(tl.int64) * keys + columns)[:, None]
    within = (columns[:, None] < keys) & (inner[None, :] < width)
    tl.store(grad_key + at * width + inner[None, :], (key_sums * scale).to(grad_key.dtype.element_ty), mask=within)
    within = (columns[:, None] < keys) & (outer[None, :] < value_width)
    tl.store(grad_value + at * value_width + outer[None, :], value_sums.to(grad_value.dtype.element_ty), mask=within)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, activation: str, causal: bool,
    normalise: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return output and divisor; arguments as ``saccade::pointwise``."""
    batch, heads, queries, _ = query.shape
    out = query.new_empty(*query.shape[:3], value.shape[3])
    total = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not normalise:
        total.fill_(1.0)
    masks, biases, common, constants, warps = arguments(query, key, value, mask, bias, activation, causal, normalise)
    query_kernel[(batch * heads * triton.cdiv(queries, constants["BLOCK"]),)](
        query, key, value, masks, biases, query, total, total, out, *common, *query.stride(),
        heads, heads // key.shape[1], queries, key.shape[2], query.shape[3], value.shape[3], scale, EPSILON,
        GRAD=False, **constants, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out, total


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, out: Tensor,
    total: Tensor, activation: str, causal: bool, normalise: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value; arguments as ``saccade::pointwise_backward``."""
    batch, heads, queries, _ = query.shape
    delta = (grad_out.float() * out).sum(-1).contiguous() if normalise else total
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    masks, biases, common, constants, warps = arguments(query, key, value, mask, bias, activation, causal, normalise)
    sizes = (heads, heads // key.shape[1], queries, key.shape[2], query.shape[3], value.shape[3], scale)
    query_kernel[(batch * heads * triton.cdiv(queries, constants["BLOCK"]),)](
        query, key, value, masks, biases, grad_out, delta, total, grads[0], *common, *grad_out.stride(), *sizes, 0.0,
        GRAD=True, **constants, num_warps=warps, num_stages=1,
    )  # fmt: skip
    key_kernel[(batch * key.shape[1] * triton.cdiv(key.shape[2], constants["BLOCK"]),)](
        query, key, value, masks, biases, grad_out, delta, total, grads[1], grads[2],
        *common, *grad_out.stride(), *sizes, **constants, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


def arguments(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, activation: str, causal: bool,
    normalise: bool,
) -> tuple[Tensor, Tensor, list[int], dict[str, object], int]:  # fmt: skip
    """Return what all launches share: mask and bias, strides, constants, warps."""
    scores = (*query.shape[:3], key.shape[2])
    masks = query if mask is None else mask.view(torch.uint8).expand(scores)  # a tensor that is not read, if none
    biases = query if bias is None else bias.expand(scores)
    strides = [stride for tensor in (query, key, value, masks, biases) for stride in tensor.stride()]
    block, warps = tiles(max(query.shape[3], value.shape[3]), query.dtype)
    constants = {
        "NORMALISE": normalise,
        "SIGMOID": activation == "sigmoid",
        "CAUSAL": causal,
        "MASK": mask is not None,
        "BIAS": bias is not None,
        "BLOCK": block,
        "WIDTH": padded(query.shape[3]),
        "VALUE_WIDTH": padded(value.shape[3]),
        "PRECISION": dot_precision(query.dtype),
        "UPCAST": INTERPRETING,
    }
    return masks, biases, strides, constants, warps


def tiles(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return rows of a tile and warps: what sm_80 and sm_90 hold without spilling."""
    if dtype == torch.float32:
        return (32, 4) if width <= 32 else (32, 8) if width <= 64 else (16, 8)
    return (64, 4) if width <= 32 else (64, 8) if width <= 64 else (32, 8)


def signature(dtype: str, *outputs: str) -> dict[str, str]:
    """Return the types of the arguments of either kernel, for rows without gaps."""
    strides = [f"{name}_{axis}" for name in ("q", "k", "v", "g", "mask", "bias") for axis in ("batch", "head", "row")]
    types = dict.fromkeys(("query", "key", "value", "bias", "grad_out", *outputs), dtype) | {"mask": "*u8"}
    types |= dict.fromkeys(("delta", "total"), "*fp32") | dict.fromkeys([*strides, "width", "value_width"], "i32:16")
    return types | dict.fromkeys(("heads", "group", "queries", "keys"), "i32") | {"scale": "fp32"}


def constants_of(width: int, dtype: torch.dtype, sigmoid: bool) -> dict[str, object]:
    """Return the constants of a build: everything switched on."""
    ones = dict.fromkeys((f"{name}_column" for name in ("q", "k", "v", "g", "mask", "bias")), 1)
    flags = dict.fromkeys(("NORMALISE", "CAUSAL", "MASK", "BIAS"), True) | {"SIGMOID": sigmoid, "UPCAST": False}
    sizes = {"BLOCK": tiles(width, dtype)[0], "WIDTH": padded(width), "VALUE_WIDTH": padded(width)}
    return {**ones, **flags, **sizes, "PRECISION": "ieee"}


SHAPES = [(32, torch.bfloat16, True), (64, torch.bfloat16, False), (128, torch.bfloat16, True)]
SHAPES += [(64, torch.float32, True), (128, torch.float32, False)]
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
SPILL = 48  # with mask, bias, causal and sums all on; up to 24 bytes (48 by triton 3.6) were seen, none without them
BUILDS = [
    *[
        Build(
            query_kernel,
            signature(NAMES[dtype], "out") | {"epsilon": "fp32"},
            constants_of(width, dtype, sigmoid) | {"GRAD": grad},
            tiles(width, dtype)[1],
            1,
            SPILL,
        )
        for width, dtype, sigmoid in SHAPES
        for grad in (False, True)
    ],
    *[
        Build(
            key_kernel,
            signature(NAMES[dtype], "grad_key", "grad_value"),
            constants_of(width, dtype, sigmoid),
            tiles(width, dtype)[1],
            1,
            SPILL,
        )
        for width, dtype, sigmoid in SHAPES
    ],
]
