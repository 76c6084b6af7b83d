"""Slides to bags: tissue, tiles and features of every slide, as files, whatever becomes of single slides."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saccade.batch import BatchOptions, Run, RunSummary, atomic_path, resolve_device, resolve_precision
from saccade.batch.fleet import Fleet
from saccade.errors import ConfigError, DataError
from saccade.mil.encoders import Encoder
from saccade.mil.slide_items import SlideItem, find_slides
from saccade.mil.slide_worker import Outcome, Places, SlideJob, SlideWorker, describe
from saccade.mil.tiles import TileOptions
from saccade.mil.tissue import TissueOptions

__all__ = ["extract"]

STAGES = ("segment", "tile", "embed")


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
    fleet: Fleet | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Find tissue, lay tiles and compute features, slide by slide.

    Files below ``out`` (settings are in the folder names, so they never mix): ``masks/ID.geojson``,
    ``previews/ID.jpg``, ``tiles/SETTINGS/ID.h5``, ``features/SETTINGS/ENCODER/ID.h5``. A contour file that is already
    there is used as it is, so what was edited in QuPath counts; with ``options.overwrite`` tissue is found anew.
    Manifest and journal lie beside the last stage's files, with copies in ``out``. Decoding runs in
    ``options.workers`` threads beside the encoder, and the next slide is prepared meanwhile.

    On a Ray cluster every worker does whole slides with ``options.workers`` cores and, if there are any, one GPU.
    Slides and ``out`` must be on storage that all nodes see under the same path; journal and table are written here,
    and files are those of a run without it. So a run can begin here and go on there.

    Status of a slide: ``done``, with the reason ``no_tissue`` if there are no tiles; or ``failed`` with a reason:
    ``no_mpp``, ``unreadable``, ``truncated``, ``bad_tile`` (no tile at all could be decoded), ``bad_geojson``; and
    ``worker_died``, of a slide that no worker of a cluster survived, which was tried three times.

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
        fleet: Ray cluster to work on; it is connected to here. ``None`` means this process.
        options: Device, batches, resume, shard, screen.

    Returns:
        Counts of the run.

    Raises:
        ConfigError: If an option cannot be used, or ``out`` holds another run, or a node does not see ``out``.
        MissingResourceError: If the device or the cluster is not there.
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
    with fleet or nullcontext():
        device, precision, workers = compute(fleet, options)
        job = SlideJob(
            Places(Path(out), tiles.name, encoder.name if encoder else ""),
            stage,
            tissue,
            tiles,
            encoder,
            slide_mpp,
            dtype,
            on_bad_tile,
            options.overwrite,
            options.batch_size,
            workers,
            device,
            precision,
        )
        return work(job, items, command or f"slides {stage}", fleet, options)


def compute(fleet: Fleet | None, options: BatchOptions) -> tuple[str, torch.dtype, int]:
    """Return device, precision and number of decoding threads of a worker."""
    if fleet is None:
        device = resolve_device(options.device)
        return str(device), resolve_precision(options.precision, device), options.workers
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"Ray hands out the GPUs: device must be auto, cpu or cuda there, got {options.device!r}.")
    name = options.device
    if name == "auto":
        name = "cuda" if fleet.has_gpus() else "cpu"
    precision = fleet.call(find_precision, options.precision, name, gpus=int(name == "cuda"))
    return name, precision, max(1, options.num_workers or min(4, fleet.largest_node))


def find_precision(name: str, device: str) -> torch.dtype:
    """Return the precision that a node uses."""
    return resolve_precision(name, resolve_device(device))


def work(
    job: SlideJob, items: Sequence[SlideItem], command: str, fleet: Fleet | None, options: BatchOptions
) -> RunSummary:
    """Run a job over slides."""
    stage, tiles, encoder = job.stage, job.tiles, job.encoder
    settings: dict[str, Any] = {"tissue": asdict(job.tissue), "slide_mpp": job.slide_mpp}
    if stage != "segment":
        settings["tiles"] = asdict(tiles)
    title = ""
    if encoder is not None:
        settings |= {**encoder.settings, "dtype": job.dtype, "on_bad_tile": job.on_bad_tile}
        settings["precision"] = str(job.precision)
        title = f"{tiles.mpp:g} um/px, {tiles.tile_px} px, encoder {encoder.name} {job.device}"
    folder = job.places.stage(stage)
    if fleet is not None:
        title = f"{title} ray".strip()
    run = Run(
        command,
        items=items,
        out=f"{folder}/",
        settings=settings,
        options=options,
        table=folder / "slides.csv",
        title=title,
        unit="slides",
    )
    last = {"segment": job.places.mask, "tile": job.places.coords, "embed": job.places.features}[stage]
    gone = {item.id for item in run.items if item.id in run.finished and not last(item.id).exists()}
    run.finished -= gone
    run.resumed -= len(gone)
    with run:
        if encoder is not None:
            for notice in encoder.notices(tiles.tile_px, tiles.mpp):
                run.reporter.say(f"note: {notice}")
        if not options.dry_run:
            pending = [item for item in run.pending if isinstance(item, SlideItem)]
            for item, outcome in outcomes(job, pending, fleet, run):
                record(run, item, outcome)
    if not options.dry_run:
        for path in (run.files.manifest, run.files.journal):
            with atomic_path(job.places.root / path.name) as temporary:
                shutil.copyfile(path, temporary)
    return run.summary


def outcomes(
    job: SlideJob, items: Sequence[SlideItem], fleet: Fleet | None, run: Run
) -> Iterator[tuple[SlideItem, Outcome]]:
    """Yield what became of each slide."""
    if fleet is None:
        yield from SlideWorker(job).each(items)
        return
    given = {replace(item, path=item.path.absolute()): item for item in items}
    gpus = int(job.device == "cuda" and job.encoder is not None)
    there = replace(job, places=replace(job.places, root=job.places.root.absolute()))
    results = fleet.map(partial(remote_worker, there), list(given), cpus=job.workers, gpus=gpus, say=run.reporter.say)
    for item, result in results:
        yield given[item], Outcome(0.0, error=result) if isinstance(result, DataError) else result


def remote_worker(job: SlideJob) -> SlideWorker:
    """Return the worker of a node.

    Raises:
        ConfigError: If the node does not see the output folder.
    """
    if not job.places.root.is_dir():
        raise ConfigError(
            f"Node {platform.node()} does not see {job.places.root}: slides and --out must be on storage that all "
            "nodes of the cluster share, under the same path."
        )
    return SlideWorker(job)


def record(run: Run, item: SlideItem, outcome: Outcome) -> None:
    """Write a slide into the journal and say so."""
    if outcome.error is not None:
        run.fail(item, outcome.error, seconds=outcome.seconds)
        return
    run.done(item, seconds=outcome.seconds, row=outcome.row, reason=outcome.reason)
    run.reporter.say(describe(item.path.name, outcome.row, outcome.seconds))
