"""Keys in class order: what of a partitioned problem can go through a fused kernel at once, and in which blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Group", "Part", "blocks", "make_groups"]

CHUNK = 128  # queries per block where each sees another number of keys


class Part(NamedTuple):
    """Contiguous keys of one class.

    Args:
        row: Where its result belongs: its class, or the row after the last class for the weighted one.
        start: First key, in class order.
        stop: One after the last key.
        seen: How many of these keys, the first ones, each query sees, ``(L,)``; ``None`` means all.
        log_weight: Additive score of each key, ``(stop - start,)``.
    """

    row: int
    start: int
    stop: int
    seen: Tensor | None
    log_weight: Tensor | None


class Group(NamedTuple):
    """Samples and heads whose keys are classed alike.

    Args:
        batch: Samples.
        heads: Query heads.
        kv_heads: Key and value heads that these read.
        order: The keys in class order, ``(S,)``; ``None`` means that they are taken as they stand.
        parts: The classes that have keys; those with a log weight last.
    """

    batch: slice
    heads: slice
    kv_heads: slice
    order: Tensor | None
    parts: list[Part]

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the key or value heads that the group reads, in class order."""
        tensor = tensor[self.batch, self.kv_heads]
        return tensor if self.order is None else tensor.index_select(2, self.order)

    def add_keys(self, total: Tensor, found: Tensor, dim: int) -> None:
        """Add what was found for the keys in class order, along ``dim``, to what belongs to them as they stand."""
        total += found if self.order is None else found.index_select(dim, self.order.argsort())


def make_groups(
    query: Tensor,
    key: Tensor,
    key_class: Tensor,
    num_classes: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_log_weight: Tensor | None,
    weighted_class: int,
) -> Iterator[Group]:
    """Yield what can go through the kernel at once: everything if classes, weights and positions are shared."""
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    given = (key_class, query_positions, key_positions, key_log_weight)
    by_sample = any(tensor is not None and tensor.dim() > 1 and differs(tensor, 0) for tensor in given)
    by_head = (key_class.dim() == 3 and differs(key_class, 1)) or (
        key_log_weight is not None and key_log_weight.dim() == 3
    )
    for samples in [slice(b, b + 1) for b in range(batch)] if by_sample else [slice(0, batch)]:
        for own in [slice(h, h + 1) for h in range(heads)] if by_head else [slice(0, heads)]:
            labels = key_class[samples.start] if key_class.dim() == 2 else key_class[samples.start, own.start]
            log_weight, positions = at(key_log_weight, samples, own), at(key_positions, samples, own)
            order, spans = arrange(labels, num_classes, positions)
            log_weight = log_weight if order is None or log_weight is None else log_weight[order]
            limits = at(query_positions, samples, own)
            if limits is not None:
                positions = torch.arange(key.shape[2]) if positions is None else positions
                positions = positions if order is None else positions[order]
            parts = []
            for label, start, stop in spans:
                seen = None
                if limits is not None and positions is not None:
                    seen = torch.searchsorted(positions[start:stop].contiguous(), limits, right=True)
                    seen = None if bool((seen == stop - start).all()) else seen
                parts.append(Part(label, start, stop, seen, None))
            if log_weight is not None:
                parts += [
                    part._replace(row=num_classes, log_weight=log_weight[part.start : part.stop])
                    for part in parts
                    if part.row == weighted_class
                ]
            yield Group(samples, own, slice(own.start // group, (own.stop - 1) // group + 1), order, parts)


def differs(tensor: Tensor, dim: int) -> bool:
    """Return whether the entries along an axis are not all the same."""
    return tensor.shape[dim] > 1 and not bool((tensor == tensor.narrow(dim, 0, 1)).all())


def at(tensor: Tensor | None, samples: slice, heads: slice) -> Tensor | None:
    """Return the last axis of ``(N,)``, ``(B, N)`` or ``(B, H, N)`` for the first of some samples and heads."""
    if tensor is None or tensor.dim() == 1:
        return tensor
    return tensor[samples.start] if tensor.dim() == 2 else tensor[samples.start, heads.start]


def arrange(labels: Tensor, num_classes: int, positions: Tensor | None) -> tuple[Tensor | None, list[tuple[int, ...]]]:
    """Return keys ordered by class, then position, and per class ``(label, start, stop)`` in that order.

    The order is ``None`` where the keys can stay: in few contiguous runs, each by ascending position.
    """
    ascending = positions is None or bool((positions[1:] >= positions[:-1]).all())
    edges = [0, *((labels[1:] != labels[:-1]).nonzero().squeeze(1) + 1).tolist(), labels.shape[0]]
    if ascending and len(edges) <= num_classes + 3:  # as many runs as classes, and one each before and after them
        runs = zip(labels[edges[:-1]].tolist(), edges, edges[1:], strict=False)
        return None, [run for run in runs if 0 <= run[0] < num_classes]
    order = torch.arange(labels.shape[0]) if positions is None or ascending else positions.argsort(stable=True)
    labels, by_class = labels[order].sort(stable=True)
    starts = torch.searchsorted(labels, torch.arange(num_classes + 1)).tolist()
    spans = zip(range(num_classes), starts, starts[1:], strict=False)
    return order[by_class], [span for span in spans if span[1] < span[2]]


def blocks(part: Part, queries: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield rows of queries, the keys that they see, and the additive mask between them."""
    if part.seen is None:
        mask = None if part.log_weight is None else part.log_weight.unsqueeze(0).to(dtype)
        yield slice(0, queries), slice(part.start, part.stop), mask
        return
    chunk = min(CHUNK, (queries + 1) // 2)
    for first in range(0, queries, chunk):
        seen = part.seen[first : first + chunk]
        most = max(int(seen.max()), 1)  # the kernel wants a key
        hidden = torch.arange(most) >= seen.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype) if part.log_weight is None else part.log_weight[:most].to(dtype)
        mask = mask.masked_fill(hidden, -torch.inf)
        yield slice(first, first + seen.shape[0]), slice(part.start, part.start + most), mask
