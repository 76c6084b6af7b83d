"""The grid of tiles on a slide: which, where, and how their pixels are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels
from saccade.mil.tissue import Tissue

__all__ = ["TileGrid", "TileOptions", "make_grid", "snapped_mpp"]

# TRIDENT's classes: microns per pixel below the bound count as this magnification.
MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))
MOST_TILES = 50_000_000  # of a grid before tissue; a slide of 200,000 x 200,000 px has 610,000 at 256 px


@dataclass(frozen=True)
class TileOptions:
    """Size, scale and choice of tiles.

    Args:
        mpp: Microns per pixel of the tiles (a magnification m is 10 / m).
        tile_px: Side in pixels at that resolution.
        overlap_px: Pixels shared by neighbours.
        min_tissue: Least share of a tile that is tissue, 0 to 1; 0 keeps what touches tissue.
        edge: ``"pad"`` keeps tiles that reach beyond the slide, ``"drop"`` does not.
        resample: ``"area"``, or ``"bicubic"`` as in TRIDENT.

    Raises:
        ConfigError: If a value is out of range.
    """

    mpp: float = 0.5
    tile_px: int = 256
    overlap_px: int = 0
    min_tissue: float = 0.25
    edge: str = "pad"
    resample: str = "area"

    def __post_init__(self) -> None:
        if not self.mpp > 0 or self.tile_px < 1 or not 0 <= self.overlap_px < self.tile_px:
            raise ConfigError(
                "mpp and tile_px must be positive, overlap_px at least 0 and below tile_px; got "
                f"{self.mpp}, {self.tile_px}, {self.overlap_px}."
            )
        if not 0 <= self.min_tissue <= 1:
            raise ConfigError(f"min_tissue must be a share from 0 to 1; got {self.min_tissue}.")
        if self.edge not in ("pad", "drop") or self.resample not in ("area", "bicubic"):
            raise ConfigError(
                f"edge must be 'pad' or 'drop', resample 'area' or 'bicubic'; got {self.edge!r}, {self.resample!r}."
            )

    @property
    def name(self) -> str:
        """Folder name, so that settings never mix: ``mpp0.5_px256_ov0``."""
        return f"mpp{self.mpp:g}_px{self.tile_px}_ov{self.overlap_px}"


@dataclass(frozen=True)
class TileGrid:
    """Tiles of one slide, in row-major order.

    Args:
        coords: ``(N, 2)`` int64, x and y of the top-left corners in level-0 pixels.
        width: Of a tile in level-0 pixels, not rounded.
        height: Likewise.
        tissue: ``(N,)``, share of tissue.
        options: How they were chosen.
    """

    coords: NDArray[np.int64]
    width: float
    height: float
    tissue: NDArray[np.float64]
    options: TileOptions

    def __len__(self) -> int:
        return len(self.coords)

    def read(self, slide: Slide, index: int) -> Pixels:
        """Return a tile as RGB uint8 ``(tile_px, tile_px, 3)``.

        Raises:
            DataError: If it cannot be decoded, with the reason ``"bad_tile"``.
        """
        x, y = self.coords[index].tolist()
        side = self.options.tile_px
        return slide.read_scaled(x, y, self.width, self.height, (side, side), resample=self.options.resample)

    def images(self, slide: Slide) -> Iterator[Pixels]:
        """Yield all tiles in order."""
        return (self.read(slide, index) for index in range(len(self)))


def make_grid(slide: Slide, tissue: Tissue | None, options: TileOptions | None = None) -> TileGrid:
    """Lay one grid over a slide, anchored at its corner, and keep the tiles that hold enough tissue.

    A tile covers ``tile_px * mpp / slide mpp`` level-0 pixels along each axis, not rounded; corners are rounded to
    whole ones. Microns decide, not levels: a pyramid whose levels are 1.9997 or 4.0009 times smaller gives the same
    tiles.

    Args:
        slide: Its resolution must be known, unless there is no tissue.
        tissue: Where the tissue is; ``None`` keeps every tile.
        options: Size, scale and choice.

    Raises:
        DataError: If the resolution is not known, with the reason ``"no_mpp"``.
        ConfigError: If tiles are so small that there would be more than 50 million.
    """
    options = options or TileOptions()
    if slide.resolution is None and tissue is not None and not tissue.mask.any():
        return TileGrid(np.empty((0, 2), np.int64), 0.0, 0.0, np.empty(0), options)
    resolution = slide.require_resolution()
    scale_x, scale_y = options.mpp / resolution.x, options.mpp / resolution.y
    width, height = options.tile_px * scale_x, options.tile_px * scale_y
    stride = options.tile_px - options.overlap_px
    columns = corners(slide.width, width, stride * scale_x, options.edge)
    rows = corners(slide.height, height, stride * scale_y, options.edge)
    if len(columns) * len(rows) > MOST_TILES:
        raise ConfigError(
            f"{slide.path.name}: {len(columns)} x {len(rows)} tiles are too many; tiles of {options.tile_px} px with "
            f"overlap {options.overlap_px} at {options.mpp:g} um/px are {width:.1f} level-0 pixels wide."
        )
    coords = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
    share = np.ones(len(coords)) if tissue is None else tissue.coverage(coords, width, height)
    kept = share >= options.min_tissue if options.min_tissue > 0 else share > 0
    return TileGrid(coords[kept], width, height, share[kept], options)


def corners(length: int, side: float, step: float, edge: str) -> NDArray[np.int64]:
    """Return rounded positions along an axis, each tile at least partly (``"pad"``) or fully (``"drop"``) inside."""
    last = length - side + 0.5 if edge == "drop" else length - 0.5
    count = max(0, int(np.floor(last / step)) + 1) if last >= 0 else 0
    return np.round(np.arange(count) * step).astype(np.int64)


def snapped_mpp(slide: Slide, magnification: float) -> float:
    """Return the target resolution that TRIDENT reads a magnification at: multiples of its own class of the slide.

    TRIDENT counts 0.499 and 0.35 um/px both as "20x" and then does not resample for 20x; a tile's resolution follows
    the slide's.

    Args:
        slide: Its resolution must be known.
        magnification: 5, 10, 20, 40, ...

    Raises:
        DataError: If the resolution is not known.
        ConfigError: If it is coarser than TRIDENT takes.
    """
    resolution = slide.require_resolution()
    own = next((power for bound, power in MAGNIFICATIONS if resolution.x < bound), None)
    if own is None:
        raise ConfigError(f"{slide.path.name} has {resolution.x:.3g} um/px, beyond TRIDENT's classes (below 2.4).")
    return resolution.x * own / magnification
