"""Predictions and attention of a trained model for a folder of bags; needs no Lightning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.batch import BatchOptions, Item, Run, RunSummary, resolve_device, resolve_precision
from saccade.checkpoints import best_checkpoint, file_digest, load_weights, read_checkpoint
from saccade.datasets.bag_files import Bag, find_bags, load_bag
from saccade.errors import CheckpointError, ConfigError, DataError
from saccade.mil.clam import CLAMMB
from saccade.mil.dsmil import DSMIL
from saccade.mil.instance_pooling import MaxPooling, MeanPooling
from saccade.mil.loading import load_model
from saccade.mil.model import MILModel, MILOutput, create_model
from saccade.mil.score_maps import save_scores
from saccade.mil.standardize import Standardize
from saccade.mil.survival import hazards_to_risk

__all__ = ["TrainedClassifier", "load_classifier", "predict_bags", "save_attention"]


@dataclass(frozen=True)
class TrainedClassifier:
    """A MIL model and what is needed to use it.

    Args:
        model: In evaluation mode.
        standardize: What is done to features first.
        class_names: Names by class index; empty for values and risks.
        task: ``"classification"``, ``"regression"`` or ``"survival"``.
        survival: ``"discrete"`` or ``"cox"``.
        weights: Where the weights come from, for the record.
    """

    model: MILModel
    standardize: nn.Module
    class_names: list[str]
    task: str
    survival: str
    weights: str

    @torch.inference_mode()
    def __call__(self, bag: Bag, device: torch.device, dtype: torch.dtype = torch.float32) -> MILOutput:
        """Run the model on one bag.

        Raises:
            DataError: If its features have another width than the model's.
        """
        width = bag.features.shape[1]
        if width != self.model.feature_dim:
            raise DataError(
                f"the bag has features of width {width}, the model takes {self.model.feature_dim}; it was trained with "
                "another encoder",
                reason="feature_width",
            )
        bags = torch.from_numpy(bag.features).to(device).float()[None]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output: MILOutput = self.model(self.standardize(bags))
        return output

    def columns(self, output: MILOutput) -> dict[str, Any]:
        """Return the columns of a table for one bag."""
        if self.task == "regression":
            return {"value": round(float(output.logits[0, 0]), 6)}
        if self.task == "survival":
            risk = output.logits[0, 0] if self.survival == "cox" else hazards_to_risk(output.logits)[0]
            return {"risk": round(float(risk), 6)}
        probabilities = self.model.probabilities(output)[0].cpu()
        names = self.class_names[-len(probabilities) :]
        best = names[int(probabilities.argmax())]
        if len(probabilities) == 1 and len(self.class_names) == 2:  # one logit for two classes
            best = self.class_names[int(probabilities[0] > 0.5)]
        return {"label": best} | {f"prob_{n}": round(float(p), 6) for n, p in zip(names, probabilities, strict=True)}


def load_classifier(path: str | Path, *, class_names: Sequence[str] | None = None) -> TrainedClassifier:
    """Load a run of ``saccade slides train`` or ``fit``, or a checkpoint of another repository.

    Args:
        path: ``*.ckpt``, a run folder, or what :func:`saccade.mil.load_model` reads.
        class_names: Names for a checkpoint that has none.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If it holds no MIL model.
    """
    given = Path(path)
    if not (given.is_dir() or given.suffix == ".ckpt"):
        model = load_model(given)
        names = list(class_names or map(str, range(max(2, model.num_classes))))
        return TrainedClassifier(model, Standardize({}), names, "classification", "", f"file:{file_digest(given)}")
    file = best_checkpoint(given)
    content = read_checkpoint(file)
    facts = content.get("saccade")
    if not isinstance(facts, dict) or facts.get("task") != "slides":
        raise CheckpointError(f"{file} was not written by a training on slides; `saccade classify` reads image models.")
    config = facts["data_config"]
    model = create_model(
        facts["model"], feature_dim=config["feature_dim"], num_classes=facts["num_classes"], **facts["options"]
    )
    state: dict[str, Tensor] = content["state_dict"]
    own = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    load_weights(model, own, source=file)
    names = list(facts["class_names"])
    weights = f"file:{file_digest(file)}"
    return TrainedClassifier(model.eval(), Standardize(config), names, config["task"], facts["survival"], weights)


def predict_bags(
    bags: str | Path,
    *,
    classifier: TrainedClassifier,
    out: str | Path,
    attention: str | Path | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Write one row for each bag below a folder, and its attention as a file.

    Columns: ``label`` and ``prob_CLASS`` (or ``value``, ``risk``) and ``n_tiles``. A bag without tiles is done with the
    reason ``no_tissue`` and has no prediction; one that cannot be read, or of another encoder, fails.

    Args:
        bags: Folder of bag files.
        classifier: The model.
        out: Table.
        attention: Folder for ``ID.h5`` with ``attention`` ``(N, branches)``, ``bag_attention`` ``(N,)``, ``coords``
            and, of models that classify tiles, ``instance_logits`` ``(N, C)``; ``None`` for none.
        options: Device, resume, shard, screen.

    Raises:
        ConfigError: If there are no bags, or ``out`` holds another run.
    """
    options = options or BatchOptions()
    files = find_bags(bags)
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    classifier.model.to(device)
    classifier.standardize.to(device)
    settings = {"weights": classifier.weights, "precision": str(dtype), "attention": attention is not None}
    title = f"{type(classifier.model).__name__} {device}"
    items = [Item(key, path) for key, path in sorted(files.items())]
    run = Run(
        "slides predict",
        items=items,
        out=out,
        settings=settings,
        options=options,
        table=Path(out),
        title=title,
        unit="slides",
    )
    with run:
        if not options.dry_run:
            for item in run.pending:
                started = time.monotonic()
                try:
                    row, reason = predict_one(item, classifier, attention, device, dtype)
                except (DataError, ConfigError) as error:
                    run.fail(item, error, seconds=time.monotonic() - started)
                else:
                    run.done(item, seconds=time.monotonic() - started, row=row, reason=reason)
    return run.summary


