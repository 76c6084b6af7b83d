"""Bi-level routing attention: each region of a map attends to the few regions that suit it as a whole.

First level: regions are compared by the means of their queries and keys, and the best few are selected for each. Second
level: the tokens of a region attend to the tokens of its selected regions
(:func:`saccade.attention.block_sparse_attention`). Maps are ``(B, H, W, C)`` everywhere in this file.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from saccade.attention import (
    BlockGeometry,
    BlockSelection,
    attention,
    block_sparse_attention,
    grid_to_regions,
    regions_to_grid,
    select_blocks,
)
from saccade.errors import ConfigError, ShapeError

__all__ = ["AttentionLePE", "BiLevelRoutingAttention", "DepthwiseConv", "PointwiseLinear", "RaggedRoutingAttention"]

POOLS = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a map ``(B, H, W, C)`` that keeps its size, with a bias.

    Args:
        channels: C.
        kernel_size: Odd.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``(B, H, W, C)``."""
        out: Tensor = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias)
        return out.permute(0, 2, 3, 1)


class PointwiseLinear(nn.Conv2d):
    """Linear map of the last axis whose weight has the shape of a 1 x 1 convolution, as in some official files.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Add a bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return F.linear(x, self.weight.flatten(1), self.bias)


@register_notrace_module  # shapes decide what it does
class BiLevelRoutingAttention(nn.Module):
    """Multi-head attention between regions and the regions that they are routed to, plus a local term.

    The map is padded with zeros at the bottom and the right until it has ``n_win`` regions a side. That happens before
    the projection: padding is keys and values like any other, equal to the projection's bias.

    Args:
        dim: C.
        num_heads: Heads; they share the routing.
        n_win: Regions a side.
        topk: Regions that each region attends to; all, if there are fewer.
        qk_dim: Width of queries and keys in all; ``None`` means ``dim``.
        qk_scale: Factor of the products; ``None`` means ``qk_dim ** -0.5``, of the full width, not that of a head.
        side_dwconv: Kernel size of the depthwise convolution of the values, the local term; 0 means none.
        auto_pad: Pad; otherwise maps must have sides that are multiples of ``n_win``.
        kv_downsample_mode: How keys and values are pooled in each region before attention: ``"identity"``,
            ``"ada_avgpool"`` or ``"ada_maxpool"`` to ``kv_per_win`` tokens a side, ``"avgpool"`` or ``"maxpool"`` by
            ``kv_downsample_ratio``.
        kv_per_win: See there.
        kv_downsample_ratio: See there; 1 means no pooling.
        param_attention: ``"qkvo"``, or ``"qkv"`` for none but an identity at the end.
        param_routing: Learn a linear map of the regions' means before they are compared; needs ``diff_routing``.
        diff_routing: Let gradients flow through the routing; needs ``soft_routing``, through which they flow.
        soft_routing: Multiply keys and values by the softmax over the selected regions.

    Raises:
        ConfigError: If an option has no such value or needs another.

    Source:
        Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023 (arXiv:2303.08810);
        official code rayleizhu/BiFormer (MIT), ``bra_legacy.py`` at commit 1697bbb.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        auto_pad: bool = True,
        kv_downsample_mode: str = "identity",
        kv_per_win: int = -1,
        kv_downsample_ratio: int = 1,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
    ) -> None:
        super().__init__()
        if param_attention not in ("qkvo", "qkv"):
            raise ConfigError(f"param_attention must be 'qkvo' or 'qkv'; got {param_attention!r}.")
        if (param_routing and not diff_routing) or (diff_routing and not soft_routing):
            raise ConfigError("param_routing needs diff_routing=True, and diff_routing needs soft_routing=True.")
        self.num_heads, self.n_win, self.topk, self.auto_pad = num_heads, n_win, topk, auto_pad
        self.diff_routing, self.soft_routing = diff_routing, soft_routing
        self.qk_dim = dim if qk_dim is None else qk_dim
        check_heads(num_heads, dim, self.qk_dim)
        self.scale = float(self.qk_dim) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Sequential(OrderedDict(qkv=nn.Linear(dim, 2 * self.qk_dim + dim)))
        emb = nn.Linear(self.qk_dim, self.qk_dim)
        self.router = nn.Sequential(OrderedDict(emb=emb)) if param_routing else nn.Identity()
        self.kv_down = pool(kv_downsample_mode, kv_per_win, kv_downsample_ratio)
        self.pools = not isinstance(self.kv_down, nn.Identity)
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv > 0 else None
        self.wo = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within a map ``(B, H, W, C)``; the shape stays.

        Raises:
            ShapeError: If the map does not divide into regions and ``auto_pad`` is off.
        """
        height, width = x.shape[1], x.shape[2]
        tokens, size = self.cut(x)
        region = (size[0] // self.n_win, size[1] // self.n_win)
        query, key, value = self.project(tokens)
        selection, weight = self.route(query, key)
        local = value
        if self.pools:
            key, value = self.pool(key, region), self.pool(value, region)
            block_k = key.shape[1] // (self.n_win * self.n_win)
            geometry = BlockGeometry(region[0] * region[1], block_k, query.shape[1], key.shape[1])
            selection = BlockSelection(selection.indices, selection.counts, geometry)
        out = attend(query, key, value, selection, self.num_heads, self.scale, weight)
        out = regions_to_grid(out, size, region)
        if self.lepe is not None:
            out = out + self.lepe(regions_to_grid(local, size, region))
        projected: Tensor = self.wo(out[:, :height, :width])
        return projected

    def routes(self, x: Tensor) -> Tensor:
        """Return which regions each region of a map ``(B, H, W, C)`` attends to.

        Returns:
            Region numbers, row by row, int32 ``(B, n_win * n_win, topk)``, ascending.
        """
        query, key, _ = self.project(self.cut(x)[0])
        return self.route(query, key)[0].indices.squeeze(1)

    def cut(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens of a map ``(B, H, W, C)``, padded if need be, region by region, and its padded size."""
        below, right = -x.shape[1] % self.n_win, -x.shape[2] % self.n_win
        if below != 0 or right != 0:
            if not self.auto_pad:
                raise ShapeError(f"maps must have sides that are multiples of {self.n_win}; got {x.shape}.")
            x = F.pad(x, [0, 0, 0, right, 0, below])
        size = (x.shape[1], x.shape[2])
        return grid_to_regions(x, (size[0] // self.n_win, size[1] // self.n_win)), size

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query and key ``(B, N, qk_dim)`` and value ``(B, N, C)`` of tokens in the order of regions."""
        qkv = self.qkv(tokens)
        return qkv[..., : self.qk_dim], qkv[..., self.qk_dim : 2 * self.qk_dim], qkv[..., 2 * self.qk_dim :]

    def route(self, query: Tensor, key: Tensor) -> tuple[BlockSelection, Tensor | None]:
        """Select regions for every region, one selection for all heads.

        Args:
            query: ``(B, N, qk_dim)``, region by region.
            key: The same of the keys.

        Returns:
            The selection of unpooled regions, and with soft routing the weight of each entry, else ``None``.
        """
        if not self.diff_routing:
            query, key = query.detach(), key.detach()
        tokens, regions = query.shape[1], self.n_win * self.n_win
        geometry = BlockGeometry(tokens // regions, tokens // regions, tokens, tokens)
        query, key = self.router(block_means(query, regions)), self.router(block_means(key, regions))
        scores = self.scale * block_scores(query, key).unsqueeze(1)  # (B, 1, R, R)
        selection = select_blocks(scores, geometry, min(self.topk, regions))
        weight: Tensor | None = None
        if self.soft_routing:
            weight = torch.softmax(scores.gather(-1, selection.indices.long()), -1)
        return selection, weight

    def pool(self, tokens: Tensor, region: tuple[int, int]) -> Tensor:
        """Pool keys or values in each region, ``(B, N, C)`` region by region, the result too."""
        maps = tokens.reshape(-1, region[0], region[1], tokens.shape[2]).permute(0, 3, 1, 2)
        pooled: Tensor = self.kv_down(maps)
        return pooled.flatten(2).transpose(1, 2).reshape(tokens.shape[0], -1, tokens.shape[2])


@register_notrace_module
class RaggedRoutingAttention(nn.Module):
    """The later official form of bi-level routing attention, in which padding does not pass through the projection.

    Regions have ``H // n_win`` by ``W // n_win`` tokens, at least 1, and as many regions are taken as cover the map;
    that can be far more than ``n_win`` a side. What is missing in the last of them is keys and values of zero, which
    take part in attention but not in the regions' means.

    Args:
        dim: C, also the width of queries and keys.
        num_heads: Heads; they share the routing.
        n_win: Decides the size of a region.
        topk: Regions that each region attends to; all, if there are fewer.
        side_dwconv: Kernel size of the depthwise convolution of the values, the local term; 0 means none.

    Source:
        As :class:`BiLevelRoutingAttention`, ``bra_nchw.py``. Differs from it: maps with sides below ``n_win`` work.
    """

    def __init__(self, dim: int, num_heads: int = 8, n_win: int = 7, topk: int = 4, *, side_dwconv: int = 5) -> None:
        super().__init__()
        check_heads(num_heads, dim, dim)
        self.num_heads, self.n_win, self.topk = num_heads, n_win, topk
        self.scale = float(dim) ** -0.5
        self.qkv_linear = PointwiseLinear(dim, 3 * dim)
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv > 0 else None
        self.output_linear = PointwiseLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within a map ``(B, H, W, C)``; the shape stays."""
        size = (x.shape[1], x.shape[2])
        region = self.region(x)
        qkv = self.qkv_linear(x)
        query, key, value = grid_to_regions(qkv, region).chunk(3, -1)
        selection = self.route(query, key, size, region)
        out = attend(query, key, value, selection, self.num_heads, self.scale, None)
        out = regions_to_grid(out, size, region)
        if self.lepe is not None:
            out = out + self.lepe(qkv.chunk(3, -1)[2])
        projected: Tensor = self.output_linear(out)
        return projected

    def region(self, x: Tensor) -> tuple[int, int]:
        """Return height and width of a region of a map ``(B, H, W, C)``."""
        return max(x.shape[1] // self.n_win, 1), max(x.shape[2] // self.n_win, 1)

    def route(self, query: Tensor, key: Tensor, size: tuple[int, int], region: tuple[int, int]) -> BlockSelection:
        """Select regions for every region, one selection for all heads.

        Args:
            query: ``(B, N, C)``, region by region, zero where there is no token.
            key: The same of the keys.
            size: Height and width of the map.
            region: Height and width of a region.
        """
        tokens, length = query.shape[1], region[0] * region[1]
        regions = tokens // length
        geometry = BlockGeometry(length, length, tokens, tokens)
        # Means over all of a region, zeros included, are those over its tokens times a factor. That of a query's region
        # does not change the order of keys.
        real = grid_to_regions(torch.ones(1, size[0], size[1], 1, device=key.device), region)
        query, key = block_means(query.detach(), regions), block_means(key.detach(), regions)
        scores = block_scores(query, key / block_means(real, regions).to(key.dtype))
        return select_blocks(scores.unsqueeze(1), geometry, min(self.topk, regions))

    def routes(self, x: Tensor) -> Tensor:
        """Return which regions each region of a map ``(B, H, W, C)`` attends to.

        Returns:
            Region numbers, row by row, int32 ``(B, R, topk)``, ascending.
        """
        region = self.region(x)
        query, key, _ = grid_to_regions(self.qkv_linear(x), region).chunk(3, -1)
        return self.route(query, key, (x.shape[1], x.shape[2]), region).indices.squeeze(1)


class AttentionLePE(nn.Module):
    """Attention of every token of a map to every other, plus a local term.

    Args:
        dim: C.
        num_heads: Heads.
        side_dwconv: Kernel size of the depthwise convolution, the local term; 0 means none.
        lepe_on_value: Apply it to the values instead of the input.
        linear: Class of the projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        side_dwconv: int = 5,
        lepe_on_value: bool = False,
        linear: type[nn.Linear] | type[PointwiseLinear] = nn.Linear,
    ) -> None:
        super().__init__()
        check_heads(num_heads, dim, dim)
        self.num_heads, self.lepe_on_value = num_heads, lepe_on_value
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.proj = linear(dim, dim)
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """Attend within a map ``(B, H, W, C)``; the shape stays."""
        query, key, value = self.qkv(x).chunk(3, -1)
        out = attention(
            heads(query.flatten(1, 2), self.num_heads),
            heads(key.flatten(1, 2), self.num_heads),
            heads(value.flatten(1, 2), self.num_heads),
        )
        out = out.transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            out = out + self.lepe(value if self.lepe_on_value else x)
        projected: Tensor = self.proj(out)
        return projected


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    num_heads: int,
    scale: float,
    block_weight: Tensor | None,
) -> Tensor:
    """Run block-sparse attention on tokens ``(B, N, C)`` whose heads lie side by side; returns the same layout."""
    out = block_sparse_attention(
        heads(query, num_heads),
        heads(key, num_heads),
        heads(value, num_heads),
        selection,
        scale=scale,
        block_weight=block_weight,
    )
    return out.transpose(1, 2).flatten(2)


def heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Return ``(B, N, C)`` as ``(B, num_heads, N, C / num_heads)``, a view."""
    return tokens.view(tokens.shape[0], tokens.shape[1], num_heads, tokens.shape[2] // num_heads).transpose(1, 2)


def block_means(tokens: Tensor, blocks: int) -> Tensor:
    """Return the means of consecutive tokens ``(B, N, C)`` as ``(B, blocks, C)``, at least float32."""
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return tokens.view(tokens.shape[0], blocks, tokens.shape[1] // blocks, tokens.shape[2]).mean(2, dtype=dtype)


def block_scores(query: Tensor, key: Tensor) -> Tensor:
    """Return the products of rows, ``(B, R, C)`` and ``(B, S, C)`` to ``(B, R, S)``; not lowered by autocast.

    The choice among regions is a discrete one: rounding here changes outputs visibly.
    """
    if not torch.jit.is_scripting():
        device = query.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return query @ key.transpose(1, 2)
    return query @ key.transpose(1, 2)


def pool(mode: str, size: int, ratio: int) -> nn.Module:
    """Return the pooling of keys and values in a region.

    Raises:
        ConfigError: If there is no such mode.
    """
    if mode not in POOLS:
        raise ConfigError(f"kv_downsample_mode must be one of {', '.join(POOLS)}; got {mode!r}.")
    if mode == "ada_avgpool":
        return nn.AdaptiveAvgPool2d(size)
    if mode == "ada_maxpool":
        return nn.AdaptiveMaxPool2d(size)
    if mode == "identity" or ratio == 1:
        return nn.Identity()
    return nn.AvgPool2d(ratio) if mode == "avgpool" else nn.MaxPool2d(ratio)


def check_heads(num_heads: int, dim: int, qk_dim: int) -> None:
    """Raise unless the heads divide both widths."""
    if num_heads < 1 or dim % num_heads != 0 or qk_dim % num_heads != 0:
        raise ConfigError(f"num_heads must divide dim and qk_dim; got {num_heads} heads, {dim} and {qk_dim}.")
