"""What the viewer shows: slides by number, pixels for a deep zoom, contours, tiles, maps."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from saccade.datasets.bag_files import Bag, plain, read_array
from saccade.errors import ConfigError, DataError
from saccade.mil.geojson import read_polygons
from saccade.mil.heatmap import colour_heatmap, normalize_scores, tile_map
from saccade.mil.score_maps import ScoreMaps, load_scores
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels
from saccade.mil.slide_folder import SlideFolder
from saccade.mil.tissue import overview

__all__ = ["ViewerContent"]

TILE = 256  # side of the zoom's tiles
LARGEST_READ = 4096  # pixels along a side of the level that one tile is read from; beyond, the overview serves
OVERVIEW = 1024  # longest side of the overview
OPEN_SLIDES = 4
MAP_PIXELS = 2048  # longest side of a map


@dataclass
class OpenSlide:
    """A slide in use, with its overview once that is needed."""

    slide: Slide
    lock: threading.Lock = field(default_factory=threading.Lock)
    small: Pixels | None = None

    @property
    def small_scale(self) -> float:
        """Level-0 pixels per pixel of the overview."""
        return max(1.0, max(self.slide.width, self.slide.height) / OVERVIEW)

    def overview(self) -> Pixels:
        """Return the whole slide, read once."""
        with self.lock:
            if self.small is None:
                self.small = overview(self.slide, self.small_scale)
            return self.small


class ViewerContent:
    """An output folder of ``saccade slides``, by the numbers that a browser may ask for.

    Args:
        folder: What is where.
    """

    def __init__(self, folder: SlideFolder) -> None:
        self.folder = folder
        self.slides = sorted(key for key, path in folder.slides.items() if path.is_file())
        if not self.slides:
            raise ConfigError(
                f"{folder.root} names no slide that is still there ({len(folder.slides)} in its journals); say "
                "--slides FOLDER if they were moved, or begin with `saccade slides run`."
            )
        self.open: OrderedDict[int, OpenSlide] = OrderedDict()
        self.lock = threading.Lock()

    @classmethod
    def of(cls, folder: str | Path, *, slides: str | Path | Sequence[str | Path] | None = None) -> ViewerContent:
        """Look into a folder; see :meth:`SlideFolder.open`."""
        return cls(SlideFolder.open(folder, slides=slides))

    def use(self, number: int) -> OpenSlide:
        """Return a slide, opened if need be; of those used least recently some are closed.

        Raises:
            IndexError: If there is no slide of this number.
            DataError: If it cannot be read.
        """
        key = self.slides[number]
        with self.lock:
            if number not in self.open:
                self.open[number] = OpenSlide(self.folder.open_slide(key))
                while len(self.open) > OPEN_SLIDES:
                    self.open.popitem(last=False)  # closed when the last request that reads it lets go
            self.open.move_to_end(number)
            return self.open[number]

    def close(self) -> None:
        """Close all slides."""
        with self.lock:
            for one in self.open.values():
                one.slide.close()
            self.open.clear()

    def table(self) -> list[dict[str, Any]]:
        """Return number and name of every slide."""
        return [{"number": number, "id": key} for number, key in enumerate(self.slides)]

    def map_files(self, number: int) -> list[Path]:
        """Return the files with scores of a slide, one for each model."""
        name = f"{self.slides[number]}.h5"
        root = self.folder.root / "attention"
        return [
            path for path in (root / name, *(folder / name for folder in sorted(root.glob("*/")))) if path.is_file()
        ]

    def map_names(self, number: int) -> list[tuple[Path, str]]:
        """Return file and name of each map of a slide."""
        return [(path, name) for path in self.map_files(number) for name in load_scores(path).maps]

    def facts(self, number: int) -> dict[str, Any]:
        """Return size, resolution and maps of a slide."""
        slide = self.use(number).slide
        resolution = slide.resolution
        root = self.folder.root / "attention"
        maps = [name if path.parent == root else f"{path.parent.name}: {name}" for path, name in self.map_names(number)]
        return {
            "id": self.slides[number],
            "width": slide.width,
            "height": slide.height,
            "mpp": None if resolution is None else resolution.x,
            "tile": TILE,
            "levels": self.max_level(slide),
            "map_width": int(slide.width / self.map_scale(slide)) * self.map_scale(slide),
            "maps": maps,
        }

    @staticmethod
    def max_level(slide: Slide) -> int:
        """Return the number of the finest zoom level; level 0 is one pixel."""
        return math.ceil(math.log2(max(slide.width, slide.height, 2)))

    @staticmethod
    def map_scale(slide: Slide) -> float:
        """Return level-0 pixels per pixel of a map."""
        return max(1.0, max(slide.width, slide.height) / MAP_PIXELS)

    def pixels(self, number: int, level: int, column: int, row: int) -> Pixels:
        """Return a tile of the deep zoom, RGB uint8.

        Raises:
            IndexError: If there is no such tile.
            DataError: If it cannot be decoded.
        """
        used = self.use(number)
        slide = used.slide
        if level > self.max_level(slide):
            raise IndexError(level)
        scale = 2 ** (self.max_level(slide) - level)
        x, y = column * TILE * scale, row * TILE * scale
        if x >= slide.width or y >= slide.height:
            raise IndexError((column, row))
        width, height = min(TILE * scale, slide.width - x), min(TILE * scale, slide.height - y)
        size = max(1, math.ceil(width / scale)), max(1, math.ceil(height / scale))
        source = slide.levels[slide.level_for(scale)]
        if max(width, height) / source.downsample <= LARGEST_READ:
            return slide.read_scaled(x, y, width, height, size)
        import cv2

        small, shrink = used.overview(), used.small_scale
        part = small[
            int(y / shrink) : max(int(y / shrink) + 1, round((y + height) / shrink)),
            int(x / shrink) : max(int(x / shrink) + 1, round((x + width) / shrink)),
        ]
        return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), np.uint8)

    def contours(self, number: int) -> list[list[list[float]]]:
        """Return rings in level-0 pixels."""
        path = self.folder.contours(self.slides[number])
        if not path.is_file():
            return []
        return [ring.tolist() for p in read_polygons(path) for ring in (p.exterior, *p.holes)]

    def tiles(self, number: int) -> dict[str, Any]:
        """Return corners of tiles and their size: those of the maps, else of the first grid that was laid."""
        files = self.map_files(number)
        if files:
            scores = load_scores(files[0])
            return {"coords": scores.coords.tolist(), "size": scores.tile_size}
        grids = sorted(self.folder.root.glob("tiles/*/"))
        found = [path for path in (grid / f"{self.slides[number]}.h5" for grid in grids) if path.is_file()]
        if not found:
            return {"coords": [], "size": [1, 1]}
        try:
            with h5py.File(found[0], "r") as file:
                coords = read_array(file, "coords").reshape(-1, 2).astype(np.int64)
                attributes = plain(file["coords"].attrs)
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{found[0]} holds no tiles ({error}).", reason="bad_bag") from error
        side = Bag(np.empty((len(coords), 0)), None, attributes).tile_size_level0 or 1.0
        return {"coords": coords.tolist(), "size": [side, float(attributes.get("tile_size_level0_y", side))]}

    def map(self, number: int, index: int) -> tuple[ScoreMaps, str]:
        """Return the scores that hold a map, and its name.

        Raises:
            IndexError: If there is no such map.
        """
        path, name = self.map_names(number)[index]
        return load_scores(path), name

    def scores(self, number: int, index: int) -> dict[str, Any]:
        """Return the numbers of one map."""
        scores, name = self.map(number, index)
        values = scores.maps[name]
        return {
            "name": name,
            "coords": scores.coords.tolist(),
            "size": scores.tile_size,
            "scores": [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()],
            "percentiles": (100 * normalize_scores(values)).round(1).tolist(),
        }

    def overlay(self, number: int, index: int) -> Pixels:
        """Return a map in colours by percentile, RGBA."""
        scores, name = self.map(number, index)
        slide = self.use(number).slide
        heatmap = tile_map(
            normalize_scores(scores.maps[name]),
            scores.coords,
            scores.tile_size,
            (slide.width, slide.height),
            downsample=self.map_scale(slide),
        )
        return colour_heatmap(heatmap, limits=(0.0, 1.0))
