"""Blocks of BiFormer, and the layers between its stages. Maps are ``(B, C, H, W)``, channels last in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import Permute

from saccade.vision_backbones.bi_level_routing import DepthwiseConv
from saccade.vision_backbones.reparam import ResidualDepthwise

__all__ = ["Block", "PostNormBlock", "convolutional_mixer", "downsample", "mlp", "patch_downsample"]

NORM_EPS = 1e-6


class Block(nn.Module):
    """Position by a depthwise convolution, attention, MLP; each added to what came in.

    Args:
        dim: C.
        attn: Attention, on ``(B, H, W, C)``.
        mlp: MLP, on ``(B, H, W, C)``.
        pos_conv: Begin with a residual 3 x 3 depthwise convolution.
        drop_path: Probability that a sample skips a branch.
        layer_scale: First value of the factors of the branches' channels; ``None`` means no factors.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        pos_conv: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.pos_embed = ResidualDepthwise(dim) if pos_conv else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, C, H, W)``."""
        x = self.pos_embed(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma1))
        x = x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))
        return x.permute(0, 3, 1, 2)


class PostNormBlock(Block):
    """A block that normalises sums instead of the branches' inputs; arguments as :class:`Block`."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, C, H, W)``."""
        x = self.pos_embed(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        x = self.norm1(x + self.drop_path(scaled(self.attn(x), self.gamma1)))
        x = self.norm2(x + self.drop_path(scaled(self.mlp(x), self.gamma2)))
        return x.permute(0, 3, 1, 2)


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply channels, the last axis, if there are factors."""
    return x if factor is None else x * factor


def mlp(dim: int, hidden: int, *, dwconv: bool = False) -> nn.Sequential:
    """Return an MLP numbered as in BiFormer's files.

    Args:
        dim: Width of input and output.
        hidden: Width between.
        dwconv: Filter the hidden map with a 3 x 3 depthwise convolution.
    """
    between = nn.Sequential(OrderedDict(dwconv=DepthwiseConv(hidden, 3))) if dwconv else nn.Identity()
    return nn.Sequential(nn.Linear(dim, hidden), between, nn.GELU(), nn.Linear(hidden, dim))


def convolutional_mixer(dim: int) -> nn.Sequential:
    """Return what takes attention's place where ``topk`` is 0; on ``(B, H, W, C)``."""
    return nn.Sequential(
        Permute([0, 3, 1, 2]),
        nn.Conv2d(dim, dim, 1),
        nn.Conv2d(dim, dim, 5, padding=2, groups=dim),
        nn.Conv2d(dim, dim, 1),
        Permute([0, 2, 3, 1]),
    )


def downsample(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 3 x 3 convolution of stride 2 and its batch norm."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), nn.BatchNorm2d(out_channels))


def patch_downsample(
    in_channels: int, out_channels: int, patch: int, norm_layer: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Return the downsampling of the STL models: patches of 4 and a norm for the stem, a norm and patches of 2 else."""
    convolution = nn.Conv2d(in_channels, out_channels, patch, stride=patch)
    if patch == 4:
        return nn.Sequential(convolution, norm_layer(out_channels))
    return nn.Sequential(norm_layer(in_channels), convolution)
