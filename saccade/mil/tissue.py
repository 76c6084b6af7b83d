"""Where the tissue is: a mask at low resolution, and polygons at level 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, DataError
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels

__all__ = ["Polygon", "Tissue", "TissueOptions", "draw_outlines", "find_tissue", "overview", "polygons_of", "rasterize"]

Mask = NDArray[np.bool_]
BLOCK, SMALL_BLOCK = 2048, 128  # pixels of a level that are read at a time; around damage
LEAST_SATURATION = 12  # an Otsu threshold below this splits scanner noise, not tissue from glass
BLANK = 1024  # longest side of the overview on which a slide of unknown resolution may prove empty
FAR = 1 << 20  # pixels; no picture is that large, and OpenCV counts in 32 bits
KEEP_SHARE = 0.1  # a piece with this share of the tissue stays, however small it is


@dataclass(frozen=True)
class TissueOptions:
    """How tissue is found.

    Args:
        method: ``"otsu"``: Otsu's threshold on the square root of saturation (few deep stains must not raise it);
            ``"hsv"``: a fixed threshold, as CLAM's default.
        mpp: Resolution of the mask in microns per pixel.
        saturation: Threshold of ``"hsv"``, 0 to 255.
        median: Side of the median filter on saturation, odd, in mask pixels.
        close: Side of the closing that follows, in mask pixels; 0 for none.
        min_area_mm2: Pieces below this are dropped, unless they hold a tenth of the tissue: small slides stay.
        min_hole_mm2: Holes below this are filled.
        pens: Leave out what has the colour of ink (saturated green or blue, black).

    Raises:
        ConfigError: If a value is out of range.
    """

    method: str = "otsu"
    mpp: float = 8.0
    saturation: int = 8
    median: int = 5
    close: int = 3
    min_area_mm2: float = 0.01
    min_hole_mm2: float = 0.005
    pens: bool = True

    def __post_init__(self) -> None:
        if self.method not in ("otsu", "hsv"):
            raise ConfigError(f"method must be 'otsu' or 'hsv'; got {self.method!r}.")
        if self.median < 1 or self.median % 2 == 0:
            raise ConfigError(f"median must be odd and positive; got {self.median}.")
        if self.mpp <= 0 or self.close < 0 or self.min_area_mm2 < 0 or self.min_hole_mm2 < 0:
            raise ConfigError("mpp must be positive; close, min_area_mm2 and min_hole_mm2 must not be negative.")


@dataclass(frozen=True)
class Polygon:
    """A piece of tissue.

    Args:
        exterior: ``(P, 2)``, x and y in level-0 pixels, not closed.
        holes: Rings like it.
        name: Class or annotation name.
    """

    exterior: NDArray[np.float64]
    holes: tuple[NDArray[np.float64], ...] = ()
    name: str = "tissue"


@dataclass(frozen=True)
class Tissue:
    """Tissue of a slide.

    Args:
        mask: Bool ``(rows, columns)``.
        scale_x: Level-0 pixels per mask pixel along x.
        scale_y: Along y.
        polygons: The same as outlines in level-0 pixels.
        source: How it was found.
    """

    mask: Mask
    scale_x: float
    scale_y: float
    polygons: tuple[Polygon, ...] = ()
    source: str = "otsu"
    sums: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1))
        sums[1:, 1:] = self.mask.cumsum(0).cumsum(1)
        object.__setattr__(self, "sums", sums)

    @property
    def share(self) -> float:
        """Tissue's share of the slide."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    def coverage(self, coords: NDArray[Any], width: float, height: float) -> NDArray[np.float64]:
        """Return the share of rectangles that is tissue; what is outside the slide is none.

        Args:
            coords: ``(N, 2)``, x and y of the top-left corners in level-0 pixels.
            width: In level-0 pixels.
            height: In level-0 pixels.

        Returns:
            ``(N,)``, exact areas of partly covered mask pixels included.
        """
        left, top = coords[:, 0] / self.scale_x, coords[:, 1] / self.scale_y
        right, bottom = left + width / self.scale_x, top + height / self.scale_y
        area = self.integral(right, bottom) - self.integral(left, bottom) - self.integral(right, top)
        area = (area + self.integral(left, top)) / (width / self.scale_x * height / self.scale_y)
        return np.asarray(np.clip(area, 0, 1))

    def integral(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the tissue area left of x and above y, in mask pixels: bilinear between the corners of the sums."""
        rows, columns = self.mask.shape
        x, y = np.clip(x, 0, columns), np.clip(y, 0, rows)
        i, j = np.minimum(y.astype(int), rows - 1), np.minimum(x.astype(int), columns - 1)
        dy, dx, s = y - i, x - j, self.sums
        above = s[i, j] * (1 - dx) + s[i, j + 1] * dx
        below = s[i + 1, j] * (1 - dx) + s[i + 1, j + 1] * dx
        return np.asarray(above * (1 - dy) + below * dy)


def overview(slide: Slide, downsample: float | tuple[float, float]) -> Pixels:
    """Return the whole slide at a downsample, read in blocks so that memory stays bounded.

    Args:
        slide: The slide.
        downsample: Level-0 pixels per pixel, one number or x and y, at least 1.

    Returns:
        RGB uint8; the last row and column may reach beyond the slide and are filled up there.

    Raises:
        DataError: If no block can be decoded; blocks that cannot, among others, are white.
    """
    scale_x, scale_y = downsample if isinstance(downsample, tuple) else (downsample, downsample)
    columns, rows = max(1, math.ceil(slide.width / scale_x)), max(1, math.ceil(slide.height / scale_y))
    out = np.full((rows, columns, 3), 255, np.uint8)
    # Blocks are measured in pixels of the level they are read from: a slide of one level is read by parts as well.
    level = slide.levels[slide.level_for(min(scale_x, scale_y))]
    shrink = max(scale_x / level.downsample_x, scale_y / level.downsample_y)
    least = max(1, int(SMALL_BLOCK / shrink))
    step = max(1, int(BLOCK / shrink))
    failures: list[DataError] = []
    done = 0

    def fill(left: int, top: int, wide: int, high: int) -> None:
        nonlocal done
        try:
            region = (left * scale_x, top * scale_y, wide * scale_x, high * scale_y)
            out[top : top + high, left : left + wide] = slide.read_scaled(*region, (wide, high))
            done += 1
        except DataError as error:
            failures.append(error)
            if max(wide, high) > least:  # narrow down what is damaged
                halves = (-(-wide // 2), -(-high // 2))
                for x in range(left, left + wide, halves[0]):
                    for y in range(top, top + high, halves[1]):
                        fill(x, y, min(halves[0], left + wide - x), min(halves[1], top + high - y))

    for top in range(0, rows, step):
        for left in range(0, columns, step):
            fill(left, top, min(step, columns - left), min(step, rows - top))
    if failures and done == 0:
        raise failures[0]
    return out


def find_tissue(slide: Slide, options: TissueOptions | None = None) -> Tissue:
    """Segment a slide.

    Args:
        slide: Its resolution must be known, unless nothing on it has the colours of tissue.
        options: How.

    Returns:
        Mask and polygons; a slide without tissue gives an empty mask, not an error.

    Raises:
        DataError: If the resolution is not known (``"no_mpp"``) or nothing can be decoded (``"bad_tile"``).

    Source:
        Saturation, median filter, threshold, closing and area filters as in CLAM (Lu et al. 2021); areas in mm^2
        instead of level-0 pixels, which are wrong for biopsies and other scan resolutions.
    """
    options = options or TissueOptions()
    if slide.resolution is None:
        scale = max(1.0, max(slide.width, slide.height) / BLANK)
        mask = tissue_colours(overview(slide, scale), options)
        if not mask.any():  # no tiles at any resolution
            return Tissue(mask, scale, scale, (), options.method)
    resolution = slide.require_resolution()
    scale_x, scale_y = max(1.0, options.mpp / resolution.x), max(1.0, options.mpp / resolution.y)
    image = overview(slide, (scale_x, scale_y))
    mask = tissue_colours(image, options)
    pixel_mm2 = scale_x * resolution.x * scale_y * resolution.y * 1e-6
    mask = filter_areas(mask, options.min_area_mm2 / pixel_mm2, options.min_hole_mm2 / pixel_mm2)
    return Tissue(mask, scale_x, scale_y, polygons_of(mask, scale_x, scale_y), options.method)


def tissue_colours(image: Pixels, options: TissueOptions) -> Mask:
    """Return where an RGB overview has the colours of tissue."""
    hsv: Pixels = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), np.uint8)
    saturation: Pixels = np.asarray(cv2.medianBlur(np.ascontiguousarray(hsv[..., 1]), options.median), np.uint8)
    ink = ink_colours(hsv) if options.pens else np.zeros(saturation.shape, bool)
    threshold: float = options.saturation
    if options.method == "otsu":
        threshold = max(otsu(saturation[~ink]), LEAST_SATURATION)
    mask: Mask = (saturation > threshold) & ~ink
    if options.close:
        square = np.ones((options.close, options.close), np.uint8)
        mask = np.asarray(cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, square), bool) & ~ink
    return mask


def otsu(values: NDArray[np.uint8]) -> float:
    """Return Otsu's threshold, found on square roots; 255 if there is only one value."""
    if values.size == 0 or values.min() == values.max():
        return 255.0
    roots = np.round(np.sqrt(values * 255.0)).astype(np.uint8).reshape(-1, 1)
    return float(cv2.threshold(roots, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0]) ** 2 / 255


def ink_colours(hsv: Pixels) -> Mask:
    """Return where ink of felt pens is: strongly saturated green to blue, or black; a little wider than its colour.

    Eosin and haematoxylin are pink to violet (hue above 120 in OpenCV's 0 to 179), DAB is brown (below 25). Colours
    with one channel full and another empty are drawn by a computer: no stained glass lets such light through.
    """
    hue, saturation, value = (hsv[..., channel].astype(int) for channel in range(3))
    coloured = (hue >= 35) & (hue <= 118) & (saturation > 90)
    drawn = (value >= 250) & (saturation >= 250)
    ink = (coloured | drawn | ((value < 50) & (saturation < 120))).astype(np.uint8)
    strokes = cv2.morphologyEx(ink, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    return np.asarray(cv2.dilate(strokes, np.ones((5, 5), np.uint8)), bool)


def filter_areas(mask: Mask, min_area: float, min_hole: float) -> Mask:
    """Fill holes and drop pieces below an area in pixels; a piece with a tenth of all tissue stays."""
    background, _, stats, _ = labelled(~np.pad(mask, 1))
    filled = stats[:, cv2.CC_STAT_AREA] < min_hole
    filled[0] = filled[background[0, 0]] = False  # label 0 is the tissue itself; the outside is no hole
    mask = mask | filled[background][1:-1, 1:-1]
    pieces, _, stats, _ = labelled(mask, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= min(min_area, KEEP_SHARE * mask.sum())
    kept[0] = False
    return np.asarray(kept[pieces])


def labelled(mask: Mask, connectivity: int = 4) -> tuple[NDArray[np.int32], int, NDArray[np.int32], Any]:
    """Return labels, their number, statistics and centroids of connected pieces."""
    count, labels, stats, centroids = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    return np.asarray(labels, np.int32), count, np.asarray(stats, np.int32), centroids


def polygons_of(mask: Mask, scale_x: float, scale_y: float) -> tuple[Polygon, ...]:
    """Trace a mask; vertices are centres of its border pixels, in level-0 coordinates."""
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    scale = np.array([scale_x, scale_y])
    rings = [(contour[:, 0].astype(float) + 0.5) * scale for contour in contours]
    parents = [] if hierarchy is None else hierarchy[0, :, 3]
    holes: dict[int, list[NDArray[np.float64]]] = {}
    for ring, parent in zip(rings, parents, strict=True):
        if parent >= 0:
            holes.setdefault(int(parent), []).append(ring)
    return tuple(
        Polygon(ring, tuple(holes.get(index, ())))
        for index, (ring, parent) in enumerate(zip(rings, parents, strict=True))
        if parent < 0
    )


def draw_outlines(
    picture: Pixels, polygons: Sequence[Polygon], scale: float, color: tuple[int, int, int], width: int
) -> Pixels:
    """Return a picture of a slide with polygons and their holes outlined.

    Args:
        picture: RGB uint8 ``(Y, X, 3)``, left as it is.
        polygons: In level-0 pixels.
        scale: Level-0 pixels per pixel of the picture.
        color: RGB.
        width: Of the lines in pixels.
    """
    drawn = picture.copy()
    for polygon in polygons:
        for ring in (polygon.exterior, *polygon.holes):
            points = np.round(np.clip(ring / scale, -FAR, FAR)).astype(np.int32)
            cv2.polylines(drawn, [points[:, None]], True, color, width, cv2.LINE_AA)
    return drawn


def rasterize(polygons: tuple[Polygon, ...], shape: tuple[int, int], scale_x: float, scale_y: float) -> Mask:
    """Draw polygons as a mask; the inverse of :func:`polygons_of`.

    Args:
        polygons: In level-0 pixels; parts outside the mask are cut off.
        shape: Rows and columns.
        scale_x: Level-0 pixels per mask pixel.
        scale_y: Along y.
    """
    mask = np.zeros(shape, np.uint8)
    scale = np.array([scale_x, scale_y])
    # OpenCV counts 32-bit fixed-point coordinates; nothing beyond the mask matters.
    limit = np.array([shape[1], shape[0]]) + 16.0

    def points(ring: NDArray[np.float64]) -> NDArray[np.int32]:
        fixed: NDArray[np.int32] = np.round(np.clip(ring / scale - 0.5, -16, limit)).astype(np.int32)
        return fixed[:, None]

    for polygon in polygons:
        piece = np.zeros(shape, np.uint8)
        cv2.drawContours(piece, [points(polygon.exterior)], 0, 1, cv2.FILLED)
        for hole in polygon.holes:
            cv2.drawContours(piece, [points(hole)], 0, 0, cv2.FILLED)
            cv2.drawContours(piece, [points(hole)], 0, 1, 1)  # the ring runs on tissue
        mask |= piece
    return np.asarray(mask, bool)
