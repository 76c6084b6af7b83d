"""Pictures beside a heatmap: tiles with the highest scores, branches side by side, how concentrated attention is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from saccade.batch import atomic_path
from saccade.errors import ConfigError, DataError
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels

__all__ = ["contact_sheet", "cumulative_attention", "plot_concentration", "side_by_side", "top_tiles"]

GAP, CAPTION, TEXT = 8, 20, 14  # pixels


def top_tiles(scores: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the indices of the highest scores, highest first; of equal ones the earlier tile."""
    return np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count]


def contact_sheet(
    slide: Slide,
    coords: NDArray[Any],
    tile_size: tuple[float, float],
    scores: NDArray[Any],
    *,
    count: int = 16,
    columns: int = 4,
    tile_px: int = 192,
) -> Pixels:
    """Return a picture of the tiles with the highest scores, each with its rank and score below it.

    Args:
        slide: Tiles are read from it; one that cannot be decoded is white and says so.
        coords: ``(N, 2)``, top-left corners in level-0 pixels.
        tile_size: Width and height in level-0 pixels.
        scores: ``(N,)``.
        count: Number of tiles, at least 1; fewer if there are fewer.
        columns: Tiles in a row.
        tile_px: Side of a tile in the picture.

    Returns:
        RGB uint8.

    Raises:
        ConfigError: If count, columns or tile_px is below 1.
    """
    if min(count, columns, tile_px) < 1:
        raise ConfigError(f"count, columns and tile_px must be at least 1; got {count}, {columns}, {tile_px}.")
    best = top_tiles(scores, count)
    rows = -(-max(len(best), 1) // columns)
    sheet = Image.new("RGB", (columns * (tile_px + GAP) + GAP, rows * (tile_px + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for rank, index in enumerate(best.tolist()):
        x, y = GAP + rank % columns * (tile_px + GAP), GAP + rank // columns * (tile_px + CAPTION + GAP)
        caption = f"{rank + 1}  {scores[index]:.4g}"
        left, top = coords[index].tolist()
        try:
            tile = slide.read_scaled(left, top, tile_size[0], tile_size[1], (tile_px, tile_px))
        except DataError:
            caption += "  cannot be decoded"
        else:
            sheet.paste(Image.fromarray(tile), (x, y))
        draw.text((x, y + tile_px + 2), caption, fill="black", font_size=TEXT)
    return np.asarray(sheet)


def side_by_side(pictures: Mapping[str, Pixels], *, height: int = 512, columns: int = 6) -> Pixels:
    """Return pictures of one size in a grid, each under its name.

    Args:
        pictures: RGB uint8 by name, at least one.
        height: Of a picture in the result, at most; their own if smaller.
        columns: Pictures in a row.

    Raises:
        ConfigError: If there are none.
    """
    if not pictures:
        raise ConfigError("side_by_side needs at least one picture.")
    first = next(iter(pictures.values()))
    scale = min(1.0, height / first.shape[0])
    size = max(1, round(first.shape[1] * scale)), max(1, round(first.shape[0] * scale))
    wide = min(columns, len(pictures))
    rows = -(-len(pictures) // wide)
    sheet = Image.new("RGB", (wide * (size[0] + GAP) + GAP, rows * (size[1] + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, picture) in enumerate(pictures.items()):
        x, y = GAP + number % wide * (size[0] + GAP), GAP + number // wide * (size[1] + CAPTION + GAP)
        draw.text((x, y), name, fill="black", font_size=TEXT)
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        sheet.paste(Image.fromarray(np.asarray(small, np.uint8)), (x, y + CAPTION))
    return np.asarray(sheet)


def cumulative_attention(attention: NDArray[Any]) -> NDArray[np.float64]:
    """Return how much attention the k most attended tiles hold together, ``(N,)`` for k from 1 to N.

    Args:
        attention: ``(N,)``, not negative; its sum counts as 1.

    Source:
        Zhang et al., ECCV 2024 (arXiv:2311.07125): few tiles holding nearly all of it is a sign of overfitting.
    """
    values = np.sort(np.asarray(attention, np.float64))[::-1].cumsum()
    return values / values[-1] if len(values) and values[-1] > 0 else values


def plot_concentration(path: str | Path, curves: Sequence[NDArray[np.float64]], *, title: str = "") -> None:
    """Draw cumulative attention of slides over the number of tiles, and its mean.

    Args:
        path: Picture, any format of matplotlib's.
        curves: Results of :func:`cumulative_attention`, at least one, none of them empty.
        title: Above the plot.

    Raises:
        ConfigError: If there are no curves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not curves:
        raise ConfigError("plot_concentration needs at least one curve.")
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(map(len, curves))
    ranks = np.unique(np.geomspace(1, longest, 400).round().astype(int))
    for curve in curves:
        own = ranks[ranks <= len(curve)]
        axes.plot(own, curve[own - 1], color="tab:blue", linewidth=0.7, alpha=max(0.08, min(0.6, 10 / len(curves))))
    # A slide with fewer tiles than k has all of its attention in them.
    mean = np.mean([curve[np.minimum(ranks, len(curve)) - 1] for curve in curves], axis=0)
    axes.plot(ranks, mean, color="black", linewidth=2, label=f"mean of {len(curves)} slides")
    axes.set(xscale="log", xlabel="most attended tiles", ylabel="share of attention", ylim=(0, 1.02), title=title)
    axes.legend(loc="lower right")
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=120)
