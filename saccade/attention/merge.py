"""Partial attention results over disjoint sets of keys, and their exact union."""

# No `from __future__ import annotations` here: TorchScript does not resolve quoted annotations of a NamedTuple.
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import ShapeError

__all__ = ["AttentionEntropy", "AttentionLSE", "merge_partials"]


class AttentionLSE(NamedTuple):
    """Attention output and the log-sum-exp of its scores.

    Args:
        out: ``(B, H, L, Dv)``, dtype of the query.
        lse: ``(B, H, L)``, natural logarithm, float32 (float64 for float64 input); ``-inf`` where nothing is visible.
    """

    out: Tensor
    lse: Tensor


class AttentionEntropy(NamedTuple):
    """Attention output, the log-sum-exp of its scores and the entropy of its weights.

    Args:
        out: ``(B, H, L, Dv)``, dtype of the query.
        lse: ``(B, H, L)``, as in :class:`AttentionLSE`.
        entropy: ``(B, H, L)``, nats, float32 (float64 for float64 input); 0 where one key or none is visible.
    """

    out: Tensor
    lse: Tensor
    entropy: Tensor


def merge_partials(partials: list[AttentionLSE]) -> AttentionLSE:
    """Unite attention over disjoint sets of keys into attention over all of them, exactly and differentiably.

    ``lse = log sum_c exp(lse_c)`` and ``out = sum_c exp(lse_c - lse) out_c``.

    Args:
        partials: One or more results of the same queries, shapes ``(..., L, Dv)`` and ``(..., L)``. A part in which a
            query saw nothing (``lse = -inf``) counts for nothing.

    Returns:
        Output in the dtype of the parts, and log-sum-exp.

    Raises:
        ShapeError: If there is no part.
    """
    if len(partials) == 0:
        raise ShapeError("merge_partials needs at least one partial result; got an empty list.")
    lses = torch.stack([part.lse for part in partials])  # (C, ..., L)
    peak = lses.detach().amax(0)
    blind = peak == -torch.inf
    weights = torch.exp(lses - peak.masked_fill(blind, 0.0))  # all zero for a query that saw nothing anywhere
    total = weights.sum(0).masked_fill(blind, 1.0)
    out = torch.zeros_like(partials[0].out, dtype=lses.dtype)
    for i in range(len(partials)):
        out = out + (weights[i] / total).unsqueeze(-1) * partials[i].out
    lse = (peak + torch.log(total)).masked_fill(blind, -torch.inf)
    return AttentionLSE(out.to(partials[0].out.dtype), lse)
