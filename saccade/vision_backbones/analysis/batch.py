"""``analyze``: measure every attention head of a model on a folder of images, and write a report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from saccade.attention import use_backend
from saccade.batch import ArrayOutput, BatchOptions, Item, Run, RunSummary
from saccade.batch.progress import Reporter
from saccade.errors import ConfigError, DataError
from saccade.vision_backbones.analysis.measurement import HeadMeasurement
from saccade.vision_backbones.analysis.patterns import (
    PatternMaps,
    PatternSummary,
    collect_patterns,
    summarise_patterns,
    training_steps,
)
from saccade.vision_backbones.analysis.pruning import mean_head_outputs
from saccade.vision_backbones.analysis.report import AnalysisReport, write_analysis
from saccade.vision_backbones.inference import Batch, Session, image_batches
from saccade.vision_backbones.loading import ModelSource
from saccade.vision_backbones.robustness import class_words

__all__ = ["analyze"]

LABELS = ("auto", "folders", "predicted")


def analyze(
    inputs: str | Path | Sequence[str | Path],
    *,
    model: str | ModelSource,
    out: str | Path,
    labels: str = "auto",
    importance: str = "zero",
    pattern_images: int = 64,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Measure what the attention heads of a vision transformer do on images, and what each is worth.

    Written to ``out``: ``report.html`` with its pictures; ``heads.csv``, ``layers.csv``, ``hops.csv``,
    ``correlations.csv``, ``clusters.csv``, ``nearest.csv``, ``head_patterns.csv``, ``images.csv``; ``summary.json``;
    ``heads.h5``, the figures of each head on each image (:class:`saccade.vision_backbones.analysis.HeadMeasurement`
    says which); ``run.json`` and ``items.jsonl``. A run that was killed goes on with the images that are missing;
    patterns and report are made anew at its end.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``; see ``saccade.batch.find_items``.
        model: Model name or checkpoint, or a ``ModelSource`` with weights and preprocessing. Global attention only.
        out: Folder for the report.
        labels: ``"folders"``: an image's true class is the innermost of its folders with the name of a class;
            ``"predicted"``: what the whole model says; ``"auto"``: folders if every image lies in one, else predicted.
        importance: ``"zero"`` or ``"mean"`` (over all images, token by token): what a pruned head's output becomes;
            ``"none"`` leaves the importance of heads out, by far the longest part.
        pattern_images: Maps of the first so many images are clustered; 0 means none.
        options: Device, batches, resume, screen. A shard measures its images; the report is written by a run without
            ``shard`` after ``saccade merge``.

    Returns:
        Counts of the run.

    Raises:
        ConfigError: If inputs, model or options cannot be used, the model's attention is not global, its heads cannot
            be pruned, or ``out`` holds another run.
        CheckpointError: If weights do not fit.
        MissingResourceError: If device or weights are not on this machine.
    """
    if labels not in LABELS:
        raise ConfigError(f"labels must be one of {', '.join(LABELS)}; got {labels!r}.")
    if pattern_images < 0:
        raise ConfigError(f"pattern_images must be 0 or more; got {pattern_images}.")
    session = Session(inputs, model, options)
    folder = Path(out)
    measurement = HeadMeasurement(session.loaded.model, session.loaded.data_config["input_size"], importance=importance)
    truth, note = find_labels(session, labels)
    settings = session.settings | {"labels": "predicted" if truth is None else "folders", "importance": importance}
    if importance == "mean":
        listed = "\n".join(item.id for item in session.items[: session.options.limit])
        settings["mean_over"] = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    array = ArrayOutput(
        folder / "heads.h5",
        dataset="heads",
        attributes=session.attributes
        | {"columns": ",".join(measurement.columns), "heads": ",".join(f"{i}.{head}" for i, head in measurement.heads)},
    )
    run = session.run(
        "analyze", out=f"{folder}/", settings=settings, table=folder / "images.csv", arrays={"heads": array}
    )
    run.title += f"  {len(measurement.layers)} layers, {len(measurement.heads)} heads"
    measure_items(run, session, measurement, truth)
    ids = sorted(run.finished)
    if session.options.dry_run or run.files.shard or not ids:
        return run.summary
    notes = [note, *limits(session, measurement)]
    rows = [run.entries[key]["row"] for key in ids]
    with Reporter(
        session.options.progress, unit="steps", log_file=session.options.log_file, color=session.options.color
    ) as reporter:
        maps, summary = None, None
        if pattern_images > 0:
            chosen = [item for item in run.items if item.id in run.finished][:pattern_images]
            maps, summary = find_patterns(session, measurement, chosen, reporter, notes)
        report = AnalysisReport(
            model=session.loaded.name,
            settings=run.settings,
            layers=measurement.layers,
            columns=measurement.columns,
            means=mean_rows(array.path),
            images=len(ids),
            accuracy=None if truth is None else sum(row["correct"] for row in rows) / len(rows),
            notes=notes,
            patterns=maps,
            summary=summary,
        )
        reporter.say(f"report: {write_analysis(report, folder)}")
    return run.summary


def find_labels(session: Session, labels: str) -> tuple[dict[str, int] | None, str]:
    """Return the true class of each item by id, ``None`` if predictions stand for it, and a note that says so."""
    told = "Labels are the predictions of the whole model: a drop of accuracy is the share of them that change."
    if not getattr(session.loaded.model, "num_classes", 0):
        if labels == "folders":
            raise ConfigError(f"Model {session.loaded.name!r} has no classifier, so folders name no classes of it.")
        return None, "The model has no classifier: importance of heads is the cosine distance of its features alone."
    if labels == "predicted":
        return None, told
    try:
        index = {name: i for i, name in enumerate(class_words(session.loaded))}
    except ConfigError:
        if labels == "folders":
            raise
        return None, told
    found: dict[str, int] = {}
    for item in session.items:
        name = next((part for part in reversed(item.path.resolve().parent.parts) if part in index), None)
        if name is None:
            if labels == "folders":
                raise ConfigError(
                    f"{item.path} lies in no folder with the name of a class of {session.loaded.name!r}, such as "
                    f"{next(iter(index))!r}. Use labels from predictions (--labels predicted)."
                )
            return None, told
        found[item.id] = index[name]
    return found, "Labels are the names of class folders."


