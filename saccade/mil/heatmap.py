"""Scores of tiles as a picture of the slide: normalise, accumulate where tiles overlap, draw over the slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from saccade.errors import ConfigError, ShapeError, suggest
from saccade.mil.slide_backends import Pixels
from saccade.mil.tissue import Polygon, rasterize

__all__ = [
    "NORMALIZATIONS",
    "Heatmap",
    "blend_heatmap",
    "colour_heatmap",
    "draw_heatmap",
    "hide_outside",
    "normalize_scores",
    "tile_map",
]

Scores = NDArray[np.float64]
NORMALIZATIONS = ("percentile", "minmax", "times-uniform", "none")
MOST_PIXELS = 1 << 28  # of a canvas: 2 GiB with the counts beside the sums


@dataclass(frozen=True)
class Heatmap:
    """Mean score at each pixel of a canvas.

    Args:
        values: ``(Y, X)``; NaN where there is no tile.
        downsample: Level-0 pixels per pixel.
    """

    values: Scores
    downsample: float

    @property
    def covered(self) -> NDArray[np.bool_]:
        """Where there is a tile."""
        return np.isfinite(self.values)


def normalize_scores(scores: NDArray[Any], method: str = "percentile") -> Scores:
    """Bring scores to a common scale.

    Args:
        scores: ``(N,)``, attention or logits.
        method: ``"percentile"``: average rank over N, in (0, 1], as CLAM has it; ``"minmax"``: from 0 to 1, all 0 if
            they are equal; ``"times-uniform"``: attention times N, 1 being what each tile has if all are equal;
            ``"none"``.

    Raises:
        ConfigError: If the method is unknown.
        ShapeError: If scores are not 1-D.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1:
        raise ShapeError(f"scores must be (N,), got {values.shape}; choose a branch or class first.")
    if method not in NORMALIZATIONS:
        raise ConfigError(f"normalisation must be one of {', '.join(NORMALIZATIONS)}; got {method!r}.")
    if method == "percentile":
        return np.asarray(rankdata(values) / max(len(values), 1))
    if method == "minmax":
        spread = np.ptp(values) if len(values) else 0.0
        return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    return values * len(values) if method == "times-uniform" else values


def tile_map(
    values: NDArray[Any],
    coords: NDArray[Any],
    tile_size: float | tuple[float, float],
    slide_size: tuple[int, int],
    *,
    downsample: float = 32.0,
    rounding: str = "nearest",
) -> Heatmap:
    """Lay tiles on a canvas; a pixel has the mean of the tiles that cover it.

    Four corners of every tile go into a table of differences whose sums are the canvas, so that time does not depend on
    the size of tiles.

    Args:
        values: ``(N,)``.
        coords: ``(N, 2)``, x and y of the top-left corners in level-0 pixels.
        tile_size: Of a tile in level-0 pixels, one number or width and height.
        slide_size: Width and height of level 0.
        downsample: Level-0 pixels per pixel of the canvas.
        rounding: Of scaled edges: ``"nearest"``, or ``"ceil"`` for corners and sizes as CLAM and TRIDENT have it.

    Raises:
        ConfigError: If the canvas would be larger than 2 GiB, or the rounding is unknown.
        ShapeError: If there are not as many coordinates as values.
    """
    if np.shape(coords) != (len(values), 2):
        raise ShapeError(f"coords must be ({len(values)}, 2) as there are values, got {np.shape(coords)}.")
    if rounding not in ("nearest", "ceil"):
        raise ConfigError(f"rounding must be 'nearest' or 'ceil'; got {rounding!r}.")
    columns, rows = (max(1, int(side / downsample)) for side in slide_size)
    if rows * columns > MOST_PIXELS:
        raise ConfigError(f"A map of {columns} x {rows} pixels is too large; take a downsample above {downsample:g}.")
    size = np.array(tile_size if isinstance(tile_size, tuple) else (tile_size, tile_size), np.float64) / downsample
    start = np.asarray(coords, np.float64) / downsample
    if rounding == "ceil":
        low = np.ceil(start)
        high = low + np.ceil(size)
    else:
        low, high = np.round(start), np.round(start + size)
    low = np.clip(low, 0, (columns, rows)).astype(np.int64)
    high = np.clip(high, 0, (columns, rows)).astype(np.int64)
    sums, counts = (box_sums(low, high, weight, (rows, columns)) for weight in (np.asarray(values, np.float64), None))
    covered = counts > 0.5
    return Heatmap(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=covered), downsample)


