"""Digital: contrast, elastic transform, pixelation, JPEG compression, saturation."""

from __future__ import annotations

import io

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image as Pillow

from saccade.datasets.corruption_kernels import LUMA, Image, gaussian

__all__ = ["contrast", "draw_elastic_transform", "elastic_transform", "jpeg_compression", "pixelate", "saturate"]


def contrast(image: Image, factor: float) -> Image:
    """Bring every value nearer to the mean of its colour."""
    mean = image.mean(axis=(0, 1), dtype=np.float64)
    changed: Image = (image - mean) * factor + mean
    return changed


def draw_elastic_transform(image: Image, strength: float, generator: Generator) -> tuple[Image, Image]:
    """Draw raw displacements in x and y, uniform within 0.5 % of the height."""
    limit = 0.005 * image.shape[0]
    return generator.uniform(-limit, limit, image.shape[:2]), generator.uniform(-limit, limit, image.shape[:2])


def elastic_transform(image: Image, strength: float, raw_x: Image, raw_y: Image) -> Image:
    """Move pixels by smoothed displacements; between pixels and beyond the border, linear and mirrored."""
    height, width = image.shape[:2]
    sigma = (0.01 * height, 0.01 * width)

    def smooth(raw: Image) -> Image:
        smoothed = gaussian(raw.astype(np.float64), sigma, truncate=3.0, border=cv2.BORDER_REFLECT)
        return (strength * smoothed).astype(np.float32)

    low_y, high_y, share_y = neighbours(np.arange(height)[:, None] + smooth(raw_y), height)
    low_x, high_x, share_x = neighbours(np.arange(width)[None, :] + smooth(raw_x), width)
    pixels = image.reshape(height * width, -1).astype(np.float32)

    def between(row: Image) -> Image:
        """Return the values of a row of neighbours, ``(H, W, C)``."""
        left, right = (pixels.take(row * width + column, axis=0) for column in (low_x, high_x))
        mixed: Image = left + share_x * (right - left)
        return mixed

    upper = between(low_y)
    moved: Image = upper + share_y * (between(high_y) - upper)
    return moved


def neighbours(position: Image, length: int) -> tuple[Image, Image, Image]:
    """Return the indices on both sides of positions, mirrored into the image, and the share of the second."""
    low = np.floor(position).astype(np.int64)
    first, second = (np.minimum(i % (2 * length), 2 * length - 1 - i % (2 * length)) for i in (low, low + 1))
    return first, second, (position - low).astype(np.float32)[..., None]


def pixelate(image: Image, share: float) -> Image:
    """Shrink to a share of the side by averaging, and show the averages as squares."""
    height, width = image.shape[:2]
    small = pillow(image).resize((max(int(width * share), 1), max(int(height * share), 1)), Pillow.Resampling.BOX)
    return np.asarray(small.resize((width, height), Pillow.Resampling.NEAREST)).reshape(image.shape)


def jpeg_compression(image: Image, quality: int) -> Image:
    """Code and decode as JPEG."""
    stream = io.BytesIO()
    pillow(image).save(stream, "JPEG", quality=quality)
    with Pillow.open(stream) as decoded:
        return np.asarray(decoded).reshape(image.shape)


def pillow(image: Image) -> Pillow.Image:
    """Return an image ``(H, W, 1)`` or ``(H, W, 3)`` as Pillow's."""
    return Pillow.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def saturate(image: Image, constant: tuple[float, float]) -> Image:
    """Multiply the saturation of HSV and add to it; a grey pixel counts as red without saturation."""
    factor, offset = constant
    if image.shape[2] == 1:
        image = image.repeat(3, axis=2)
        return (saturate(image, constant) @ LUMA)[..., None]
    value = image.max(axis=2, keepdims=True).astype(np.float32)
    below = value - image
    spread = below.max(axis=2, keepdims=True)
    saturation = spread / np.maximum(value, 1)
    wanted = (saturation * factor + offset).clip(0, 1)
    colour: NDArray[np.float32] = np.where(spread > 0, below / np.maximum(spread, 1), np.array([0, 1, 1], np.float32))
    coloured: Image = value * (1 - wanted * colour)
    return coloured
