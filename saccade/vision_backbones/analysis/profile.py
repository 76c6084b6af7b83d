"""How attention is spread over distance, and what a head's pattern looks like in a word."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.attention import attention_statistics_from_maps
from saccade.errors import ShapeError

__all__ = ["AttentionProfile", "attention_profile", "hops", "pattern_label"]

ELEMENTS = 2**22  # of the table from (query, key) to hop; longer maps are taken in blocks of rows


@dataclass(frozen=True)
class AttentionProfile:
    """Figures of one layer's attention between patches, per sample and head; float32, float64 for float64 maps.

    Prefix rows and columns are left out and the rows of the patches normalised again; a patch that attends to prefix
    tokens alone counts in ``prefix_mass`` only. A hop is the Chebyshev distance
    on the grid; there are K of them, hop 0 being the patch itself.

    Args:
        prefix_mass: ``(B, H)``, mean attention of patch queries to prefix tokens, before they are left out.
        mass_by_hop: ``(B, H, K)``, mean over queries of the attention to all patches at a hop; sums to 1.
        mean_per_neighbour_by_hop: ``(B, H, K)``, mean over queries of that over the number of patches that the query
            has at the hop; 0 for a query that has none.
        mean_distance: ``(B, H)``, mean over queries of the expected Euclidean distance, in patches.
        entropy: ``(B, H)``, mean entropy of the rows, in nats.
        largest_column: ``(B, H)``, largest mean over queries of the attention to one patch.
        grid: Rows and columns of patches.
    """

    prefix_mass: Tensor
    mass_by_hop: Tensor
    mean_per_neighbour_by_hop: Tensor
    mean_distance: Tensor
    entropy: Tensor
    largest_column: Tensor
    grid: tuple[int, int]

    @property
    def entropy_share(self) -> Tensor:
        """``(B, H)``, entropy over the largest that it could be, 0..1; 1 for a single patch."""
        patches = self.grid[0] * self.grid[1]
        return self.entropy / math.log(patches) if patches > 1 else torch.ones_like(self.entropy)

    @property
    def near_mass(self) -> Tensor:
        """``(B, H)``, attention to patches at hops 1 and 2."""
        return self.mass_by_hop[..., 1:3].sum(-1)


def attention_profile(maps: Tensor, grid: tuple[int, int], *, prefix_tokens: int = 0) -> AttentionProfile:
    """Measure how attention between patches is spread over distance; not differentiable.

    Args:
        maps: ``(B, H, N, N)``, rows sum to 1.
        grid: Rows and columns of patches.
        prefix_tokens: Class and register tokens in front of the patches.

    Raises:
        ShapeError: If the maps have another shape or dtype, or do not fit the grid.

    Source:
        The idea is that of Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
        TVCG 2023 (arXiv:2303.13731); its formulas are not public, these are saccade's own.

    Example:
        >>> profile = attention_profile(torch.full((1, 1, 9, 9), 1 / 9), (3, 3))
        >>> profile.mass_by_hop.round(decimals=3)  # a patch has 8, 5 or 3 neighbours
        tensor([[[0.1110, 0.4940, 0.3950]]])
        >>> profile.entropy_share.round(decimals=3)
        tensor([[1.]])
    """
    tokens = prefix_tokens + grid[0] * grid[1]
    if maps.ndim != 4 or maps.shape[2:] != (tokens, tokens) or not maps.is_floating_point():
        raise ShapeError(
            f"maps must be floating point (B, H, {tokens}, {tokens}) for {prefix_tokens} prefix tokens and a grid of "
            f"{grid[0]} x {grid[1]}; got {maps.dtype} {tuple(maps.shape)}."
        )
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    rows = maps[:, :, prefix_tokens:]
    patches = rows[..., prefix_tokens:]
    mass = patches.sum(-1, keepdim=True)
    patches = patches / mass.masked_fill(mass == 0, 1.0)
    found = attention_statistics_from_maps(patches, mask=mass > 0, grid=grid)
    if found.mean_distance is None:
        raise RuntimeError("attention_statistics_from_maps gave no distance for a grid")
    by_hop, per_neighbour = sums_by_hop(patches, grid)
    seeing = (mass > 0).sum((2, 3)).clamp(min=1).unsqueeze(-1)
    return AttentionProfile(
        prefix_mass=rows[..., :prefix_tokens].sum(-1).mean(-1),
        mass_by_hop=by_hop / seeing,
        mean_per_neighbour_by_hop=per_neighbour / seeing,
        mean_distance=found.mean_distance,
        entropy=found.entropy,
        largest_column=found.key_mass.amax(-1),
        grid=grid,
    )


def hops(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the Chebyshev distance between all patches, ``(N, N)``, integers."""
    place = torch.arange(grid[0] * grid[1], device=device)
    row, column = place // grid[1], place % grid[1]
    return torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())


def sums_by_hop(patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the sums over queries of mass and mean per neighbour by hop, ``(B, H, K)`` each, of ``(B, H, N, N)``."""
    distance = hops(grid, patches.device)
    count, number = max(grid), len(distance)
    sums = patches.new_zeros(*patches.shape[:2], count)
    means = torch.zeros_like(sums)
    step = max(1, ELEMENTS // (number * count))
    for start in range(0, number, step):
        block = distance[start : start + step]
        member = torch.nn.functional.one_hot(block, count).to(patches.dtype)  # (R, N, K)
        neighbours = member.sum(1, keepdim=True).clamp(min=1)
        weights = patches[:, :, start : start + step].flatten(2)  # (B, H, R N)
        sums += weights @ member.flatten(0, 1)
        means += weights @ (member / neighbours).flatten(0, 1)
    return sums, means


def pattern_label(*, hop0: float, within2: float, largest_column: float, entropy_share: float) -> str:
    """Name a pattern by the first rule that fits.

    ``"self"``: more than half on the patch itself; ``"local"``: more than 0.6 within two hops; ``"column"``: one patch
    gets more than 0.3 of the average query, a sink; ``"uniform"``: entropy above 0.95 of the largest; else
    ``"mixed"``.

    Args:
        hop0: Attention to the patch itself.
        within2: Attention within two hops, itself included.
        largest_column: Largest mean attention to one patch.
        entropy_share: Entropy over the largest that it could be.

    Example:
        >>> pattern_label(hop0=0.1, within2=0.3, largest_column=0.4, entropy_share=0.7)
        'column'
    """
    if hop0 > 0.5:
        return "self"
    if within2 > 0.6:
        return "local"
    if largest_column > 0.3:
        return "column"
    return "uniform" if entropy_share > 0.95 else "mixed"
