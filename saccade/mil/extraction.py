"""Slides to bags: tissue, tiles and features of every slide, as files, whatever becomes of single slides."""

from __future__ import annotations

import csv
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from saccade.batch import (
    BatchOptions,
    Item,
    Run,
    RunSummary,
    atomic_path,
    find_items,
    resolve_device,
    resolve_precision,
)
from saccade.datasets.bag_files import Bag, save_bag
from saccade.errors import ConfigError, DataError
from saccade.mil.encoders import Encoder
from saccade.mil.geojson import tissue_from_geojson, write_polygons
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels
from saccade.mil.tiles import TileGrid, TileOptions, make_grid
from saccade.mil.tissue import Tissue, TissueOptions, find_tissue, overview

__all__ = ["SLIDE_EXTENSIONS", "SlideItem", "extract", "find_slides", "read_slide_list"]

SLIDE_EXTENSIONS = (
    ".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .dcm .czi .avs .img".split()  # noqa: SIM905
)
PREVIEW = 1024  # longest side of a preview in pixels
STAGES = ("segment", "tile", "embed")


@dataclass(frozen=True, order=True)
class SlideItem(Item):
    """One slide to work on.

    Args:
        id: Unique name: the file's stem.
        path: The file.
        mpp: Its resolution where the list says it.
    """

    mpp: float | None = None


def find_slides(inputs: str | Path | Sequence[str | Path], *, list_file: str | Path | None = None) -> list[SlideItem]:
    """Resolve inputs to slides, sorted by id.

    Ids are file stems (``.ome.tif`` counts as one extension). Equal stems get their folder's name in front, or a
    number.
    All files of one DICOM series in a folder are one slide, named after the first.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``. PNG and JPEG are slides only when named.
        list_file: CSV with a column ``slide`` (path or id) and, if need be, ``mpp``: only these slides, in any order.

    Raises:
        ConfigError: If nothing is found, or the list names a slide twice or one that is not there.
    """
    found = find_items(inputs, extensions=SLIDE_EXTENSIONS, kind="slides")
    paths = one_per_series([item.path for item in found])
    named = unique_ids(paths)
    if list_file is None:
        return sorted(SlideItem(key, path) for key, path in named.items())
    rows = read_slide_list(list_file)
    by_name = {name: key for key, path in named.items() for name in (key, path.name, path.as_posix())}
    chosen: dict[str, SlideItem] = {}
    for number, row in enumerate(rows, start=2):
        key = by_name.get(row["slide"]) or by_name.get(Path(row["slide"]).name)
        place = f"{list_file}, line {number}"
        if key is None:
            raise ConfigError(f"{place}: slide {row['slide']!r} is not among the inputs.")
        if key in chosen:
            raise ConfigError(f"{place}: slide {key!r} is listed twice.")
        chosen[key] = SlideItem(key, named[key], parse_mpp(row.get("mpp"), place))
    return sorted(chosen.values())


