"""What the regions of a map read from each other under bi-level routing, as numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.attention import Segments, grid_to_regions, partitioned_attention
from saccade.vision_backbones.bi_level_routing import BiLevelRoutingAttention, RaggedRoutingAttention

__all__ = ["RegionReads", "region_reads"]


class RegionReads(NamedTuple):
    """Which regions each region reads, and how much. R regions, row by row.

    Args:
        shares: Weight that the tokens of a region give to the tokens of another in all, their mean, ``(B, H, R, R)``
            float32: reader, then read. Rows sum to 1; exactly 0 where the region was not selected.
        selected: The routing, bool ``(B, R, R)``: reader, then read.
        region: Rows and columns of tokens in a region.
    """

    shares: Tensor
    selected: Tensor
    region: tuple[int, int]


def region_reads(module: BiLevelRoutingAttention | RaggedRoutingAttention, x: Tensor) -> RegionReads:
    """Compute how much each region attends to each region that it is routed to.

    Args:
        module: An attention with routing.
        x: Its input, ``(B, H, W, C)``. Padding counts as tokens, as it does in the attention itself.
    """
    weight: Tensor | None = None
    if isinstance(module, BiLevelRoutingAttention):
        tokens, size = module.cut(x)
        region = (size[0] // module.n_win, size[1] // module.n_win)
        query, key, _ = module.project(tokens)
        selection, weight = module.route(query, key)
        if module.pools:
            key = module.pool(key, region)
    else:
        region = module.region(x)
        query, key, _ = grid_to_regions(module.qkv_linear(x), region).chunk(3, -1)
        selection = module.route(query, key, (x.shape[1], x.shape[2]), region)
    chosen = selection.indices[:, 0].long()  # (B, R, k): one routing for all heads
    batch, regions, count = chosen.shape
    heads = module.num_heads

    def per_region(tokens: Tensor) -> Tensor:
        cut: Tensor = tokens.unflatten(2, (heads, -1)).unflatten(1, (regions, -1))
        return cut  # (B, R, n, H, d)

    samples = torch.arange(batch, device=x.device)[:, None, None]
    read = per_region(key)[samples, chosen]  # (B, R, k, n, H, d)
    if weight is not None:
        read = read * weight[:, 0, :, :, None, None, None]
    each = Segments(tuple(range(0, (count + 1) * read.shape[3], read.shape[3])))
    rows = per_region(query).flatten(0, 1).transpose(1, 2)
    columns = read.flatten(0, 1).flatten(1, 2).transpose(1, 2)
    mass = partitioned_attention(rows, columns, columns[..., :1], each, count, scale=module.scale).class_mass
    parts = mass.float().mean(3).view(batch, regions, heads, count).transpose(1, 2)
    index = chosen[:, None].expand(-1, heads, -1, -1)
    shares = parts.new_zeros(batch, heads, regions, regions).scatter_(3, index, parts)
    selected = torch.zeros(batch, regions, regions, dtype=torch.bool, device=x.device)
    return RegionReads(shares, selected.scatter_(2, chosen, torch.ones_like(chosen, dtype=torch.bool)), region)
