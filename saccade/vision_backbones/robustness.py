"""Robustness of an image classifier: ``evaluate_robustness`` runs ImageNet-C, -P, -A, -R, -Sketch, -V2 or corruptions.

One model, one pool of decoding processes; every folder of the suite (a corruption at a severity, a perturbation) is an
item of the batch run, so a run that was killed goes on with the folder where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from saccade.attention import use_backend
from saccade.batch import BatchOptions, Item, Run, RunSummary
from saccade.datasets.corruptions import SEVERITIES
from saccade.datasets.robustness_suites import NOISE_PERTURBATIONS, SUITES, Part, Suite, find_suite
from saccade.errors import ConfigError, DataError, suggest
from saccade.vision_backbones.inference import Forward, PreparedModel
from saccade.vision_backbones.loading import LoadedModel, ModelSource
from saccade.vision_backbones.robustness_batches import SuiteBatch, suite_batches
from saccade.vision_backbones.robustness_metrics import flip_probability, ranks, top5_distance, zipf_distance
from saccade.vision_backbones.robustness_report import Report, read_reference, write_report

__all__ = ["RobustnessSummary", "evaluate_robustness"]


@dataclass(frozen=True)
class RobustnessSummary(RunSummary):
    """What became of a robustness run; its items are folders.

    Args:
        bad_files: Images or clips that could not be read; they count in no metric.
        metrics: Metrics by exact name; empty for a shard, whose folders are only a part of the suite.
    """

    bad_files: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 all done, 1 every folder failed, 3 some failed or some files could not be read."""
        code = super().exit_code
        return 3 if code == 0 and self.bad_files else code


