"""Tissue and tiles exactly as CLAM finds them, for work that continues CLAM's."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, suggest
from saccade.mil.slide import Slide
from saccade.mil.tissue import Polygon

__all__ = ["CLAMPatching", "CLAMSegmentation", "clam_coordinates", "clam_segmentation"]

REFERENCE = 512  # areas are counted in squares of so many level-0 pixels
MOST_PIXELS = 100_000_000  # of the level that is segmented
Points = NDArray[np.int32]
# saturation threshold, median, closing, least tissue and hole in reference squares, most holes of a piece
PRESETS: dict[str, tuple[int, int, int, float, float, int]] = {
    "default": (8, 7, 4, 100, 16, 8),
    "bwh_biopsy": (15, 11, 2, 1, 1, 2),
    "bwh_resection": (15, 11, 4, 100, 16, 8),
    "tcga": (8, 7, 4, 16, 4, 8),
    "heatmap": (15, 11, 2, 50, 8, 10),
}


@dataclass(frozen=True)
class CLAMSegmentation:
    """CLAM's parameters under its own names.

    Args:
        sthresh: Threshold of saturation.
        mthresh: Side of the median filter, odd.
        close: Side of the closing; 0 for none.
        use_otsu: Otsu's threshold instead of ``sthresh``.
        a_t: Least area of tissue, in squares of 512 level-0 pixels.
        a_h: Least area of a hole, likewise.
        max_n_holes: Most holes of a piece.
        seg_level: Level that is segmented; -1 is the one that CLAM takes, nearest to 64 times smaller.
    """

    sthresh: int = 8
    mthresh: int = 7
    close: int = 4
    use_otsu: bool = False
    a_t: float = 100
    a_h: float = 16
    max_n_holes: int = 8
    seg_level: int = -1

    @classmethod
    def preset(cls, name: str) -> CLAMSegmentation:
        """Return one of CLAM's own settings: ``default``, ``bwh_biopsy``, ``bwh_resection``, ``tcga``, ``heatmap``.

        Raises:
            ConfigError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"No CLAM preset {name!r}.{suggest(name, PRESETS)} There are: {', '.join(PRESETS)}.")
        sthresh, mthresh, close, a_t, a_h, holes = PRESETS[name]
        return cls(sthresh, mthresh, close, False, a_t, a_h, holes)


@dataclass(frozen=True)
class CLAMPatching:
    """CLAM's choice of patches.

    Args:
        patch_size: Side in pixels of ``patch_level``.
        step_size: Distance of patches in pixels of that level.
        patch_level: Level.
        contour_fn: ``"four_pt"``, ``"four_pt_hard"``, ``"center"`` or ``"basic"``: which points must lie in tissue.
        use_padding: Patches may run past the slide.
    """

    patch_size: int = 256
    step_size: int = 256
    patch_level: int = 0
    contour_fn: str = "four_pt"
    use_padding: bool = True


def clam_segmentation(slide: Slide, options: CLAMSegmentation | str = "default") -> tuple[Polygon, ...]:
    """Return the pieces of tissue that CLAM finds, with CLAM's rounding.

    Args:
        slide: Needs no resolution.
        options: Parameters, or the name of a preset.

    Raises:
        ConfigError: If the level to be segmented has more than 1e8 pixels, as in CLAM, or a parameter is wrong.
        DataError: If that level cannot be decoded.

    Source:
        Lu et al. 2021; ``mahmoodlab/CLAM``. With the default preset small slides lose all their tissue.
    """
    if isinstance(options, str):
        options = CLAMSegmentation.preset(options)
    number = options.seg_level if options.seg_level >= 0 else openslide_level(slide, 64)
    level = slide.levels[number]
    if level.width * level.height > MOST_PIXELS:
        raise ConfigError(
            f"{slide.path.name}: level {number} has {level.width} x {level.height} px; too many for CLAM."
        )
    hsv = cv2.cvtColor(slide.read(0, 0, level.width, level.height, number), cv2.COLOR_RGB2HSV)
    saturation = cv2.medianBlur(np.ascontiguousarray(hsv[..., 1]), options.mthresh)
    kind = cv2.THRESH_BINARY + (cv2.THRESH_OTSU if options.use_otsu else 0)
    mask = cv2.threshold(saturation, 0 if options.use_otsu else options.sthresh, 255, kind)[1]
    if options.close > 0:
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((options.close, options.close), np.uint8))
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return ()
    scale = (level.downsample_x, level.downsample_y)
    reference = int(REFERENCE**2 / (scale[0] * scale[1]))
    parents = np.asarray(hierarchy)[0, :, 3]
    areas = [float(cv2.contourArea(contour)) for contour in contours]
    pieces = []
    for outer in np.flatnonzero(parents == -1).tolist():
        inner = np.flatnonzero(parents == outer).tolist()
        area = areas[outer] - sum(areas[hole] for hole in inner)
        if area == 0 or not area > options.a_t * reference:
            continue
        largest = sorted(inner, key=areas.__getitem__, reverse=True)[: options.max_n_holes]
        holes = [scaled(contours[hole], scale) for hole in largest if areas[hole] > options.a_h * reference]
        pieces.append(Polygon(scaled(contours[outer], scale), tuple(holes)))
    return tuple(pieces)


