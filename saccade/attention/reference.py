"""The literal forms: every operator as its equation says, in float32 (float64 for float64 input), scores in full.

They define what is correct, can run everything everywhere, and are what TorchScript compiles where the fast form is a
custom operator. Nothing here is fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.merge import AttentionLSE

__all__ = ["attention", "attention_lse"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute ``dropout(softmax(scale * q k^T + bias)) v``; arguments as :func:`saccade.attention.attention`.

    Returns:
        ``(B, H, L, Dv)``, dtype of ``query``.
    """
    weights, _ = softmax_weights(query, key, mask, bias, causal, scale)
    weights = F.dropout(weights, dropout_p)
    return (weights @ per_query_head(value, query)).to(query.dtype)


def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> AttentionLSE:
    """Compute attention and ``log(sum_j exp(score_ij))``; arguments as :func:`saccade.attention.attention_lse`.

    Returns:
        Output ``(B, H, L, Dv)`` and log-sum-exp ``(B, H, L)``.
    """
    weights, lse = softmax_weights(query, key, mask, bias, causal, scale)
    return AttentionLSE((weights @ per_query_head(value, query)).to(query.dtype), lse)


def softmax_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return the attention weights ``(B, H, L, S)`` and the log-sum-exp of the scores ``(B, H, L)``.

    A query that sees no key has weights 0, log-sum-exp ``-inf`` and no gradient.
    """
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    scores = scale * query.to(wide(query)) @ per_query_head(key, query).transpose(-1, -2)  # (B, H, L, S)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if causal:
        visible = visible.tril(scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        visible = visible & mask
    scores = scores.masked_fill(~visible, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)  # (B, H, L, 1)
    lse = torch.logsumexp(scores.masked_fill(blind, 0.0), -1, keepdim=True)  # finite, so no gradient is NaN
    weights = torch.exp(scores - lse)
    return weights, lse.masked_fill(blind, -torch.inf).squeeze(-1)


def per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat each key or value head for the query heads that read it, in the dtype that is computed in."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1).to(wide(query))


def wide(tensor: Tensor) -> torch.dtype:
    """Return float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
