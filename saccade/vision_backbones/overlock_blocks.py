"""The blocks of OverLoCK: small layers, the convolutional block, and the two blocks that mix with dynamic kernels."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from saccade.attention import ContextKernels, context_kernels, context_mixing
from saccade.errors import ConfigError
from saccade.vision_backbones.reparam import DilatedReparamConv, ResidualDepthwise

__all__ = ["ContMixBlock", "FocusBlock", "GlobalResponseNorm", "LayerScale", "RepConvBlock", "SqueezeExcite"]

CENTERS = 7  # region centres along either side of the map


@register_notrace_module
class LayerScale(nn.Module):
    """Scale and shift channels; stored like a depthwise 1 x 1 convolution.

    Args:
        channels: C.
        init: First value of the scale; the shift starts at 0.
    """

    def __init__(self, channels: int, init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``(B, C, H, W)``."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.addcmul(bias.view(-1, 1, 1), x, weight.view(-1, 1, 1))


@register_notrace_module
class GlobalResponseNorm(nn.Module):
    """Computes ``x (gamma n / mean(n) + 1) + beta``, ``n`` the norm of each channel over the map.

    Args:
        channels: C.

    Source:
        Woo et al., "ConvNeXt V2", CVPR 2023 (arXiv:2301.00808), section 3.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)``."""
        norm = channel_norm(x)
        scale = self.gamma * norm / (norm.mean(1, keepdim=True) + 1e-6) + 1
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


@torch.fx.wrap
def channel_norm(x: Tensor) -> Tensor:
    """Return the norm of each channel over the map, ``(B, C, 1, 1)``, at least float32: squares overflow in float16."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if torch.is_grad_enabled():
        norm: Tensor = torch.linalg.vector_norm(x, 2.0, [2, 3], True, dtype=dtype)
    else:  # not differentiable at 0, but several times faster on a channels-last map
        norm = x.to(dtype).square().sum([2, 3], keepdim=True).sqrt()
    return norm


class SqueezeExcite(nn.Module):
    """Computes ``x sigmoid(W2 GELU(W1 mean(x)))``.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(16, channels // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels of ``(B, C, H, W)``."""
        weights: Tensor = self.proj(x)
        return x * weights


class RepConvBlock(nn.Module):
    """Convolutional block of the Base-Net and the Overview-Net.

    Args:
        channels: C.
        kernel_size: K of the large convolution.
        mlp_ratio: Hidden channels as a multiple of C.
        ls_init_value: First value of the layer scale; ``None`` means none.
        res_scale: The layer scale acts on the skip connection instead of the branch.
        drop_path: Probability that a sample skips the branch.
        deploy: Build large convolutions in merged form.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        mlp_ratio: float = 4,
        ls_init_value: float | None = None,
        res_scale: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * channels)
        self.res_scale = res_scale
        self.dwconv = ResidualDepthwise(channels)
        self.proj = nn.Sequential(
            LayerNorm2d(channels),
            DilatedReparamConv(channels, kernel_size, deploy=deploy),
            nn.BatchNorm2d(channels),
            SqueezeExcite(channels),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            ResidualDepthwise(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, channels, 1),
        )
        self.ls = layer_scale(channels, ls_init_value)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, C, H, W)``; the size stays."""
        x = self.dwconv(x)
        y = self.proj(x)
        x = self.ls(x) + self.drop_path(y) if self.res_scale else x + self.drop_path(self.ls(y))
        return x


