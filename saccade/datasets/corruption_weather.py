"""Weather: snow, frost, fog, spatter, brightness."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from saccade.datasets.corruption_kernels import LUMA, Image, enlarge, gaussian, motion, plasma

__all__ = [
    "brightness",
    "draw_fog",
    "draw_frost",
    "draw_snow",
    "draw_spatter",
    "fog",
    "frost",
    "frost_texture",
    "snow",
    "spatter",
]

WATER = np.array([175, 238, 238], np.float32) / 255
PANE = 256  # pixels: smaller images see a part of a pane of this size
MUD = np.array([63, 42, 20], np.float32) / 255
Snow = tuple[float, float, float, float, int, float, float]
Spatter = tuple[float, float, float, float, float, int]


def draw_snow(image: Image, constant: Snow, generator: Generator) -> tuple[Image, Image]:
    """Draw the flakes, a normal value per pixel, and the direction of their fall in degrees."""
    return generator.normal(constant[0], constant[1], image.shape[:2]), generator.uniform(-135, -45, 1)


def snow(image: Image, constant: Snow, flakes: Image, angle: Image) -> Image:
    """Lay a pale veil and falling flakes over the image, and the same flakes turned by 180 degrees."""
    _, _, zoom, cut, radius, sigma, mix = constant
    height, width = image.shape[:2]
    flakes = enlarge(flakes.astype(np.float64), zoom)
    flakes[flakes < cut] = 0
    flakes = motion(flakes.clip(0, 1), radius, sigma, float(angle[0])).clip(0, 1)
    flakes = (np.round(flakes * 255) / 255)[:height, :width, None].astype(np.float32)
    picture = image.astype(np.float32) / 255
    grey = picture @ LUMA if picture.shape[2] == 3 else picture[..., 0]
    picture = mix * picture + (1 - mix) * np.maximum(picture, grey[..., None] * 1.5 + 0.5)
    whole: Image = 255 * (picture + flakes + np.rot90(flakes, 2))
    return whole


def draw_frost(image: Image, constant: tuple[float, float], generator: Generator) -> tuple[Image]:
    """Draw a frozen pane of the image's size."""
    return (frost_texture(image.shape[0], image.shape[1], generator),)


def frost(image: Image, constant: tuple[float, float], texture: Image) -> Image:
    """Mix the image with a frozen pane ``(H, W, 3)``, brightness 0 to 255."""
    pane = texture if image.shape[2] == 3 else (texture @ LUMA)[..., None]
    return constant[0] * image.astype(np.float32) + constant[1] * pane


def frost_texture(height: int, width: int, generator: Generator) -> NDArray[np.float32]:
    """Make a picture of ice on a window pane: crystals that branch at 60 degrees, before a cloudy ground.

    Args:
        height: Pixels.
        width: Pixels.
        generator: Source of randomness.

    Returns:
        ``(height, width, 3)``, 0 to 255.
    """
    side = max(height, width, PANE)
    count = 60
    origin = generator.uniform(-0.1, 1.1, (count, 1, 2)) * side
    length = side * generator.uniform(0.1, 0.5, (count, 1))
    heading = (
        generator.uniform(0, 2 * np.pi, (count, 1)) + np.arange(3) * np.pi / 3 + generator.normal(0, 0.1, (count, 3))
    )
    stems = segments(origin, heading, length)
    along = generator.uniform(0.05, 0.95, (count, 3, 40))
    foot = stems[..., None, 0, :] + along[..., None] * (stems[..., None, 1, :] - stems[..., None, 0, :])
    turn = np.where(generator.random(along.shape) < 0.5, -1, 1) * np.pi / 3
    twigs = segments(foot, heading[..., None] + turn, length[..., None] * 0.3 * (1 - along))
    crystals = np.zeros((side, side), np.uint8)
    for lines, thickness, level in ((twigs, 1, 150), (stems, max(1, side // 150), 230)):
        points = (lines.reshape(-1, 2, 2) * 16).round().astype(np.int32)  # 4 binary places, see `shift`
        cv2.polylines(crystals, list(points), False, level, thickness, cv2.LINE_AA, shift=4)
    top, left = generator.integers(0, (side - height + 1, side - width + 1))
    ice: Image = crystals.astype(np.float32)
    ice = (
        0.4 * ice
        + 0.35 * gaussian(ice, side / 80)
        + 100 * plasma(1 << (side - 1).bit_length(), 1.7, generator)[:side, :side]
    )
    cut = ice[top : top + height, left : left + width, None]
    texture: NDArray[np.float32] = (cut * np.array([0.92, 1.0, 1.08], np.float32)).clip(0, 255)
    return texture


def segments(foot: Image, heading: Image, length: Image) -> Image:
    """Return the two ends of lines, ``(..., 2, 2)`` as (x, y), from where they start, their direction and length."""
    reach = np.stack([np.cos(heading), np.sin(heading)], axis=-1) * length[..., None]
    start = np.broadcast_to(foot, reach.shape)
    return np.stack([start, start + reach], axis=-2)


def draw_fog(image: Image, constant: tuple[float, float], generator: Generator) -> tuple[Image]:
    """Draw a cloud whose side is the next power of two."""
    return (plasma(1 << (max(image.shape[:2]) - 1).bit_length(), constant[1], generator),)


def fog(image: Image, constant: tuple[float, float], cloud: Image) -> Image:
    """Add a cloud and darken the whole so that the brightest value can stay what it was."""
    height, width = image.shape[:2]
    brightest = float(image.max()) / 255
    whole: Image = (image + 255 * constant[0] * cloud[:height, :width, None]) * (brightest / (brightest + constant[0]))
    return whole


def draw_spatter(image: Image, constant: Spatter, generator: Generator) -> tuple[Image]:
    """Draw a normal value per pixel, which becomes drops."""
    return (generator.normal(constant[0], constant[1], image.shape[:2]),)


def spatter(image: Image, constant: Spatter, liquid: Image) -> Image:
    """Let drops of water (severity 1 to 3) or mud (4 and 5) fall on the lens."""
    _, _, sigma, threshold, amount, is_mud = constant
    liquid = gaussian(liquid.astype(np.float64), sigma)
    liquid[liquid < threshold] = 0
    picture = image.astype(np.float32) / 255
    colour = MUD if is_mud else WATER
    if picture.shape[2] == 1:
        colour = colour @ LUMA
    if is_mud:
        cover = gaussian((liquid > threshold).astype(np.float32), amount)
        cover[cover < 0.8] = 0
        splashed: Image = picture * (1 - cover[..., None]) + colour * cover[..., None]
    else:
        splashed = picture + amount * water_drops((liquid * 255).astype(np.uint8))[..., None] * colour
    return 255 * splashed


def water_drops(liquid: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return how bright each pixel of drops is, 0 to 1: lit from one side, brightest inside near the edge."""
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    rim = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
    light = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = cv2.blur(cv2.filter2D(rim, cv2.CV_8U, light), (3, 3)).astype(np.float32)
    drops: NDArray[np.float32] = liquid * relief
    return drops / max(float(drops.max()), 1e-12)


def brightness(image: Image, amount: float) -> Image:
    """Add to the value of HSV, which the largest of red, green and blue is; hue and saturation stay."""
    value = image.max(axis=2, keepdims=True).astype(np.float32)
    brighter = np.minimum(value + 255 * amount, 255)
    whole: Image = brighter - (value - image) * (brighter / np.maximum(value, 1))
    return whole
