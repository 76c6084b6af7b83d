"""Heatmaps of a folder of slides, from bag files and a model: nothing is segmented or encoded again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from saccade.batch import BatchOptions, Item, Run, RunSummary, atomic_path, resolve_device, resolve_precision
from saccade.datasets.bag_files import find_bags, load_bag
from saccade.errors import ConfigError, DataError
from saccade.mil.geojson import read_polygons, write_tiles
from saccade.mil.heatmap import (
    NORMALIZATIONS,
    Heatmap,
    blend_heatmap,
    colour_heatmap,
    hide_outside,
    normalize_scores,
    tile_map,
)
from saccade.mil.heatmap_figures import contact_sheet, cumulative_attention, plot_concentration, side_by_side
from saccade.mil.heatmap_pyramid import write_heatmap_pyramid
from saccade.mil.inference import TrainedClassifier, save_attention
from saccade.mil.score_maps import ScoreMaps, load_scores
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels
from saccade.mil.slide_folder import SlideFolder, feature_folder
from saccade.mil.tissue import overview

__all__ = ["HeatmapOptions", "draw_heatmaps"]

FORMATS = ("png", "tif")
LONGEST = 2048  # pixels of a PNG
LONGEST_OF_MANY = 512  # pixels of a map among others
PIXELS_PER_TILE = 8  # of the map behind a TIFF: its tiles are squares of one colour
FINEST = 4.0  # level-0 pixels per pixel of a TIFF


@dataclass(frozen=True)
class HeatmapOptions:
    """What is drawn, and how.

    Args:
        format: ``"png"``, or ``"tif"`` for pyramidal OME-TIFF.
        class_name: Draw the map of a class, of models that have one for each.
        branch: Draw the map of a branch, from 1.
        normalize: One of :data:`saccade.mil.heatmap.NORMALIZATIONS`.
        alpha: Opacity, 0..1.
        colormap: matplotlib's name.
        downsample: Level-0 pixels per pixel of the picture; ``None`` means 2048 pixels along the longer side (PNG) or
            4 (TIFF).
        smooth: Standard deviation of a Gaussian in pixels of the picture (PNG) or eighths of a tile (TIFF).
        tissue: Draw inside the contours of the tissue alone.
        top: Tiles on the contact sheet; 0 for no sheet.
        geojson: Also write tiles with their scores for QuPath.

    Raises:
        ConfigError: If a value is out of range, or both a class and a branch are given.
    """

    format: str = "png"
    class_name: str | None = None
    branch: int | None = None
    normalize: str = "percentile"
    alpha: float = 0.5
    colormap: str = "coolwarm"
    downsample: float | None = None
    smooth: float = 0.0
    tissue: bool = False
    top: int = 16
    geojson: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS or self.normalize not in NORMALIZATIONS:
            raise ConfigError(
                f"format must be one of {FORMATS} and normalize of {NORMALIZATIONS}; got {self.format!r}, "
                f"{self.normalize!r}."
            )
        if self.class_name is not None and self.branch is not None:
            raise ConfigError("A heatmap is of a class or of a branch; give one of them.")
        if not 0 <= self.alpha <= 1 or self.smooth < 0 or self.top < 0:
            raise ConfigError(
                f"alpha must be between 0 and 1, smooth and top at least 0; got {self.alpha}, {self.smooth}, "
                f"{self.top}."
            )
        if self.downsample is not None and not 1 <= self.downsample < float("inf"):
            raise ConfigError(f"downsample must be at least 1, got {self.downsample}.")

    @property
    def suffix(self) -> str:
        """What tells the folder of a class or a branch from the bag's."""
        if self.branch is not None:
            return f".branch{self.branch}"
        if self.class_name is None:
            return ""
        return ".class-" + "".join(c if c.isalnum() or c in "-_" else "_" for c in self.class_name)


