"""Where the visual tokens of a picture lie in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from saccade.errors import ConfigError

__all__ = ["ImageGrid", "find_image_grid", "seen_picture"]


@dataclass(frozen=True)
class ImageGrid:
    """Visual tokens that show the whole of a picture, row by row.

    Args:
        rows: From top to bottom.
        columns: From left to right.
        first: Place of the first of them among the visual tokens.
    """

    rows: int
    columns: int
    first: int = 0

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.rows * self.columns

    def cells(self, values: Tensor) -> Tensor:
        """Return the part ``(..., rows, columns)`` of values of all visual tokens ``(..., V)``."""
        part = values[..., self.first : self.first + self.count]
        return part.reshape(*values.shape[:-1], self.rows, self.columns)

    def check(self, visual: int) -> None:
        """Raise unless a picture with so many visual tokens has this grid.

        Raises:
            ConfigError: If it ends behind the last token.
        """
        if self.first < 0 or min(self.rows, self.columns) < 1 or self.first + self.count > visual:
            raise ConfigError(
                f"A grid of {self.rows} x {self.columns} tokens from token {self.first} on does not fit into the "
                f"{visual} visual tokens of the prompt."
            )


def find_image_grid(inputs: Mapping[str, Tensor], model: Any, visual: int) -> ImageGrid:  # noqa: ANN401
    """Find the tokens that show the whole of a prompt's only picture.

    Three cases are known: the processor says the grid (``image_grid_thw``, the Qwen families); the picture is one
    square view; or a square view of the whole comes before larger ones (``image_grid_pinpoints``, LLaVA-NeXT and
    LLaVA-OneVision).

    Args:
        inputs: Model inputs of one prompt.
        model: A model of transformers.
        visual: Number of visual tokens in the prompt.

    Raises:
        ConfigError: In all other cases, with what to pass instead.
    """
    config = model.config
    if "image_grid_thw" in inputs:
        frames, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = int(config.vision_config.spatial_merge_size)
        grid = ImageGrid(rows // merge, columns // merge)
        if frames == 1 and len(inputs["image_grid_thw"]) == 1 and grid.count == visual:
            return grid
    elif hasattr(config, "num_query_tokens"):
        raise ConfigError(
            f"The {visual} visual tokens of {type(model).__name__} are answers to learned queries and have no place in "
            "the picture, so there is no map to draw."
        )
    elif hasattr(config, "image_grid_pinpoints"):
        side = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        if side * side <= visual:
            return ImageGrid(side, side)
    elif views(inputs) == 1 and math.isqrt(visual) ** 2 == visual:
        return ImageGrid(math.isqrt(visual), math.isqrt(visual))
    raise ConfigError(
        f"How the {visual} visual tokens of {type(model).__name__} lie in the picture is not known (several views or "
        "pictures, or no square). Pass grid=ImageGrid(rows, columns, first), on the command line --grid ROWSxCOLUMNS "
        "[--first-token N], of the view that shows the whole picture."
    )


def views(inputs: Mapping[str, Tensor]) -> int:
    """Return how many pictures the vision tower sees."""
    pixels = inputs.get("pixel_values")
    return 1 if pixels is None or pixels.ndim < 4 else math.prod(pixels.shape[:-3])


def seen_picture(inputs: Mapping[str, Tensor], processor: Any, image: Image.Image, grid: ImageGrid) -> Image.Image:  # noqa: ANN401
    """Return the picture as the model sees it: cropped, padded or stretched by the processor.

    Where the pixels reach the model as a list of patches (the Qwen families) the photograph itself, which they cover.

    Args:
        inputs: Model inputs of one prompt.
        processor: The model's processor.
        image: The photograph, RGB.
        grid: Tokens of the view to return.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim < 4:
        return image
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    view = flat[min(grid.first // grid.count, len(flat) - 1)].float().cpu().numpy().transpose(1, 2, 0)
    images = processor.image_processor
    if images.do_normalize:
        view = view * np.asarray(images.image_std) + np.asarray(images.image_mean)
    return Image.fromarray((view.clip(0, 1) * 255).round().astype(np.uint8))
