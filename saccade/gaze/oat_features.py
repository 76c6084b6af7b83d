"""What OAT sees of an object: a small network on its crop, a linear map of given features, or nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import ConfigError, ShapeError
from saccade.gaze.scenes import SceneBatch

__all__ = ["ConstantEmbedding", "CropEmbedding", "FeatureEmbedding", "spatial_pyramid"]

CROPS_AT_ONCE = 512
LEVELS = (1, 2, 4, 8)


class CropEmbedding(nn.Module):
    """Two convolutions and one linear layer, trained from scratch.

    Args:
        width: Numbers per object.
        pyramid_levels: 0: the official fixed size (149..163 x 89..103 pixels); 2, 3 or 4 levels of a spatial pyramid
            take crops of any size from 18 pixels up.

    Source:
        OAT (ECCV 2024), oat_eccv24; keys ``cnn1.0``, ``cnn2.0``, ``fc``.
    """

    def __init__(self, width: int, pyramid_levels: int = 0) -> None:
        super().__init__()
        if pyramid_levels not in (0, 2, 3, 4):
            raise ConfigError(f"pyramid_levels must be 0, 2, 3 or 4, got {pyramid_levels}.")
        self.pyramid_levels = pyramid_levels
        self.cnn1 = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(5))
        self.cnn2 = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU())
        inputs = 32 * sum(level**2 for level in LEVELS[:pyramid_levels]) if pyramid_levels else 1440
        self.fc = nn.Linear(inputs, width)

    def embed(self, crops: Tensor) -> Tensor:
        """Map crops ``(M, 3, H, W)`` to ``(M, width)``."""
        maps = self.cnn2(self.cnn1(crops))
        if self.pyramid_levels:
            flat = spatial_pyramid(maps, LEVELS[: self.pyramid_levels])
        else:
            flat = F.max_pool2d(maps, 3).flatten(1)
            if flat.shape[1] != self.fc.in_features:
                raise ShapeError(
                    f"Crops of {crops.shape[-2]} x {crops.shape[-1]} pixels do not fit: without a spatial pyramid they "
                    "must be 149..163 high and 89..103 wide. Resize them, or set pyramid_levels."
                )
        embedded: Tensor = self.fc(flat)
        return embedded

    def forward(self, scenes: SceneBatch) -> tuple[Tensor, Tensor]:
        """Embed each object once, and a white crop that stands for the begin of a path.

        Returns:
            Objects ``(B, N, width)``, zeros where there is none, and the begin ``(width,)``.
        """
        if scenes.features is None or scenes.features.ndim != 5:
            raise ShapeError("This model embeds crops: SceneBatch.features must be (B, N, 3, H, W).")
        crops = scenes.features[scenes.valid]
        blank = torch.ones_like(crops[:1])
        parts = [self.embed(part) for part in torch.cat([crops, blank]).split(CROPS_AT_ONCE)]
        embedded = torch.cat(parts)
        objects = embedded.new_zeros(*scenes.valid.shape, embedded.shape[-1])
        objects[scenes.valid] = embedded[:-1]
        return objects, embedded[-1]


class FeatureEmbedding(nn.Module):
    """A linear map of features computed beforehand, by whatever encoder.

    Args:
        features: Numbers per object that come in, F.
        width: Numbers per object that go out.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.fc = nn.Linear(features, width)
        self.begin = nn.Parameter(torch.zeros(width))

    def embed(self, features: Tensor) -> Tensor:
        """Map ``(..., F)`` to ``(..., width)``."""
        if features.shape[-1] != self.fc.in_features:
            raise ShapeError(
                f"The model takes {self.fc.in_features} features per object, got {features.shape[-1]}: "
                "use the encoder that it was trained with."
            )
        embedded: Tensor = self.fc(self.norm(features))
        return embedded

    def forward(self, scenes: SceneBatch) -> tuple[Tensor, Tensor]:
        """Return objects ``(B, N, width)`` and the begin ``(width,)``."""
        if scenes.features is None or scenes.features.ndim != 3:
            raise ShapeError("This model takes features: SceneBatch.features must be (B, N, F).")
        return self.embed(scenes.features), self.begin


class ConstantEmbedding(nn.Module):
    """The same learned vector for every object: what is left when pictures are not at hand.

    Args:
        width: Its length.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.begin = nn.Parameter(torch.ones(width))

    def forward(self, scenes: SceneBatch) -> tuple[Tensor, Tensor]:
        """Return objects ``(B, N, width)`` and the begin ``(width,)``."""
        return self.begin.expand(*scenes.valid.shape, -1), self.begin


def spatial_pyramid(maps: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Pool maps of any size to the maxima of 1, 4, 16, ... cells.

    Args:
        maps: ``(B, C, H, W)``, not negative.
        levels: Cells along each side.

    Returns:
        ``(B, C * sum(n^2))``, level by level. Where a side does not divide, the map is padded with zeros on both sides.
    """
    height, width = maps.shape[-2:]
    pooled = []
    for level in levels:
        tall, wide = -(-height // level), -(-width // level)
        above, left = (tall * level - height) // 2, (wide * level - width) // 2
        padding = (left, wide * level - width - left, above, tall * level - height - above)
        pooled.append(F.max_pool2d(F.pad(maps, padding), (tall, wide)).flatten(1))
    return torch.cat(pooled, 1)
