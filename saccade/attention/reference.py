"""The literal forms: every operator as its equation says, in float32 (float64 for float64 input), scores in full.

They define what is correct, can run everything everywhere, and are what TorchScript compiles where the fast form is a
custom operator. Nothing here is fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.decay import LinearAttention
from saccade.attention.key_classes import PartitionedAttention
from saccade.attention.merge import AttentionEntropy, AttentionLSE

__all__ = [
    "attention",
    "attention_diversification",
    "attention_diversification_from_maps",
    "attention_entropy",
    "attention_lse",
    "attention_pooling",
    "combine_heads",
    "context_mixing",
    "linear_attention",
    "partitioned_attention",
    "pointwise_attention",
    "prefix_softmax_mean",
    "token_average_pooling",
]


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


def context_mixing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Make and apply both kernels of every position; arguments as :func:`saccade.attention.context_mixing`.

    Returns:
        ``(B, 2 G d, H, W)``, dtype of ``value``.
    """
    groups = small_table.shape[0]
    if scale is None:
        scale = float(value.shape[1] // groups) ** -0.5
    centers = key.to(wide(key)).flatten(2).unflatten(1, [groups, -1])  # (B, G, c, R)
    positions = query.to(wide(query)).flatten(2).unflatten(1, [groups, -1]).transpose(2, 3)  # (B, G, N, c)
    logits = scale * positions @ centers @ projection.to(wide(query)).t() + projection_bias.to(wide(query))
    height, width = query.shape[2], query.shape[3]
    small_kernel = (small_table.shape[1] + 1) // 2
    split = small_kernel * small_kernel  # a power is a float in TorchScript
    small = window_sum(logits[..., :split], small_table, value[:, : value.shape[1] // 2], height, width)
    large = window_sum(logits[..., split:], large_table, value[:, value.shape[1] // 2 :], height, width)
    return torch.cat([small, large], 1).to(value.dtype)


def window_sum(logits: Tensor, table: Tensor, value: Tensor, height: int, width: int) -> Tensor:
    """Return ``sum_t softmax(logits + bias)[n, t] value[neighbour t of n]``, ``(B, G d, H, W)``.

    Args:
        logits: ``(B, G, H W, K K)``.
        table: Bias by relative position, ``(G, 2 K - 1, 2 K - 1)``.
        value: ``(B, G d, H, W)``.
        height: H.
        width: W.
    """
    groups, kernel = table.shape[0], (table.shape[1] + 1) // 2
    rows = neighbours(height, kernel, value.device)[:, None, :, None]  # (H, 1, K, 1)
    columns = neighbours(width, kernel, value.device)[None, :, None, :]  # (1, W, 1, K)
    relative_row = rows - torch.arange(height, device=value.device)[:, None, None, None] + kernel - 1
    relative_column = columns - torch.arange(width, device=value.device)[None, :, None, None] + kernel - 1
    bias = table.to(logits.dtype)[:, relative_row, relative_column].flatten(3).flatten(1, 2)  # (G, N, K K)
    weights = torch.softmax(logits + bias, -1).unsqueeze(2)  # (B, G, 1, N, K K)
    windows = value.to(logits.dtype)[:, :, rows, columns].flatten(4).flatten(2, 3)  # (B, G d, N, K K)
    mixed = (weights * windows.unflatten(1, [groups, -1])).sum(-1)  # (B, G, d, N)
    out: Tensor = mixed.flatten(1, 2).unflatten(2, [height, width])
    return out


def neighbours(length: int, kernel: int, device: torch.device) -> Tensor:
    """Return the neighbours of each position along one side, the window shifted to lie inside: ``(L, K)``."""
    start = (torch.arange(length, device=device) - kernel // 2).clamp(0, length - kernel)
    return start[:, None] + torch.arange(kernel, device=device)


def attention_diversification(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    logit_multiplier: Tensor | None = None,
    lse: Tensor | None = None,
    threshold: float = 2.0,
    prefix_tokens: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Compute the loss from the maps; arguments as :func:`saccade.attention.attention_diversification`.

    Returns:
        Scalar; ``lse`` is not needed.
    """
    maps, _ = softmax_weights(query, key, mask, bias, False, scale, logit_multiplier)
    return attention_diversification_from_maps(maps, threshold, prefix_tokens)


def attention_diversification_from_maps(maps: Tensor, threshold: float = 2.0, prefix_tokens: int = 0) -> Tensor:
    """Compute the mean cosine between the rows of the maps' mean over heads and its mean row, both thresholded.

    Returns:
        Scalar; arguments as :func:`saccade.attention.attention_diversification_from_maps`.
    """
    spatial = maps.to(wide(maps))[:, :, prefix_tokens:, prefix_tokens:]
    if prefix_tokens > 0:
        mass = spatial.sum(-1, keepdim=True)
        spatial = spatial / torch.where(mass > 0, mass, torch.ones_like(mass))
    mean = spatial.mean(1)  # (B, N, N)
    column_mean = mean.mean(1)
    tau = threshold / max(mean.shape[-1], 1)
    kept = torch.where(mean > tau, mean, torch.zeros_like(mean))
    target = torch.where(column_mean > tau, column_mean, torch.zeros_like(column_mean))
    cosine = F.cosine_similarity(kept, target.unsqueeze(1), dim=-1, eps=1e-8)  # (B, N)
    return cosine.sum() / max(cosine.numel(), 1)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> LinearAttention:
    """Compute ``((scale q k^T) * D) v``, ``D_ij = exp(log_decay (i - j))`` for ``j <= i``; without ``causal``, D = 1.

    Arguments as :func:`saccade.attention.linear_attention`.

    Returns:
        Output ``(B, H, L, Dv)`` and state ``(B, H, D, Dv)``, one column wider if normalised.
    """
    queries = scale * query.to(wide(query))
    keys, values = per_query_head(key, query), per_query_head(value, query)
    if mask is not None:
        keys = keys.masked_fill(~mask.expand(key.shape[0], 1, 1, key.shape[2]).transpose(-1, -2), 0.0)
    if normalise:
        values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    if initial_state is None:
        initial_state = values.new_zeros(keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
    state = initial_state.to(values.dtype)
    if causal:
        if log_decay is None:
            log_decay = values.new_zeros(query.shape[1])
        rate = log_decay.to(values.dtype)[:, None, None]  # (H, 1, 1)
        steps = torch.arange(query.shape[2], device=query.device)
        decay = torch.exp(rate * (steps[:, None] - steps).clamp(min=0)).tril()  # (H, L, L)
        weights = (queries @ keys.transpose(-1, -2)) * decay  # (B, H, L, L)
        out = weights @ values + torch.exp(rate * (steps + 1)[:, None]) * (queries @ state)
        fading = torch.exp(rate * (query.shape[2] - 1 - steps)[:, None])  # (H, L, 1)
        state = torch.exp(rate * query.shape[2]) * state + (fading * keys).transpose(-1, -2) @ values
    else:
        state = state + keys.transpose(-1, -2) @ values
        out = queries @ state
    if normalise:
        out = divide_by_last(out)
    return LinearAttention(out.to(query.dtype), state)


def divide_by_last(sums: Tensor) -> Tensor:
    """Divide all columns by the last one, the sum of the weights, and drop it; 0 where it is 0."""
    total = sums[..., -1:]
    nothing = total == 0
    return sums[..., :-1].masked_fill(nothing, 0.0) / total.masked_fill(nothing, 1.0)


def partitioned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    mask: Tensor | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    key_log_weight: Tensor | None = None,
    weighted_class: int | None = None,
) -> PartitionedAttention:
    """Split attention by class of key; arguments as :func:`saccade.attention.partitioned_attention`.

    Returns:
        Outputs and masses of all keys, of each class, and of the weighted class.
    """
    members = class_members(key_class, num_classes)  # (B, 1 or H, C, S)
    visible = members.any(2).unsqueeze(2)
    if mask is not None:
        visible = visible & mask
    if causal:
        visible = visible & earlier_keys(query, key, query_positions, key_positions)
    weights, lse = softmax_weights(query, key, visible, None, False, scale)
    value = per_query_head(value, query)
    class_weights = weights.unsqueeze(2) * members.unsqueeze(3)  # (B, H, C, L, S)
    weighted_out: Tensor | None = None
    weighted_mass: Tensor | None = None
    if key_log_weight is not None and weighted_class is not None:
        log_weight = key_log_weight if key_log_weight.dim() == 3 else key_log_weight.unsqueeze(1)  # (B, 1 or H, S)
        factor = torch.exp(log_weight.to(weights.dtype).masked_fill(~members[:, :, weighted_class], -torch.inf))
        weighted = weights * factor.unsqueeze(2)
        weighted_out = (weighted @ value).to(query.dtype)
        weighted_mass = weighted.sum(-1)
    return PartitionedAttention(
        out=(weights @ value).to(query.dtype),
        lse=lse,
        class_out=(class_weights @ value.unsqueeze(2)).to(query.dtype),
        class_mass=class_weights.sum(-1),
        weighted_out=weighted_out,
        weighted_mass=weighted_mass,
    )


def attention_pooling(scores: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh the instances of a bag; arguments as :func:`saccade.attention.attention_pooling`.

    Returns:
        Output ``(B, M, D)``, weights ``(B, M, N)`` and log-sum-exp ``(B, M)``.
    """
    weights, lse = pooling_weights(scores, mask)
    dtype = torch.promote_types(weights.dtype, value.dtype)
    return (weights.to(dtype) @ value.to(dtype)).to(value.dtype), weights, lse


def pooling_weights(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the softmax over the last axis and its log-sum-exp; 0 and ``-inf`` where nothing in a row takes part."""
    scores = scores.to(wide(scores))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    opened = scores.masked_fill(blind, 0.0)  # finite, so no gradient is NaN
    weights = torch.softmax(opened, -1).masked_fill(blind, 0.0)
    lse = torch.logsumexp(opened, -1).masked_fill(blind.squeeze(-1), -torch.inf)
    return weights, lse


def token_average_pooling(tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum nine shifted maps for each dilation; arguments as :func:`saccade.attention.token_average_pooling`.

    Returns:
        ``(B, H W, C)``, dtype of ``tokens``.
    """
    height, width, margin = weights.shape[2], weights.shape[3], weights.shape[1] - 1
    image = tokens.to(wide(tokens)).unflatten(1, [height, width])
    factors = weights.to(wide(tokens)).unsqueeze(-1)  # (B, K, H, W, 1)
    padded = F.pad(image, [0, 0, margin, margin, margin, margin])
    out = factors[:, 0] * image
    for dilation in range(1, weights.shape[1]):
        total = torch.zeros_like(image)
        for dy in (-dilation, 0, dilation):
            for dx in (-dilation, 0, dilation):
                total = total + padded[:, margin + dy : margin + dy + height, margin + dx : margin + dx + width]
        out = out + factors[:, dilation] * total / 9
    pooled: Tensor = out.flatten(1, 2)
    return pooled.to(tokens.dtype)


def prefix_softmax_mean(scores: Tensor, value: Tensor) -> AttentionLSE:
    """Compute causal attention of queries that are all zero, with the scores as bias.

    Arguments as :func:`saccade.attention.prefix_softmax_mean`.
    """
    nothing = torch.zeros_like(value[..., :1])
    return attention_lse(nothing, nothing, value, None, scores.unsqueeze(-2), True, 1.0)


def pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    activation: str = "sigmoid",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute ``f(scale * q k^T + bias) v``; arguments as :func:`saccade.attention.pointwise_attention`.

    Returns:
        ``(B, H, L, Dv)``, dtype of ``query``.
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
    weights = torch.sigmoid(scores) if activation == "sigmoid" else F.elu(scores) + 1
    weights = weights.masked_fill(~visible, 0.0)
    out = weights @ per_query_head(value, query)
    if normalise:
        out = out / (weights.sum(-1, keepdim=True) + 1e-8)
    return out.to(query.dtype)


def combine_heads(out: Tensor, gates: Tensor) -> Tensor:
    """Multiply each head by its gate and lay the heads side by side; as :func:`saccade.attention.combine_heads`."""
    if gates.dim() == 3:
        gates = gates.unsqueeze(-1)
    return (out.to(wide(out)).transpose(1, 2) * gates.to(wide(out))).flatten(2).to(out.dtype)


def attention_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> AttentionEntropy:
    """Compute attention and ``-sum_j p_ij log(p_ij)``; arguments as :func:`saccade.attention.attention_entropy`.

    Returns:
        Output ``(B, H, L, Dv)``, log-sum-exp ``(B, H, L)`` and entropy ``(B, H, L)``.
    """
    weights, lse = softmax_weights(query, key, mask, bias, causal, scale)
    logarithms = weights.masked_fill(weights == 0.0, 1.0).log()  # 0 log 0 = 0, also in the gradient
    entropy = -(weights * logarithms).sum(-1)
    return AttentionEntropy((weights @ per_query_head(value, query)).to(query.dtype), lse, entropy)


def softmax_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    logit_multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention weights ``(B, H, L, S)`` and the log-sum-exp of the scores ``(B, H, L)``.

    A query that sees no key has weights 0, log-sum-exp ``-inf`` and no gradient.
    """
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    scores = scale * query.to(wide(query)) @ per_query_head(key, query).transpose(-1, -2)  # (B, H, L, S)
    if logit_multiplier is not None:
        scores = scores * logit_multiplier.to(scores.dtype)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if causal:
        visible = visible.tril(scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        visible = visible & mask
    scores = scores.masked_fill(~visible, -torch.inf)
    return softmax_and_lse(scores)


def softmax_and_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax over the last axis and the log-sum-exp without it; zeros and ``-inf`` where all is ``-inf``."""
    blind = (scores == -torch.inf).all(-1, keepdim=True)  # (B, H, L, 1)
    lse = torch.logsumexp(scores.masked_fill(blind, 0.0), -1, keepdim=True)  # finite, so no gradient is NaN
    weights = torch.exp(scores - lse)
    return weights, lse.masked_fill(blind, -torch.inf).squeeze(-1)


def per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat each key or value head for the query heads that read it, in the dtype that is computed in."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1).to(wide(query))


def sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """Add up the gradients ``(B, H, S, D)`` of the query heads that read one key or value head."""
    heads = like.shape[1]
    return grad.to(like.dtype) if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2).to(like.dtype)


def wide(tensor: Tensor) -> torch.dtype:
    """Return float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def class_members(key_class: Tensor, num_classes: int) -> Tensor:
    """Return which keys are in which class, bool ``(B, 1 or H, C, S)``, from labels ``(B, S)`` or ``(B, H, S)``."""
    labels = key_class if key_class.dim() == 3 else key_class.unsqueeze(1)
    return labels.unsqueeze(2) == torch.arange(num_classes, device=labels.device).unsqueeze(1)


def earlier_keys(query: Tensor, key: Tensor, query_positions: Tensor | None, key_positions: Tensor | None) -> Tensor:
    """Return which keys are not later than which query, bool ``(1 or B, 1, L, S)``; bottom-right without positions."""
    queries, keys = query.shape[2], key.shape[2]
    if query_positions is None:
        query_positions = torch.arange(keys - queries, keys, device=query.device)
    if key_positions is None:
        key_positions = torch.arange(keys, device=query.device)
    seen = key_positions.unsqueeze(-2) <= query_positions.unsqueeze(-1)  # (L, S) or (B, L, S)
    return seen.unsqueeze(-3)
