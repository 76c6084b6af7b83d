"""Partial attention results over disjoint sets of keys, and their exact union."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import ShapeError

__all__ = ["AttentionLSE", "merge_partials"]


class AttentionLSE(NamedTuple):
    """Attention output and the log-sum-exp of its scores.

    Args:
        out: ``(B, H, L, Dv)``, dtype of the query.
        lse: ``(B, H, L)``, natural logarithm, float32 (float64 for float64 input); ``-inf`` where nothing is visible.
    """

    out: Tensor
    lse: Tensor


def merge_partials(partials: Sequence[tuple[Tensor, Tensor]]) -> AttentionLSE:
    """Unite attention over disjoint sets of keys into attention over all of them, exactly and differentiably.

    ``lse = log sum_c exp(lse_c)`` and ``out = sum_c exp(lse_c - lse) out_c``.

    Args:
        partials: One or more results ``(out, lse)`` of the same queries, shapes ``(..., L, Dv)`` and ``(..., L)``, as
            :func:`attention_lse` gives them. A part in which a query saw nothing (``lse = -inf``) counts for nothing.

    Returns:
        Output in the dtype of the parts, and log-sum-exp.

    Raises:
        ShapeError: If there is no part.
    """
    if not partials:
        raise ShapeError("merge_partials needs at least one partial result; got an empty sequence.")
    lses = torch.stack([lse for _, lse in partials])  # (C, ..., L)
    peak = lses.detach().amax(0)
    blind = peak == -torch.inf
    weights = torch.exp(lses - peak.masked_fill(blind, 0.0))  # all zero for a query that saw nothing anywhere
    total = weights.sum(0).masked_fill(blind, 1.0)
    merged = torch.zeros_like(partials[0][0], dtype=lses.dtype)
    for (out, _), weight in zip(partials, weights, strict=True):
        merged = merged + (weight / total).unsqueeze(-1) * out
    lse = (peak + torch.log(total)).masked_fill(blind, -torch.inf)
    return AttentionLSE(merged.to(partials[0][0].dtype), lse)
