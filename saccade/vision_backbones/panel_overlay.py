"""Cells drawn over the photograph that a model saw: which ones a place reads, how strongly, and the place itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from saccade.vision_backbones.overlay import Legend, above_legend, colours, toned_down
from saccade.vision_backbones.point_maps import Panel

__all__ = ["draw_panels"]

OUTLINE = "white"  # around cells that take part
QUERY = (0, 200, 255)  # around the cell that asks, and the place in it; not among the colours of the map
GAP = 8  # pixels between two panels


def draw_panels(
    view: NDArray[np.uint8], panels: Sequence[Panel], title: str, place: tuple[float, float], *, alpha: float
) -> Image.Image:
    """Draw the maps of one place side by side, each over the photograph.

    Colours run from the panel's ``low`` to its largest value. Cells that take no part show the photograph, its colours
    toned down. A white line surrounds those that do, a blue one the cell that asks; a blue ring is around the place.

    Args:
        view: RGB photograph, uint8 ``(Y, X, 3)``.
        panels: One or more.
        title: First line of the legends.
        place: ``(x, y)`` as shares of the sides.
        alpha: Opacity of the colours, 0..1.

    Returns:
        RGB picture.
    """
    pictures = [draw_panel(view, panel, title, place, alpha) for panel in panels]
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + GAP
    return whole


def draw_panel(
    view: NDArray[np.uint8], panel: Panel, title: str, place: tuple[float, float], alpha: float
) -> Image.Image:
    """Draw one map and its legend."""
    height, width = view.shape[:2]
    rows, columns = np.round(panel.rows * height).astype(int), np.round(panel.columns * width).astype(int)
    high = float(panel.values[panel.used].max())
    spread = high - panel.low
    heat = (panel.values - panel.low) / spread if spread > 0 else np.ones_like(panel.values)
    pixel_heat, covered = (
        np.repeat(np.repeat(cells, np.diff(rows), 0), np.diff(columns), 1) for cells in (heat, panel.used)
    )
    toned = toned_down(view)
    blended = (1 - alpha) * toned + alpha * colours(pixel_heat.clip(0, 1).astype(np.float32))
    canvas = Image.fromarray(np.where(covered[..., None], blended.round(), toned).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    line = max(2, width // 160)
    for start, end in borders(panel.used):
        draw.line([(columns[x], rows[y]) for y, x in (start, end)], OUTLINE, line)
    row, column = panel.query
    box = (columns[column], rows[row], columns[column + 1] - 1, rows[row + 1] - 1)
    draw.rectangle([int(edge) for edge in box], outline=QUERY, width=line)
    x, y, reach = place[0] * width, place[1] * height, 2 * line
    draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=QUERY, width=line)
    return above_legend(
        np.asarray(canvas), Legend(title, panel.title, f"{100 * panel.low:.3g} %", f"{100 * high:.3g} %")
    )


def borders(used: NDArray[np.bool_]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the edges between cells that are used and those that are not, as pairs of corners ``(row, column)``."""
    padded = np.pad(used, 1)
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # edge above row r of column c
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    return [((r, c), (r, c + 1)) for r, c in level] + [((r, c), (r + 1, c)) for r, c in upright]
