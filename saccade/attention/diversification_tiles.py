"""Backend ``torch`` of attention diversification: maps one tile at a time, recomputed in the backward pass.

Between forward and backward only vectors are kept, four numbers for each token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.reference import wide
from saccade.attention.tiles import TiledMaps

__all__ = ["EPSILON", "mean_row_gradient", "thresholded_direction", "tiled_attention_diversification"]


def tiled_attention_diversification(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    logit_multiplier: Tensor | None,
    lse: Tensor | None,
    threshold: float,
    prefix_tokens: int,
    scale: float | None,
) -> Tensor:
    """Run in tiles; a tile holds whole rows, so it finds its log-sum-exp by itself."""
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    if prefix_tokens > 0:
        query, key = query[:, :, prefix_tokens:], key[:, :, prefix_tokens:]
        bias, mask = without_prefix(bias, prefix_tokens), without_prefix(mask, prefix_tokens)
        if logit_multiplier is not None:
            logit_multiplier = logit_multiplier[:, prefix_tokens:, prefix_tokens:]
    loss: Tensor = tiled_diversification(query, key, bias, mask, logit_multiplier, threshold, scale)[0]
    return loss


def without_prefix(tensor: Tensor | None, prefix_tokens: int) -> Tensor | None:
    """Drop the first rows and columns of a mask or bias, along the axes that it has in full."""
    if tensor is None:
        return None
    for axis in range(max(tensor.ndim - 2, 0), tensor.ndim):
        if tensor.shape[axis] != 1:
            tensor = tensor.narrow(axis, prefix_tokens, tensor.shape[axis] - prefix_tokens)
    return tensor


# What the loss and its gradient know of the maps: four rows of ``(B, N)``, with m and t the map M averaged over heads
# and its mean row s, both thresholded:
#   column mean  s_j = mean_i M_ij
#   row norm     |m_i|, at least EPSILON
#   cosine       c_i = m_i . t / (|m_i| |t|)
#   pull         u_j = sum_i m_ij / |m_i|
EPSILON = 1e-8


def thresholded_direction(column_mean: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return ``t / |t|``, ``(B, N)``, and ``|t|``, ``(B, 1)``."""
    target = F.threshold(column_mean, tau, 0.0)
    norm = target.norm(dim=-1, keepdim=True).clamp(min=EPSILON)
    return target / norm, norm


def mean_row_gradient(column_mean: Tensor, cosine: Tensor, pull: Tensor, tau: float) -> Tensor:
    """Return what ``d(sum of cosines)/dM_ij`` owes to the mean row, the same for every i, ``(B, N)``."""
    direction, norm = thresholded_direction(column_mean, tau)
    gradient = (pull - direction * cosine.sum(-1, keepdim=True)) / (norm * column_mean.shape[-1])
    return torch.where(column_mean > tau, gradient, 0.0)


