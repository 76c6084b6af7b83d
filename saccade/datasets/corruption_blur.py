"""Blur: Gaussian, glass, defocus, motion, zoom."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator

from saccade.datasets.corruption_kernels import Image, disk, enlarge, gaussian, motion

__all__ = [
    "defocus_blur",
    "draw_glass_blur",
    "draw_motion_blur",
    "gaussian_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
]


def gaussian_blur(image: Image, sigma: float) -> Image:
    """Blur by ``sigma`` pixels."""
    return gaussian(image.astype(np.float32), sigma)


def draw_glass_blur(image: Image, constant: tuple[float, int, int], generator: Generator) -> tuple[Image]:
    """Draw the offsets ``(sweeps, rows, columns, 2)`` of the pixels to exchange, ``-reach`` to ``reach - 1`` each."""
    _, reach, sweeps = constant
    rows, columns = (max(length - 2 * reach, 0) for length in image.shape[:2])
    return (generator.integers(-reach, reach, (sweeps, rows, columns, 2)),)


def glass_blur(image: Image, constant: tuple[float, int, int], offsets: Image) -> Image:
    """Blur, exchange each pixel with a near one, from the bottom right corner on, and blur again.

    Pixels nearer than ``reach`` to the border start no exchange; an image smaller than that is only blurred.
    """
    sigma, reach, _ = constant
    height, width = image.shape[:2]
    shuffled = gaussian(image.astype(np.float32), sigma).astype(np.uint8).reshape(height * width, -1)
    y = np.arange(height - reach, reach, -1)[:, None]
    x = np.arange(width - reach, reach, -1)
    # Exchanges hang on one another, so they run one by one, on a list: reading and writing an array is slower.
    order = list(range(height * width))
    for offset in offsets:
        near = (y + offset[..., 0]) * width + x + offset[..., 1]
        for one, other in zip((y * width + x).ravel().tolist(), near.ravel().tolist(), strict=True):
            order[one], order[other] = order[other], order[one]
    return gaussian(shuffled[order].reshape(image.shape).astype(np.float32), sigma)


def defocus_blur(image: Image, constant: tuple[int, float]) -> Image:
    """Blur with a disk."""
    blurred: Image = cv2.filter2D(image.astype(np.float32), -1, disk(*constant))
    return blurred.reshape(image.shape)


def draw_motion_blur(image: Image, constant: tuple[int, float], generator: Generator) -> tuple[Image]:
    """Draw the direction in degrees."""
    return (generator.uniform(-45, 45, 1),)


def motion_blur(image: Image, constant: tuple[int, float], angle: Image) -> Image:
    """Blur along one direction."""
    return motion(image, *constant, float(angle[0]))


def zoom_blur(image: Image, factors: Image) -> Image:
    """Average the image with enlarged copies of itself."""
    height, width = image.shape[:2]
    source = image.astype(np.float32)
    total = source.copy()
    for factor in factors:
        total += enlarge(source, factor)[:height, :width]
    return total / (len(factors) + 1)
