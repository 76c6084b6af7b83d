"""What is done with one slide: tissue, tiles and features, each a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from saccade.batch import atomic_path
from saccade.datasets.bag_files import Bag, save_bag
from saccade.errors import ConfigError, DataError
from saccade.mil.encoders import Encoder
from saccade.mil.geojson import tissue_from_geojson, write_polygons
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels
from saccade.mil.slide_items import SlideItem
from saccade.mil.tiles import TileGrid, TileOptions, make_grid
from saccade.mil.tissue import Tissue, TissueOptions, draw_outlines, find_tissue, overview

__all__ = ["Outcome", "Places", "SlideJob", "SlideWorker", "describe"]

PREVIEW = 1024  # longest side of a preview in pixels
OUTLINE = (0, 140, 60)
EXPECTED = (DataError, ConfigError, MemoryError)  # what makes a slide fail and lets the run go on


@dataclass(frozen=True)
class Prepared:
    """A slide whose tissue and tiles are known."""

    slide: Slide
    tissue: Tissue
    grid: TileGrid | None


@dataclass(frozen=True)
class Places:
    """Files of a slide below the output folder."""

    root: Path
    tiles: str
    encoder: str

    def mask(self, key: str) -> Path:
        """Contours."""
        return self.root / "masks" / f"{key}.geojson"

    def preview(self, key: str) -> Path:
        """Thumbnail with contours."""
        return self.root / "previews" / f"{key}.jpg"

    def coords(self, key: str) -> Path:
        """Tile coordinates."""
        return self.root / "tiles" / self.tiles / f"{key}.h5"

    def features(self, key: str) -> Path:
        """The bag."""
        return self.root / "features" / self.tiles / self.encoder / f"{key}.h5"

    def stage(self, name: str) -> Path:
        """Folder of the run's manifest and journal, by command."""
        return {"segment": self.root / "masks", "tile": self.root / "tiles" / self.tiles}.get(
            name, self.root / "features" / self.tiles / self.encoder
        )


@dataclass(frozen=True)
class SlideJob:
    """What is to be done with every slide; plain values and an encoder, so that it can be sent to other machines.

    Args:
        places: Where files go.
        stage: ``"segment"``, ``"tile"`` or ``"embed"``.
        tissue: How tissue is found.
        tiles: Size, scale and choice of tiles.
        encoder: For ``"embed"``.
        slide_mpp: Resolution of slides whose item has none.
        dtype: Of stored features.
        on_bad_tile: ``"skip"``, ``"white"`` or ``"fail"``.
        overwrite: Find tissue anew where there are contours.
        batch_size: Tiles at a time.
        workers: Decoding threads.
        device: Of the encoder.
        precision: Of the encoder's products.
    """

    places: Places
    stage: str
    tissue: TissueOptions
    tiles: TileOptions
    encoder: Encoder | None
    slide_mpp: float | None
    dtype: str
    on_bad_tile: str
    overwrite: bool
    batch_size: int
    workers: int
    device: str
    precision: torch.dtype


@dataclass(frozen=True)
class Outcome:
    """What became of a slide.

    Args:
        seconds: Time spent on it.
        row: Its columns in the table.
        reason: A word about an empty result.
        error: Why it failed, if it did.
    """

    seconds: float
    row: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    error: Exception | None = None


