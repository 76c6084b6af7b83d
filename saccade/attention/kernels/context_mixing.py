"""Context mixing in Triton: no kernel of a position, and no window's values, ever leave the registers.

A program owns a block of positions of one sample and group, consecutive along the rows of the map, so that neighbouring
lanes read neighbouring values. It walks the taps; logits are plain multiply-adds in float32 (all of it is below
1 GFLOP where it is largest). Tiles are (channels, positions). Log-sum-exps are to base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import Build, padded

__all__ = ["BUILDS", "backward", "forward"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def window(position, length, kernel):
    """Return the first neighbour of each position along one side, and the kind of its window."""
    start = tl.minimum(tl.maximum(position - kernel // 2, 0), length - kernel)
    return start, start - position + kernel - 1


@triton.jit
def spot(y, x, stride_y, stride_x):
    """Return the offset of each position in a map, as one row."""
    return (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[None, :]


@triton.jit
def logit(q, rows, biases, kind, tap, kernel):
    """Return the logits, to base 2, of one tap of each position: ``q . row + bias`` by kind of window."""
    bias = tl.load(biases + kind * kernel * kernel + tap)
    return (tl.sum(q * rows, 0) + bias) * LOG2E


@triton.jit
def mix_kernel(
    query, kernels, biases, value, out, lse,
    query_b, query_c, query_y, query_x, value_b, value_c, value_y, value_x,
    G, C, D, H, W, S, K,
    C_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out ``(B, 2, G, D, H W)`` and lse ``(B, 2, G, H W)`` for a block of positions: both kernels, one pass."""
    pair = tl.program_id(1).to(tl.int64)
    b, g = pair // G, pair % G
    N = H * W
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    y, x = tl.minimum(n, N - 1) // W, tl.minimum(n, N - 1) % W
    c, d = tl.arange(0, C_TILE)[:, None], tl.arange(0, D_TILE)[:, None]
    at = query + b * query_b + (g * C + c) * query_c + spot(y, x, query_y, query_x)
    q = tl.load(at, mask=c < C, other=0.0).to(tl.float32)
    rows = kernels + pair * (S * S + K * K) * C + c
    table = biases
    for half in range(2):
        size = tl.where(half == 0, S, K)
        top, kind_y = window(y, H, size)
        left, kind_x = window(x, W, size)
        kind = kind_y * size + kind_x
        first = value + b * value_b + ((half * G + g) * D + d) * value_c + spot(top, left, value_y, value_x)
        peak = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        mixed = tl.zeros([D_TILE, BLOCK], tl.float32)
        mine = table + g * size * size * size * size
        for tap in range(size * size):
            s = logit(q, tl.load(rows + tap * C, mask=c < C, other=0.0), mine, kind, tap, size)
            higher = tl.maximum(peak, s)
            shrink, p = tl.exp2(peak - higher), tl.exp2(s - higher)
            offset = (tap // size).to(tl.int64) * value_y + (tap % size) * value_x
            v = tl.load(first + offset, mask=d < D, other=0.0).to(tl.float32)
            peak, total, mixed = higher, total * shrink + p, mixed * shrink[None, :] + p[None, :] * v
        unit = (b * 2 + half) * G + g
        tl.store(out + (unit * D + d) * N + n[None, :], mixed / total[None, :], mask=(d < D) & inside[None, :])
        tl.store(lse + unit * N + n, peak + tl.log2(total), mask=inside)
        rows += size * size * C
        table += G * size * size * size * size


@triton.jit
def query_grad_kernel(
    query, kernels, biases, value, out, lse, grad_out, grad_query, delta,
    query_b, query_c, query_y, query_x, value_b, value_c, value_y, value_x, grad_b, grad_c, grad_y, grad_x,
    G, C, D, H, W, S, K,
    C_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the query, ``(B, G, C, H W)``, and ``delta = out . grad_out``, shaped as lse."""
    pair = tl.program_id(1).to(tl.int64)
    b, g = pair // G, pair % G
    N = H * W
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    n = tl.minimum(n, N - 1)
    y, x = n // W, n % W
    c, d = tl.arange(0, C_TILE)[:, None], tl.arange(0, D_TILE)[:, None]
    at = query + b * query_b + (g * C + c) * query_c + spot(y, x, query_y, query_x)
    q = tl.load(at, mask=c < C, other=0.0).to(tl.float32)
    rows = kernels + pair * (S * S + K * K) * C + c
    table = biases
    grad_q = tl.zeros([C_TILE, BLOCK], tl.float32)
    for half in range(2):
        size = tl.where(half == 0, S, K)
        top, kind_y = window(y, H, size)
        left, kind_x = window(x, W, size)
        kind = kind_y * size + kind_x
        unit = (b * 2 + half) * G + g
        channel = (half * G + g) * D + d
        at = grad_out + b * grad_b + channel * grad_c + spot(y, x, grad_y, grad_x)
        grad = tl.load(at, mask=d < D, other=0.0).to(tl.float32)
        mixed = tl.load(out + (unit * D + d) * N + n[None, :], mask=d < D, other=0.0).to(tl.float32)
        products = tl.sum(grad * mixed, 0)
        tl.store(delta + unit * N + n, products, mask=inside)
        level = tl.load(lse + unit * N + n)
        first = value + b * value_b + channel * value_c + spot(top, left, value_y, value_x)
        mine = table + g * size * size * size * size
        for tap in range(size * size):
            row = tl.load(rows + tap * C, mask=c < C, other=0.0)
            p = tl.exp2(logit(q, row, mine, kind, tap, size) - level)
            offset = (tap // size).to(tl.int64) * value_y + (tap % size) * value_x
            v = tl.load(first + offset, mask=d < D, other=0.0).to(tl.float32)
            grad_q += (p * (tl.sum(grad * v, 0) - products))[None, :] * row
        rows += size * size * C
        table += G * size * size * size * size
    tl.store(grad_query + (pair * C + c) * N + n[None, :], grad_q, mask=(c < C) & inside[None, :])


@triton.jit
def value_grad_kernel(
    query, kernels, biases, lse, grad_out, grad_value,
    query_b, query_c, query_y, query_x, grad_b, grad_c, grad_y, grad_x,
    G, C, D, H, W, S, K,
    C_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the value, ``(B, 2, G, D, H W)``: each value gathers from the positions that read it.

    Along each side these are the positions ``[0 if y < K else y - K // 2, H if y >= H - K else y + K // 2 + 1)``.
    """
    pair = tl.program_id(1).to(tl.int64)
    b, g = pair // G, pair % G
    half = tl.program_id(2)
    size = tl.where(half == 0, S, K)
    N = H * W
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x = tl.minimum(n, N - 1) // W, tl.minimum(n, N - 1) % W
    c, d = tl.arange(0, C_TILE)[:, None], tl.arange(0, D_TILE)[:, None]
    rows = kernels + (pair * (S * S + K * K) + half * S * S) * C + c
    table = biases + half * G * S * S * S * S + g * size * size * size * size
    unit = (b * 2 + half) * G + g
    queries = query + b * query_b + (g * C + c) * query_c
    grads = grad_out + b * grad_b + ((half * G + g) * D + d) * grad_c
    first_y, first_x = tl.where(y < size, 0, y - size // 2), tl.where(x < size, 0, x - size // 2)
    end_y = tl.where(y >= H - size, H, y + size // 2 + 1)
    end_x = tl.where(x >= W - size, W, x + size // 2 + 1)
    most_y = tl.where(2 * size > H, H, size + size // 2)
    most_x = tl.where(2 * size > W, W, size + size // 2)
    acc = tl.zeros([D_TILE, BLOCK], tl.float32)
    for step in range(most_y * most_x):
        i, j = first_y + step // most_x, first_x + step % most_x
        reads = (i < end_y) & (j < end_x) & (n < N)
        top, kind_y = window(i, H, size)
        left, kind_x = window(j, W, size)
        tap = tl.where(reads, (y - top) * size + x - left, 0)
        kind = tl.where(reads, kind_y * size + kind_x, 0)
        at = queries + spot(i, j, query_y, query_x)
        q = tl.load(at, mask=(c < C) & reads[None, :], other=0.0).to(tl.float32)
        row = tl.load(rows + tap[None, :] * C, mask=(c < C) & reads[None, :], other=0.0)
        level = tl.load(lse + unit * N + i * W + j, mask=reads, other=0.0)
        p = tl.where(reads, tl.exp2(logit(q, row, table, kind, tap, size) - level), 0.0)
        at = grads + spot(i, j, grad_y, grad_x)
        acc += p[None, :] * tl.load(at, mask=(d < D) & reads[None, :], other=0.0).to(tl.float32)
    tl.store(grad_value + (unit * D + d) * N + n[None, :], acc, mask=(d < D) & (n < N)[None, :])


@triton.jit
def logit_grad(
    query, row, biases, value, lse, grad_out, delta,
    query_y, query_x, value_y, value_x, grad_y, grad_x,
    y, x, live, c, d, plane, tap, C, D, H, W, size,
):  # fmt: skip
    """Return the gradient of the logit of one tap at positions ``(y, x)``, and their queries ``(C, positions)``."""
    top, kind_y = window(y, H, size)
    left, kind_x = window(x, W, size)
    q = tl.load(query + spot(y, x, query_y, query_x), mask=(c < C) & live[None, :], other=0.0).to(tl.float32)
    at = grad_out + spot(y, x, grad_y, grad_x)
    grad = tl.load(at, mask=(d < D) & live[None, :], other=0.0).to(tl.float32)
    at = value + spot(top + tap // size, left + tap % size, value_y, value_x)
    v = tl.load(at, mask=(d < D) & live[None, :], other=0.0).to(tl.float32)
    level = tl.load(lse + plane + y * W + x, mask=live, other=0.0)
    products = tl.load(delta + plane + y * W + x, mask=live, other=0.0)
    p = tl.exp2(logit(q, row, biases, kind_y * size + kind_x, tap, size) - level)
    return tl.where(live, p * (tl.sum(grad * v, 0) - products), 0.0), q


@triton.jit
def kernels_grad_kernel(
    query, kernels, biases, value, lse, grad_out, delta, grad_kernels,
    query_b, query_c, query_y, query_x, value_b, value_c, value_y, value_x, grad_b, grad_c, grad_y, grad_x,
    G, C, D, H, W, S, K,
    C_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tap's row of the kernels ``(B, G, S S + K K, C)``, over all positions."""
    pair = tl.program_id(1).to(tl.int64)
    b, g = pair // G, pair % G
    entry = tl.program_id(0)
    half = tl.where(entry < S * S, 0, 1)
    size, tap = tl.where(half == 0, S, K), entry - half * S * S
    N = H * W
    c, d = tl.arange(0, C_TILE)[:, None], tl.arange(0, D_TILE)[:, None]
    row_at = (pair * (S * S + K * K) + entry) * C + c
    row = tl.load(kernels + row_at, mask=c < C, other=0.0)
    table = biases + half * G * S * S * S * S + g * size * size * size * size
    channel = (half * G + g) * D + d
    plane = ((b * 2 + half) * G + g) * N
    acc = tl.zeros([C_TILE, BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ds, q = logit_grad(
            query + b * query_b + (g * C + c) * query_c, row, table, value + b * value_b + channel * value_c,
            lse, grad_out + b * grad_b + channel * grad_c, delta,
            query_y, query_x, value_y, value_x, grad_y, grad_x,
            tl.minimum(n, N - 1) // W, tl.minimum(n, N - 1) % W, n < N, c, d, plane, tap, C, D, H, W, size,
        )  # fmt: skip
        acc += ds[None, :] * q
    tl.store(grad_kernels + row_at, tl.sum(acc, 1)[:, None], mask=c < C)


@triton.jit
def places(kind, length, kernel):
    """Return the first position along one side whose window is of a kind, and how many there are."""
    middle = kernel // 2
    first = tl.where(kind > middle, kernel - 1 - kind, tl.where(kind == middle, middle, length - 1 - kind))
    return first, tl.where(kind == middle, length - kernel + 1, 1)


@triton.jit
def biases_grad_kernel(
    query, kernels, biases, value, lse, grad_out, delta, grad_biases,
    query_b, query_c, query_y, query_x, value_b, value_c, value_y, value_x, grad_b, grad_c, grad_y, grad_x,
    B, G, C, D, H, W, S, K,
    C_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the bias of one tap in one kind of window, over the samples and positions of that kind."""
    entry, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    half = tl.where(entry < S * S * S * S, 0, 1)
    size, inner = tl.where(half == 0, S, K), entry - half * S * S * S * S
    tap, kind = inner % (size * size), inner // (size * size)
    first_y, rows = places(kind // size, H, size)
    first_x, columns = places(kind % size, W, size)
    table = half * G * S * S * S * S + g * size * size * size * size
    c, d = tl.arange(0, C_TILE)[:, None], tl.arange(0, D_TILE)[:, None]
    channel = (half * G + g) * D + d
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B * rows * columns, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = t < B * rows * columns
        b = tl.where(live, t // (rows * columns), 0).to(tl.int64)
        y, x = first_y + t // columns % rows, first_x + t % columns
        at = ((b * G + g) * (S * S + K * K) + half * S * S + tap)[None, :] * C + c
        ds, _ = logit_grad(
            query + b[None, :] * query_b + (g * C + c) * query_c,
            tl.load(kernels + at, mask=(c < C) & live[None, :], other=0.0), biases + table,
            value + b[None, :] * value_b + channel * value_c, lse,
            grad_out + b[None, :] * grad_b + channel * grad_c, delta,
            query_y, query_x, value_y, value_x, grad_y, grad_x,
            y, x, live, c, d, ((b * 2 + half) * G + g) * H * W, tap, C, D, H, W, size,
        )  # fmt: skip
        acc += ds
    tl.store(grad_biases + table + inner, tl.sum(acc, 0))


def tiles(query_width: int, value_width: int) -> dict[str, int]:
    """Return widths of tiles, positions of a program, and warps: few enough that a tile stays in the registers."""
    widths = {"C_TILE": padded(query_width), "D_TILE": padded(value_width)}
    widest = max(widths.values())
    return {**widths, "BLOCK": 32 if widest == 16 else 16, "num_warps": max(1, min(4, widest // 32))}


@torch.library.custom_op("saccade::mix_windows", mutates_args=())
def forward(
    query: Tensor, kernels: Tensor, biases: Tensor, value: Tensor, small: int, large: int
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        query: ``(B, G c, H, W)``, any strides.
        kernels: ``(B, G, S S + K K, c)``, float32, contiguous.
        biases: By kind of window, ``(G, S, S, S, S)`` and then ``(G, K, K, K, K)``, float32, flat.
        value: ``(B, 2 G d, H, W)``, any strides.
        small: S.
        large: K.

    Returns:
        Output as ``value``, contiguous; log-sum-exp to base 2, ``(B, 2, G, H W)``.
    """
    batch, groups, _, width = kernels.shape
    positions = query.shape[2] * query.shape[3]
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, 2, groups, positions, dtype=torch.float32, device=query.device)
    launch = tiles(width, value.shape[1] // (2 * groups))
    if batch > 0:
        mix_kernel[(triton.cdiv(positions, launch["BLOCK"]), batch * groups)](
            query, kernels, biases, value, out, lse, *query.stride(), *value.stride(),
            *sizes(query, kernels, value, small, large), **launch,
        )  # fmt: skip
    return out, lse


@forward.register_fake
def forward_fake(
    query: Tensor, kernels: Tensor, biases: Tensor, value: Tensor, small: int, large: int
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes, dtypes and strides."""
    lse = kernels.new_empty(kernels.shape[0], 2, kernels.shape[1], query.shape[2] * query.shape[3])
    return torch.empty_like(value, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("saccade::mix_windows_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    query: Tensor,
    kernels: Tensor,
    biases: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    small: int,
    large: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels; return the gradients of query, kernels, biases and value, contiguous."""
    batch, groups, taps, width = kernels.shape
    positions = query.shape[2] * query.shape[3]
    grad_query, grad_kernels, grad_biases, grad_value = empty(query, kernels, biases, value)
    if batch == 0:
        return grad_query, grad_kernels, grad_biases.zero_(), grad_value
    delta = torch.empty_like(lse)
    launch = tiles(width, value.shape[1] // (2 * groups))
    blocks = triton.cdiv(positions, launch["BLOCK"])
    strides = (*query.stride(), *value.stride(), *grad_out.stride())
    dims = sizes(query, kernels, value, small, large)
    query_grad_kernel[(blocks, batch * groups)](
        query, kernels, biases, value, out, lse, grad_out, grad_query, delta, *strides, *dims, **launch
    )
    value_grad_kernel[(blocks, batch * groups, 2)](
        query, kernels, biases, lse, grad_out, grad_value, *query.stride(), *grad_out.stride(), *dims, **launch
    )
    kernels_grad_kernel[(taps, batch * groups)](
        query, kernels, biases, value, lse, grad_out, delta, grad_kernels, *strides, *dims, **launch
    )
    biases_grad_kernel[(small**4 + large**4, groups)](
        query, kernels, biases, value, lse, grad_out, delta, grad_biases, *strides, batch, *dims, **launch
    )
    return grad_query, grad_kernels, grad_biases, grad_value


@backward.register_fake
def backward_fake(
    grad_out: Tensor,
    query: Tensor,
    kernels: Tensor,
    biases: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    small: int,
    large: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of the right shapes, dtypes and strides."""
    return empty(query, kernels, biases, value)


def empty(query: Tensor, kernels: Tensor, biases: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return contiguous tensors for the gradients."""
    grad_query, grad_value = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, value))
    return grad_query, torch.empty_like(kernels), torch.empty_like(biases), grad_value


def sizes(query: Tensor, kernels: Tensor, value: Tensor, small: int, large: int) -> tuple[int, ...]:
    """Return G, C, D, H, W, S, K, as every kernel takes them."""
    groups = kernels.shape[1]
    return groups, kernels.shape[3], value.shape[1] // (2 * groups), query.shape[2], query.shape[3], small, large


def keep(ctx, inputs, output) -> None:
    """Keep the arguments and both results."""
    *tensors, ctx.small, ctx.large = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad_out, grad_lse):
    """Return the gradients of all arguments; none flows through the log-sum-exp."""
    return (*backward(grad_out, *ctx.saved_tensors, ctx.small, ctx.large), None, None)


forward.register_autograd(differentiate, setup_context=keep)


NARROW = {"query", "value", "out", "grad_out", "grad_query", "grad_value"}  # the dtype of the call; the rest is float32
WIDE = {"kernels", "biases", "lse", "delta", "grad_kernels", "grad_biases"}


def build(kernel, width: int, dtype: str) -> Build:
    """Return the build of a kernel for one width of query and value."""
    launch = tiles(width, width)
    warps = launch.pop("num_warps")
    names = [name for name in kernel.arg_names if name not in launch]
    kinds = {name: f"*{dtype}" if name in NARROW else "*fp32" if name in WIDE else "i32" for name in names}
    # Gathered tiles and their 64-bit addresses are a few registers too many: 40 bytes on sm_80, the rest is triton 3.6.
    spill_bytes = {mix_kernel: 32, query_grad_kernel: 328, value_grad_kernel: 216, biases_grad_kernel: 80}
    return Build(kernel, kinds, launch, num_warps=warps, spill_bytes=spill_bytes.get(kernel, 0))


KERNELS = (mix_kernel, query_grad_kernel, value_grad_kernel, kernels_grad_kernel, biases_grad_kernel)
WIDTHS = ((16, "bf16"), (16, "fp32"), (32, "fp32"))  # published models have at most 16 channels in a group
BUILDS = [build(kernel, width, dtype) for kernel in KERNELS for width, dtype in WIDTHS]
