"""The table of ``saccade predict``, written by any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from saccade.batch import BatchOptions, Item, Run, RunSummary
from saccade.errors import DataError
from saccade.mil.classifier import SlideClassifier
from saccade.vision_backbones.ranking import top_classes

__all__ = ["PredictionTable", "bag_row", "image_row"]

RowOf = Callable[[Mapping[str, Any], int], dict[str, Any]]


def image_row(class_names: Sequence[str], topk: int) -> RowOf:
    """Return the function that gives the most probable classes of an image."""
    return lambda outputs, index: top_classes(outputs["logits"][index].cpu(), class_names, topk)


def bag_row(module: SlideClassifier) -> RowOf:
    """Return the function that gives the prediction for a slide, as ``saccade slides predict`` writes it."""

    def row(outputs: Mapping[str, Any], index: int) -> dict[str, Any]:
        tiles = int(outputs["n_tiles"][index])
        columns = module.tables.row(outputs["predicted"][index].float().cpu().numpy()) if tiles else {}
        return {**columns, "n_tiles": tiles}

    return row


class PredictionTable(Callback):
    """Each process appends its rows to a part beside the table; the first one unites the parts when all are done.

    The parts must lie on a file system that all processes share.

    Args:
        out: The table.
        row: Turns what ``predict_step`` returned and an index in it into the columns of an item.
        settings: What the rows depend on, for ``run.json``.
    """

    def __init__(self, out: Path, row: RowOf, settings: Mapping[str, Any]) -> None:
        self.out = out
        self.row = row
        self.settings = settings
        self.stream: TextIO | None = None
        self.summary: RunSummary | None = None

    def parts(self) -> list[Path]:
        """Return the parts that are there."""
        return sorted(self.out.parent.glob(f"{self.out.name}.rank*.part"))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the part of this process; those of an interrupted run are removed."""
        if trainer.is_global_zero:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            for part in self.parts():
                part.unlink()
        trainer.strategy.barrier("old parts are gone")
        part = self.out.with_name(f"{self.out.name}.rank{trainer.global_rank}.part")
        self.stream = part.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - what predict_step returns
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the rows of a batch."""
        if self.stream is None:
            raise RuntimeError("PredictionTable works within trainer.predict only.")
        for index, name in enumerate(outputs["id"]):
            entry = {"id": name, "error": outputs["error"][index], "reason": outputs["reason"][index]}
            if not entry["error"]:
                entry["row"] = self.row(outputs, index)
            self.stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unite the parts."""
        if self.stream is not None:
            self.stream.close()
        trainer.strategy.barrier("parts are complete")
        if trainer.is_global_zero:
            self.summary = self.unite()

    def unite(self) -> RunSummary:
        """Write the table, ``run.json`` and ``items.jsonl``, and remove the parts."""
        parts = self.parts()
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        entries = {entry["id"]: entry for entry in map(json.loads, lines)}
        items = [Item(name, Path(name)) for name in sorted(entries)]
        options = BatchOptions(overwrite=True, progress="none")
        with Run(
            "predict", items=items, out=self.out, settings=self.settings, options=options, table=self.out
        ) as united:
            for item in items:
                entry = entries[item.id]
                if entry["error"]:
                    united.fail(item, DataError(entry["error"], reason=entry["reason"]))
                else:
                    united.done(item, row=entry["row"], reason=entry["reason"])
        for part in parts:
            part.unlink()
        return united.summary
