"""The literal form of block-sparse attention: the mask that a selection stands for, and the scores in full.

It belongs to :mod:`saccade.attention.reference`, and defines what is correct.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.attention.blocks import BlockSelection
from saccade.attention.merge import AttentionLSE
from saccade.attention.reference import per_query_head, softmax_and_lse, wide

__all__ = ["block_sparse_attention", "block_sparse_attention_lse"]


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_logit: Tensor | None = None,
    block_weight: Tensor | None = None,
) -> Tensor:
    """Return the output of :func:`block_sparse_attention_lse`."""
    return block_sparse_attention_lse(
        query, key, value, selection, scale, key_valid, extra_key, extra_value, extra_logit, block_weight
    ).out


def block_sparse_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_logit: Tensor | None = None,
    block_weight: Tensor | None = None,
) -> AttentionLSE:
    """Compute attention under the mask that a selection of blocks stands for.

    Arguments as :func:`saccade.attention.block_sparse_attention_lse`.

    Returns:
        Output ``(B, H, L, Dv)`` and log-sum-exp ``(B, H, L)``.
    """
    g = selection.geometry
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    visible, weight = selected_keys(selection, block_weight, query.shape[1])  # (B, H, L, S)
    position = torch.arange(g.q_len, device=query.device).unsqueeze(-1) + g.q_offset  # (L, 1)
    j = torch.arange(g.kv_len, device=query.device)
    visible = visible | (j < selection.sink) | ((position - j).abs() < selection.window)
    if g.causal:
        visible = visible & (j <= position)
    if key_valid is not None:
        visible = visible & key_valid[:, None, None]
    query_wide, values = query.to(wide(query)), per_query_head(value, query)
    scores = scale * query_wide @ per_query_head(key, query).transpose(-1, -2)
    if weight is not None:  # the key and the value are multiplied by the weight of their block
        scores = scores * weight
    scores = scores.masked_fill(~visible, -torch.inf)
    if extra_key is not None and extra_value is not None:  # one more column, with its own key for each query block
        extra = [t.expand(-1, -1, g.q_blocks, -1) for t in (extra_key, extra_value)]
        rows = [per_query_head(t, query).repeat_interleave(g.block_q, 2)[:, :, : g.q_len] for t in extra]
        column = scale * (query_wide * rows[0]).sum(-1)  # (B, H, L)
        if extra_logit is not None:
            logit = extra_logit.to(scores.dtype).expand(-1, -1, g.q_blocks)
            column = column + logit.repeat_interleave(g.block_q, 2)[:, :, : g.q_len]
        scores = torch.cat([scores, column.unsqueeze(-1)], -1)
    weights, lse = softmax_and_lse(scores)
    shares = weights[..., : g.kv_len]
    out = (shares if weight is None else shares * weight) @ values
    if extra_key is not None and extra_value is not None:
        out = out + weights[..., g.kv_len :] * rows[1]
    return AttentionLSE(out.to(query.dtype), lse)


def selected_keys(selection: BlockSelection, block_weight: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """Return which keys lie in a selected block, bool ``(B, H, L, S)``, and the weight of each key, 1 elsewhere."""
    g = selection.geometry
    group = heads // selection.indices.shape[1]
    listed = torch.arange(selection.indices.shape[-1], device=selection.indices.device) < selection.counts.unsqueeze(-1)
    blocks = torch.arange(g.k_blocks, device=selection.indices.device)
    chosen = (selection.indices.unsqueeze(-1) == blocks) & listed.unsqueeze(-1)  # (B, Hs, NQ, K, NB)

    def per_pair(table: Tensor) -> Tensor:  # (B, Hs, NQ, NB) -> (B, H, L, S)
        table = table.repeat_interleave(group, 1).repeat_interleave(g.block_q, 2)[:, :, : g.q_len]
        return table.repeat_interleave(g.block_k, 3)[..., : g.kv_len]

    weight = None
    if block_weight is not None:
        weight = per_pair(torch.where(chosen, block_weight.unsqueeze(-1) - 1.0, 0.0).sum(-2) + 1.0)
    return per_pair(chosen.any(-2)), weight
