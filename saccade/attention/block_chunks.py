"""Block-sparse attention as a registered operator, and its CPU path: gather, attend and forget, a chunk at a time.

The keys that a few query blocks read are gathered into cache-sized copies, torch's fused kernel runs on them, and they
are gone. The backward pass gathers them again, so nothing that grows with the selection is ever kept. Where there are
few keys and a large share of them is selected, the kernel runs over all of them under a mask instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.attention.blocks import (
    BlockGeometry,
    BlockSelection,
    ceil_div,
    gather_rows,
    key_tokens,
    positional,
    visible_tokens,
)
from saccade.attention.sdpa import flash_cpu, flash_cpu_backward_lse, kernel_view, widen

__all__ = ["block_sparse", "block_sparse_backward"]

CHUNK_BYTES = 1 << 22  # of gathered keys, values and mask of the query blocks that are computed at once
FEW_KEYS = 512  # up to here the products with keys that are not selected cost less than gathering those that are ...
LARGE_SHARE = 4  # ... if at least one in so many is selected


@torch.library.custom_op("saccade::block_sparse", mutates_args=())
def block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: Tensor,
    entry_weight: Tensor | None,
    key_valid: Tensor | None,
    rule: list[int],
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Attend to the listed blocks; differentiable in query, key, value and weight through both results.

    Args:
        query: ``(B, H, L, D)``, no axis empty.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        entries: Codes of :func:`saccade.attention.blocks.block_entries`, ``(B, Hs, NQ, E)``.
        entry_weight: Factor of key and value of each entry, same shape, dtype of the query; not with ``triton``.
        key_valid: Bool ``(B, S)``.
        rule: block_q, block_k, q_offset, causal, sink and window of the selection.
        scale: Factor of the products.
        triton: Run the Triton kernels instead of the chunks.

    Returns:
        Output ``(B, H, L, Dv)``, its heads interleaved in memory, and log-sum-exp ``(B, H, L)``.
    """
    out, lse = new_results(query, value)
    selection = restore(rule, query, key, entries)
    if triton:
        from saccade.attention.kernels.block_sparse import forward

        forward(query, key, value, selection, key_valid, scale, out, lse)
        return out, lse
    for chunk in chunks(query, key, value, selection, entry_weight, key_valid):
        result, sums = flash_cpu(*chunk.inputs(query, key, value), chunk.mask, False, scale)
        chunk.rows(out).copy_(result[..., : value.shape[-1]])
        chunk.rows(lse).copy_(sums)
    return out, lse


@block_sparse.register_fake
def block_sparse_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: Tensor,
    entry_weight: Tensor | None,
    key_valid: Tensor | None,
    rule: list[int],
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes, dtypes and strides."""
    return new_results(query, value)


@torch.library.custom_op("saccade::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: Tensor,
    entry_weight: Tensor | None,
    key_valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rule: list[int],
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and weight (empty without one); see :func:`block_sparse`."""
    selection = restore(rule, query, key, entries)
    grad_weight = query.new_empty(0) if entry_weight is None else torch.zeros_like(entry_weight)
    if triton:
        from saccade.attention.kernels.block_sparse import backward

        grads = [interleaved(t, t.dtype) for t in (query, key, value)]
        backward(grad_out, grad_lse, query, key, value, selection, key_valid, scale, out, lse, *grads)
        return grads[0], grads[1], grads[2], grad_weight
    grad_query = interleaved(query, query.dtype)
    grad_key, grad_value = (interleaved(t, accumulator(t)).zero_() for t in (key, value))
    for chunk in chunks(query, key, value, selection, entry_weight, key_valid):
        inputs = chunk.inputs(query, key, value)
        width = inputs[0].shape[-1]
        of_query, of_key, of_value = flash_cpu_backward_lse(
            widen(chunk.rows(grad_out), width),
            None if grad_lse is None else chunk.rows(grad_lse),
            *inputs,
            chunk.mask,
            widen(chunk.rows(out), width),
            chunk.rows(lse),
            causal=False,
            scale=scale,
        )
        chunk.rows(grad_query).copy_(of_query[..., : query.shape[-1]])
        for total, grad, source in ((grad_key, of_key, key), (grad_value, of_value, value)):
            grad = grad[..., : source.shape[-1]]  # of the weighted rows
            if entry_weight is not None:
                chunk.add_weight_gradient(grad_weight, grad, chunk.gather(source))
            chunk.add_rows(total, chunk.weigh(grad))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_weight


