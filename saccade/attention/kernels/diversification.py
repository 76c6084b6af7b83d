"""Triton kernels of attention diversification, for self-attention without bias, mask or logit multiplier.

The threshold acts on the mean over heads, so the heads are the inner loop of a tile; only vectors leave the forward
pass. Backward, the gradient G of that mean is the same for all heads: it is written once, ``(B, N, N)``, an H-th of the
maps or a 2 H-th, and freed when the gradients of query and key are done. Every sum has one order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.diversification_tiles import EPSILON, mean_row_gradient, thresholded_direction
from saccade.attention.kernels.runtime import INTERPRETING, Build, dot_precision, padded

__all__ = ["diversification_kernels", "row_lse"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, rows, stride, N, D, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows of one head, zeros beyond N and D."""
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    tile = tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def tile_weights(query, key, lse, columns, N, scale, PRECISION: tl.constexpr):
    """Return the attention weights of query rows and key rows; rows beyond N come with an lse of infinity."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
    weights = tl.exp2(scores - lse[:, None] * LOG2E)
    return tl.where(columns[None, :] < N, weights, 0.0)


@triton.jit
def head_mean(
    query, key, lse, rows, columns,
    query_head, query_row, key_head, key_row, H, GROUP, N, D, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return one tile of the maps' mean over heads; the pointers are those of one sample."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for h in range(H):
        head = tl.cast(h, tl.int64)
        q = load_rows(query + head * query_head, rows, query_row, N, D, WIDTH, UPCAST)
        k = load_rows(key + tl.cast(h // GROUP, tl.int64) * key_head, columns, key_row, N, D, WIDTH, UPCAST)
        row_lse = tl.load(lse + head * N + rows, mask=rows < N, other=float("inf"))
        total += tile_weights(q, k, row_lse, columns, N, scale, PRECISION)
    return total / H


@triton.jit
def row_lse_kernel(
    query, key, lse,
    query_batch, query_head, query_row, key_batch, key_head, key_row, H, GROUP, N, D, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the scores of a block of queries of one head."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    sample_head = pid // blocks
    sample, head = (sample_head // H).to(tl.int64), (sample_head % H).to(tl.int64)
    rows = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    q = load_rows(query + sample * query_batch + head * query_head, rows, query_row, N, D, WIDTH, UPCAST)
    key += sample * key_batch + (head // GROUP) * key_head
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        k = load_rows(key, columns, key_row, N, D, WIDTH, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(columns[None, :] < N, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))  # finite: each block has a key
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        peak = higher
    tl.store(lse + (sample * H + head) * N + rows, (peak + tl.log2(total)) / LOG2E, mask=rows < N)


@triton.jit
def column_mean_kernel(
    query, key, lse, column_mean,
    query_batch, query_head, query_row, key_batch, key_head, key_row, H, GROUP, N, D, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mean over queries and heads of the weights of a block of keys."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    columns = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    query, key, lse = query + sample * query_batch, key + sample * key_batch, lse + sample * H * N
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mean = head_mean(
            query, key, lse, rows, columns, query_head, query_row, key_head, key_row, H, GROUP, N, D, scale,
            WIDTH, BLOCK, PRECISION, UPCAST,
        )  # fmt: skip
        total += tl.sum(mean, 0)
    tl.store(column_mean + sample * N + columns, total / N, mask=columns < N)


@triton.jit
def row_kernel(
    query, key, lse, direction, row_norm, cosine,
    query_batch, query_head, query_row, key_batch, key_head, key_row, H, GROUP, N, D, scale, tau, epsilon,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Norm of each thresholded row of a block, and its cosine with the thresholded mean row."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    query, key, lse = query + sample * query_batch, key + sample * key_batch, lse + sample * H * N
    product = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mean = head_mean(
            query, key, lse, rows, columns, query_head, query_row, key_head, key_row, H, GROUP, N, D, scale,
            WIDTH, BLOCK, PRECISION, UPCAST,
        )  # fmt: skip
        kept = tl.where(mean > tau, mean, 0.0)
        along = tl.load(direction + sample * N + columns, mask=columns < N, other=0.0)
        product += tl.sum(kept * along[None, :], 1)
        square += tl.sum(kept * kept, 1)
    norm = tl.maximum(tl.sqrt(square), epsilon)
    tl.store(row_norm + sample * N + rows, norm, mask=rows < N)
    tl.store(cosine + sample * N + rows, product / norm, mask=rows < N)


@triton.jit
def pull_kernel(
    query, key, lse, row_norm, pull,
    query_batch, query_head, query_row, key_batch, key_head, key_row, H, GROUP, N, D, scale, tau,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum over queries of the thresholded rows, each divided by its norm, for a block of keys."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    columns = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    query, key, lse = query + sample * query_batch, key + sample * key_batch, lse + sample * H * N
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mean = head_mean(
            query, key, lse, rows, columns, query_head, query_row, key_head, key_row, H, GROUP, N, D, scale,
            WIDTH, BLOCK, PRECISION, UPCAST,
        )  # fmt: skip
        share = 1.0 / tl.load(row_norm + sample * N + rows, mask=rows < N, other=1.0)
        total += tl.sum(tl.where(mean > tau, mean, 0.0) * share[:, None], 0)
    tl.store(pull + sample * N + columns, total, mask=columns < N)


@triton.jit
def grad_mean_kernel(
    query, key, lse, direction, row_norm, cosine, through_mean_row, grad_mean,
    query_batch, query_head, query_row, key_batch, key_head, key_row, H, GROUP, N, D, scale, tau,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of G, the derivative of the sum of all cosines with respect to the maps' mean over heads."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    sample = (pid // (blocks * blocks)).to(tl.int64)
    rows = (pid // blocks % blocks) * BLOCK + tl.arange(0, BLOCK)
    columns = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mean = head_mean(
        query + sample * query_batch, key + sample * key_batch, lse + sample * H * N,
        rows, columns, query_head, query_row, key_head, key_row, H, GROUP, N, D, scale,
        WIDTH, BLOCK, PRECISION, UPCAST,
    )  # fmt: skip
    norm = tl.load(row_norm + sample * N + rows, mask=rows < N, other=1.0)
    alike = tl.load(cosine + sample * N + rows, mask=rows < N, other=0.0)
    along = tl.load(direction + sample * N + columns, mask=columns < N, other=0.0)
    through = tl.load(through_mean_row + sample * N + columns, mask=columns < N, other=0.0)
    gradient = (along[None, :] - mean * (alike / norm)[:, None]) / norm[:, None]
    gradient = tl.where(mean > tau, gradient, 0.0) + through[None, :]
    inside = (rows[:, None] < N) & (columns[None, :] < N)
    at = grad_mean + (sample * N + rows[:, None]) * N + columns[None, :]
    tl.store(at, gradient.to(grad_mean.dtype.element_ty), mask=inside)


@triton.jit
def load_grad_mean(grad_mean, rows, columns, N):
    """Load one tile of G of one sample."""
    inside = (rows[:, None] < N) & (columns[None, :] < N)
    return tl.load(grad_mean + rows[:, None].to(tl.int64) * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def grad_query_kernel(
    query, key, lse, grad_mean, factor, expected, grad_query,
    query_batch, query_head, query_row, key_batch, key_head, key_row, H, GROUP, N, D, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one head, and ``expected``, ``E_i = sum_j A_ij G_ij``, which dk needs too."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    sample_head = pid // blocks
    sample, head = (sample_head // H).to(tl.int64), (sample_head % H).to(tl.int64)
    rows = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    q = load_rows(query + sample * query_batch + head * query_head, rows, query_row, N, D, WIDTH, UPCAST)
    row_lse = tl.load(lse + (sample * H + head) * N + rows, mask=rows < N, other=float("inf"))
    key += sample * key_batch + (head // GROUP) * key_head
    grad_mean += sample * N * N
    mean = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        k = load_rows(key, columns, key_row, N, D, WIDTH, UPCAST)
        weights = tile_weights(q, k, row_lse, columns, N, scale, PRECISION)
        mean += tl.sum(weights * load_grad_mean(grad_mean, rows, columns, N), 1)
    tl.store(expected + (sample * H + head) * N + rows, mean, mask=rows < N)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, N, BLOCK):  # again, with E known: one sum over A (G - E) does not cancel
        columns = first + tl.arange(0, BLOCK)
        k = load_rows(key, columns, key_row, N, D, WIDTH, UPCAST)
        weights = tile_weights(q, k, row_lse, columns, N, scale, PRECISION)
        grad_scores = weights * (load_grad_mean(grad_mean, rows, columns, N) - mean[:, None])
        total += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    total *= scale * tl.load(factor)
    widths = tl.arange(0, WIDTH)
    at = grad_query + ((sample * H + head) * N + rows[:, None]) * D + widths[None, :]
    tl.store(at, total.to(grad_query.dtype.element_ty), mask=(rows[:, None] < N) & (widths[None, :] < D))


@triton.jit
def grad_key_kernel(
    query, key, lse, grad_mean, factor, expected, grad_key,
    query_batch, query_head, query_row, key_batch, key_head, key_row, H, GROUP, N, D, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of keys of one key head, from the query heads that read it, one after the other."""
    blocks = tl.cdiv(N, BLOCK)
    key_heads = H // GROUP
    pid = tl.program_id(0)
    sample_head = pid // blocks
    sample, key_index = (sample_head // key_heads).to(tl.int64), (sample_head % key_heads).to(tl.int64)
    columns = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    k = load_rows(key + sample * key_batch + key_index * key_head, columns, key_row, N, D, WIDTH, UPCAST)
    grad_mean += sample * N * N
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    query += sample * query_batch + key_index * GROUP * query_head
    lse += (sample * H + key_index * GROUP) * N
    expected += (sample * H + key_index * GROUP) * N
    for _ in range(GROUP):
        for first in range(0, N, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            q = load_rows(query, rows, query_row, N, D, WIDTH, UPCAST)
            row_lse = tl.load(lse + rows, mask=rows < N, other=float("inf"))
            mean = tl.load(expected + rows, mask=rows < N, other=0.0)
            weights = tile_weights(q, k, row_lse, columns, N, scale, PRECISION)
            grad_scores = weights * (load_grad_mean(grad_mean, rows, columns, N) - mean[:, None])
            total += tl.dot(tl.trans(grad_scores.to(q.dtype)), q, input_precision=PRECISION)
        query, lse, expected = query + query_head, lse + N, expected + N  # the next head of the group
    total *= scale * tl.load(factor)
    widths = tl.arange(0, WIDTH)
    at = grad_key + ((sample * key_heads + key_index) * N + columns[:, None]) * D + widths[None, :]
    tl.store(at, total.to(grad_key.dtype.element_ty), mask=(columns[:, None] < N) & (widths[None, :] < D))


class Launcher:
    """Query and key as the kernels read them, and what all launches share."""

    def __init__(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.query, self.key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
        self.batch, self.heads, self.tokens, self.width = query.shape
        self.key_heads, self.scale = key.shape[1], scale
        self.constants = tile_options(self.width, query.dtype)
        self.constants |= {"PRECISION": dot_precision(query.dtype), "UPCAST": INTERPRETING}

    def launch(self, kernel: Any, copies: int, tensors: tuple[Tensor, ...], *extra: float, pairs: bool = False) -> None:  # noqa: ANN401
        """Run one program for each block of tokens, or pair of blocks, of each of ``copies`` samples or heads."""
        blocks = triton.cdiv(self.tokens, self.constants["BLOCK"])
        programs = copies * blocks * (blocks if pairs else 1)
        sizes = (self.heads, self.heads // self.key_heads, self.tokens, self.width, self.scale, *extra)
        strides = (*self.query.stride()[:3], *self.key.stride()[:3])
        kernel[(programs,)](self.query, self.key, *tensors, *strides, *sizes, **self.constants)


def tile_options(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return tile sizes and launch options; float32 products outside tensor cores keep their operands in registers."""
    block = (64 if width <= 128 else 32) if dtype != torch.float32 else (32 if width <= 128 else 16)
    return {"WIDTH": padded(width), "BLOCK": block, "num_warps": 4 if width <= 64 else 8, "num_stages": 2}


@torch.library.custom_op("saccade::diversification_row_lse", mutates_args=())
def row_lse(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the log-sum-exp of the scores, float32 ``(B, H, N)``, without a gradient."""
    launcher = Launcher(query, key, scale)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    launcher.launch(row_lse_kernel, launcher.batch * launcher.heads, (lse,))
    return lse


@row_lse.register_fake
def row_lse_fake(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return a result of the right shape and dtype."""
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("saccade::diversification_kernels", mutates_args=())
def diversification_kernels(
    query: Tensor, key: Tensor, lse: Tensor, threshold: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss, differentiable in query and key.

    Args:
        query: ``(B, H, N, D)``, nothing empty.
        key: ``(B, Hkv, N, D)``.
        lse: ``(B, H, N)``, float32, contiguous, without a gradient.
        threshold: Multiple of ``1 / N``.
        scale: Factor of the products.

    Returns:
        Loss, and column mean, row norm and cosine stacked, ``(3, B, N)``, without a gradient.
    """
    launcher = Launcher(query, key, scale)
    batch, tokens = launcher.batch, launcher.tokens
    tau = threshold / tokens
    statistics = query.new_empty((3, batch, tokens), dtype=torch.float32)
    column_mean, row_norm, cosine = statistics.unbind(0)
    launcher.launch(column_mean_kernel, batch, (lse, column_mean))
    direction, _ = thresholded_direction(column_mean, tau)
    launcher.launch(row_kernel, batch, (lse, direction, row_norm, cosine), tau, EPSILON)
    return cosine.mean(), statistics


@diversification_kernels.register_fake
def diversification_kernels_fake(
    query: Tensor, key: Tensor, lse: Tensor, threshold: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    return query.new_empty((), dtype=torch.float32), query.new_empty(
        (3, query.shape[0], query.shape[2]), dtype=torch.float32
    )


@torch.library.custom_op("saccade::diversification_kernels_backward", mutates_args=())
def diversification_kernels_backward(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, statistics: Tensor, threshold: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key."""
    launcher = Launcher(query, key, scale)
    batch, heads, tokens = launcher.batch, launcher.heads, launcher.tokens
    tau = threshold / tokens
    column_mean, row_norm, cosine = statistics.unbind(0)
    pull = torch.empty_like(column_mean)
    launcher.launch(pull_kernel, batch, (lse, row_norm, pull), tau)
    direction, _ = thresholded_direction(column_mean, tau)
    through_mean_row = mean_row_gradient(column_mean, cosine, pull, tau)
    # bfloat16 has float32's range: entries of G reach N / threshold, and a rounding of each is that of half attention.
    grad_mean = query.new_empty(
        (batch, tokens, tokens), dtype=torch.float32 if query.dtype == torch.float32 else torch.bfloat16
    )
    launcher.launch(
        grad_mean_kernel, batch, (lse, direction, row_norm, cosine, through_mean_row, grad_mean), tau, pairs=True
    )
    factor = (grad / (batch * tokens * heads)).float()
    expected = torch.empty_like(lse)
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    launcher.launch(grad_query_kernel, batch * heads, (lse, grad_mean, factor, expected, grad_query))
    launcher.launch(grad_key_kernel, batch * launcher.key_heads, (lse, grad_mean, factor, expected, grad_key))
    return grad_query, grad_key


@diversification_kernels_backward.register_fake
def diversification_kernels_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, statistics: Tensor, threshold: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    return query.new_empty(query.shape), key.new_empty(key.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep the inputs and the statistics: vectors, no map."""
    query, key, lse, ctx.threshold, ctx.scale = inputs
    ctx.save_for_backward(query, key, lse, output[1])
    ctx.set_materialize_grads(False)


def kernel_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Return the gradients of the forward operator's arguments."""
    if grad is None:
        return (None,) * 5
    query, key, lse, statistics = ctx.saved_tensors
    return (
        *diversification_kernels_backward(grad, query, key, lse, statistics, ctx.threshold, ctx.scale),
        None,
        None,
        None,
    )


diversification_kernels.register_autograd(kernel_gradients, setup_context=save_for_backward)


def build(kernel: Any, width: int, dtype: torch.dtype) -> Build:  # noqa: ANN401
    """Describe one kernel as it is launched for a head width and dtype."""
    options = tile_options(width, dtype)
    launch = options.pop("num_warps"), options.pop("num_stages")
    constants = {**options, "PRECISION": "ieee", "UPCAST": False}
    strides = ("query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row")
    tensors = ("query", "key", "grad_mean", "grad_query", "grad_key")
    kinds = dict.fromkeys((*strides, "D"), "i32:16") | dict.fromkeys(("H", "GROUP", "N"), "i32")
    kinds |= dict.fromkeys(("scale", "tau", "epsilon"), "fp32")
    kinds |= dict.fromkeys(tensors, "*bf16" if dtype == torch.bfloat16 else "*fp32")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
    # Two registers: grad_key_kernel at width 64 on sm_80, pull_kernel in float32 on sm_90.
    return Build(kernel, signature, constants, *launch, spill_bytes=8)


BUILDS = [
    build(kernel, width, dtype)
    for kernel in (
        row_lse_kernel,
        column_mean_kernel,
        row_kernel,
        pull_kernel,
        grad_mean_kernel,
        grad_query_kernel,
        grad_key_kernel,
    )
    for width, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32))
]