def openslide_level(slide: Slide, downsample: float) -> int:
    """Return the level that OpenSlide calls best: the coarsest whose downsample does not exceed the wanted one."""
    return max((i for i, level in enumerate(slide.levels) if level.downsample <= downsample), default=0)


def scaled(contour: object, scale: tuple[float, float]) -> NDArray[np.float64]:
    """Return a contour in level-0 pixels, truncated."""
    points: NDArray[np.float64] = np.trunc(np.asarray(contour, np.float64)[:, 0] * scale)
    return points


def clam_coordinates(
    slide: Slide, pieces: tuple[Polygon, ...], options: CLAMPatching | None = None
) -> NDArray[np.int64]:
    """Return level-0 corners ``(N, 2)`` of the patches that CLAM takes: x outer, y inner, piece after piece.

    Args:
        slide: The slide.
        pieces: Tissue as :func:`clam_segmentation` finds it.
        options: Choice of patches.

    Raises:
        ConfigError: If ``contour_fn`` is none of CLAM's.
    """
    options = options or CLAMPatching()
    if options.contour_fn not in ("four_pt", "four_pt_hard", "center", "basic"):
        raise ConfigError(
            f"contour_fn must be 'four_pt', 'four_pt_hard', 'center' or 'basic'; got {options.contour_fn!r}."
        )
    level = slide.levels[options.patch_level]
    factor = np.array([int(level.downsample_x), int(level.downsample_y)])
    side, step = options.patch_size * factor, options.step_size * factor
    found = [corners(piece, side, step, slide, options) for piece in pieces]
    return np.concatenate([np.zeros((0, 2), np.int64), *found])


def corners(
    piece: Polygon, side: NDArray[np.int64], step: NDArray[np.int64], slide: Slide, options: CLAMPatching
) -> NDArray[np.int64]:
    """Return the corners of one piece, from a grid that starts at its bounding box."""
    ring = piece.exterior.astype(np.int32)[:, None]
    x, y, width, height = cv2.boundingRect(ring)
    end_x, end_y = (
        (x + width, y + height)
        if options.use_padding
        else (min(x + width, slide.width - side[0] + 1), min(y + height, slide.height - side[1] + 1))
    )
    columns, rows = np.arange(x, end_x, step[0]), np.arange(y, end_y, step[1])
    grid = np.stack(np.meshgrid(columns, rows, indexing="ij"), -1).reshape(-1, 2)
    holes = [hole.astype(np.int32)[:, None] for hole in piece.holes]
    kept = [point for point in grid.tolist() if is_tissue(point, side, ring, holes, options)]
    return np.array(kept, np.int64).reshape(-1, 2)


def is_tissue(
    corner: list[int], side: NDArray[np.int64], ring: Points, holes: list[Points], options: CLAMPatching
) -> bool:
    """Whether the points that ``contour_fn`` looks at lie in a piece, and the patch's centre in none of its holes."""
    middle = [corner[axis] + side[axis] // 2 for axis in range(2)]
    shift = int(side[0] // 2 * 0.5)
    four = [(middle[0] + dx, middle[1] + dy) for dx in (-shift, shift) for dy in (-shift, shift)]
    points = {"basic": [corner], "center": [middle]}.get(options.contour_fn, four)
    inside = [cv2.pointPolygonTest(ring, (float(x), float(y)), False) >= 0 for x, y in points]
    if not (all(inside) if options.contour_fn == "four_pt_hard" else any(inside)):
        return False
    centre = tuple(float(corner[axis] + side[axis] / 2) for axis in range(2))
    return not any(cv2.pointPolygonTest(hole, centre, False) > 0 for hole in holes)
