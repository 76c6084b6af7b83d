"""Blocks of FAN, and what lies before and behind them. Maps are ``(B, C, H, W)``, channels last in memory."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.layers import DropPath, LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from timm.models.xcit import LPI, ClassAttentionBlock, conv3x3
from torch import Tensor, nn

from saccade.attention import attention
from saccade.errors import ConfigError
from saccade.vision_backbones.diversity import DiversityPoint
from saccade.vision_backbones.token_pooling import PoolingBlock

__all__ = [
    "Block",
    "ChannelAttention",
    "HybridStem",
    "LastClassAttention",
    "TokenMixing",
    "conv_stem",
    "init_lpi",
]

NORM_EPS = 1e-6


class TokenMixing(nn.Module):
    """Multi-head self-attention over the tokens.

    Args:
        dim: C.
        num_heads: Heads.

    Raises:
        ConfigError: If the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.diversity = DiversityPoint()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``(B, N, C)``; the shape stays."""
        key, value = self.kv(x).chunk(2, -1)
        query = self.q(x).unflatten(-1, [self.num_heads, -1]).transpose(1, 2)  # (B, H, N, D)
        key = key.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
        value = value.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)
        self.diversity(query, key)
        mixed: Tensor = self.proj(attention(query, key, value).transpose(1, 2).flatten(2))
        return mixed


class LocalMlp(nn.Module):
    """Two linear layers around a residual 3 x 3 neighbourhood of the hidden map; no other activation.

    Args:
        dim: C.
        hidden: Width between.
        eta: First value of the neighbourhood's factors.
    """

    def __init__(self, dim: int, hidden: int, eta: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = LPI(hidden)
        self.gamma = nn.Parameter(torch.full((hidden,), eta))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Transform tokens ``(B, H W, C)``."""
        x = self.fc1(x)
        out: Tensor = self.fc2(x + self.gamma * self.dwconv(x, height, width))
        return out


class ChannelAttention(nn.Module):
    """An MLP whose channels are weighted for each image: by how they agree, over the tokens, with their head's mean.

    ``gate[h, d] = sigmoid(sum_n Q[n, h, d] k[n, h]) * temperature[h]`` with ``Q = softmax_n(W z)`` and ``k`` the mean
    of ``softmax_n(z)`` over the head's channels. Work is linear in tokens and channels.

    Args:
        dim: C.
        num_heads: Heads, each with a temperature.
        hidden: Width of the MLP.
        eta: First value of the factors of the MLP's neighbourhood.

    Raises:
        ConfigError: If the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, eta: float) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.q = nn.Linear(dim, dim)
        self.mlp_v = LocalMlp(dim, hidden, eta)
        self.norm_v = nn.LayerNorm(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Transform tokens ``(B, H W, C)``."""
        query = self.q(x).softmax(1).unflatten(-1, [self.num_heads, -1])  # (B, N, H, D)
        key = x.softmax(1).unflatten(-1, [self.num_heads, -1]).mean(-1, keepdim=True)
        gate = torch.sigmoid((query * key).sum(1)) * self.temperature.squeeze(-1)  # (B, H, D)
        value: Tensor = self.norm_v(self.mlp_v(x, height, width))
        return value * gate.flatten(1).unsqueeze(1)


class TokenDownsample(nn.Module):
    """Halve the resolution and change the width: a 3 x 3 convolution and a norm over channels."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_dim, H / 2, W / 2)``."""
        shrunk: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return shrunk.permute(0, 3, 1, 2)


