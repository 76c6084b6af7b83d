"""What a test leaves: tables of slides and patients, and of metrics with bootstrap intervals; and folds pooled."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saccade.batch import write_table
from saccade.mil.evaluation import bootstrap, by_patient, classification_metrics, regression_metrics
from saccade.mil.survival import concordance_index

__all__ = ["ResultTables", "pool_folds"]

Array = NDArray[Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class ResultTables:
    """Metrics and tables of predictions for slides.

    Args:
        task: ``"classification"``, ``"regression"`` or ``"survival"``.
        class_names: Names by class index.
    """

    task: str
    class_names: Sequence[str] = ()

    def metrics(self, predicted: Array, target: Array) -> dict[str, float]:
        """Return the metrics of the task.

        Args:
            predicted: ``(N, C)`` probabilities, or ``(N, 1)`` values or risks.
            target: ``(N,)`` class indices or values, or ``(N, 2)`` times and events.
        """
        if self.task == "classification":
            return classification_metrics(predicted, target)
        if self.task == "regression":
            return regression_metrics(predicted[:, 0], target)
        return {"c_index": concordance_index(torch.as_tensor(predicted[:, 0]), torch.as_tensor(target))}

    def row(self, predicted: Any, target: Any = None) -> Row:  # noqa: ANN401 - arrays
        """Return the columns of one prediction."""
        if self.task == "classification":
            known = {} if target is None else {"target": self.class_names[int(target)]}
            best = self.class_names[int(predicted.argmax())] if len(predicted) > 1 else self.class_names[-1]
            names = self.class_names[-len(predicted) :]
            return {**known, "label": best} | {
                f"prob_{n}": round(float(p), 6) for n, p in zip(names, predicted, strict=True)
            }
        word = "value" if self.task == "regression" else "risk"
        truth: Row = {}
        if target is not None:
            truth = {"target": float(target)} if self.task == "regression" else {"time": target[0], "event": target[1]}
        return {**truth, word: round(float(predicted[0]), 6)}

    def rows(self, known: Mapping[str, Sequence[Any]], predicted: Array, target: Array) -> list[Row]:
        """Return table rows of predictions and targets, after columns that are known."""
        return [
            {name: column[number] for name, column in known.items()} | self.row(values, target[number])
            for number, values in enumerate(predicted)
        ]

    def write(self, results: Sequence[Row], folder: Path) -> list[Row]:
        """Write ``slides.csv``, ``patients.csv`` and ``intervals.csv``; return the rows of the last.

        Args:
            results: With ``id``, ``patient``, ``n_tiles``, ``predicted``, ``target``, and ``fold`` if there are folds.
            folder: Where to.
        """
        predicted = np.array([result["predicted"] for result in results])
        target = np.array([result["target"] for result in results])
        patients = [result["patient"] for result in results]
        known = {"slide": [result["id"] for result in results], "patient": patients}
        if all("fold" in result for result in results):
            known["fold"] = [result["fold"] for result in results]
        known["n_tiles"] = [result["n_tiles"] for result in results]
        write_table(folder / "slides.csv", self.rows(known, predicted, target))
        mean, first_target, names = by_patient(predicted, target, patients)
        write_table(folder / "patients.csv", self.rows({"patient": names}, mean, first_target))
        slides = bootstrap(self.metrics, predicted, target, groups=patients)
        people = bootstrap(self.metrics, mean, first_target)
        rows = [
            {"level": level, "metric": name, "value": value, "low": low, "high": high}
            for level, intervals in (("slide", slides), ("patient", people))
            for name, (value, low, high) in intervals.items()
        ]
        write_table(folder / "intervals.csv", rows)
        return rows

    def read(self, path: Path) -> list[Row]:
        """Read back what :meth:`write` was given from its ``slides.csv``."""
        with path.open(encoding="utf-8", newline="") as stream:
            return [self.result(row) for row in csv.DictReader(stream)]

    def result(self, row: Mapping[str, str]) -> Row:
        """Return the result that a row of ``slides.csv`` tells."""
        found: Row = {"id": row["slide"], "patient": row["patient"], "n_tiles": int(row["n_tiles"])}
        if self.task == "classification":
            columns = [f"prob_{name}" for name in self.class_names if f"prob_{name}" in row]
            predicted = [float(row[name]) for name in columns]
            return found | {"predicted": predicted, "target": list(self.class_names).index(row["target"])}
        if self.task == "regression":
            return found | {"predicted": [float(row["value"])], "target": float(row["target"])}
        return found | {"predicted": [float(row["risk"])], "target": [float(row["time"]), float(row["event"])]}


def pool_folds(tables: ResultTables, tests: Mapping[str, Path], folder: Path) -> list[Row]:
    """Unite the tests of a cross-validation.

    Written into ``folder``: ``slides.csv``, ``patients.csv`` and ``intervals.csv`` over all held-out slides together,
    each predicted by the model that has not seen it, and ``summary.csv``, a row for each metric.

    Args:
        tables: Of the task.
        tests: Folder of each fold's test, with its ``slides.csv``, by the fold's name.
        folder: Where to.

    Returns:
        The rows of ``summary.csv``: ``metric``, ``folds``; ``mean`` and ``sd`` (n - 1) over the folds in which the
        metric is defined; ``slide`` and ``patient``, the metric over all held-out slides and patients, with 95 %
        bootstrap intervals in ``slide_low``, ``slide_high``, ``patient_low``, ``patient_high``.
    """
    folds = {name: tables.read(place / "slides.csv") for name, place in tests.items()}
    results = [result | {"fold": name} for name, fold in folds.items() for result in fold]
    results.sort(key=lambda result: str(result["id"]))
    pooled = {(row["level"], row["metric"]): row for row in tables.write(results, folder)}
    single = [
        tables.metrics(np.array([r["predicted"] for r in fold]), np.array([r["target"] for r in fold]))
        for fold in folds.values()
    ]
    rows: list[Row] = []
    for metric in single[0]:
        values = [value for value in (found[metric] for found in single) if value == value]
        row: Row = {"metric": metric, "folds": len(values), "mean": float("nan"), "sd": float("nan")}
        if values:
            row["mean"] = float(np.mean(values))
        if len(values) > 1:
            row["sd"] = float(np.std(values, ddof=1))
        for level in ("slide", "patient"):
            found = pooled[level, metric]
            row |= {level: found["value"], f"{level}_low": found["low"], f"{level}_high": found["high"]}
        rows.append(row)
    write_table(folder / "summary.csv", rows)
    return rows
