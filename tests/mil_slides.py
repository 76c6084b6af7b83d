"""Slides for tests, drawn and written as pyramids."""

from pathlib import Path

import cv2
import numpy as np
import tifffile


def drawn_slide(width: int = 2200, height: int = 1700, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return RGB pixels of two pieces of stained tissue, one with a hole, on bright glass, and the exact mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 4, height // 2), (width // 6, height // 3), 0, 0, 360, 1, cv2.FILLED)
    cv2.circle(mask, (width // 4, height // 2), height // 8, 0, cv2.FILLED)
    cv2.ellipse(mask, (3 * width // 4, height // 2), (width // 7, height // 4), 30, 0, 360, 1, cv2.FILLED)
    glass = rng.normal(243, 2, (height, width, 3))
    stain = np.array([190.0, 110, 170]) + 25 * rng.normal(size=(height // 8 + 1, width // 8 + 1, 3))
    stain = cv2.resize(stain, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.where(mask[..., None] > 0, stain, glass).clip(0, 255).astype(np.uint8), mask > 0


def write_pyramid(
    path: Path,
    pixels: np.ndarray,
    factors: tuple[float, ...] = (1, 4),
    *,
    mpp: float | None = 0.5,
    compression: str = "jpeg",
    tile: int = 256,
) -> Path:
    """Write a tiled TIFF whose levels are smaller by these factors (sizes rounded)."""
    height, width = pixels.shape[:2]
    tags = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        for index, factor in enumerate(factors):
            size = (round(width / factor), round(height / factor))
            level = pixels if factor == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            writer.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression=compression,
                compressionargs={"level": 90} if compression == "jpeg" else None,
                subfiletype=1 if index else 0,
                metadata=None,
                **tags,
            )
    return path