def draw_heatmaps(
    folder: str | Path,
    *,
    classifier: TrainedClassifier,
    name: str,
    out: str | Path | None = None,
    bags: str | Path | None = None,
    slides: str | Path | Sequence[str | Path] | None = None,
    only: Sequence[str] = (),
    heatmap: HeatmapOptions | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Draw where a model looks, for each slide of an output folder of ``saccade slides``.

    Files below ``out``: ``attention/NAME/ID.h5`` (read again if it is of these weights), and in ``heatmaps/NAME/``
    ``ID.png`` or ``ID.tif``; ``ID.top.png``, the tiles with the highest scores; ``ID.branches.png``, where there are
    several branches or classes; ``ID.geojson`` if asked for; ``heatmaps.csv``; ``concentration.png``, which share of
    attention the k most attended tiles hold.

    A slide is ``done``, with the reason ``no_tissue`` and no picture if it has no tiles, or ``failed``: ``no_slide``,
    ``no_coords``, ``no_tile_size``, ``feature_width``, ``bad_bag``, ``unreadable``, ...

    Args:
        folder: Output of ``saccade slides run``.
        classifier: The model.
        name: Of the folders below ``attention/`` and ``heatmaps/``.
        out: Where to write; ``None`` means ``folder``.
        bags: Bag files, if not those below ``folder``.
        slides: Where the scanner files are, if not where they were when the bags were made.
        only: Ids of slides; all if empty.
        heatmap: What is drawn.
        options: Device, resume, shard, screen.

    Raises:
        ConfigError: If there are no bags, an id is unknown, the model has no such map, or ``out`` holds another run.
    """
    options, heatmap = options or BatchOptions(), heatmap or HeatmapOptions()
    source = SlideFolder.open(folder, slides=slides)
    found = find_bags(bags if bags is not None else feature_folder(folder))
    unknown = [key for key in only if key not in found]
    if unknown:
        raise ConfigError(f"No bag of slide {unknown[0]!r}; there are {len(found)}: {', '.join(sorted(found)[:8])} ...")
    items = [Item(key, path) for key, path in sorted(found.items()) if not only or key in only]
    target = SlideFolder(source.root if out is None else Path(out), source.slides)
    place = target.root / "heatmaps" / f"{name}{heatmap.suffix}"
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    drawn = {key: value for key, value in asdict(heatmap).items() if key != "format"}
    run = Run(
        "slides heatmap",
        items=items,
        out=f"{place}/",
        settings={"weights": classifier.weights, "precision": str(precision), **drawn},
        options=options,
        table=place / "heatmaps.csv",
        title=f"{type(classifier.model).__name__} {device}",
        unit="slides",
    )
    gone = {
        key for key in run.finished if not (run.entries[key]["reason"] or (place / f"{key}.{heatmap.format}").exists())
    }
    run.finished -= gone
    run.resumed -= len(gone & {item.id for item in run.items})
    worker = HeatmapWorker(source, target, place, name, classifier, heatmap, device, precision)
    with run:
        if not options.dry_run:
            classifier.model.to(device)
            classifier.standardize.to(device)
            for item in run.pending:
                started = time.monotonic()
                try:
                    row, reason = worker.draw(item)
                except DataError as error:
                    run.fail(item, error, seconds=time.monotonic() - started)
                else:
                    run.done(item, seconds=time.monotonic() - started, row=row, reason=reason)
            worker.plot([key for key in sorted(run.finished) if not run.entries[key]["reason"]])
    return run.summary


@dataclass(frozen=True)
class HeatmapWorker:
    """Draws one slide after the other."""

    source: SlideFolder
    target: SlideFolder
    place: Path
    name: str
    classifier: TrainedClassifier
    options: HeatmapOptions
    device: torch.device
    precision: torch.dtype

    def scores(self, item: Item) -> ScoreMaps | None:
        """Return what the model says of a slide's tiles, computed unless a file has it; ``None`` without tiles."""
        path = self.target.attention(self.name, item.id)
        if path.exists():
            known = load_scores(path)
            if known.attributes.get("weights_of_model") == self.classifier.weights:
                return known
        bag = load_bag(item.path)
        if len(bag) == 0:
            return None
        save_attention(path, self.classifier, self.classifier(bag, self.device, self.precision), bag)
        return load_scores(path)

    def draw(self, item: Item) -> tuple[dict[str, Any], str]:
        """Write the pictures of a slide; return its row and a word about an empty one."""
        scores = self.scores(item)
        if scores is None:
            return {"n_tiles": 0}, "no_tissue"
        options = self.options
        chosen = scores.choose(options.class_name, options.branch)
        values = scores.maps[chosen]
        with self.source.open_slide(item.id) as slide:
            if options.format == "tif":
                downsample = min(scores.tile_size) / PIXELS_PER_TILE
                heatmap = self.map(item.id, slide, scores, values, downsample)
                colours = colour_heatmap(heatmap, colormap=options.colormap, limits=self.limits, smooth=options.smooth)
                finest = options.downsample or min(FINEST, max(slide.width, slide.height) / LONGEST)
                path = self.place / f"{item.id}.tif"
                write_heatmap_pyramid(
                    path, slide, colours, downsample, downsample=max(1.0, finest), alpha=options.alpha
                )
            else:
                self.pictures(item.id, slide, scores, chosen)
            if options.top:
                sheet = contact_sheet(slide, scores.coords, scores.tile_size, values, count=options.top)
                save_png(self.place / f"{item.id}.top.png", sheet)
        if options.geojson:
            named = {"Attention" if name == "attention" else name.capitalize(): v for name, v in scores.maps.items()}
            measurements = {**named, "Percentile": 100 * normalize_scores(values)}
            write_tiles(self.place / f"{item.id}.geojson", scores.coords, *scores.tile_size, measurements)
        curve = cumulative_attention(scores.maps["attention"])
        row = {"map": chosen, "n_tiles": len(values), "top10_attention": round(float(curve[:10][-1]), 6)}
        return {**row, "tiles_with_half": int(np.searchsorted(curve, 0.5) + 1)}, ""

    @property
    def limits(self) -> tuple[float, float] | None:
        """Values at both ends of the colours; those of percentiles are the same for every slide."""
        return (0.0, 1.0) if self.options.normalize in ("percentile", "minmax") else None

    def map(self, key: str, slide: Slide, scores: ScoreMaps, values: NDArray[np.float64], downsample: float) -> Heatmap:
        """Lay scores on a canvas."""
        normal = normalize_scores(values, self.options.normalize)
        heatmap = tile_map(normal, scores.coords, scores.tile_size, (slide.width, slide.height), downsample=downsample)
        if self.options.tissue:
            contours = self.source.contours(key)
            if not contours.exists():
                raise DataError(f"no contours {contours}; draw without --tissue", reason="no_contours")
            heatmap = hide_outside(heatmap, read_polygons(contours))
        return heatmap

    def pictures(self, key: str, slide: Slide, scores: ScoreMaps, chosen: str) -> None:
        """Write the PNG of the chosen map, and all branches or classes side by side."""
        options = self.options
        downsample = options.downsample or max(1.0, max(slide.width, slide.height) / LONGEST)
        coarse = max(downsample, max(slide.width, slide.height) / LONGEST_OF_MANY)

        def picture(values: NDArray[np.float64], downsample: float, ground: Pixels) -> Pixels:
            heatmap = self.map(key, slide, scores, values, downsample)
            colours = colour_heatmap(heatmap, colormap=options.colormap, limits=self.limits, smooth=options.smooth)
            return blend_heatmap(colours, ground[: colours.shape[0], : colours.shape[1]], options.alpha)

        save_png(self.place / f"{key}.png", picture(scores.maps[chosen], downsample, overview(slide, downsample)))
        parts = scores.prefixed("branch ") or scores.prefixed("class ")
        if parts:
            ground = overview(slide, coarse)
            maps = {"attention": scores.maps["attention"], **parts}
            views = {name: picture(values, coarse, ground) for name, values in maps.items()}
            save_png(self.place / f"{key}.branches.png", side_by_side(views))

    def plot(self, keys: list[str]) -> None:
        """Draw how concentrated attention is on these slides."""
        curves = [
            cumulative_attention(load_scores(self.target.attention(self.name, key)).maps["attention"]) for key in keys
        ]
        if curves:
            title = f"{type(self.classifier.model).__name__} {self.name}"
            plot_concentration(self.place / "concentration.png", curves, title=title)


def save_png(path: Path, picture: Pixels) -> None:
    """Write a picture that appears complete or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)