class SlideWorker:
    """Does the stages of a slide.

    Args:
        job: What is to be done.
    """

    def __init__(self, job: SlideJob) -> None:
        self.job, self.places, self.tiles = job, job.places, job.tiles
        self.device = torch.device(job.device)
        if job.encoder is not None:
            job.encoder.to(self.device)
        self.readers = ThreadPoolExecutor(max(1, job.workers))
        self.turn = Lock()

    def each(self, items: Sequence[SlideItem]) -> Iterator[tuple[SlideItem, Outcome]]:
        """Yield what became of each slide, in order; the next one is prepared beside the encoder."""
        with ThreadPoolExecutor(1) as ahead, self.readers:
            following = ahead.submit(self.prepare, items[0]) if items else None
            for number, item in enumerate(items):
                current = following
                following = ahead.submit(self.prepare, items[number + 1]) if number + 1 < len(items) else None
                if current is not None:
                    yield item, self.finish(item, current.result)

    def __call__(self, item: SlideItem) -> Outcome:
        """Return what became of a slide. Of two threads that call this, one prepares while the other encodes."""
        try:
            prepared = self.prepare(item)
        except EXPECTED as error:
            return Outcome(0.0, error=error)
        with self.turn:
            return self.finish(item, lambda: prepared)

    def prepare(self, item: SlideItem) -> Prepared:
        """Open a slide, find its tissue and lay its tiles."""
        slide = Slide(item.path, mpp=item.mpp if item.mpp is not None else self.job.slide_mpp)
        drawing = self.places.mask(item.id)
        if drawing.exists() and not self.job.overwrite:
            tissue = tissue_from_geojson(drawing, slide, mpp=self.job.tissue.mpp)
        else:
            tissue = find_tissue(slide, self.job.tissue)
            write_polygons(drawing, tissue.polygons, source=tissue.source)
        if not self.places.preview(item.id).exists() or self.job.overwrite:
            save_preview(self.places.preview(item.id), slide, tissue)
        grid = None if self.job.stage == "segment" else make_grid(slide, tissue, self.tiles)
        return Prepared(slide, tissue, grid)

    def finish(self, item: SlideItem, prepared: Callable[[], Prepared]) -> Outcome:
        """Write what is left to write of a slide."""
        started = time.monotonic()
        try:
            row, reason = self.write(item, prepared())
        except EXPECTED as error:
            return Outcome(time.monotonic() - started, error=error)
        return Outcome(time.monotonic() - started, row, reason)

    def write(self, item: SlideItem, ready: Prepared) -> tuple[dict[str, Any], str]:
        """Write tiles and features; return the row and a word about an empty result."""
        slide, grid = ready.slide, ready.grid
        resolution = slide.resolution  # not needed where there is no tissue
        row: dict[str, Any] = {
            "width": slide.width,
            "height": slide.height,
            "mpp_x": None if resolution is None else round(resolution.x, 6),
            "mpp_y": None if resolution is None else round(resolution.y, 6),
            "mpp_source": None if resolution is None else resolution.source,
            "tissue": round(ready.tissue.share, 4),
            "tissue_source": ready.tissue.source,
            "notices": "; ".join(slide.notices),
        }
        reason = "" if ready.tissue.mask.any() else "no_tissue"
        if grid is not None:
            reason = "" if len(grid) else "no_tissue"
            row["n_tiles"] = len(grid)
            save_coords(self.places.coords(item.id), grid, slide)
        if grid is not None and self.job.encoder is not None:
            bag, bad = self.encode(slide, grid, self.job.encoder)
            save_bag(self.places.features(item.id), bag)
            row |= {"n_tiles": len(bag), "n_bad_tiles": bad}
        slide.close()
        return row, reason

    def encode(self, slide: Slide, grid: TileGrid, encoder: Encoder) -> tuple[Bag, int]:
        """Return the bag of a slide, and the number of tiles that could not be decoded."""
        features = np.empty((len(grid), encoder.dim), self.job.dtype)
        kept = np.ones(len(grid), bool)
        size = self.job.batch_size
        bad_count = 0
        for first, images, bad in self.batches(slide, grid):
            bad_count += len(bad)
            if self.job.on_bad_tile != "white":
                kept[first + np.array(bad, int)] = False
            tiles = torch.from_numpy(images).to(self.device, non_blocking=True)
            if len(images) < size:  # one shape for every batch, so that results do not depend on the number of tiles
                tiles = torch.cat([tiles, tiles.new_full((size - len(images), *tiles.shape[1:]), 255)])
            values = encoder(tiles, self.job.precision)[: len(images)].cpu().numpy()
            features[first : first + len(images)] = values
        if len(grid) and not kept.any():
            raise DataError(f"{slide.path.name}: none of its {len(grid)} tiles can be decoded.", reason="bad_tile")
        attributes = {**tile_attributes(grid, slide), "encoder": encoder.name, "weights": encoder.weights}
        attributes |= {"n_bad_tiles": bad_count, "precision": str(self.job.precision).removeprefix("torch.")}
        return Bag(features[kept], grid.coords[kept], attributes), bad_count

    def batches(self, slide: Slide, grid: TileGrid) -> Iterator[tuple[int, NDArray[np.uint8], list[int]]]:
        """Yield first index, tiles and bad slots of each batch; the readers stay two batches ahead."""
        size = self.job.batch_size

        def read(index: int) -> Pixels | DataError:
            try:
                return grid.read(slide, index)
            except DataError as error:
                return error

        waiting: list[tuple[int, list[Future[Pixels | DataError]]]] = []
        starts = iter(range(0, len(grid), size))

        def submit() -> None:
            first = next(starts, None)
            if first is not None:
                indices = range(first, min(first + size, len(grid)))
                waiting.append((first, [self.readers.submit(read, index) for index in indices]))

        for _ in range(3):
            submit()
        while waiting:
            first, futures = waiting.pop(0)
            images = np.full((len(futures), self.tiles.tile_px, self.tiles.tile_px, 3), 255, np.uint8)
            bad = []
            for slot, future in enumerate(futures):
                result = future.result()
                if isinstance(result, DataError):
                    if self.job.on_bad_tile == "fail":
                        raise result
                    bad.append(slot)
                else:
                    images[slot] = result
            submit()
            yield first, images, bad