def read_slide_list(path: str | Path) -> list[dict[str, str]]:
    """Read a CSV of slides; its column may be called ``slide``, ``slide_id``, ``wsi`` or ``path``.

    Returns:
        Rows with the key ``slide`` and the other columns as they are.

    Raises:
        ConfigError: If there is no such column, or no row.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        column = next((name for name in ("slide", "slide_id", "wsi", "path") if name in columns), None)
        if column is None:
            raise ConfigError(f"{path} has no column 'slide' (nor slide_id, wsi, path); it has {', '.join(columns)}.")
        rows = [{**row, "slide": (row[column] or "").strip()} for row in reader]
    rows = [row for row in rows if row["slide"]]
    if not rows:
        raise ConfigError(f"{path} lists no slides.")
    return rows


def parse_mpp(text: str | None, place: str) -> float | None:
    """Return the resolution in a cell of a list."""
    if not (text or "").strip():
        return None
    try:
        value = float(str(text).replace(",", "."))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{place}: mpp must be a positive number, got {text!r}.")
    return value


def one_per_series(paths: Sequence[Path]) -> list[Path]:
    """Keep one file of each DICOM series in a folder; files that do not open stay, to be reported."""
    import openslide

    kept: list[Path] = []
    seen: set[tuple[Path, str]] = set()
    for path in sorted(paths):
        if path.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(path) as slide:
                    identity = slide.properties.get(openslide.PROPERTY_NAME_QUICKHASH1, path.name)
            except openslide.OpenSlideError:
                identity = path.name
            if (path.parent, identity) in seen:
                continue
            seen.add((path.parent, identity))
        kept.append(path)
    return kept


def unique_ids(paths: Sequence[Path]) -> dict[str, Path]:
    """Name slides by their stems, made unique."""
    count = Counter(stem(path) for path in paths)
    named: dict[str, Path] = {}
    for path in paths:
        name = stem(path) if count[stem(path)] == 1 else f"{path.resolve().parent.name}-{stem(path)}"
        number = 2
        while name in named:
            name, number = f"{name.rsplit('~', 1)[0]}~{number}", number + 1
        named[name] = path
    return named


def stem(path: Path) -> str:
    """Return the name without its extension."""
    name = path.stem
    return name[:-4] if name.lower().endswith((".ome",)) else name


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


def extract(
    inputs: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    stage: str = "embed",
    encoder: Encoder | None = None,
    tissue: TissueOptions | None = None,
    tiles: TileOptions | None = None,
    list_file: str | Path | None = None,
    slide_mpp: float | None = None,
    dtype: str = "float16",
    on_bad_tile: str = "skip",
    command: str | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Find tissue, lay tiles and compute features, slide by slide.

    Files below ``out`` (settings are in the folder names, so they never mix): ``masks/ID.geojson``,
    ``previews/ID.jpg``, ``tiles/SETTINGS/ID.h5``, ``features/SETTINGS/ENCODER/ID.h5``. A contour file that is already
    there is used as it is, so what was edited in QuPath counts; with ``options.overwrite`` tissue is found anew.
    Manifest and journal lie beside the last stage's files, with copies in ``out``. Decoding runs in
    ``options.workers`` threads beside the encoder, and the next slide is prepared meanwhile.

    Status of a slide: ``done``, with the reason ``no_tissue`` if there are no tiles; or ``failed`` with a reason:
    ``no_mpp``, ``unreadable``, ``truncated``, ``bad_tile`` (no tile at all could be decoded), ``bad_geojson``.

    Args:
        inputs: Slides; see :func:`find_slides`.
        out: Folder.
        stage: Last thing to do: ``"segment"``, ``"tile"`` or ``"embed"``.
        encoder: For ``"embed"``.
        tissue: How tissue is found.
        tiles: Size, scale and choice of tiles.
        list_file: CSV of slides with their own ``mpp``.
        slide_mpp: Resolution of every slide that the list gives none.
        dtype: Of stored features, ``"float16"`` or ``"float32"``.
        on_bad_tile: ``"skip"`` leaves tiles out that cannot be decoded, ``"white"`` encodes white ones instead,
            ``"fail"`` fails the slide. Counted as ``n_bad_tiles`` in any case.
        command: Name of the run for the manifest; the default is ``slides STAGE``.
        options: Device, batches, resume, shard, screen.

    Returns:
        Counts of the run.

    Raises:
        ConfigError: If an option cannot be used, or ``out`` holds another run.
    """
    options = options or BatchOptions()
    tissue, tiles = tissue or TissueOptions(), tiles or TileOptions()
    if stage not in STAGES or on_bad_tile not in ("skip", "white", "fail") or dtype not in ("float16", "float32"):
        raise ConfigError(
            f"stage must be one of {STAGES}, on_bad_tile skip, white or fail, dtype float16 or float32; got "
            f"{stage!r}, {on_bad_tile!r}, {dtype!r}."
        )
    if (stage == "embed") != (encoder is not None):
        raise ConfigError("stage 'embed' needs an encoder, and the others take none.")
    items = find_slides(inputs, list_file=list_file)
    places = Places(Path(out), tiles.name, encoder.name if encoder else "")
    settings: dict[str, Any] = {"tissue": asdict(tissue), "slide_mpp": slide_mpp}
    if stage != "segment":
        settings["tiles"] = asdict(tiles)
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    title = ""
    if encoder is not None:
        settings |= {**encoder.settings, "dtype": dtype, "on_bad_tile": on_bad_tile, "precision": str(precision)}
        title = f"{tiles.mpp:g} um/px, {tiles.tile_px} px, encoder {encoder.name} {device}"
    run = Run(
        command or f"slides {stage}",
        items=items,
        out=f"{places.stage(stage)}/",
        settings=settings,
        options=options,
        table=places.stage(stage) / "slides.csv",
        title=title,
        unit="slides",
    )
    last = {"segment": places.mask, "tile": places.coords, "embed": places.features}[stage]
    gone = {item.id for item in run.items if item.id in run.finished and not last(item.id).exists()}
    run.finished -= gone
    run.resumed -= len(gone)
    worker = Worker(places, stage, tissue, tiles, encoder, slide_mpp, dtype, on_bad_tile, options, device, precision)
    with run:
        if encoder is not None:
            for notice in encoder.notices(tiles.tile_px, tiles.mpp):
                run.reporter.say(f"note: {notice}")
        if not options.dry_run:
            worker.work(run)
    if not options.dry_run:
        for path in (run.files.manifest, run.files.journal):
            with atomic_path(Path(out) / path.name) as temporary:
                shutil.copyfile(path, temporary)
    return run.summary


