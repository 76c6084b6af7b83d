"""Predicting scanpaths on image files."""

from __future__ import annotations

import csv
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from saccade.attention import use_backend
from saccade.batch import (
    IMAGE_EXTENSIONS,
    BatchOptions,
    Item,
    Run,
    RunSummary,
    find_items,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from saccade.checkpoints import best_checkpoint, file_digest
from saccade.datasets.images import read_image
from saccade.errors import ConfigError, DataError, suggest
from saccade.gaze.crops import cut_crops
from saccade.gaze.decoding import DecodedPaths, beam_search, greedy, sample
from saccade.gaze.loading import LoadedPredictor, load_predictor
from saccade.gaze.object_boxes import BoxSource, ObjectBoxes, find_target
from saccade.gaze.object_features import ObjectEncoder
from saccade.gaze.predicted_paths import write_predictions
from saccade.gaze.scenes import SceneBatch, stack_scenes
from saccade.gaze.trials import scene_of

__all__ = ["Query", "Strategy", "predict_scanpaths", "read_queries"]


@dataclass(frozen=True)
class Query:
    """What is looked for.

    Args:
        target: Label, index or box of an object; ``None``: nothing in particular.
        task: What the records say; ``None`` means ``target``.
        features: ``(F,)``, e.g. of a description in words; used in place of the target object's own.
    """

    target: str | None = None
    task: str | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class Strategy:
    """How paths are decoded.

    Args:
        kind: ``"sample"``, ``"greedy"`` or ``"beam"``.
        paths: Paths per image and query; greedy decoding gives one.
        max_length: Most fixations; ``None``: as long as the longest in training.
        temperature: Of sampling.
        top_p: Of sampling.
        length_penalty: Of beam search.
        inhibition: No return to this many of the objects visited last.
        viewer: Whose paths; ``None``: anybody's.

    Raises:
        ConfigError: If a value is out of range.
    """

    kind: Literal["sample", "greedy", "beam"] = "sample"
    paths: int = 10
    max_length: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    length_penalty: float = 0.0
    inhibition: int = 0
    viewer: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("sample", "greedy", "beam"):
            raise ConfigError(f"Decoding is sample, greedy or beam, got {self.kind!r}.")
        if self.paths < 1 or (self.max_length is not None and self.max_length < 1):
            raise ConfigError("The number of paths and the greatest length must be at least 1.")
        if self.kind == "beam" and self.inhibition:
            raise ConfigError("Beam search knows no inhibition of return; sample, or decode greedily.")

    def decode(self, loaded: LoadedPredictor, scenes: SceneBatch, seeds: Sequence[int]) -> DecodedPaths:
        """Decode the paths of scenes, each with random numbers of its own."""
        length = self.max_length or loaded.max_length
        count = 1 if self.kind == "greedy" else self.paths
        viewers = self.viewer_numbers(loaded, (len(scenes), count), scenes.device)
        if self.kind == "greedy":
            return greedy(loaded.model, scenes, max_length=length, viewers=viewers, inhibition=self.inhibition)
        if self.kind == "beam":
            options: dict[str, Any] = {"length_penalty": self.length_penalty, "viewers": viewers}
            return beam_search(loaded.model, scenes, count, max_length=length, **options)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(
            loaded.model,
            scenes,
            count,
            max_length=length,
            temperature=self.temperature,
            top_p=self.top_p,
            viewers=viewers,
            inhibition=self.inhibition,
            uniforms=torch.stack([torch.rand(count, length, generator=generator) for generator in generators]),
        )

    def viewer_numbers(self, loaded: LoadedPredictor, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        """Return the number of the viewer for each path, ``None`` if nobody was asked for."""
        if self.viewer is None:
            return None
        if not loaded.model.num_viewers or self.viewer not in loaded.viewers:
            raise ConfigError(
                f"The model does not know viewer {self.viewer!r}.{suggest(self.viewer, loaded.viewers)}"
                + ("" if loaded.model.num_viewers else " It was trained without viewers (model.num_viewers).")
            )
        return torch.full(shape, loaded.viewers.index(self.viewer), device=device)


def predict_scanpaths(
    inputs: str | Path | Sequence[str | Path],
    *,
    model: str | Path,
    boxes: BoxSource,
    out: str | Path,
    queries: Query | Mapping[str, Sequence[Query]] | None = None,
    strategy: Strategy | None = None,
    encoder: ObjectEncoder | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Predict where people look on image files, and write the paths as a table or any other format of scanpaths.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``; see ``saccade.batch.find_items``.
        model: Checkpoint or run folder of ``saccade fit -c gaze/oat``.
        boxes: Where the objects are; see ``read_boxes``, ``boxes_on_grid`` and ``boxes_by_detector``.
        out: ``.csv``, ``.h5`` or another extension of ``saccade.gaze.write_scanpaths``.
        queries: What is looked for: on every image, or by image name; ``None``: nothing in particular.
        strategy: How paths are decoded; ``None``: ten samples.
        encoder: Of the objects, for a model that was trained on features; the same as in training.
        options: Device, resume, screen.

    Returns:
        Counts of the run.

    Raises:
        ConfigError: If inputs, model, encoder or options cannot be used, or ``out`` holds another run.
        CheckpointError: If the model is not one of gaze.
    """
    options, strategy = options or BatchOptions(), strategy or Strategy()
    items = find_items(inputs, extensions=IMAGE_EXTENSIONS)
    loaded = load_predictor(model)
    check_encoder(loaded, encoder)
    device = resolve_device(options.device)
    seed_everything(options.seed, deterministic=options.deterministic)
    strategy.viewer_numbers(loaded, (1, 1), device)
    loaded.model.to(device)
    settings = {
        "model": file_digest(best_checkpoint(model)),
        "strategy": vars(strategy),
        "encoder": None if encoder is None else encoder.name,
        "queries": describe(queries),
        "seed": options.seed,
        "precision": options.precision,
    }
    title = f"{Path(model).name}  {strategy.kind}  {device}"
    run = Run("gaze predict", items=items, out=out, settings=settings, options=options, title=title)
    target = Path(out)
    if run.files.data(target).exists() and not run.files.manifest.exists() and not options.overwrite:
        raise ConfigError(f"{out} exists and no run of saccade wrote it. Choose another --out, or pass --overwrite.")
    predict = ImagePredictor(loaded, boxes, strategy, encoder, device, options.seed)
    dtype = resolve_precision(options.precision, device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    pending = [] if options.dry_run else run.pending
    with run, use_backend(options.attention_backend), autocast, ThreadPoolExecutor(max(1, options.workers)) as pool:
        for begin in range(0, len(pending), options.batch_size):
            items = pending[begin : begin + options.batch_size]
            start = time.monotonic()
            views: list[View] = []
            failed: dict[str, DataError] = {}
            for item, image in zip(items, pool.map(try_reading, items), strict=True):
                try:
                    views += predict.views(item, image, queries_of(queries, item))
                except DataError as error:
                    failed[item.id] = error
            rows = predict(views)
            seconds = (time.monotonic() - start) / len(items)
            for item in items:
                if item.id in failed:
                    run.fail(item, failed[item.id], seconds=seconds)
                else:
                    run.done(item, seconds=seconds, row=rows[item.id])
    if not options.dry_run:
        write_predictions(run.entries, run.files.data(target))
    return run.summary


def try_reading(item: Item) -> Image.Image | DataError:
    """Return the image, or why there is none."""
    try:
        return read_image(item.path)
    except DataError as error:
        return error


@dataclass(frozen=True)
class View:
    """One search on one image."""

    item: Item
    size: tuple[int, int]
    objects: ObjectBoxes
    query: Query
    scene: SceneBatch
    seed: int


@dataclass(frozen=True)
class ImagePredictor:
    """Predicts the paths on a batch of images."""

    loaded: LoadedPredictor
    boxes: BoxSource
    strategy: Strategy
    encoder: ObjectEncoder | None
    device: torch.device
    seed: int

    def views(self, item: Item, image: Image.Image | DataError, queries: Sequence[Query]) -> list[View]:
        """Return the searches on an image.

        Raises:
            DataError: If the image, its boxes or a target cannot be used.
        """
        if isinstance(image, DataError):
            raise image
        objects = self.boxes(item.id, image)
        features = self.features(image, objects.boxes)
        views = []
        for number, query in enumerate(queries):
            scene = self.scene(image, objects, features, query)
            seed = zlib.crc32(f"{self.seed} {number} {item.id}".encode())  # paths depend on no other image
            views.append(View(item, image.size, objects, query, scene, seed))
        return views

    def __call__(self, views: Sequence[View]) -> dict[str, dict[str, Any]]:
        """Return size and paths of each image as plain values, for the journal."""
        rows: dict[str, dict[str, Any]] = {}
        if not views:
            return rows
        scenes = stack_scenes([view.scene for view in views]).to(self.device)
        decoded = self.strategy.decode(self.loaded, scenes, [view.seed for view in views])
        for number, view in enumerate(views):
            width, height = view.size
            row = rows.setdefault(view.item.id, {"width": width, "height": height, "paths": []})
            row["paths"] += self.rows(decoded, number, view)
        return rows

    def features(self, image: Image.Image, boxes: Tensor) -> Tensor | None:
        """Return what the model sees of the objects besides their place."""
        if self.encoder is not None:
            return self.encoder(image, boxes)
        if self.loaded.features["kind"] == "crops":
            return cut_crops(image, boxes, self.loaded.features["crop_size"])
        return None

    def scene(self, image: Image.Image, objects: ObjectBoxes, features: Tensor | None, query: Query) -> SceneBatch:
        """Return the scene of one query."""
        target = -1 if query.target is None else find_target(objects, query.target)
        size = (float(image.width), float(image.height))
        scene = scene_of(objects.boxes, size=size, target=target, features=features)
        return scene if query.features is None else replace(scene, target_features=query.features[None])

    def rows(self, decoded: DecodedPaths, scene: int, view: View) -> list[dict[str, Any]]:
        """Return the paths of one scene as plain values; paths that do not exist are left out."""
        boxes, query, target = view.objects.boxes, view.query, int(view.scene.target)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        shared = {
            "task": query.task or query.target,
            "subject": self.strategy.viewer or "model",
            "target": target if target >= 0 else None,
            "box": boxes[target].tolist() if target >= 0 else None,
        }
        paths = []
        for number in range(decoded.objects.shape[1]):
            path = decoded.path(scene, number)
            if path:
                places = {"sample": number, "objects": path, "xy": centre[path].tolist()}
                paths.append(shared | places | {"log_prob": float(decoded.log_prob[scene, number])})
        return paths


def queries_of(queries: Query | Mapping[str, Sequence[Query]] | None, item: Item) -> Sequence[Query]:
    """Return what is looked for on an image.

    Raises:
        DataError: If there is a list of queries and the image is not on it.
    """
    if queries is None:
        return [Query()]
    if isinstance(queries, Query):
        return [queries]
    found = queries.get(item.id) or queries.get(item.path.name)
    if not found:
        raise DataError(f"There is no query for {item.id!r}.{suggest(item.id, queries)}", reason="no_query")
    return found


def read_queries(path: str | Path) -> dict[str, list[Query]]:
    """Read a table of searches: columns ``image`` and ``target``, and ``task`` if records shall say something else.

    Raises:
        ConfigError: If a column is missing.
    """
    found: dict[str, list[Query]] = {}
    with Path(path).open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if not {"image", "target"} <= set(reader.fieldnames or []):
            raise ConfigError(f"{path} needs the columns image and target, its header has {reader.fieldnames}.")
        for row in reader:
            found.setdefault(row["image"], []).append(Query(row["target"], row.get("task") or None))
    return found


def describe(queries: Query | Mapping[str, Sequence[Query]] | None) -> Any:  # noqa: ANN401 - plain values
    """Return the queries as plain values, for the settings of the run."""
    if queries is None:
        return None
    if isinstance(queries, Query):
        return [queries.target, queries.task]
    return {name: [describe(query) for query in several] for name, several in sorted(queries.items())}


def check_encoder(loaded: LoadedPredictor, encoder: ObjectEncoder | None) -> None:
    """Raise unless the encoder is the one that the model was trained with."""
    wanted = loaded.features.get("encoder")
    if (wanted is None) != (encoder is None):
        raise ConfigError(
            "The model was trained without an encoder; leave it out."
            if wanted is None
            else f"The model was trained on features of {wanted!r}: pass that encoder."
        )
    if encoder is not None and encoder.name != wanted:
        raise ConfigError(f"The model was trained on features of {wanted!r}, got the encoder {encoder.name!r}.")
