"""Bottom-up saliency of an image by its spectral residual, and of the objects in it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import DataError

__all__ = ["object_saliency", "spectral_residual"]

SIDE = 64  # longer side in px at which the spectrum is taken


def spectral_residual(image: NDArray[np.uint8], *, blur: float = 2.5) -> NDArray[np.float32]:
    """Compute what is unexpected in an image: its spectrum with the smooth part of the log amplitude taken away.

    Args:
        image: ``(H, W)`` or ``(H, W, 3)`` uint8.
        blur: Standard deviation of the final Gaussian, in px at 64 px.

    Returns:
        ``(H, W)`` float32, not negative, with mean 1 (all 1 for an image without structure).

    Raises:
        DataError: If the image has another shape.

    Source:
        Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007.
    """
    from scipy import ndimage

    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3):
        raise DataError(f"An image must be (H, W) or (H, W, 3), got {image.shape}.", reason="bad_image")
    grey = image.astype(np.float64)
    grey = grey if grey.ndim == 2 else grey @ np.array([0.299, 0.587, 0.114])
    zoom = SIDE / max(grey.shape)
    small = ndimage.zoom(grey, zoom, order=1, grid_mode=True, mode="grid-constant") if zoom < 1 else grey
    if np.ptp(small) == 0:
        return np.ones(grey.shape, np.float32)
    spectrum = np.fft.fft2(small)
    amplitude = np.log(np.abs(spectrum) + 1e-8)
    residual = amplitude - ndimage.uniform_filter(amplitude, 3, mode="wrap")
    energy = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    smooth = ndimage.gaussian_filter(energy, blur)
    scale = [long / short for long, short in zip(grey.shape, smooth.shape, strict=True)]
    full = ndimage.zoom(smooth, scale, order=1, grid_mode=True, mode="nearest").clip(min=0)
    return np.asarray(full / full.mean(), np.float32)


def object_saliency(saliency: NDArray[np.float32], boxes: Tensor) -> Tensor:
    """Return the mean saliency inside each box, ``(N,)`` float32; 0 outside the image.

    Args:
        saliency: ``(H, W)``.
        boxes: ``(N, 4)`` x1 y1 x2 y2 in px.
    """
    height, width = saliency.shape
    total = np.pad(saliency.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    corners = boxes.round().long().numpy()
    x1, x2 = (corners[:, column].clip(0, width) for column in (0, 2))
    y1, y2 = (corners[:, column].clip(0, height) for column in (1, 3))
    inside = total[y2, x2] - total[y1, x2] - total[y2, x1] + total[y1, x1]
    area = np.maximum((x2 - x1) * (y2 - y1), 1)
    return torch.from_numpy(inside / area).float().clamp(min=0)
