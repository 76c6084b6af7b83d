"""What attention does, in numbers: sinks, entropy, distance, agreement of heads, importance of heads.

:func:`attention_statistics` reads a layer's attention maps once, tile by tile, from query and key, and keeps vectors;
everything else is derived from those. No map is held, and the model's own attention stays the fused one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.problem import describe
from saccade.attention.tiles import TiledMaps
from saccade.errors import ShapeError

__all__ = [
    "AttentionStatistics",
    "GateStatistics",
    "attention_statistics",
    "attention_statistics_from_maps",
    "gate_statistics",
    "head_importance",
    "sink_norm_ratio",
]

OFFSETS = 4  # local focus on the query's own token and the three before it


@dataclass(frozen=True)
class AttentionStatistics:
    """Figures of one layer's attention ``p_ij``, per sample and head; float32, float64 for float64 input.

    A query that sees no key counts nowhere. Entropies are in nats.

    Args:
        key_mass: ``(B, H, S)``, mean over queries of ``p_ij``: how much of the layer's attention each key gets.
        importance: ``(B, H, S)``, the same sum over the number of queries that can see the key; 0 where none can.
        row_entropy: ``(B, H, L)``, ``-sum_j p_ij log p_ij``; 0 for a query that sees nothing.
        visible_keys: ``(B, H, L)``, integers, how many keys each query can see.
        concentration: ``(B, H)``, Frobenius norm of the map.
        head_diversity: ``(B,)``, standard deviation of ``p_ij`` over heads (that of a population), averaged over the
            pairs that at least one head can see.
        local_focus: ``(B, H, 4)``, mean of ``p`` of query i on the key n places before its own, n = 0..3, queries and
            keys aligned at their ends; NaN where there is no such pair.
        mean_distance: ``(B, H)``, mean over patch queries of ``sum_j p_ij |i - j|`` on the grid in units of patches,
            prefix tokens left out and rows renormalised; ``None`` without a grid.
        max_logit: ``(B, H)``, largest score before the softmax.
        lse: ``(B, H, L)``, log-sum-exp of the scores; ``-inf`` for a query that sees nothing.
    """

    key_mass: Tensor
    importance: Tensor
    row_entropy: Tensor
    visible_keys: Tensor
    concentration: Tensor
    head_diversity: Tensor
    local_focus: Tensor
    mean_distance: Tensor | None
    max_logit: Tensor
    lse: Tensor

    @property
    def sink(self) -> Tensor:
        """``(B, H)``, the most important key; it need not be the first in a vision model."""
        return self.importance.argmax(-1)

    def sink_rate(self, epsilon: float = 0.3) -> Tensor:
        """Return how often each key is a sink, in percent of the samples, ``(H, S)``.

        Args:
            epsilon: Importance above which it is one.
        """
        return 100 * (self.importance > epsilon).to(self.importance.dtype).mean(0)

    @property
    def first_token_mass(self) -> Tensor:
        """``(B, H)``, mean attention to the first key."""
        return self.key_mass[..., 0]

    def class_mass(self, key_class: Tensor, num_classes: int) -> Tensor:
        """Return the mean attention to each class of keys, ``(B, H, C)``.

        Args:
            key_class: ``(S,)`` or ``(B, S)``, integers; -1 is no class.
            num_classes: C.

        Raises:
            ShapeError: If the labels have another shape or lie outside -1..C-1.
        """
        batch, _, keys = self.key_mass.shape
        if key_class.shape not in ((keys,), (batch, keys)) or key_class.is_floating_point():
            raise ShapeError(
                f"key_class must be integers of shape ({keys},) or ({batch}, {keys}); "
                f"got {key_class.dtype} {tuple(key_class.shape)}."
            )
        if key_class.min() < -1 or key_class.max() >= num_classes:
            raise ShapeError(f"key_class must be in -1..{num_classes - 1}; got {key_class.min()}..{key_class.max()}.")
        member = F.one_hot(key_class.long() + 1, num_classes + 1)[..., 1:].to(self.key_mass.dtype)
        return self.key_mass @ member  # (S, C) or (B, S, C)

    @property
    def entropy(self) -> Tensor:
        """``(B, H)``, mean entropy of the rows that see a key."""
        seeing = self.visible_keys > 0
        return self.row_entropy.sum(-1) / seeing.sum(-1).clamp(min=1)

    @property
    def normalised_entropy(self) -> Tensor:
        """``(B, H, L)``, entropy of each row over the largest it could have; NaN with fewer than two visible keys."""
        most = self.visible_keys.to(self.row_entropy.dtype).log()
        return (self.row_entropy / most).masked_fill(self.visible_keys < 2, math.nan)

    @property
    def effective_keys(self) -> Tensor:
        """``(B, H, L)``, the number of equally attended keys that would have a row's entropy."""
        return self.row_entropy.exp()

    @property
    def entropy_bands(self) -> Tensor:
        """``(4,)``, share of the heads whose mean normalised entropy is in each quarter of 0..1."""
        heads = self.normalised_entropy.nanmean((0, 2))
        quarters = (4 * heads[~heads.isnan()]).long().clamp(max=3)
        return torch.bincount(quarters, minlength=4) / max(quarters.numel(), 1)

    @property
    def lse_range(self) -> tuple[Tensor, Tensor]:
        """Least and largest log-sum-exp of the queries that see a key, ``(B, H)`` each."""
        return self.lse.masked_fill(self.visible_keys == 0, torch.inf).amin(-1), self.lse.amax(-1)


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
) -> AttentionStatistics:
    """Read the attention maps of one layer once, in tiles, and keep their figures; not differentiable.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        mask: As in :func:`saccade.attention.attention`.
        bias: As there; ``-inf`` hides a key like a mask.
        causal: As there.
        scale: As there.
        grid: Rows and columns of patches, for the distance; L and S are then ``prefix_tokens`` more than their product.
        prefix_tokens: Class and register tokens in front of the patches; counts for the distance only.

    Returns:
        The figures, on the device of the query.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device, is empty, or does not fit the grid.

    Source:
        Sink rate: Gu et al., "When Attention Sink Emerges in Language Models", ICLR 2025 (arXiv:2410.10781).

    Example:
        >>> found = attention_statistics(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), grid=(2, 2))
        >>> found.effective_keys[0, 0].round()
        tensor([4., 4., 4., 4.])
        >>> found.mean_distance.round(decimals=3)  # a quarter of 0 + 1 + 1 + sqrt(2)
        tensor([[0.8540, 0.8540]])
    """
    problem = describe(query, key, key, mask=mask, bias=bias, causal=causal, scale=scale)
    batch, heads, queries, keys = problem.batch, problem.heads, problem.queries, problem.keys
    if problem.empty:
        raise ShapeError(f"attention statistics need a sample, a query and a key; got {problem}.")
    if grid is not None and not prefix_tokens + grid[0] * grid[1] == queries == keys:
        raise ShapeError(
            f"a grid of {grid[0]} x {grid[1]} patches after {prefix_tokens} prefix tokens makes "
            f"{prefix_tokens + grid[0] * grid[1]} tokens; got {queries} queries and {keys} keys."
        )
    maps = TiledMaps(query, key, mask, bias, causal, scale)
    zeros = maps.query.new_zeros
    key_sum, seen_by, row_entropy = zeros(batch, heads, keys), zeros(batch, heads, keys), zeros(batch, heads, queries)
    visible_keys, lse = zeros((batch, heads, queries), dtype=torch.int64), zeros(batch, heads, queries)
    square, focus, deviation, pairs = zeros(batch, heads), zeros(batch, heads, OFFSETS), zeros(batch), zeros(batch)
    distance, rows_with_patches = zeros(batch, heads), zeros(batch, heads)
    max_logit = torch.full_like(square, -torch.inf)
    for samples, blocks in maps.tiles():
        for rows in blocks:
            scores = maps.scores(samples, rows)  # (b, H, R, S)
            visible = scores > -torch.inf
            row_lse = scores.logsumexp(-1)
            weights = torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, 0.0).unsqueeze(-1))
            lse[samples, :, rows] = row_lse
            visible_keys[samples, :, rows] = visible.sum(-1)
            max_logit[samples] = torch.maximum(max_logit[samples], scores.amax((-1, -2)))
            row_entropy[samples, :, rows] = -torch.xlogy(weights, weights).sum(-1)
            key_sum[samples] += weights.sum(2)
            seen_by[samples] += visible.sum(2)
            square[samples] += weights.square().sum((-1, -2))
            deviation[samples] += weights.std(1, correction=0).sum((-1, -2))
            pairs[samples] += visible.any(1).sum((-1, -2))
            focus[samples] += local_sums(weights, rows.start + keys - queries)
            if grid is not None:
                moved, counted = distance_sums(weights, rows, grid, prefix_tokens)
                distance[samples] += moved
                rows_with_patches[samples] += counted
    aligned = torch.arange(keys - queries, keys)[:, None] >= torch.arange(OFFSETS)  # a key n places before exists
    return AttentionStatistics(
        key_mass=key_sum / (visible_keys > 0).sum(-1, keepdim=True).clamp(min=1),
        importance=key_sum / seen_by.clamp(min=1),
        row_entropy=row_entropy,
        visible_keys=visible_keys,
        concentration=square.sqrt(),
        head_diversity=deviation / pairs.clamp(min=1),
        local_focus=focus / aligned.sum(0).to(focus),
        mean_distance=None if grid is None else distance / rows_with_patches.clamp(min=1),
        max_logit=max_logit,
        lse=lse,
    )