class MixingBlock(nn.Module):
    """What both blocks with dynamic kernels have in common: the mixing itself and the residual branches.

    Args:
        channels: C, channels that are mixed.
        width: Channels of the block's map.
        query_channels: Leading channels of the normalised map that make the queries.
        key_channels: Trailing channels of the normalised map that make the region centres.
        kernel_size: K of the large dynamic kernel and of the static one beside it.
        smk_size: S of the small dynamic kernel.
        num_heads: Half the number of groups.
        mlp_ratio: Hidden channels of the second branch as a multiple of C.
        ls_init_value: First value of the layer scales; ``None`` means none.
        res_scale: The layer scales act on the skip connections instead of the branches.
        drop_path: Probability that a sample skips a branch.
        deploy: Build large convolutions in merged form.

    Raises:
        ConfigError: If the groups do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        query_channels: int,
        key_channels: int,
        kernel_size: int,
        smk_size: int,
        num_heads: int,
        mlp_ratio: float,
        ls_init_value: float | None,
        res_scale: bool,
        drop_path: float,
        deploy: bool,
    ) -> None:
        super().__init__()
        groups, hidden = 2 * num_heads, int(mlp_ratio * channels)
        if channels % (2 * groups) != 0:
            raise ConfigError(
                f"channels must be a multiple of 4 * num_heads = {2 * groups}, for two kernels of {groups} groups; "
                f"got {channels}."
            )
        self.kernel_size, self.query_channels, self.key_channels = kernel_size, query_channels, key_channels
        self.res_scale = res_scale
        self.dwconv1 = ResidualDepthwise(width)
        self.norm1 = LayerNorm2d(width)
        self.weight_query = nn.Sequential(
            nn.Conv2d(query_channels, channels // 2, 1, bias=False), nn.BatchNorm2d(channels // 2)
        )
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(CENTERS),
            nn.Conv2d(key_channels, channels // 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
        )
        self.weight_proj = nn.Conv2d(CENTERS**2, smk_size**2 + kernel_size**2, 1)
        self.rpb1 = nn.Parameter(torch.zeros(groups, 2 * smk_size - 1, 2 * smk_size - 1))
        self.rpb2 = nn.Parameter(torch.zeros(groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.lepe = nn.Sequential(DilatedReparamConv(channels, kernel_size, deploy=deploy), nn.BatchNorm2d(channels))
        self.se_layer = SqueezeExcite(channels)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1))
        self.dwconv2 = ResidualDepthwise(width)
        self.norm2 = LayerNorm2d(width)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            nn.GELU(),
            ResidualDepthwise(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, width, 1),
        )
        self.ls1, self.ls2 = layer_scale(width, ls_init_value), layer_scale(width, ls_init_value)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def mix(self, z: Tensor, value: Tensor) -> Tensor:
        """Filter a value map with kernels that each position makes from the normalised map.

        Maps smaller than the large kernel are enlarged for it, and the result pooled back.

        Args:
            z: Normalised map, ``(B, width, H, W)``.
            value: ``(B, C, H, W)``.

        Returns:
            ``(B, C, H, W)``.
        """
        z = enlarge(z, self.kernel_size)
        bias = self.weight_proj.bias
        assert bias is not None  # for TorchScript
        mixed = context_mixing(
            self.weight_query(z[:, : self.query_channels]),
            self.weight_key(z[:, -self.key_channels :]),
            enlarge(value, self.kernel_size),
            self.weight_proj.weight.flatten(1),
            bias,
            self.rpb1,
            self.rpb2,
        )
        return pool_back(mixed, value)

    @torch.jit.ignore
    def kernels(self, z: Tensor) -> ContextKernels:
        """Return the kernels that :meth:`mix` makes of a normalised map, on the enlarged map if it is enlarged.

        Args:
            z: Output of ``norm1``, ``(B, width, H, W)``.
        """
        z = enlarge(z, self.kernel_size)
        bias = self.weight_proj.bias
        assert bias is not None
        query = self.weight_query(z[:, : self.query_channels])
        return context_kernels(
            query,
            self.weight_key(z[:, -self.key_channels :]),
            self.weight_proj.weight.flatten(1),
            bias,
            self.rpb1,
            self.rpb2,
            scale=(2 * query.shape[1] // self.rpb1.shape[0]) ** -0.5,
        )

    def add_branches(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the output of the first branch to ``x``, then run the second."""
        x = self.ls1(x) + self.drop_path(y) if self.res_scale else x + self.drop_path(self.ls1(y))
        x = self.dwconv2(x)
        y = self.mlp(self.norm2(x))
        x = self.ls2(x) + self.drop_path(y) if self.res_scale else x + self.drop_path(self.ls2(y))
        return x