@dataclass
class Worker:
    """Does the stages of a slide; preparation of the next one runs beside the encoder."""

    places: Places
    stage: str
    tissue: TissueOptions
    tiles: TileOptions
    encoder: Encoder | None
    slide_mpp: float | None
    dtype: str
    on_bad_tile: str
    options: BatchOptions
    device: torch.device
    precision: torch.dtype

    def work(self, run: Run) -> None:
        """Work through the pending slides of a run."""
        if self.encoder is not None:
            self.encoder.to(self.device)
        pending = [item for item in run.pending if isinstance(item, SlideItem)]
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(max(1, self.options.workers)) as readers:
            following = ahead.submit(self.prepare, pending[0]) if pending else None
            for number, item in enumerate(pending):
                current = following
                following = ahead.submit(self.prepare, pending[number + 1]) if number + 1 < len(pending) else None
                started = time.monotonic()
                try:
                    row, reason = self.finish(item, current, readers)
                except (DataError, ConfigError, MemoryError) as error:
                    run.fail(item, error, seconds=time.monotonic() - started)
                else:
                    run.done(item, seconds=time.monotonic() - started, row=row, reason=reason)
                    run.reporter.say(describe(item.path.name, row, time.monotonic() - started))

    def prepare(self, item: SlideItem) -> Prepared:
        """Open a slide, find its tissue and lay its tiles."""
        slide = Slide(item.path, mpp=item.mpp if item.mpp is not None else self.slide_mpp)
        drawing = self.places.mask(item.id)
        if drawing.exists() and not self.options.overwrite:
            tissue = tissue_from_geojson(drawing, slide, mpp=self.tissue.mpp)
        else:
            tissue = find_tissue(slide, self.tissue)
            write_polygons(drawing, tissue.polygons)
        if not self.places.preview(item.id).exists() or self.options.overwrite:
            save_preview(self.places.preview(item.id), slide, tissue)
        grid = None if self.stage == "segment" else make_grid(slide, tissue, self.tiles)
        return Prepared(slide, tissue, grid)

    def finish(
        self, item: SlideItem, prepared: Future[Prepared] | None, readers: ThreadPoolExecutor
    ) -> tuple[dict[str, Any], str]:
        """Write what is left to write of a slide; return its row and a word about an empty result."""
        if prepared is None:
            raise RuntimeError("every pending slide is prepared before it is finished")
        ready = prepared.result()
        slide, grid = ready.slide, ready.grid
        resolution = slide.require_resolution()
        row: dict[str, Any] = {
            "width": slide.width,
            "height": slide.height,
            "mpp_x": round(resolution.x, 6),
            "mpp_y": round(resolution.y, 6),
            "mpp_source": resolution.source,
            "tissue": round(ready.tissue.share, 4),
            "tissue_source": ready.tissue.source,
            "notices": "; ".join(slide.notices),
        }
        reason = "" if ready.tissue.mask.any() else "no_tissue"
        if grid is not None:
            reason = "" if len(grid) else "no_tissue"
            row["n_tiles"] = len(grid)
            save_coords(self.places.coords(item.id), grid, slide)
        if grid is not None and self.encoder is not None:
            bag, bad = self.encode(slide, grid, self.encoder, readers)
            save_bag(self.places.features(item.id), bag)
            row |= {"n_tiles": len(bag), "n_bad_tiles": bad}
        slide.close()
        return row, reason

    def encode(self, slide: Slide, grid: TileGrid, encoder: Encoder, readers: ThreadPoolExecutor) -> tuple[Bag, int]:
        """Return the bag of a slide, and the number of tiles that could not be decoded."""
        features = np.empty((len(grid), encoder.dim), self.dtype)
        kept = np.ones(len(grid), bool)
        size = self.options.batch_size
        bad_count = 0
        for first, images, bad in self.batches(slide, grid, readers):
            bad_count += len(bad)
            if self.on_bad_tile != "white":
                kept[first + np.array(bad, int)] = False
            tiles = torch.from_numpy(images).to(self.device, non_blocking=True)
            if len(images) < size:  # one shape for every batch, so that results do not depend on the number of tiles
                tiles = torch.cat([tiles, tiles.new_full((size - len(images), *tiles.shape[1:]), 255)])
            values = encoder(tiles, self.precision)[: len(images)].cpu().numpy()
            features[first : first + len(images)] = values
        if len(grid) and not kept.any():
            raise DataError(f"{slide.path.name}: none of its {len(grid)} tiles can be decoded.", reason="bad_tile")
        attributes = {**tile_attributes(grid, slide), "encoder": encoder.name, "weights": encoder.weights}
        attributes |= {"n_bad_tiles": bad_count, "precision": str(self.precision).removeprefix("torch.")}
        return Bag(features[kept], grid.coords[kept], attributes), bad_count

    def batches(
        self, slide: Slide, grid: TileGrid, readers: ThreadPoolExecutor
    ) -> Iterator[tuple[int, NDArray[np.uint8], list[int]]]:
        """Yield first index, tiles and bad slots of each batch; the readers stay two batches ahead."""
        size = self.options.batch_size

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
                waiting.append((first, [readers.submit(read, index) for index in indices]))

        for _ in range(3):
            submit()
        while waiting:
            first, futures = waiting.pop(0)
            images = np.full((len(futures), self.tiles.tile_px, self.tiles.tile_px, 3), 255, np.uint8)
            bad = []
            for slot, future in enumerate(futures):
                result = future.result()
                if isinstance(result, DataError):
                    if self.on_bad_tile == "fail":
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
    resolution, options = slide.require_resolution(), grid.options
    return {
        "target_mpp": options.mpp,
        "base_mpp": resolution.x,
        "base_mpp_y": resolution.y,
        "mpp_source": resolution.source,
        "tile_size_level0": grid.width,
        "tile_size_level0_y": grid.height,
        "patch_size": options.tile_px,
        "patch_size_level0": round(grid.width),
        "overlap": options.overlap_px,
        "min_tissue": options.min_tissue,
        "resample": options.resample,
        "fill": slide.fill,
        "level0_width": slide.width,
        "level0_height": slide.height,
        "level0_magnification": round(10 / resolution.x, 2),
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
    import cv2

    scale = max(1.0, max(slide.width, slide.height) / PREVIEW)
    image = np.ascontiguousarray(overview(slide, scale))
    for polygon in tissue.polygons:
        for ring in (polygon.exterior, *polygon.holes):
            cv2.polylines(image, [np.round(ring / scale).astype(np.int32)[:, None]], True, (0, 140, 60), 2, cv2.LINE_AA)
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, quality=88)
