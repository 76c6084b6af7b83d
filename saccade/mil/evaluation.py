"""Metrics of slide classifiers with bootstrap intervals, by slide and by patient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap", "by_patient", "classification_metrics", "regression_metrics"]

Array = NDArray[Any]


def classification_metrics(probabilities: Array, target: Array) -> dict[str, float]:
    """Return accuracy, macro F1, balanced accuracy, AUROC (macro, one against rest) and Cohen's kappa.

    Args:
        probabilities: ``(N, C)``.
        target: ``(N,)`` class indices.

    Returns:
        Values by name; AUROC is the mean over the classes for which there are slides in and out of the class, NaN if
        there is none.
    """
    count = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    confusion = np.bincount(target * count + predicted, minlength=count * count).reshape(count, count)
    total, hits, true, said = confusion.sum(), np.diag(confusion), confusion.sum(1), confusion.sum(0)
    there = true > 0
    chance = float((true * said).sum() / total**2)
    classes = range(1, count) if count == 2 else range(count)  # two classes have one curve
    areas = [area_under_roc(probabilities[:, c], target == c) for c in classes if 0 < true[c] < total]
    return {
        "acc": float(hits.sum() / total),
        "f1_macro": float(np.mean(2 * hits[there] / (true + said)[there])),
        "balanced_acc": float(np.mean(hits[there] / true[there])),
        "auroc": float(np.mean(areas)) if areas else float("nan"),
        "kappa": float((hits.sum() / total - chance) / (1 - chance)) if chance < 1 else float("nan"),
    }


def area_under_roc(scores: Array, positive: NDArray[np.bool_]) -> float:
    """Return the share of pairs in which the positive has the higher score, ties counting half (Mann and Whitney)."""
    from scipy.stats import rankdata

    count = int(positive.sum())
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (len(scores) - count)))


def regression_metrics(predicted: Array, target: Array) -> dict[str, float]:
    """Return mean absolute and root mean square error, R squared and Pearson's r of ``(N,)`` values."""
    residual = target - predicted
    spread = ((target - target.mean()) ** 2).sum()
    varied = len(target) > 1 and predicted.std() > 0 and target.std() > 0
    return {
        "mae": float(np.abs(residual).mean()),
        "rmse": float(np.sqrt((residual**2).mean())),
        "r2": float(1 - (residual**2).sum() / spread) if spread > 0 else float("nan"),
        "pearson": float(np.corrcoef(predicted, target)[0, 1]) if varied else float("nan"),
    }


def bootstrap(
    metrics: Callable[[Array, Array], Mapping[str, float]],
    predicted: Array,
    target: Array,
    *,
    groups: Sequence[str] | None = None,
    samples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Return each metric with its percentile interval.

    Args:
        metrics: Computes values by name.
        predicted: ``(N, ...)``.
        target: ``(N, ...)``.
        groups: Patient of each row: patients are drawn, not slides.
        samples: Bootstrap samples.
        level: Of the interval.
        seed: The same seed gives the same interval.

    Returns:
        ``(value, low, high)`` by name.
    """
    generator = np.random.default_rng(seed)
    names = np.array(groups if groups is not None else range(len(target)))
    members = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    draws: dict[str, list[float]] = {}
    value = metrics(predicted, target)
    for _ in range(samples):
        rows = np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
        for name, number in metrics(predicted[rows], target[rows]).items():
            draws.setdefault(name, []).append(number)
    tail = 100 * (1 - level) / 2
    defined = {name: [number for number in draws[name] if number == number] or [float("nan")] for name in value}
    limits = {name: np.percentile(defined[name], [tail, 100 - tail]).tolist() for name in value}
    return {name: (number, limits[name][0], limits[name][1]) for name, number in value.items()}


def by_patient(predicted: Array, target: Array, patients: Sequence[str]) -> tuple[Array, Array, list[str]]:
    """Return the mean prediction and the first target of each patient, and the patients in order of appearance."""
    order = list(dict.fromkeys(patients))
    names = np.array(patients)
    rows = [np.flatnonzero(names == name) for name in order]
    return np.stack([predicted[r].mean(0) for r in rows]), np.stack([target[r[0]] for r in rows]), order