def limits(session: Session, measurement: HeadMeasurement) -> list[str]:
    """Return what else a reader has to know."""
    notes = []
    if session.loaded.weights == "random":
        notes.append("The weights are random: nothing here says anything about a trained model.")
    if measurement.pruning is None:
        notes.append("Importance of heads was left out.")
    return notes


def measure_items(run: Run, session: Session, measurement: HeadMeasurement, truth: dict[str, int] | None) -> None:
    """Measure all pending items and record each."""
    options = session.options
    session.loaded.model.to(session.device)
    with run, use_backend(options.attention_backend):
        pending = run.pending
        if options.dry_run or not pending:
            return
        if measurement.pruning is not None and run.settings["importance"] == "mean":
            everything = session.items[: options.limit]  # of all shards
            run.reporter.say(f"averaging the outputs of heads over {len(everything):,} images")
            measurement.pruning.means = average(session, measurement, everything)
        for batch in batches(session, pending):
            if len(batch.errors) == len(batch.indices):
                values, logits = None, None
            else:
                classes = None if truth is None else torch.zeros(len(batch.images), dtype=torch.int64)
                if classes is not None and truth is not None:
                    for slot, index in enumerate(batch.indices):
                        classes[slot] = truth[pending[index].id]
                with precision(session):
                    values, logits = measurement.measure(batch.images, classes)
            for slot, index in enumerate(batch.indices):
                item = pending[index]
                if values is None or logits is None or slot in batch.errors:
                    run.fail(item, batch.errors[slot], seconds=batch.seconds)
                elif not logits[slot].isfinite().all():
                    run.fail(item, DataError("the model's output is not finite", reason="not_finite"))
                else:
                    row = image_row(session, logits[slot], None if truth is None else truth[item.id])
                    run.done(item, seconds=batch.seconds, row=row, arrays={"heads": values[slot].numpy()})


def batches(session: Session, items: Sequence[Item]) -> Iterator[Batch]:
    """Decode items in the background."""
    return image_batches(
        [item.path for item in items],
        session.loaded.data_config,
        batch_size=min(session.options.batch_size, len(session.items)),
        num_workers=session.options.workers,
        device=session.device,
    )


def precision(session: Session) -> AbstractContextManager[object]:
    """Return the context in which the model runs."""
    lower = session.dtype != torch.float32
    return torch.autocast(session.device.type, session.dtype) if lower else nullcontext()


def average(session: Session, measurement: HeadMeasurement, items: Sequence[Item]) -> list[Tensor]:
    """Average the outputs of all heads over the images that can be read."""

    def readable() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(session, items):
            mask = torch.zeros(len(batch.images), dtype=torch.bool)
            mask[[slot for slot in range(len(batch.indices)) if slot not in batch.errors]] = True
            yield batch.images, mask

    with precision(session):
        return mean_head_outputs(session.loaded.model, measurement.layers, readable())


def image_row(session: Session, logits: Tensor, truth: int | None) -> dict[str, Any]:
    """Return the columns of ``images.csv``."""
    if len(logits) == 0:
        return {}
    names = session.loaded.class_names or [str(index) for index in range(len(logits))]
    probabilities = logits.double().softmax(0)
    best = int(probabilities.argmax())
    row: dict[str, Any] = {"predicted": names[best], "prob": round(float(probabilities[best]), 6)}
    if truth is not None:
        row |= {"label": names[truth], "prob_label": round(float(probabilities[truth]), 6), "correct": best == truth}
    return row


def mean_rows(path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the mean of the rows of ``heads.h5``, ``(T, F)``; NaN stays where a grid has no such hop."""
    with h5py.File(path) as file:
        data = file["heads"]
        total = np.zeros(data.shape[1:])
        for start in range(0, len(data), 256):
            total += data[start : start + 256].astype(np.float64).sum(0)
        return total / len(data)


def find_patterns(
    session: Session, measurement: HeadMeasurement, items: Sequence[Item], reporter: Reporter, notes: list[str]
) -> tuple[tuple[PatternMaps, list[str]] | None, PatternSummary | None]:
    """Cluster the maps of some images; add a note if there are too few."""
    parts: list[PatternMaps] = []
    names: list[str] = []
    with use_backend(session.options.attention_backend), precision(session):
        for batch in batches(session, items):
            good = [slot for slot in range(len(batch.indices)) if slot not in batch.errors]
            for slot in good:  # one image at a time: matrices of a whole batch can be large
                parts.append(collect_patterns(session.loaded.model, measurement.layers, batch.images[slot : slot + 1]))
                names.append(items[batch.indices[slot]].id)
    if not parts:
        notes.append("No image could be read again for the patterns.")
        return None, None
    maps = PatternMaps.join(parts)
    steps = training_steps(len(maps.maps))
    reporter.say(f"patterns: {len(maps.maps):,} maps of {len(names)} images, {steps} steps of training")
    reporter.start(steps)
    try:
        summary = summarise_patterns(
            maps, seed=session.options.seed, steps=steps, device=session.device, advance=reporter.advance
        )
    except ConfigError as error:
        notes.append(f"There is no summary of patterns: {error}")
        return None, None
    finally:
        reporter.stop()
    return (maps, names), summary
