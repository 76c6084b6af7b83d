"""A heat map drawn over the photograph that a model saw, with a legend that says what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import timm
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from saccade.datasets.images import read_image

__all__ = ["Legend", "above_legend", "colours", "draw_overlay", "model_view", "toned_down", "view_of"]

COLOURS = cv2.COLORMAP_INFERNO  # perceptually uniform: equal steps of the map look equally large
TONED_DOWN = 0.75  # share of grey under the map
VIEW_MIN = 288  # pixels of the shorter side: the legend stays legible
VIEW_MAX = 1024  # pixels of the longer side
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")


@dataclass(frozen=True)
class Legend:
    """What stands below the picture.

    Args:
        title: First line, e.g. the class and its probability.
        subtitle: Second line: what the colours show.
        low: What the darkest colour stands for.
        high: What the brightest colour stands for.
    """

    title: str
    subtitle: str
    low: str
    high: str


def model_view(path: str | Path, data_config: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the part of a photograph that the model sees, upright, at the photograph's own resolution.

    It is the model's preprocessing with a larger target size, so crop and proportions are the same.

    Args:
        path: Image file.
        data_config: timm's description of the preprocessing.

    Returns:
        RGB, uint8 ``(Y, X, 3)``; the longer side at most 1024 pixels, a small photograph enlarged.

    Raises:
        DataError: If the image cannot be read.
    """
    return view_of(read_image(path), data_config)


def view_of(image: Image.Image, data_config: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the part of a photograph that the model sees; see :func:`model_view`.

    Args:
        image: RGB, upright.
        data_config: timm's description of the preprocessing.
    """
    channels, *size = data_config["input_size"]
    zoom = min(image.size) * data_config["crop_pct"] / min(size)  # photograph's pixels per input pixel
    zoom = min(max(zoom, VIEW_MIN / min(size)), VIEW_MAX / max(size))
    larger = (channels, *(round(side * zoom) for side in size))
    transform = timm.data.create_transform(**{**data_config, "input_size": larger}, use_prefetcher=True)
    pixels: NDArray[np.uint8] = np.asarray(transform(image)).transpose(1, 2, 0)
    return pixels


def draw_overlay(view: NDArray[np.uint8], values: NDArray[Any], legend: Legend, *, alpha: float) -> Image.Image:
    """Blend a map over a photograph and put a legend below.

    Colours are spread from the smallest to the largest value of the map. The photograph's own colours are toned down,
    so that colour means the map.

    Args:
        view: RGB photograph, uint8 ``(Y, X, 3)``.
        values: Map of any resolution, ``(gy, gx)``, finite.
        legend: What is written below.
        alpha: Opacity of the map, 0..1.

    Returns:
        RGB picture as wide as the photograph and higher by the legend.
    """
    height, width = view.shape[:2]
    spread = float(values.max() - values.min())
    heat = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    smooth = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    return above_legend(cv2.addWeighted(toned_down(view), 1 - alpha, colours(smooth), alpha, 0), legend)


def toned_down(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a photograph with most of its colour taken out."""
    grey = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(view, 1 - TONED_DOWN, grey, TONED_DOWN, 0), dtype=np.uint8)


def above_legend(pixels: NDArray[Any], legend: Legend) -> Image.Image:
    """Put a legend below a picture, RGB ``(Y, X, 3)``."""
    height, width = pixels.shape[:2]
    strip = draw_legend(width, legend)
    picture = Image.new("RGB", (width, height + strip.height), "white")
    picture.paste(Image.fromarray(np.asarray(pixels, dtype=np.uint8)))
    picture.paste(strip, (0, height))
    return picture


def colours(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return RGB colours, ``(Y, X, 3)``, of values 0..1."""
    coloured = cv2.applyColorMap((heat * 255).round().astype(np.uint8), COLOURS)
    return np.asarray(coloured[..., ::-1], dtype=np.uint8)


def draw_legend(width: int, legend: Legend) -> Image.Image:
    """Draw two lines of text and a colour bar with its ends named."""
    size = min(max(width // 28, 13), 26)
    bold = ImageFont.truetype(FONTS / "DejaVuSans-Bold.ttf", size)
    plain = ImageFont.truetype(FONTS / "DejaVuSans.ttf", round(size * 0.85))
    margin, line = size // 2, round(size * 1.45)
    lines = [(legend.title, bold), (legend.subtitle, plain)]
    lines = [(text, font) for text, font in lines if text]
    strip = Image.new("RGB", (width, 2 * margin + line * (len(lines) + 1)), "white")
    draw = ImageDraw.Draw(strip)
    for row, (text, font) in enumerate(lines):
        draw.text((margin, margin + row * line), shortened(text, font, width - 2 * margin), "black", font)
    top = margin + len(lines) * line
    left = 2 * margin + round(plain.getlength(legend.low))
    right = width - 2 * margin - round(plain.getlength(legend.high))
    draw.text((margin, top), legend.low, "black", plain)
    draw.text((width - margin, top), legend.high, "black", plain, anchor="ra")
    if right > left:
        bar = colours(np.tile(np.linspace(0, 1, right - left, dtype=np.float32), (round(size * 0.8), 1)))
        strip.paste(Image.fromarray(bar), (left, top + round(size * 0.1)))
    return strip


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut a text to a width in pixels, with an ellipsis if anything is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
