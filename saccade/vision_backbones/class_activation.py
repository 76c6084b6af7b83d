"""Maps from the last features of a model, without gradients: class activation and the first principal component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.attention_maps import token_grid

__all__ = ["FeatureLayout", "class_map", "eigen_map", "reads_positions_alike"]


@dataclass(frozen=True)
class FeatureLayout:
    """Where the image positions are in a feature tensor.

    Args:
        axes: ``"NCHW"``, ``"NHWC"``, or ``"NLC"`` (tokens).
        grid: Rows and columns of positions.
        prefix: Class and register tokens in front.
    """

    axes: Literal["NCHW", "NHWC", "NLC"]
    grid: tuple[int, int]
    prefix: int = 0

    @classmethod
    def of(cls, features: object, model: nn.Module, image_size: tuple[int, int]) -> Self:
        """Recognise the layout.

        Args:
            features: Output of ``model.forward_features`` or of a layer.
            model: Says whether maps are channels last (``output_fmt``) and how many prefix tokens there are.
            image_size: Rows and columns of the input image.

        Raises:
            ConfigError: If there are no positions to be found in it.
        """
        if isinstance(features, Tensor) and features.ndim == 4:
            last = str(getattr(model, "output_fmt", "NCHW")).upper() == "NHWC"
            rows, columns = features.shape[1:3] if last else features.shape[2:]
            if rows * columns > 1:
                return cls("NHWC" if last else "NCHW", (rows, columns))
        if isinstance(features, Tensor) and features.ndim == 3:
            found = token_grid(features.shape[1], image_size, int(getattr(model, "num_prefix_tokens", 0)))
            if found is not None:
                return cls("NLC", found[1], found[0])
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(f"its features ({shape}) have no image positions; name another layer with --layer.")

    def positions(self, features: Tensor) -> Tensor:
        """Return the features by position, ``(B, P, C)``."""
        if self.axes == "NLC":
            return features[:, self.prefix :]
        return features.flatten(1, 2) if self.axes == "NHWC" else features.flatten(2).transpose(1, 2)

    def arrange(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn features by position, ``(B, P, C)``, back into what a head takes; prefix tokens become zeros."""
        batch, _, channels = positions.shape
        if self.axes == "NLC":
            return torch.cat([positions.new_zeros(batch, self.prefix, channels), positions], dim=1)
        if self.axes == "NHWC":
            return positions.reshape(batch, *grid, channels)
        return positions.transpose(1, 2).reshape(batch, channels, *grid)


@torch.no_grad()
def reads_positions_alike(model: Any, layout: FeatureLayout, features: Tensor) -> bool:  # noqa: ANN401 - timm's contract
    """Tell whether a model's head pools all positions in the same way, so that it can judge each on its own.

    True of heads that pool by average, also with further layers before or after; false of class tokens and of heads
    that flatten the map.

    Args:
        model: Has ``forward_head``.
        layout: Of the features.
        features: Of one image; only their shape and scale matter.
    """
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    positions = layout.positions(noise)

    def pooled(by_position: Tensor) -> Tensor:
        output: Tensor = model.forward_head(layout.arrange(by_position, layout.grid), pre_logits=True)
        return output

    as_is, turned, other = pooled(positions), pooled(positions.flip(1)), pooled(positions.flip(0, 2))
    return torch.allclose(as_is, turned, rtol=1e-3, atol=1e-4 * float(as_is.abs().max())) and not torch.equal(
        as_is, other
    )


def class_map(model: Any, layout: FeatureLayout, features: Tensor, classes: Tensor) -> Tensor:  # noqa: ANN401
    """Return the logit of a class that the model's head gives to each position on its own.

    For a head of average pooling and a linear layer this is the class activation map with the bias added: its mean over
    the positions is the logit of the image.

    Args:
        model: Has ``forward_head``, for which ``reads_positions_alike``.
        layout: Of the features.
        features: Output of ``forward_features``, ``(B, ...)``.
        classes: Class index of each image, ``(B,)``.

    Returns:
        ``(B, gy, gx)`` float32.

    Source:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016 (arXiv:1512.04150), eq. 2.
        Differs from it: the bias is included, and layers of the head beside the linear one are applied per position.
    """
    maps = []
    with torch.autocast(features.device.type, enabled=False):  # half precision would show as bands in the map
        for image, index in zip(layout.positions(features.float()), classes, strict=True):
            logits = model.forward_head(layout.arrange(image[:, None], (1, 1)))  # (P, K)
            maps.append(logits[:, index].reshape(layout.grid))
    return torch.stack(maps)


def eigen_map(layout: FeatureLayout, features: Tensor) -> Tensor:
    """Project the features of each position on their first principal direction.

    Args:
        layout: Of the features.
        features: ``(B, ...)``.

    Returns:
        ``(B, gy, gx)`` float32; the sign is chosen such that the sum is positive.

    Source:
        Muhammad and Yeasin, "Eigen-CAM", IJCNN 2020 (arXiv:2008.00299), section III. Differs from it: the sign, which
        the decomposition leaves open, is fixed.
    """
    positions = layout.positions(features.float())
    _, _, directions = torch.linalg.svd(positions, full_matrices=False)
    projection = (positions @ directions[:, 0, :, None]).squeeze(-1)  # (B, P)
    projection = projection * torch.where(projection.sum(1, keepdim=True) < 0, -1.0, 1.0)
    maps: Tensor = projection.unflatten(1, layout.grid)
    return maps
