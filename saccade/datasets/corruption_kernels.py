"""Filters and geometry that several corruptions share. Images are float arrays ``(H, W)`` or ``(H, W, C)``."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["LUMA", "Image", "disk", "enlarge", "gaussian", "motion", "plasma"]

Image = NDArray[Any]
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # brightness of red, green and blue (ITU-R BT.601)


def gaussian(
    image: Image, sigma: float | tuple[float, float], *, truncate: float = 4.0, border: int = cv2.BORDER_REPLICATE
) -> Image:
    """Blur with a Gaussian cut off after ``truncate`` standard deviations; ``sigma`` in pixels, that of rows first."""
    rows, columns = (sigma, sigma) if isinstance(sigma, int | float) else sigma
    blurred: Image = cv2.sepFilter2D(
        image, -1, gaussian_weights(columns, truncate), gaussian_weights(rows, truncate), borderType=border
    )
    return blurred.reshape(image.shape)  # OpenCV drops a last axis of length 1


def gaussian_weights(sigma: float, truncate: float) -> NDArray[np.float64]:
    """Return the weights of a one-dimensional Gaussian, their sum 1."""
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-12)) ** 2)
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def disk(radius: int, alias_sigma: float) -> NDArray[np.float32]:
    """Return a disk of that radius in pixels, its edge softened, the sum of its values 1."""
    reach = max(8, radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    shape = (x**2 + y**2 <= radius**2).astype(np.float32)
    size = 3 if radius <= 8 else 5
    soft: NDArray[np.float32] = cv2.GaussianBlur(shape / shape.sum(), (size, size), alias_sigma)
    return soft


def motion(image: Image, radius: int, sigma: float, angle: float) -> Image:
    """Blur along one direction with the half Gaussian of ``sigma`` pixels, in ``2 * radius + 1`` steps of one pixel.

    Beyond the border the image goes on with its last pixel, so the brightness of a flat image stays, whatever its size.

    Args:
        image: ``(H, W)`` or ``(H, W, C)``, any real dtype.
        radius: Half the number of steps.
        sigma: Standard deviation in pixels.
        angle: Direction in degrees; 0 is along the rows.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    across, along = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    dy, dx = (-np.ceil(steps * part - 0.5).astype(int) for part in (across, along))
    height, width = image.shape[:2]
    top, left = max(0, dy.max()), max(0, dx.max())
    padding = [(top, max(0, -dy.min())), (left, max(0, -dx.min())), *[(0, 0)] * (image.ndim - 2)]
    padded = np.pad(image, padding, mode="edge").astype(np.float32)
    blurred = np.zeros(image.shape, np.float32)
    for weight, down, right in zip(weights.astype(np.float32), dy, dx, strict=True):
        blurred += weight * padded[top - down : top - down + height, left - right : left - right + width]
    return blurred


def enlarge(image: Image, factor: float) -> Image:
    """Cut out the centre and enlarge it by ``factor`` to at least the old size, linearly, corner pixels on corners.

    The result may be larger by a pixel or so at the right and the bottom; callers cut it.
    """
    for axis in (0, 1):
        length = image.shape[axis]
        kept = int(np.ceil(length / factor))
        first = (length - kept) // 2
        size = max(round(kept * factor), 1)
        position = np.arange(size) * ((kept - 1) / max(size - 1, 1))
        low = np.minimum(position.astype(int), max(kept - 2, 0))
        shape = [1] * image.ndim
        shape[axis] = size
        share = (position - low).astype(image.dtype).reshape(shape)
        near = image.take(first + low, axis=axis)
        image = near + share * (image.take(first + np.minimum(low + 1, kept - 1), axis=axis) - near)
    return image


def plasma(size: int, decay: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """Return a cloud ``(size, size)`` between 0 and 1 that repeats at its borders (diamond-square algorithm).

    Midpoints are the mean of their four neighbours plus uniform noise, its amplitude falling by ``decay ** 2``
    each time the grid is halved.

    Args:
        size: Side in pixels, a power of two.
        decay: Root of the fall of the amplitude per halving.
        generator: Source of randomness.
    """
    cloud = np.zeros((size, size), np.float32)
    amplitude, step = 1.0, size
    while step >= 2:
        half = step // 2
        noise = generator.uniform(-amplitude, amplitude, (3, size // step, size // step)).astype(np.float32)
        corners = cloud[::step, ::step]
        beside = corners + np.roll(corners, -1, axis=1)
        below = corners + np.roll(corners, -1, axis=0)
        centres = (beside + np.roll(beside, -1, axis=0)) / 4 + noise[0]
        cloud[half::step, half::step] = centres
        cloud[::step, half::step] = (beside + centres + np.roll(centres, 1, axis=0)) / 4 + noise[1]
        cloud[half::step, ::step] = (below + centres + np.roll(centres, 1, axis=1)) / 4 + noise[2]
        amplitude /= decay**2
        step = half
    cloud -= cloud.min()
    scaled: NDArray[np.float32] = cloud / max(float(cloud.max()), 1e-12)
    return scaled