class FocusBlock(MixingBlock):
    """Block of the Focus-Net: features and top-down context in one map, mixed with dynamic kernels.

    Args:
        channels: C, channels of the features.
        context_channels: c, channels of the context; they follow the features.
        is_first: The context is used as it arrives, not mixed with that of the stage.
        kernel_size: K of the large dynamic kernel and of the static one beside it.
        smk_size: S of the small dynamic kernel.
        num_heads: Half the number of groups.
        mlp_ratio: Hidden channels of the second branch as a multiple of C.
        ls_init_value: First value of the layer scales; ``None`` means none.
        res_scale: The layer scales act on the skip connections instead of the branches.
        drop_path: Probability that a sample skips a branch.
        deploy: Build large convolutions in merged form.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        is_first: bool = False,
        kernel_size: int = 7,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 3,
        ls_init_value: float | None = 1.0,
        res_scale: bool = True,
        drop_path: float = 0.0,
        deploy: bool = False,
    ) -> None:
        width = channels + context_channels
        super().__init__(
            channels,
            width=width,
            query_channels=channels,
            key_channels=context_channels,
            kernel_size=kernel_size,
            smk_size=smk_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            ls_init_value=ls_init_value,
            res_scale=res_scale,
            drop_path=drop_path,
            deploy=deploy,
        )
        self.is_first = is_first
        self.x_scale: nn.Module = nn.Identity() if is_first else LayerScale(context_channels, 1.0)
        self.h_scale: nn.Module = nn.Identity() if is_first else LayerScale(context_channels, 1.0)
        self.fusion = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, channels, 1),
            GlobalResponseNorm(channels),
        )
        self.dyconv_proj = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Transform features and context, ``(B, C + c, H, W)``; ``context`` is that of the stage, ``(B, c, H, W)``."""
        if not self.is_first:
            features, own = x[:, : self.query_channels], x[:, self.query_channels :]
            x = torch.cat([features, self.x_scale(own) + self.h_scale(context)], 1)
        x = self.dwconv1(x)
        z = self.norm1(x)
        value = self.fusion(z)
        y = self.se_layer(self.dyconv_proj(self.mix(z, value)) + self.lepe(value))
        return self.add_branches(x, self.proj(self.gate(value) * y))


class ContMixBlock(MixingBlock):
    """The dynamic kernels as a block on their own, for any network: queries and region centres from the same map.

    Args:
        channels: C.
        kernel_size: K of the large dynamic kernel and of the static one beside it.
        smk_size: S of the small dynamic kernel.
        num_heads: Half the number of groups.
        mlp_ratio: Hidden channels of the second branch as a multiple of C.
        ls_init_value: First value of the layer scales; ``None`` means none.
        res_scale: The layer scales act on the skip connections instead of the branches.
        drop_path: Probability that a sample skips a branch.
        deploy: Build the large convolution in merged form.

    Source:
        Lou and Yu, "OverLoCK", CVPR 2025 (arXiv:2502.20087); official code LMMMEng/OverLoCK (Apache-2.0),
        models/contmix.py at commit 2c8ab3b.

    Example:
        >>> ContMixBlock(64)(torch.zeros(2, 64, 14, 20)).shape
        torch.Size([2, 64, 14, 20])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4,
        ls_init_value: float | None = None,
        res_scale: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__(
            channels,
            width=channels,
            query_channels=channels,
            key_channels=channels,
            kernel_size=kernel_size,
            smk_size=smk_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            ls_init_value=ls_init_value,
            res_scale=res_scale,
            drop_path=drop_path,
            deploy=deploy,
        )
        for table in (self.rpb1, self.rpb2):
            nn.init.trunc_normal_(table, std=0.02)
        self.weight_value = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.fusion_proj = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, C, H, W)``; the size stays."""
        x = self.dwconv1(x)
        z = self.norm1(x)
        y = self.se_layer(self.fusion_proj(self.mix(z, self.weight_value(z))) + self.lepe(z))
        return self.add_branches(x, self.proj(self.gate(z) * y))


def layer_scale(channels: int, init: float | None) -> nn.Module:
    """Return a layer scale, or nothing in its place."""
    return nn.Identity() if init is None else LayerScale(channels, init)


@torch.fx.wrap
def enlarge(x: Tensor, side: int) -> Tensor:
    """Resize a map bilinearly so that its shorter side has ``side`` positions; return a larger one as it is."""
    height, width = x.shape[2], x.shape[3]
    if min(height, width) >= side:
        return x
    size = [side, int(side / height * width)] if height < width else [int(side / width * height), side]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@torch.fx.wrap
def pool_back(x: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`enlarge` by average pooling to the size of another map."""
    if x.shape[2] == like.shape[2] and x.shape[3] == like.shape[3]:
        return x
    return F.adaptive_avg_pool2d(x, (like.shape[2], like.shape[3]))
