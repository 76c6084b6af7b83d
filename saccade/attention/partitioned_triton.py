"""The Triton path of :func:`saccade.attention.partitioned_attention`: classes as parts of one launch, then their merge.

Keys stay where they are; the kernel reads them through a permutation into class order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.attention.flash import softmax_parts
from saccade.attention.key_classes import PartitionedAttention

__all__ = ["partitioned_triton"]


def partitioned_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    mask: Tensor | None,
    causal: bool,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float | None,
    key_log_weight: Tensor | None,
    weighted_class: int | None,
) -> PartitionedAttention:
    """Attend to every class by itself in one launch, and scale each by its share of the common normaliser.

    Args:
        query: As in :func:`saccade.attention.partitioned_attention`, like all others.
        key: As there.
        value: As there.
        key_class: Labels ``(B, S)`` or ``(B, H, S)``.
        num_classes: As there.
        mask: As there; best without what only excludes keys, which labels do better.
        causal: As there.
        query_positions: As there.
        key_positions: As there.
        scale: As there.
        key_log_weight: As there.
        weighted_class: As there.
    """
    labels = key_class if key_class.ndim == 3 else key_class.unsqueeze(1)  # (B, Hs, S)
    key_bias = None
    if key_log_weight is not None:
        key_bias = key_log_weight if key_log_weight.ndim == 3 else key_log_weight.unsqueeze(1)
        heads = max(labels.shape[1], key_bias.shape[1])
        labels, key_bias = labels.expand(-1, heads, -1), key_bias.float().expand(-1, heads, -1).contiguous()
    order, bounds = class_order(labels, num_classes, key_positions)
    out, lse = softmax_parts(
        query,
        key,
        value,
        order,
        bounds,
        mask=mask,
        query_positions=as_rows(query_positions),
        key_positions=as_rows(key_positions),
        key_bias=key_bias,
        weighted_part=0 if weighted_class is None else weighted_class,
        causal=causal,
        scale=scale,
    )
    return merge_classes(out, lse, num_classes)


def as_rows(positions: Tensor | None) -> Tensor | None:
    """Return positions ``(L,)`` or ``(B, L)`` as ``(1 or B, L)``."""
    return positions.unsqueeze(0) if positions is not None and positions.ndim == 1 else positions


def class_order(labels: Tensor, num_classes: int, key_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the keys ordered by class, then position, int32 ``(B, Hs, S)``, and where each class begins.

    The second is int32 ``(B, Hs, C + 1)``. Keys of no class are at the ends.
    """
    by_position = None
    if key_positions is not None:
        by_position = key_positions.argsort(dim=-1, stable=True).unsqueeze(-2).expand(labels.shape)
        labels = labels.gather(-1, by_position)
    labels, order = labels.sort(dim=-1, stable=True)
    order = order if by_position is None else by_position.gather(-1, order)
    firsts = torch.arange(num_classes + 1, device=labels.device).expand(*labels.shape[:2], -1)
    return order.int().contiguous(), torch.searchsorted(labels, firsts.contiguous()).int()


def merge_classes(out: Tensor, lse: Tensor, num_classes: int) -> PartitionedAttention:
    """Scale partial results by their share of the common normaliser.

    Args:
        out: ``(B, H, P, L, Dv)``, one part for each class, and one more if a class is weighted.
        lse: ``(B, H, P, L)``.
        num_classes: C.
    """
    peak = lse[:, :, :num_classes].detach().amax(2, keepdim=True)
    blind = peak == -torch.inf
    mass = torch.exp(lse - peak.masked_fill(blind, 0.0))
    total = mass[:, :, :num_classes].sum(2, keepdim=True).masked_fill(blind, 1.0)
    mass = mass / total
    scaled = out * mass.unsqueeze(-1)
    class_out = scaled[:, :, :num_classes]
    weighted = lse.shape[2] > num_classes
    return PartitionedAttention(
        out=class_out.sum(2).to(out.dtype),
        lse=(peak + total.log()).masked_fill(blind, -torch.inf).squeeze(2),
        class_out=class_out.to(out.dtype),
        class_mass=mass[:, :, :num_classes],
        weighted_out=scaled[:, :, -1].to(out.dtype) if weighted else None,
        weighted_mass=mass[:, :, -1] if weighted else None,
    )
