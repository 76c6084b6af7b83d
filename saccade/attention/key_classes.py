"""Classes of keys: how they are given as contiguous ranges, and what attention that tells them apart returns."""

# No `from __future__ import annotations` here: TorchScript does not resolve quoted annotations of a NamedTuple.
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import ShapeError

__all__ = ["PartitionedAttention", "Segments", "by_class"]


class PartitionedAttention(NamedTuple):
    """Attention taken apart by class of key; ``p`` are the attention weights over all keys that take part.

    Args:
        out: ``sum_j p_ij value[j]``, the ordinary attention, ``(B, H, L, Dv)``, dtype of the query.
        lse: Log-sum-exp of the scores, ``(B, H, L)``, float32 (float64 for float64 input).
        class_out: The part of ``out`` that comes from each class, ``(B, H, C, L, Dv)``, dtype of the query.
        class_mass: The part of the weights that falls on each class, ``(B, H, C, L)``, dtype of ``lse``.
        weighted_out: ``sum_j p_ij exp(w_j) value[j]`` over the weighted class, ``(B, H, L, Dv)``; ``None`` without one.
        weighted_mass: ``sum_j p_ij exp(w_j)`` over the weighted class, ``(B, H, L)``; ``None`` without one.
    """

    out: Tensor
    lse: Tensor
    class_out: Tensor
    class_mass: Tensor
    weighted_out: Tensor | None
    weighted_mass: Tensor | None


def by_class(out: Tensor, lse: Tensor, part_out: Tensor, part_mass: Tensor, num_classes: int) -> PartitionedAttention:
    """Return the result from parts ``(B, H, P, ...)``: the classes and, if there is one more, the weighted class."""
    if part_mass.shape[2] == num_classes:
        return PartitionedAttention(out, lse, part_out, part_mass, None, None)
    class_out, weighted_out = part_out.split([num_classes, 1], 2)
    class_mass, weighted_mass = part_mass.split([num_classes, 1], 2)
    return PartitionedAttention(out, lse, class_out, class_mass, weighted_out.squeeze(2), weighted_mass.squeeze(2))


@dataclass(frozen=True)
class Segments:
    """Classes as contiguous ranges of keys, the same in every sample and head.

    Args:
        bounds: Ascending key indices; segment ``r`` holds the keys ``bounds[r] <= j < bounds[r + 1]``. Keys before the
            first and from the last bound on are excluded. A segment may be empty.
        labels: Class of each segment, ``-1`` = excluded; several may have one class. ``None``: segment ``r`` is class
            ``r``.

    Raises:
        ShapeError: If the bounds are fewer than two, negative or descending, or not one more than the labels.

    Example:
        >>> Segments((0, 35, 611, 640), labels=(0, 1, 0)).key_class(640).bincount()  # text, image, text
        tensor([ 64, 576])
    """

    bounds: tuple[int, ...]
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] < 0 or list(self.bounds) != sorted(self.bounds):
            raise ShapeError(f"Segments needs at least two bounds, ascending from 0 or more; got {self.bounds}.")
        if self.labels is not None and len(self.labels) != len(self.bounds) - 1:
            raise ShapeError(f"Segments needs one label per segment, {len(self.bounds) - 1}; got {self.labels}.")

    def key_class(self, keys: int, device: torch.device | None = None) -> Tensor:
        """Return the class of each of the first ``keys`` keys, int64 ``(keys,)``."""
        labels = range(len(self.bounds) - 1) if self.labels is None else self.labels
        key_class = torch.full((keys,), -1, device=device)
        for label, start, stop in zip(labels, self.bounds, self.bounds[1:], strict=False):
            key_class[start:stop] = label
        return key_class