@block_sparse_backward.register_fake
def block_sparse_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: Tensor,
    entry_weight: Tensor | None,
    key_valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rule: list[int],
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return results of the right shapes, dtypes and strides."""
    grad_weight = query.new_empty(0) if entry_weight is None else torch.empty_like(entry_weight)
    grads = [interleaved(t, t.dtype) for t in (query, key, value)]
    return grads[0], grads[1], grads[2], grad_weight


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep what the backward pass reads: the inputs and the results, nothing gathered."""
    query, key, value, entries, entry_weight, key_valid, *ctx.rule = inputs
    ctx.save_for_backward(query, key, value, entries, entry_weight, key_valid, *output)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Call the backward operator."""
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[6])
    grads = block_sparse_backward(grad_out, grad_lse, *saved, *ctx.rule)
    grad_weight = None if saved[4] is None else grads[3]
    return *grads[:3], None, grad_weight, None, None, None, None


block_sparse.register_autograd(backward, setup_context=save_for_backward)


class Chunk(NamedTuple):
    """A few query blocks of one sample, and the keys they read.

    Args:
        sample: Number in the batch.
        first: Number of the first query block.
        start: Its first query.
        blocks: C, number of query blocks.
        size: Queries in each.
        block_k: Keys in a block.
        tokens: ``(1, Hs, C, T)``, within S; ``None`` means all keys in their order.
        mask: Additive ``(C, 1 or H, 1 or size, T)``, or ``None`` if everything is seen.
        weight: Factor of each entry, ``(Hs, C, E)``.
    """

    sample: int
    first: int
    start: int
    blocks: int
    size: int
    block_k: int
    tokens: Tensor | None
    mask: Tensor | None
    weight: Tensor | None

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the queries' part of a tensor ``(B, H, L, ...)`` as ``(C, H, size, ...)``, a view."""
        part = tensor[self.sample, :, self.start : self.start + self.blocks * self.size]
        return part.view(part.shape[0], self.blocks, self.size, *part.shape[2:]).transpose(0, 1)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of keys or values that are read, ``(C, heads, T, width)``, heads Hkv or H."""
        whole = tensor[self.sample : self.sample + 1]
        if self.tokens is None:
            return whole
        heads = max(self.tokens.shape[1], tensor.shape[1])
        return gather_rows(whole, self.tokens, heads)[0].transpose(0, 1)

    def weigh(self, rows: Tensor) -> Tensor:
        """Multiply gathered rows by the weights of their entries."""
        if self.weight is None:
            return rows
        factor = self.weight.repeat_interleave(self.block_k, -1)  # (Hs, C, T)
        return rows * factor.transpose(0, 1).unsqueeze(-1)

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, and gathered and weighted key and value, as torch's kernel takes them."""
        width = max(key.shape[-1], value.shape[-1])
        return (
            kernel_view(self.rows(query), width),
            kernel_view(self.weigh(self.gather(key)), width),
            kernel_view(self.weigh(self.gather(value)), width),
        )

    def add_rows(self, total: Tensor, grad: Tensor) -> None:
        """Add gradients of gathered rows, ``(C, heads, T, width)``, to those of all rows, always in the same order."""
        if self.tokens is None:
            total[self.sample] += grad[0]
            return
        kv_heads, keys, width = total.shape[1:]
        rows = grad.to(total.dtype).transpose(1, 2).flatten(0, 1)  # (C * T, heads, width)
        table = total[self.sample].transpose(0, 1)  # (S, Hkv, width), contiguous
        if self.tokens.shape[1] == 1:
            table.view(keys, -1).index_add_(0, self.tokens.flatten(), rows.flatten(1))
        else:
            heads = rows.shape[1]
            kv_head = torch.arange(heads) // (heads // kv_heads)
            index = self.tokens[0].flatten(1).t() * kv_heads + kv_head  # (C * T, heads)
            table.view(-1, width).index_add_(0, index.flatten(), rows.flatten(0, 1))

    def add_weight_gradient(self, total: Tensor, grad: Tensor, rows: Tensor) -> None:
        """Add what the weighted rows, keys or values, contribute to the gradient of the weights ``(B, Hs, NQ, E)``."""
        product = (grad * rows).sum(-1).transpose(0, 1)  # (heads, C, T)
        if total.shape[1] == 1:
            product = product.sum(0, keepdim=True)
        part = total[self.sample, :, self.first : self.first + self.blocks, : product.shape[-1] // self.block_k]
        part += product.unflatten(-1, (-1, self.block_k)).sum(-1)


def chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    entry_weight: Tensor | None,
    key_valid: Tensor | None,
) -> Iterator[Chunk]:
    """Cut the query blocks into chunks; a shorter last block is one of its own."""
    entries, geometry = selection.indices, selection.geometry
    share = LARGE_SHARE * entries.shape[-1] * geometry.block_k
    if geometry.kv_len <= min(FEW_KEYS, share) and entry_weight is None and not positional(selection):
        for sample in range(query.shape[0]):
            mask = all_keys(entries[sample], geometry, None if key_valid is None else key_valid[sample], query)
            yield Chunk(sample, 0, 0, 1, geometry.q_len, geometry.block_k, None, mask, None)
        return
    whole, rest = divmod(geometry.q_len, geometry.block_q)
    runs = [(0, whole, geometry.block_q)] * (whole > 0) + [(whole, whole + 1, rest)] * (rest > 0)
    copies = 2 * max(entries.shape[1], key.shape[1]) * max(key.shape[-1], value.shape[-1])
    per_key = copies + (geometry.block_q * entries.shape[1] if positional(selection) else 1)
    step = max(1, CHUNK_BYTES // (query.element_size() * per_key * entries.shape[-1] * geometry.block_k))
    complete = bool((entries >= 0).all())
    plain = complete and key_valid is None and geometry.kv_len % geometry.block_k == 0 and not positional(selection)
    for sample in range(query.shape[0]):
        valid = None if key_valid is None else key_valid[sample : sample + 1]
        for begin, end, size in runs:
            for first in range(begin, end, step):
                blocks = min(step, end - first)
                part = entries[sample : sample + 1, :, first : first + blocks]
                if not complete:
                    part = part[..., : longest(part)]
                tokens, weight = key_tokens(part, geometry.block_k), None
                scores_mask: Tensor | None = None
                if not plain:
                    visible = visible_tokens(tokens, part, selection, valid, first, size)
                    scores_mask = None if bool(visible.all()) else additive(visible[0].transpose(0, 1), query)
                    tokens = tokens.clamp(0, geometry.kv_len - 1)
                if entry_weight is not None:
                    weight = entry_weight[sample, :, first : first + blocks, : part.shape[-1]]
                start = first * geometry.block_q
                yield Chunk(sample, first, start, blocks, size, geometry.block_k, tokens, scores_mask, weight)


def all_keys(entries: Tensor, geometry: BlockGeometry, valid: Tensor | None, query: Tensor) -> Tensor:
    """Return the mask of all queries of a sample over all keys, ``(1, 1 or H, L, S)``, as torch's kernel takes it.

    Args:
        entries: Codes, ``(Hs, NQ, E)``, no window and no sink among them.
        geometry: The selection's.
        valid: Bool ``(S,)``.
        query: ``(B, H, L, D)``; decides heads and dtype.
    """
    blocks = ceil_div(geometry.kv_len, geometry.block_k)
    table = query.new_full((*entries.shape[:2], blocks + 1), -torch.inf)  # the last column is for entries of nothing
    table = table.scatter_(2, torch.where(entries >= 0, entries >> 1, blocks), 0.0)[:, :, None, :blocks, None]
    mask = table.expand(-1, -1, geometry.block_q, -1, geometry.block_k).flatten(3).flatten(1, 2)
    mask = mask[:, : geometry.q_len, : geometry.kv_len]
    if valid is not None:
        mask = mask.masked_fill(~valid, -torch.inf)
    if mask.shape[0] not in (1, query.shape[1]):
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[0], 0)
    return mask.unsqueeze(0)


