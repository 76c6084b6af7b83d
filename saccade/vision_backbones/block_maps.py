"""Models whose features are the maps after each of their blocks: what timm asks of them, for FAN and RVT."""

# Annotations are evaluated here, not kept as text: torch.fx hands those of the model's forward on to TorchScript.
from collections.abc import Iterator

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.feature_maps import FeatureMaps, init_linear

__all__ = ["BlockMaps"]

POOLS = ("avg", "max", "avgmax", "")


class BlockMaps(FeatureMaps):
    """The part of timm's contract that models with a map after each block share.

    A subclass makes its layers, ``feature_info`` and ``norm``, calls :meth:`reset_classifier`, and defines
    ``forward_features``, ``steps`` (through :meth:`with_norm`) and ``keep``. Features are the last map,
    before ``norm``.

    Args:
        in_chans: Channels of the image.
        channels: Of the features.
        drop_rate: Dropout before the classifier.
    """

    def __init__(self, in_chans: int, channels: int, drop_rate: float) -> None:
        super().__init__(in_chans, channels)
        self.head_drop = nn.Dropout(drop_rate)
        self.norm: nn.Module = nn.LayerNorm(channels, eps=1e-6)

    @torch.jit.ignore
    def set_pool(self, global_pool: str) -> None:
        """Set the pooling before the classifier.

        Raises:
            ConfigError: If it has no such name.
        """
        if global_pool not in POOLS:
            raise ConfigError(f"global_pool must be one of {', '.join(map(repr, POOLS))}; got {global_pool!r}.")
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=global_pool != "")
        self.flat = global_pool != ""

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: 0 means none.
            global_pool: ``None`` keeps the present pooling.

        Raises:
            ConfigError: If the model cannot pool like this.
        """
        if global_pool is not None:
            self.set_pool(global_pool)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features
        like = next(self.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            init_linear(self.head)
        self.train(self.training)

    def pooled(self, x: Tensor) -> Tensor:
        """Return normalised features ``(B, C)``; without pooling ``(B, H, W, C)``."""
        return self.pool_map(x)

    def pool_map(self, x: Tensor) -> Tensor:
        """Pool a map ``(B, C, H, W)`` over its places and normalise."""
        x = self.global_pool(x)
        normalised: Tensor = self.norm(x if self.flat else x.permute(0, 2, 3, 1))
        return normalised

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify features; ``pre_logits`` leaves the classifier out."""
        x = self.head_drop(self.pooled(x))
        if not pre_logits:
            x = self.head(x)
        return x if self.flat else x.permute(0, 3, 1, 2)

    def with_norm(self, maps: Iterator[Tensor], norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield maps as :meth:`steps` does: the last one is normalised if ``norm``."""
        last = len(self.feature_info) - 1
        for i, x in enumerate(maps):
            y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if norm and i == last else x
            yield x, y