def describe(name: str, row: Mapping[str, Any], seconds: float) -> str:
    """Return the line of a finished slide."""
    parts = [name, f"tissue {row['tissue']:.0%}"]
    if "n_tiles" in row:
        parts.append(f"{row['n_tiles']:,} tiles")
    if row.get("n_bad_tiles"):
        parts.append(f"{row['n_bad_tiles']} bad tiles left out")
    return "  ".join([*parts, f"{seconds:.1f} s"])


def tile_attributes(grid: TileGrid, slide: Slide) -> dict[str, Any]:
    """Return what readers of a bag need to know, under our names and TRIDENT's."""
    resolution, options = slide.resolution, grid.options
    scale: dict[str, Any] = {}
    if resolution is not None:
        scale = {
            "base_mpp": resolution.x,
            "base_mpp_y": resolution.y,
            "mpp_source": resolution.source,
            "tile_size_level0": grid.width,
            "tile_size_level0_y": grid.height,
            "patch_size_level0": round(grid.width),
            "level0_magnification": round(10 / resolution.x, 2),
        }
    return scale | {
        "target_mpp": options.mpp,
        "patch_size": options.tile_px,
        "overlap": options.overlap_px,
        "min_tissue": options.min_tissue,
        "resample": options.resample,
        "fill": slide.fill,
        "level0_width": slide.width,
        "level0_height": slide.height,
        "target_magnification": round(10 / options.mpp, 2),
        "name": slide.path.name,
        "slide_quickhash": slide.properties.get("openslide.quickhash-1", ""),
    }


def save_coords(path: Path, grid: TileGrid, slide: Slide) -> None:
    """Write coordinates and tissue shares of tiles, readable by TRIDENT as a patch file."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        coords = file.create_dataset("coords", data=grid.coords)
        file.create_dataset("tissue", data=grid.tissue.astype(np.float32))
        for name, value in tile_attributes(grid, slide).items():
            coords.attrs[name] = value


def save_preview(path: Path, slide: Slide, tissue: Tissue) -> None:
    """Write a thumbnail with the contours of the tissue."""
    scale = max(1.0, max(slide.width, slide.height) / PREVIEW)
    image = draw_outlines(overview(slide, scale), tissue.polygons, scale, OUTLINE, 2)
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, quality=88)