class Block(PoolingBlock):
    """Token mixing, behind pooling if there is any, and channel attention; each scaled and added to what came in.

    Args:
        dim: C.
        num_heads: Heads of token mixing.
        channel_heads: Heads of channel attention.
        mlp_ratio: Hidden width of the MLP, as a multiple.
        num_scales: Branches of token-aware average pooling; ``None`` means no pooling.
        eta: First value of the factors of the branches' channels.
        drop_path: Probability that a sample skips a branch.
        out_dim: Width that the next block has; if another, the map is halved at the end.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        channel_heads: int,
        mlp_ratio: float,
        num_scales: int | None,
        eta: float,
        drop_path: float,
        out_dim: int,
    ) -> None:
        super().__init__(dim, num_scales)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = TokenMixing(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = ChannelAttention(dim, channel_heads, int(mlp_ratio * dim), eta)
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample = nn.Identity() if out_dim == dim else TokenDownsample(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, C, H, W)``."""
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C), a view
        attended = self.attn(self.norm1(self.pool(tokens, (height, width))))
        tokens = tokens + self.drop_path(self.gamma1 * attended)
        tokens = tokens + self.drop_path(self.gamma2 * self.mlp(self.norm2(tokens), height, width))
        out: Tensor = self.downsample(tokens.transpose(1, 2).reshape(batch, channels, height, width))
        return out


class LastClassAttention(ClassAttentionBlock):  # type: ignore[misc]
    """timm's class attention where nobody reads the patches any more."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the class token ``(B, 1, C)`` of tokens ``(B, 1 + N, C)``."""
        token = x[:, :1] + self.drop_path1(self.gamma1 * self.attn(self.norm1(x)))
        token = self.norm2(token)
        out: Tensor = token + self.drop_path2(self.gamma2 * self.mlp(token))
        return out


def conv_stem(in_chans: int, dim: int, patch_size: int) -> nn.Sequential:
    """Return XCiT's stem: 3 x 3 convolutions of stride 2 with batch norms, GELU between.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the tokens.
        patch_size: Stride of the whole: 16, 8 or 4.

    Raises:
        ConfigError: If it is another.
    """
    parts = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 1)}.get(patch_size)
    if parts is None:
        raise ConfigError(f"patch_size must be 16, 8 or 4; got {patch_size}.")
    widths = [in_chans, *[dim // part for part in parts]]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [conv3x3(before, after, 2), nn.GELU()]
    return nn.Sequential(OrderedDict(proj=nn.Sequential(*layers[:-1])))


class TwoStages(nn.Module):
    """ConvNeXt's stem and its first two stages, to strides 4 and 8.

    Args:
        in_chans: Channels of the image.
        depths: Blocks of the stages.
        dims: Channels of the stages.
    """

    def __init__(self, in_chans: int, depths: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), LayerNorm2d(dims[0], eps=NORM_EPS))
        common = {"ls_init_value": 1e-6, "conv_mlp": True, "norm_layer": LayerNorm2d}
        self.stages = nn.Sequential(
            ConvNeXtStage(dims[0], dims[0], stride=1, depth=depths[0], **common),
            ConvNeXtStage(dims[0], dims[1], stride=2, depth=depths[1], **common),
        )
        for module in self.modules():  # as ConvNeXt itself begins
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map at stride 8."""
        out: Tensor = self.stages(self.stem(x))
        return out


class HybridStem(nn.Module):
    """Two stages of ConvNeXt, then patches.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the tokens.
        depths: Blocks of the stages.
        dims: Channels of the stages.
        patch_size: Stride of the patches, on top of 8.
    """

    def __init__(self, in_chans: int, dim: int, depths: Sequence[int], dims: Sequence[int], patch_size: int) -> None:
        super().__init__()
        self.backbone = TwoStages(in_chans, depths, dims)
        self.proj: nn.Module = nn.Conv2d(dims[1], dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of tokens."""
        out: Tensor = self.proj(self.backbone(x))
        return out


def check_heads(dim: int, num_heads: int) -> None:
    """Raise unless heads divide channels."""
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(f"the number of heads must divide the channels; got {num_heads} heads, {dim} channels.")


def init_lpi(module: nn.Module) -> None:
    """Draw the weights of the convolutions between an MLP's layers with the variance that keeps that of gradients."""
    if isinstance(module, LPI):
        for conv in (module.conv1, module.conv2):
            fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / fan_out))
            nn.init.zeros_(conv.bias)