@torch.library.custom_op("saccade::tiled_diversification", mutates_args=())
def tiled_diversification(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    logit_multiplier: Tensor | None,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the loss in tiles, differentiable in query, key and multiplier.

    The mean row is known after all rows only, so rows are visited twice where a sample is more than one tile.

    Returns:
        Loss, and the statistics stacked, ``(4, B, N)``, which have no gradient.
    """
    maps = TiledMaps(query, key, mask, bias, False, scale, logit_multiplier)
    batch, tokens = query.shape[0], query.shape[2]
    tau = threshold / max(tokens, 1)
    statistics = maps.query.new_zeros(4, batch, tokens)
    for samples, blocks in maps.tiles():
        column_mean, row_norm, cosine, pull = statistics[:, samples]
        for rows in blocks:
            mean = maps.weights(samples, rows).mean(1)  # (b, R, N)
            column_mean += mean.sum(1) / tokens
        direction, _ = thresholded_direction(column_mean, tau)
        for rows in blocks:
            if len(blocks) > 1:
                mean = maps.weights(samples, rows).mean(1)
            kept = F.threshold(mean, tau, 0.0)
            row_norm[:, rows] = kept.norm(dim=-1).clamp(min=EPSILON)
            cosine[:, rows] = (kept @ direction.unsqueeze(-1)).squeeze(-1) / row_norm[:, rows]
            pull += (row_norm[:, None, rows].reciprocal() @ kept).squeeze(1)
    return statistics[2].sum() / max(batch * tokens, 1), statistics


@tiled_diversification.register_fake
def tiled_diversification_fake(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    logit_multiplier: Tensor | None,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    dtype = wide(query)
    return query.new_empty((), dtype=dtype), query.new_empty((4, query.shape[0], query.shape[2]), dtype=dtype)


@torch.library.custom_op("saccade::tiled_diversification_backward", mutates_args=())
def tiled_diversification_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    logit_multiplier: Tensor | None,
    statistics: Tensor,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and multiplier (empty without one), each tile of weights once more.

    ``G = dL/dM`` is the same for every head, and ``dS = A (G - sum_j A G) / H``.
    """
    maps = TiledMaps(query, key, mask, bias, False, scale, logit_multiplier)
    heads, tokens = query.shape[1], query.shape[2]
    tau = threshold / max(tokens, 1)
    column_mean, row_norm, cosine, pull = statistics
    direction, _ = thresholded_direction(column_mean, tau)
    through_mean_row = mean_row_gradient(column_mean, cosine, pull, tau)
    factor = grad / max(query.shape[0] * tokens * heads, 1)
    grad_query, grad_key = torch.empty_like(maps.query), torch.zeros_like(maps.key)
    grad_multiplier = maps.query.new_zeros(0 if logit_multiplier is None else logit_multiplier.shape)
    with torch.autocast(query.device.type, enabled=False):  # backward may be called where autocast is on
        for samples, blocks in maps.tiles():
            for rows in blocks:
                weights = maps.weights(samples, rows)
                mean = weights.mean(1)  # (b, R, N)
                norm, alike = row_norm[samples, rows, None], cosine[samples, rows, None]
                through_row = torch.where(mean > tau, (direction[samples, None] - mean * (alike / norm)) / norm, 0.0)
                grad_mean = (through_row + through_mean_row[samples, None]) * factor
                grad_scores = weights * grad_mean.unsqueeze(1)
                grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)
                if maps.logit_multiplier is not None:
                    grad_multiplier[:, rows] += (maps.products(samples, rows) * grad_scores).sum(0)
                    grad_scores *= maps.logit_multiplier[:, rows]
                grad_query[samples, :, rows], grad_key_part = maps.input_gradients(grad_scores, samples, rows)
                grad_key[samples] += grad_key_part
    multiplier_dtype = query.dtype if logit_multiplier is None else logit_multiplier.dtype
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_multiplier.to(multiplier_dtype)


@tiled_diversification_backward.register_fake
def tiled_diversification_backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    logit_multiplier: Tensor | None,
    statistics: Tensor,
    threshold: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    multiplier = query.new_empty(0) if logit_multiplier is None else logit_multiplier
    return query.new_empty(query.shape), key.new_empty(key.shape), multiplier.new_empty(multiplier.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep the inputs and the statistics: vectors, no map."""
    query, key, bias, mask, logit_multiplier, ctx.threshold, ctx.scale = inputs
    ctx.save_for_backward(query, key, bias, mask, logit_multiplier, output[1])
    ctx.set_materialize_grads(False)


def tiled_diversification_gradients(
    ctx: Any,  # noqa: ANN401
    grad: Tensor | None,
    _: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the forward operator's arguments."""
    if grad is None:
        return (None,) * 7
    query, key, bias, mask, logit_multiplier, statistics = ctx.saved_tensors
    grad_query, grad_key, grad_multiplier = tiled_diversification_backward(
        grad, query, key, bias, mask, logit_multiplier, statistics, ctx.threshold, ctx.scale
    )
    wanted = grad_multiplier if logit_multiplier is not None else None
    return grad_query, grad_key, None, None, wanted, None, None


tiled_diversification.register_autograd(tiled_diversification_gradients, setup_context=save_for_backward)