def predict_one(
    item: Item, classifier: TrainedClassifier, folder: str | Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], str]:
    """Return the row of a bag and a word about an empty one; write its attention."""
    bag = load_bag(item.path)
    if len(bag) == 0:
        return {"n_tiles": 0}, "no_tissue"
    output = classifier(bag, device, dtype)
    if folder is not None:
        save_attention(Path(folder) / f"{item.id}.h5", classifier, output, bag)
    return {**classifier.columns(output), "n_tiles": len(bag)}, ""


def save_attention(path: Path, classifier: TrainedClassifier, output: MILOutput, bag: Bag) -> None:
    """Write what a model says of the tiles of one bag, with its coordinates and the attributes of the bag."""
    whole = output.attention[0].float().cpu().numpy()
    branches = whole[:, None]
    if output.branch_attention is not None:
        one = output.branch_attention[0]
        branches = (one.mean(1) if one.ndim == 3 else one).float().cpu().numpy().T  # heads of a branch: their mean
    logits = None if output.instance_logits is None else output.instance_logits[0].float().cpu().numpy()
    save_scores(
        path,
        attention=whole,
        branches=branches,
        branch_names=branch_names(classifier, branches.shape[1]),
        bag=bag,
        weights=classifier.weights,
        logits=logits,
        logit_names=None if logits is None else classifier.class_names[-logits.shape[1] :],
    )


def branch_names(classifier: TrainedClassifier, count: int) -> list[str]:
    """Return names of the rows of a model's attention: of classes where each class has one, else numbers from 1."""
    if isinstance(classifier.model, CLAMMB | DSMIL | MaxPooling | MeanPooling) and classifier.class_names:
        return [f"class {name}" for name in classifier.class_names[-count:]]
    return [f"branch {number}" for number in range(1, count + 1)]