@dataclass
class Tally:
    """What is known so far of the part being evaluated: sums over its readable files."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, values: dict[str, float]) -> None:
        """Count one file."""
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


def evaluate_robustness(
    roots: str | Path | Sequence[str | Path],
    *,
    model: str | ModelSource,
    out: str | Path,
    suite: str,
    clean: str | Path | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    difficulty: int = 1,
    reference: str | Path | None = None,
    options: BatchOptions | None = None,
) -> RobustnessSummary:
    """Evaluate a classifier on a robustness suite and write its metrics, tables and a plot.

    Preprocessing is the model's own, but for ImageNet-C and -P, whose images have their final size: those are not
    cropped, and resized only for a model whose input has another size.

    Written to ``out``: ``metrics.json``, ``metrics.csv``, ``table.md``, ``table.tex``, ``plot.png``, ``parts.csv`` (a
    row per folder), ``run.json``, ``items.jsonl``.

    Args:
        roots: Folder of the suite; for ImageNet-C and -P also several. The layouts are those of
            ``saccade.datasets.robustness_suites.find_suite``.
        model: Model name or checkpoint, or a ``ModelSource`` with weights and preprocessing.
        out: Folder for the results.
        suite: ``"imagenet-c"``, ``"imagenet-p"``, ``"imagenet-a"``, ``"imagenet-r"``, ``"imagenet-sketch"``,
            ``"imagenet-v2"``, or ``"corruptions"``: the nineteen corruptions, made on the fly of images in one folder
            per class.
        clean: Clean images in class folders, for ``"imagenet-c"``: relative mCE and retention need them.
        corruptions: Corruptions or groups (``"noise"``, ``"extra"``, ...) for ``"imagenet-c"`` and ``"corruptions"``;
            ``None`` means all.
        severities: Severities for those two.
        difficulty: Of ``"imagenet-p"``: 1, 2 or 3.
        reference: CSV table with the columns ``kind``, ``flip_probability`` and ``top5_distance`` of the model that mFR
            and mT5D divide by (AlexNet); ``parts.csv`` of its own run is one.
        options: Device, batches, resume, screen. ``limit`` and ``shard`` count folders.

    Returns:
        Counts of the run, and the metrics.

    Raises:
        ConfigError: If an argument cannot be used, folders are missing, or ``out`` holds another run.
        CheckpointError: If weights do not fit.
        MissingResourceError: If device or weights are not on this machine.
    """
    places = [Path(roots)] if isinstance(roots, str | Path) else [Path(root) for root in roots]
    check_arguments(suite, clean=clean, corruptions=corruptions, severities=severities, reference=reference)
    divisor = read_reference(Path(reference)) if reference is not None else None
    prepared = PreparedModel(model, options)
    found = find_suite(
        suite,
        places,
        classes=class_words(prepared.loaded),
        corruptions=corruptions,
        severities=sorted(set(severities)),
        difficulty=difficulty,
        clean=Path(clean) if clean is not None else None,
    )
    settings = prepared.settings | {"suite": suite, "classes": len(found.columns)}
    if suite in ("imagenet-c", "corruptions"):
        settings["all_of_imagenet"] = found.has_all_of_imagenet
    if suite == "imagenet-p":
        settings["difficulty"] = difficulty
    if suite == "corruptions":
        settings["corruption_seed"] = prepared.options.seed
    folder = Path(out)
    run = Run(
        "robustness",
        items=[Item(part.id, part.folder) for part in found.parts],
        out=f"{folder}/",
        settings=settings,
        options=prepared.options,
        table=folder / "parts.csv",
        title=f"{prepared.title}  {suite}",
        unit="folders",
    )
    forget_parts_with_bad_files(run)
    evaluate(run, prepared, found, difficulty)
    rows = [entry["row"] for entry in run.entries.values() if entry["status"] == "done"]
    metrics: dict[str, float] = {}
    if not prepared.options.dry_run and run.files.shard == "":
        report = Report(suite, prepared.loaded.name, run.settings, rows, divisor)
        metrics = report.metrics
        write_report(report, folder)
    summary = run.summary
    values = {entry.name: getattr(summary, entry.name) for entry in fields(summary)}
    return RobustnessSummary(**values, bad_files=sum(row["bad_files"] for row in rows), metrics=metrics)


def check_arguments(
    suite: str,
    *,
    clean: str | Path | None,
    corruptions: Sequence[str] | None,
    severities: Sequence[int],
    reference: str | Path | None,
) -> None:
    """Raise if an argument is out of range, or means nothing for the suite."""
    if suite not in SUITES:
        raise ConfigError(f"Unknown suite {suite!r}.{suggest(suite, SUITES)} All: {', '.join(SUITES)}.")
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ConfigError(f"severities must be some of 1, 2, 3, 4, 5, got {list(severities)}.")
    if clean is not None and suite != "imagenet-c":
        raise ConfigError(f"clean images are evaluated beside imagenet-c only, not {suite}.")
    if reference is not None and suite != "imagenet-p":
        raise ConfigError(f"a reference table is for imagenet-p, not {suite}.")
    if suite not in ("imagenet-c", "corruptions") and (corruptions is not None or set(severities) != set(SEVERITIES)):
        raise ConfigError(f"{suite} has no corruptions and severities to choose from.")


def class_words(loaded: LoadedModel) -> list[str]:
    """Return the names that class folders have for a model: WordNet ids, or the names that it was trained with.

    Raises:
        ConfigError: If the model has no classifier, or nobody knows its classes.
    """
    network: Any = loaded.model
    count = int(getattr(network, "num_classes", 0) or 0)
    if not count:
        raise ConfigError(f"Model {loaded.name!r} has no classifier; pass weights that include one.")
    names = loaded.class_names
    labels = network.pretrained_cfg.get("label_names")  # of a published model; `class_names` are their descriptions
    descriptions = network.pretrained_cfg.get("label_descriptions") or {}
    if labels and names == [descriptions.get(label, label) for label in labels]:
        return list(labels)
    subset = timm.data.infer_imagenet_subset(network)
    if subset is not None:
        info = timm.data.ImageNetInfo(subset)
        if names is None or names == [info.index_to_description(index) for index in range(info.num_classes())]:
            return list(info.label_names())
    if names is None:
        raise ConfigError(
            f"Nobody knows the {count} classes of {loaded.name!r}: pass a run of `saccade fit`, which stores their "
            "names, or a classifier for ImageNet."
        )
    return names


def forget_parts_with_bad_files(run: Run) -> None:
    """Count folders with files that could not be read as still to do, like items that failed: they may be mended."""
    again = {item.id for item in run.items if item.id in run.finished and run.entries[item.id]["row"]["bad_files"]}
    run.finished -= again
    run.resumed -= len(again)


def evaluate(run: Run, prepared: PreparedModel, suite: Suite, difficulty: int) -> None:
    """Run the model over all pending parts and record each."""
    options, device = prepared.options, prepared.device
    network = prepared.loaded.model.to(device)
    forward = Forward(network, device, prepared.dtype)
    columns = torch.tensor(suite.columns)
    with run, use_backend(options.attention_backend):
        forward.say = run.reporter.say
        if suite.left_out:
            run.reporter.say(f"{len(suite.left_out)} class folders that the model does not know are left out")
        pending = {item.id: item for item in run.pending}
        if options.dry_run or not pending:
            return
        batches = suite_batches(
            suite,
            [part for part in suite.parts if part.id in pending],
            prepared.loaded.data_config,
            batch_size=min(options.batch_size, max(suite.size(part) for part in suite.parts)),
            num_workers=options.workers,
            device=device,
            seed=options.seed,
            least_frames=difficulty + 1,
        )
        tally, bad = Tally(), 0
        for files in batches:
            item = pending[files.part.id]
            for slot, error in files.batch.errors.items():
                note_bad_file(run, item, tally, f"{files.samples[slot].name}: {error}")
            if len(files.batch.errors) < len(files.samples):
                if suite.name == "imagenet-p":
                    logits = forward_clip(forward, files.batch.images, options.batch_size)[:, columns]
                    add_clip(tally, files.part, logits, difficulty)
                else:
                    add_images(tally, files, forward(files.batch.images)[:, columns])
            tally.seconds += files.batch.seconds * len(files.samples)
            if files.is_last:
                record(run, item, files.part, tally)
                bad += len(tally.bad)
                tally = Tally()
        if bad:
            run.reporter.say(f"{bad:,} files could not be read; they count in no figure")


def note_bad_file(run: Run, item: Item, tally: Tally, message: str) -> None:
    """Report a file that cannot be read; it counts in no metric.

    Raises:
        DataError: If ``on_error`` is ``"stop"``.
    """
    tally.bad.append(message)
    if run.options.on_error == "stop":
        run.fail(item, DataError(message, reason="unreadable_file"))
    run.reporter.fail(f"{item.id}/{message.partition(': ')[0]}", message.partition(": ")[2])


def add_images(tally: Tally, files: SuiteBatch, logits: Tensor) -> None:
    """Count which images of a batch the model gets right."""
    best = logits.argsort(dim=1, descending=True, stable=True)[:, :5].tolist()
    for slot, sample in enumerate(files.samples):
        if slot not in files.batch.errors:
            tally.add({"correct": sample.label == best[slot][0], "correct_top5": sample.label in best[slot]})


def forward_clip(forward: Forward, frames: Tensor, batch_size: int) -> Tensor:
    """Return the logits of all frames, ``(F, K)``, from passes of one shape."""
    outputs = []
    for chunk in frames.split(batch_size):
        padding = chunk.new_zeros(batch_size - len(chunk), *chunk.shape[1:])
        outputs.append(forward(torch.cat([chunk, padding]))[: len(chunk)])
    return torch.cat(outputs)


def add_clip(tally: Tally, part: Part, logits: Tensor, difficulty: int) -> None:
    """Add the flips and distances of a clip."""
    places = ranks(logits.double().numpy())
    noise = part.kind in NOISE_PERTURBATIONS
    tally.add(
        {
            "flip_probability": flip_probability(places.argmin(axis=-1), noise=noise, difficulty=difficulty),
            "top5_distance": top5_distance(places, noise=noise, difficulty=difficulty),
            "zipf_distance": zipf_distance(places, noise=noise, difficulty=difficulty),
        }
    )


def record(run: Run, item: Item, part: Part, tally: Tally) -> None:
    """Write the result of a part into the journal."""
    if tally.count == 0:
        run.fail(item, DataError(f"none of {len(tally.bad)} files can be read", reason="unreadable_files"))
        return
    row: dict[str, Any] = {
        "kind": part.kind,
        "severity": part.severity,
        "files": tally.count,
        "bad_files": len(tally.bad),
    }
    if "correct" in tally.sums:
        row |= {name: int(value) for name, value in tally.sums.items()}
        row["top1_percent"] = round(100 * tally.sums["correct"] / tally.count, 4)
    else:
        row |= {name: round(value / tally.count, 8) for name, value in tally.sums.items()}
    row["unreadable"] = "; ".join(tally.bad)
    run.done(item, seconds=tally.seconds, row=row)