def local_sums(weights: Tensor, own: int) -> Tensor:
    """Return the sums over a tile's rows of the weight on the key n places before the query's own, ``(b, H, 4)``.

    Args:
        weights: ``(b, H, R, S)``.
        own: Key at the place of the first row; may be negative.
    """
    sums = [weights.diagonal(own - n, -2, -1).sum(-1) for n in range(OFFSETS)]
    return torch.stack(sums, -1)


def distance_sums(weights: Tensor, rows: slice, grid: tuple[int, int], prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the sum over a tile's patch queries of their mean distance, and how many see a patch, ``(b, H)`` each."""
    place = torch.arange(grid[0] * grid[1], device=weights.device)
    place = torch.stack([place // grid[1], place % grid[1]], -1).to(weights.dtype)  # (N, 2)
    first = max(prefix_tokens - rows.start, 0)  # rows of the tile before the patches
    own = place[max(rows.start - prefix_tokens, 0) : max(rows.stop - prefix_tokens, 0)]
    patches = weights[:, :, first:, prefix_tokens:]  # (b, H, R', N)
    mass = patches.sum(-1)
    moved = (patches * torch.cdist(own, place, compute_mode="donot_use_mm_for_euclid_dist")).sum(-1)
    return (moved / mass.masked_fill(mass == 0, 1.0)).sum(-1), (mass > 0).sum(-1)


def attention_statistics_from_maps(
    maps: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
) -> AttentionStatistics:
    """Compute :func:`attention_statistics` of maps that exist anyway.

    Args:
        maps: ``(B, H, L, S)``, each row a distribution over its visible keys. Their logarithms count as the scores, so
            ``lse`` is 0.
        mask: Which keys each query could see.
        causal: As in :func:`attention_statistics`.
        grid: As there.
        prefix_tokens: As there.

    Raises:
        ShapeError: As there.

    Example:
        >>> attention_statistics_from_maps(torch.eye(3)[None, None], causal=True).local_focus.round()
        tensor([[[1., 0., 0., nan]]])
    """
    if maps.ndim != 4 or not maps.is_floating_point():
        raise ShapeError(f"maps must be floating point (B, H, L, S); got {maps.dtype} {tuple(maps.shape)}.")
    maps = maps.double() if maps.dtype == torch.float64 else maps.float()
    query, key = maps[..., :1] * 0, maps[:, :, :1].transpose(-1, -2) * 0
    bias = maps.clamp(min=torch.finfo(maps.dtype).tiny).log()  # a visible key with weight 0 stays visible
    return attention_statistics(query, key, mask=mask, bias=bias, causal=causal, grid=grid, prefix_tokens=prefix_tokens)


def sink_norm_ratio(tensor: Tensor, sink: Tensor) -> Tensor:
    """Compare the norm of keys or values at the sink with the mean norm; values well below 1 mark a true sink.

    Args:
        tensor: Key or value, ``(B, Hkv, S, D)``.
        sink: Position for each query head, ``(B, H)``, such as :attr:`AttentionStatistics.sink`.

    Returns:
        ``(B, H)``, float32 (float64 for float64).

    Example:
        >>> value = torch.ones(1, 1, 4, 8).index_fill(2, torch.tensor(0), 0.0)
        >>> sink_norm_ratio(value, torch.zeros(1, 1, dtype=torch.int64))
        tensor([[0.]])
    """
    norms: Tensor = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).norm(dim=-1)
    norms = norms.repeat_interleave(sink.shape[1] // norms.shape[1], 1)
    return norms.gather(-1, sink.unsqueeze(-1)).squeeze(-1) / norms.mean(-1)


def head_importance(out: Tensor, grad_out: Tensor) -> Tensor:
    """Estimate how much the loss would change without each head, from one backward pass: ``|sum grad_out * out|``.

    That is the derivative with respect to a gate of 1 on the head. Average it over many samples.

    Args:
        out: Output of attention before the output projection, ``(B, H, L, Dv)``.
        grad_out: The loss's gradient of it, same shape.

    Returns:
        ``(B, H)``, float32 (float64 for float64).

    Source:
        Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019 (arXiv:1905.10650).

    Example:
        >>> head_importance(torch.ones(1, 2, 3, 4), torch.tensor([1.0, -2.0])[None, :, None, None].expand(1, 2, 3, 4))
        tensor([[12., 24.]])
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    return (out.detach().to(wide) * grad_out.detach().to(wide)).sum((-1, -2)).abs()


class GateStatistics(NamedTuple):
    """How heads with gates are used.

    Args:
        mean: ``(H,)``, mean gate; of a router's probabilities this is its load.
        frequency: ``(H,)``, share of the tokens whose gate is not 0.
    """

    mean: Tensor
    frequency: Tensor


def gate_statistics(gates: Tensor) -> GateStatistics:
    """Average the gates of heads over tokens.

    Args:
        gates: ``(..., H)``.

    Example:
        >>> gate_statistics(torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
        GateStatistics(mean=tensor([0.7500, 0.0000]), frequency=tensor([1., 0.]))
    """
    tokens = gates.detach().to(torch.promote_types(gates.dtype, torch.float32)).flatten(0, -2)
    return GateStatistics(tokens.mean(0), (tokens != 0).to(tokens.dtype).mean(0))
