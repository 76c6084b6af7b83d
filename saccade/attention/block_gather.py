"""Block-sparse attention made of torch's own operators: every selected key is gathered, as the literal papers do.

It takes K times the memory of keys and values, but it can be exported and scripted, and runs on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention import reference
from saccade.attention.blocks import BlockSelection, block_entries, gather_rows, key_tokens, visible_tokens
from saccade.attention.merge import AttentionLSE
from saccade.attention.sdpa import sdpa_attention

__all__ = ["gather_attention", "gather_attention_lse"]


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float | None,
    key_valid: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_logit: Tensor | None,
    block_weight: Tensor | None,
) -> Tensor:
    """Run SDPA with one sample for each query block; made of torch's own operators, also for TorchScript."""
    queries, keys, values, mask, bias = gathered(
        query, key, value, selection, key_valid, extra_key, extra_value, extra_logit, block_weight
    )
    return whole(sdpa_attention(queries, keys, values, mask, bias, False, scale, 0.0), query)


def gather_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float | None,
    key_valid: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_logit: Tensor | None,
    block_weight: Tensor | None,
) -> AttentionLSE:
    """Do the same with the literal softmax, which has a log-sum-exp."""
    queries, keys, values, mask, bias = gathered(
        query, key, value, selection, key_valid, extra_key, extra_value, extra_logit, block_weight
    )
    out, lse = reference.attention_lse(queries, keys, values, mask, bias, False, scale)
    return AttentionLSE(whole(out, query), whole(lse.unsqueeze(-1), query).squeeze(-1))


def gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    key_valid: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_logit: Tensor | None,
    block_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return query, key, value, mask and bias of the same attention with each query block as a sample of its own.

    Shapes ``(B * NQ, H, block_q, D)``, ``(B * NQ, Hkv or H, T, D)``, a mask that broadcasts, and the extra key as the
    last of the T keys.
    """
    g = selection.geometry
    entries, weight = block_entries(selection, block_weight)
    tokens = key_tokens(entries, g.block_k)
    visible = visible_tokens(tokens, entries, selection, key_valid, 0, g.block_q)
    tokens = tokens.clamp(min=0, max=g.kv_len - 1)
    batch, shared, blocks = tokens.shape[:3]
    heads = max(shared, key.shape[1])
    keys, values = gather_rows(key, tokens, heads), gather_rows(value, tokens, heads)  # (B, heads, NQ, T, D)
    if weight is not None:
        factor = weight.repeat_interleave(g.block_k, -1).unsqueeze(-1).to(key.dtype)
        keys, values = keys * factor, values * factor
    bias: Tensor | None = None
    if extra_key is not None and extra_value is not None:
        group = heads // key.shape[1]
        extra_key = extra_key.to(key.dtype).expand(batch, key.shape[1], blocks, -1).repeat_interleave(group, 1)
        extra_value = extra_value.to(key.dtype).expand(batch, key.shape[1], blocks, -1).repeat_interleave(group, 1)
        keys = torch.cat([keys, extra_key.unsqueeze(3)], 3)
        values = torch.cat([values, extra_value.unsqueeze(3)], 3)
        visible = F.pad(visible, [0, 1], value=True)
        if extra_logit is not None:
            logit = extra_logit.expand(batch, query.shape[1], blocks)[..., None, None]
            bias = F.pad(logit, [tokens.shape[3], 0]).transpose(1, 2).flatten(0, 1)
    if visible.shape[1] != 1 and visible.shape[1] != query.shape[1]:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)
    queries = F.pad(query, [0, 0, 0, blocks * g.block_q - query.shape[2]]).unflatten(2, [blocks, g.block_q])
    return (
        queries.transpose(1, 2).flatten(0, 1),
        keys.transpose(1, 2).flatten(0, 1),
        values.transpose(1, 2).flatten(0, 1),
        visible.transpose(1, 2).flatten(0, 1),
        bias,
    )


def whole(rows: Tensor, query: Tensor) -> Tensor:
    """Put ``(B * NQ, H, block_q, W)`` together as ``(B, H, L, W)``."""
    rows = rows.unflatten(0, [query.shape[0], -1]).transpose(1, 2).flatten(2, 3)
    return rows[:, :, : query.shape[2]]