def box_sums(low: NDArray[np.int64], high: NDArray[np.int64], weight: Scores | None, shape: tuple[int, int]) -> Scores:
    """Return at each pixel the sum of the weights of the boxes that cover it."""
    rows, columns = shape[0] + 1, shape[1] + 1
    table = np.zeros(rows * columns)
    for (x, y), sign in (
        ((low[:, 0], low[:, 1]), 1.0),
        ((high[:, 0], high[:, 1]), 1.0),
        ((low[:, 0], high[:, 1]), -1.0),
        ((high[:, 0], low[:, 1]), -1.0),
    ):
        np.add.at(table, y * columns + x, sign if weight is None else sign * weight)
    sums = table.reshape(rows, columns)
    for axis in (0, 1):
        np.cumsum(sums, axis, out=sums)
    return sums[:-1, :-1]


def colour_heatmap(
    heatmap: Heatmap, *, colormap: str = "coolwarm", limits: tuple[float, float] | None = None, smooth: float = 0.0
) -> Pixels:
    """Return a map as a picture with a transparent background.

    Args:
        heatmap: The map.
        colormap: matplotlib's name.
        limits: Values at both ends of the colours; ``None`` means the smallest and the largest.
        smooth: Standard deviation of a Gaussian in pixels of the map; covered pixels alone count.

    Returns:
        RGBA uint8 ``(Y, X, 4)``, alpha 255 where there is a tile, else 0.

    Raises:
        ConfigError: If there is no such colormap.
    """
    import cv2
    from matplotlib import colormaps

    if colormap not in colormaps:
        raise ConfigError(f"matplotlib has no colormap {colormap!r}.{suggest(colormap, colormaps)}")
    values, covered = heatmap.values, heatmap.covered
    if smooth > 0:
        weight = cv2.GaussianBlur(covered.astype(np.float64), (0, 0), smooth)
        blurred = cv2.GaussianBlur(np.where(covered, values, 0.0), (0, 0), smooth)
        values = np.where(covered, blurred / np.maximum(weight, 1e-12), np.nan)
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values))) if covered.any() else (0.0, 1.0)
    scaled = np.where(covered, values, low) - low
    table = np.round(colormaps[colormap](np.arange(256))[:, :3] * 255).astype(np.uint8)
    index = np.clip(scaled / max(high - low, 1e-12) * 256, 0, 255).astype(np.uint8)
    return np.dstack([table[index], np.where(covered, 255, 0).astype(np.uint8)])


def blend_heatmap(colours: Pixels, background: Pixels, alpha: float) -> Pixels:
    """Lay the colours of a map over a picture; what no tile covers stays as it is.

    Args:
        colours: RGBA uint8 of :func:`colour_heatmap`; if of another size, pixels are repeated.
        background: RGB uint8.
        alpha: Opacity of the map, 0..1.

    Returns:
        RGB uint8 of the size of the background.
    """
    import cv2

    height, width = background.shape[:2]
    if colours.shape[:2] != (height, width):
        resized = cv2.resize(colours, (width, height), interpolation=cv2.INTER_NEAREST)
        colours = np.asarray(resized, np.uint8)
    blend = cv2.addWeighted(background, 1 - alpha, np.ascontiguousarray(colours[..., :3]), alpha, 0)
    return np.where(colours[..., 3:] > 0, blend, background).astype(np.uint8)


def draw_heatmap(
    heatmap: Heatmap,
    background: Pixels,
    *,
    alpha: float = 0.5,
    colormap: str = "coolwarm",
    limits: tuple[float, float] | None = None,
    smooth: float = 0.0,
) -> Pixels:
    """Blend a map over a picture of the slide; what no tile covers stays as it is.

    Args:
        heatmap: The map.
        background: RGB uint8 of the whole slide, any size.
        alpha: Opacity of the map, 0..1.
        colormap: As in :func:`colour_heatmap`.
        limits: Likewise.
        smooth: Likewise.

    Returns:
        RGB uint8 of the size of the background.

    Raises:
        ConfigError: If alpha is no share, or there is no such colormap.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha must be between 0 and 1, got {alpha}.")
    return blend_heatmap(colour_heatmap(heatmap, colormap=colormap, limits=limits, smooth=smooth), background, alpha)


def hide_outside(heatmap: Heatmap, polygons: tuple[Polygon, ...]) -> Heatmap:
    """Return the map with NaN outside of outlines, such as those of the tissue in level-0 pixels."""
    scale = heatmap.downsample
    shape = (heatmap.values.shape[0], heatmap.values.shape[1])
    inside = rasterize(polygons, shape, scale, scale)
    return Heatmap(np.where(inside, heatmap.values, np.nan), scale)