def longest(entries: Tensor) -> int:
    """Return how many leading entries hold all that is something, at least 1."""
    used = (entries >= 0).flatten(0, -2).any(0).nonzero()
    return 1 if used.numel() == 0 else int(used[-1]) + 1


def additive(visible: Tensor, query: Tensor) -> Tensor:
    """Return the mask ``(C, Hs, 1 or rows, T)`` as torch's kernel takes it: 0 or ``-inf``, one head or all of them."""
    if visible.shape[1] not in (1, query.shape[1]):
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)
    return torch.zeros(visible.shape, dtype=query.dtype).masked_fill(~visible, -torch.inf)


def new_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return unfilled output and log-sum-exp."""
    out = interleaved(query[..., :1].expand(*query.shape[:3], value.shape[-1]), query.dtype)
    return out, query.new_empty(query.shape[:3], dtype=accumulator(query))


def interleaved(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an unfilled ``(B, H, N, W)`` tensor whose memory is ``(B, N, H, W)``, as projections want it."""
    batch, heads, rows, width = like.shape
    return like.new_empty((batch, rows, heads, width), dtype=dtype).transpose(1, 2)


def accumulator(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def restore(rule: list[int], query: Tensor, key: Tensor, entries: Tensor) -> BlockSelection:
    """Return the selection that a rule's numbers stand for, with the codes of its entries in place of the indices."""
    block_q, block_k, q_offset, causal, sink, window = rule
    geometry = BlockGeometry(block_q, block_k, query.shape[2], key.shape[2], q_offset, bool(causal))
    return BlockSelection(entries, (entries >= 0).sum(-1), geometry, sink, window)
