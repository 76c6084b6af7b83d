"""Generated whole slides: stained tissue with drawn nuclei, of which some hold a lesion at a known place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError

__all__ = ["DrawnSlide", "draw_slide", "save_slide"]

MPP = 0.5
COARSE = 8  # level-0 pixels per pixel of the masks
LEVELS = (1, 4, 16)
STAINS = np.array([[0.88, 0.95, 0.39], [0.10, 0.92, 0.36]])  # densities of haematoxylin and eosin in R, G, B
Field = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cells:
    """How the nuclei of one kind of tissue look.

    Args:
        spacing: Of their grid in level-0 pixels.
        share: Of the places of the grid that hold one.
        radius: Least and largest, in level-0 pixels.
        longest: Largest ratio of the axes.
        density: Least and largest density of haematoxylin, 0 to 1.
    """

    spacing: int
    share: float
    radius: tuple[float, float]
    longest: float
    density: tuple[float, float]


STROMA = Cells(26, 0.5, (4.0, 6.5), 2.4, (0.35, 0.6))
LYMPHOCYTES = Cells(13, 0.8, (4.0, 5.0), 1.15, (0.65, 0.8))
LESION = Cells(19, 0.85, (5.5, 10.0), 1.6, (0.4, 0.8))


@dataclass(frozen=True)
class DrawnSlide:
    """A slide with known contents, 0.5 um/px.

    Args:
        name: Its id.
        patient: Whom it is of; a third of the patients have two slides.
        label: ``"lesion"`` or ``"normal"``; the slides of a patient have the same.
        pixels: RGB uint8 ``(Y, X, 3)``.
        tissue: Bool ``(Y / 8, X / 8)``.
        lesion: Likewise; empty for ``"normal"``.
    """

    name: str
    patient: str
    label: str
    pixels: NDArray[np.uint8]
    tissue: Mask
    lesion: Mask


def draw_slide(index: int, *, seed: int = 0) -> DrawnSlide:
    """Draw a slide of a cohort.

    Tissue is pink stroma with scattered nuclei and, in either class, nodes of lymphocytes: small, round and dark. A
    lesion is one to three places where nuclei are large, crowded and of unequal size, 2 to 20 % of the tissue. Slides
    differ in size, outline, thickness and stain, so that neither colour nor darkness gives a class away.

    Args:
        index: Number of the slide. Half of the patients have a lesion.
        seed: Of the cohort; slide i is the same however many there are.

    Raises:
        ConfigError: If the index is negative.
    """
    if index < 0:
        raise ConfigError(f"index must be at least 0, got {index}.")
    rng = np.random.default_rng([seed, index])
    patient = index * 3 // 4
    rows, columns = int(rng.integers(160, 209)), int(rng.integers(200, 257))
    tissue = blob(rng, (rows, columns), (columns / 2, rows / 2), (columns * 0.38, rows * 0.38), roughness=0.2)
    lesion = np.zeros_like(tissue)
    if patient % 2 == 0:
        while not lesion.any():
            for _ in range(int(rng.integers(1, 4))):
                lesion |= blob(rng, tissue.shape, somewhere(rng, tissue), tuple(rng.uniform(10, 26, 2)), roughness=0.3)
            lesion &= cv2.erode(tissue.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    nodes = np.zeros_like(tissue)
    for _ in range(int(rng.integers(1, 5))):
        nodes |= blob(rng, tissue.shape, somewhere(rng, tissue), tuple(rng.uniform(8, 22, 2)), roughness=0.2)
    nodes &= tissue & ~lesion
    pixels = stain(rng, tissue, [(tissue & ~lesion & ~nodes, STROMA), (nodes, LYMPHOCYTES), (lesion, LESION)])
    label = "lesion" if lesion.any() else "normal"
    return DrawnSlide(f"slide-{index:03d}", f"patient-{patient:03d}", label, pixels, tissue, lesion)


def save_slide(slide: DrawnSlide, path: str | Path) -> None:
    """Write a slide as a pyramidal TIFF of JPEG tiles, levels 1, 4 and 16 times smaller, with its resolution.

    Args:
        slide: What :func:`draw_slide` returns.
        path: ``*.tif``.
    """
    import tifffile

    height, width = slide.pixels.shape[:2]
    with tifffile.TiffWriter(path) as writer:
        for factor in LEVELS:
            size = (width // factor, height // factor)
            level = slide.pixels if factor == 1 else cv2.resize(slide.pixels, size, interpolation=cv2.INTER_AREA)
            writer.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                subfiletype=0 if factor == 1 else 1,
                resolution=(1e4 / MPP / factor, 1e4 / MPP / factor),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def blob(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    centre: tuple[float, float],
    radii: tuple[float, ...],
    *,
    roughness: float,
) -> Mask:
    """Return an ellipse whose edge a smooth random field moves in and out."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    distance = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
    return np.asarray(distance + roughness * noise(rng, shape, max(2.0, min(radii) / 3)) < 1)


def noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, float]) -> Field:
    """Return a smooth random field of mean about 0 and standard deviation 1."""
    wide, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    field = cv2.GaussianBlur(rng.standard_normal(shape[:2], np.float32), (0, 0), wide, sigmaY=high)
    return np.asarray(field / field.std(), np.float32)


def somewhere(rng: np.random.Generator, mask: Mask) -> tuple[float, float]:
    """Return x and y of a random place that a mask holds."""
    y, x = np.nonzero(mask)
    chosen = int(rng.integers(len(x)))
    return float(x[chosen]), float(y[chosen])


def stain(rng: np.random.Generator, tissue: Mask, parts: list[tuple[Mask, Cells]]) -> NDArray[np.uint8]:
    """Return the pixels of a slide: absorption of two stains on bright glass, after Lambert and Beer."""
    shape = (tissue.shape[0] * COARSE, tissue.shape[1] * COARSE)
    size = (shape[1], shape[0])
    nuclei = np.zeros(shape, np.uint8)
    for mask, cells in parts:
        draw_nuclei(rng, nuclei, mask, cells)
    body = enlarge(cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), 0.7), size)
    half = (shape[0] // 2, shape[1] // 2)
    fibres = enlarge(0.7 * noise(rng, half, (9.0, 1.2)) + 0.3 * noise(rng, half, 1.0), size)
    thickness = 1 + 0.12 * enlarge(noise(rng, tissue.shape, 12.0), size)
    eosin = body * thickness * (0.34 + 0.07 * fibres)
    haematoxylin = cv2.GaussianBlur(nuclei, (0, 0), 0.8).astype(np.float32) / 255 + 0.06 * body
    amounts = rng.uniform(0.8, 1.25, 2)
    vectors = ((STAINS + rng.uniform(-0.04, 0.04, STAINS.shape)) * amounts[:, None]).astype(np.float32)
    grain = rng.normal(0, 1.5, (256, 256)).astype(np.float32)
    grain = np.tile(grain, (shape[0] // 256 + 1, shape[1] // 256 + 1))[: shape[0], : shape[1]]
    pixels = np.empty((*shape, 3), np.uint8)
    for channel in range(3):
        light = cv2.exp(-(haematoxylin * vectors[0, channel] + eosin * vectors[1, channel]))
        pixels[..., channel] = np.clip(243 * light + grain, 0, 255)
    return pixels


def enlarge(field: NDArray[Any], size: tuple[int, int]) -> Field:
    """Return a field at another size, width and height."""
    return np.asarray(cv2.resize(field, size, interpolation=cv2.INTER_LINEAR), np.float32)


def draw_nuclei(rng: np.random.Generator, canvas: NDArray[np.uint8], mask: Mask, cells: Cells) -> None:
    """Draw nuclei on a jittered grid wherever a mask has tissue."""
    if not mask.any():
        return
    rows, columns = (range(0, side, cells.spacing) for side in canvas.shape)
    places = (
        np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
        + rng.uniform(0, 1, (len(rows) * len(columns), 2)) * cells.spacing
    )
    inside = (places < (canvas.shape[1], canvas.shape[0])).all(1)
    places = places[inside & (rng.random(len(places)) < cells.share)]
    coarse = (places / COARSE).astype(int)
    places = places[mask[coarse[:, 1], coarse[:, 0]]]
    radius = rng.uniform(*cells.radius, len(places))
    ratio = np.sqrt(rng.uniform(1, cells.longest, len(places)))
    axes = np.stack([radius * ratio, radius / ratio], -1)
    angle = rng.uniform(0, 180, len(places))
    density = rng.uniform(*cells.density, len(places)) * 255
    fixed = 4  # binary digits after the point
    for centre, pair, turn, value in zip(
        (places * 2**fixed).astype(int).tolist(), (axes * 2**fixed).astype(int).tolist(), angle, density, strict=True
    ):
        cv2.ellipse(canvas, centre, pair, turn, 0, 360, value, cv2.FILLED, cv2.LINE_AA, fixed)
