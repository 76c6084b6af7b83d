"""Crops of objects out of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.errors import DataError

__all__ = ["cut_crops"]


def cut_crops(image: Image.Image, boxes: Tensor, size: int | Sequence[int]) -> Tensor:
    """Cut boxes out of an image, each resized to one size whatever its shape.

    Args:
        image: RGB.
        boxes: ``(N, 4)`` x1 y1 x2 y2 in px; what lies outside the image is black.
        size: Height and width in px, or one number for both.

    Returns:
        ``(N, 3, H, W)`` float32 in [0, 1].

    Raises:
        DataError: If a box lies entirely outside the image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    crops = []
    for number, box in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = box
        if x2 <= 0 or y2 <= 0 or x1 >= image.width or y1 >= image.height:
            raise DataError(
                f"Box {number} {box} lies outside the image of {image.width} x {image.height} px.", reason="bad_boxes"
            )
        corners = (round(x1), round(y1), max(round(x2), round(x1) + 1), max(round(y2), round(y1) + 1))
        crop = image.crop(corners).resize((width, height), Image.Resampling.BILINEAR)
        crops.append(torch.from_numpy(np.array(crop.convert("RGB"))))
    return torch.stack(crops).permute(0, 3, 1, 2).float() / 255
