"""A place of a photograph, and where it is in the crop that a model sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saccade.errors import ConfigError, DataError

__all__ = ["CENTRE", "locate", "parse_place"]

CENTRE = (0.5, 0.5)


def parse_place(text: str) -> tuple[float, float]:
    """Return the place that ``X,Y`` names: pixels, as integers, or shares of the sides, written with a point.

    Raises:
        ConfigError: If it is neither.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        return int(parts[0]), int(parts[1])
    try:
        x, y = (float(part) for part in parts)
    except ValueError:
        x, y = math.nan, math.nan
    if len(parts) != 2 or any("." not in part for part in parts) or not (0 <= x <= 1 and 0 <= y <= 1):
        raise ConfigError(
            f"a place is X,Y in pixels of the photograph (310,180) or in shares of its sides (0.5,0.25); got {text!r}."
        )
    return x, y


def locate(place: Sequence[float], size: tuple[int, int], data_config: Mapping[str, Any]) -> tuple[float, float]:
    """Find where a place of a photograph is in what a model sees of it.

    Args:
        place: ``(x, y)``: pixels, as integers (the middle of the pixel is meant), or shares of the sides.
        size: Width and height of the upright photograph.
        data_config: timm's description of the preprocessing.

    Returns:
        ``(x, y)`` as shares of the width and height that the model sees, in [0, 1).

    Raises:
        DataError: If the model does not see the place, or the photograph does not have it.
    """
    _, *target = data_config["input_size"]
    enlarged = [math.floor(side / data_config["crop_pct"]) for side in target]
    ratios = [side / wanted for side, wanted in zip(size, enlarged[::-1], strict=True)]  # along x, along y
    if data_config.get("crop_mode") == "border":
        ratios = [max(ratios)] * 2
    elif data_config.get("crop_mode") != "squash":
        ratios = [min(ratios)] * 2
    found = []
    for value, side, ratio, seen in zip(place, size, ratios, target[::-1], strict=True):
        pixel = value + 0.5 if isinstance(value, int) else value * side
        if pixel > side:
            raise DataError(f"it has {size[0]} x {size[1]} pixels and none at {place}", reason="place_outside")
        found.append(((pixel - side / 2) / ratio + seen / 2) / seen)
    if not all(0 <= share <= 1 for share in found):
        raise DataError(
            f"the model does not see the place {place}, which its crop leaves out; --crop-pct 1.0 crops less",
            reason="place_outside",
        )
    return min(found[0], 1 - 1e-9), min(found[1], 1 - 1e-9)
