"""Stages of OverLoCK: runs of blocks, what lies between them, and the heads."""

from __future__ import annotations

import torch
from timm.layers import create_classifier
from torch import Tensor, nn

from saccade.vision_backbones.recompute import Stage, recompute

__all__ = ["FocusDownsample", "FocusStage", "Head", "auxiliary_head", "downsample", "init_weights"]


class FocusStage(Stage):
    """Blocks on features and context that all see the context with which the stage began."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """Transform ``(B, C + c, H, W)`` given context ``(B, c, H, W)``."""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = recompute(block, x, context)
            else:
                x = block(x, context)
        return x


class FocusDownsample(nn.Module):
    """Halve the resolution of features and context, each with its own convolution."""

    def __init__(self, channels: int, out_channels: int, context_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.x_proj = downsample(channels, out_channels)
        self.h_proj = downsample(context_channels, context_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out + c, H / 2, W / 2)``."""
        return torch.cat([self.x_proj(x[:, : self.channels]), self.h_proj(x[:, self.channels :])], 1)


class Head(nn.Sequential):
    """Projection, pooling and classifier, numbered as in the official files.

    Args:
        channels: Of the features.
        projection: Channels that are pooled.
        num_classes: 0 means none: the pooled channels are returned.
        global_pool: Kind of pooling, ``""`` for none: a map of logits is returned.
        drop_rate: Dropout before the classifier.
    """

    def __init__(self, channels: int, projection: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__(
            nn.Conv2d(channels, projection, 1, bias=False), nn.BatchNorm2d(projection), nn.SiLU(), *[nn.Identity()] * 3
        )
        self.projection, self.drop_rate = projection, drop_rate
        self.reset(num_classes, global_pool)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify ``(B, C, H, W)``; ``pre_logits`` leaves the classifier out."""
        for i, layer in enumerate(self):
            if i != 4 or not pre_logits:
                x = layer(x)
        return x

    def reset(self, num_classes: int, global_pool: str) -> None:
        """Replace pooling and classifier."""
        pool, classifier = create_classifier(self.projection, num_classes, pool_type=global_pool, use_conv=True)
        self.pool_type = global_pool
        self.num_features = self.projection * pool.feat_mult()
        self[3] = nn.Sequential(pool, nn.Dropout(self.drop_rate))
        self[4] = classifier.to(self[0].weight)
        self[5] = nn.Flatten(1) if global_pool else nn.Identity()
        init_weights(self[4])


def downsample(in_channels: int, out_channels: int, stride: int = 2) -> nn.Sequential:
    """Return a 3 x 3 convolution and its batch norm."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """Return the classifier on the Overview-Net's output."""
    classifier = nn.Conv2d(channels, num_classes, 1) if num_classes > 0 else nn.Identity()
    return nn.Sequential(nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(1), classifier, nn.Flatten(1))


def init_weights(module: nn.Module) -> None:
    """Draw the weights of a convolution from a normal distribution cut off at two."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
