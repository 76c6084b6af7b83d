"""Which slides train, validate and test: patients never cross, classes stay in proportion."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saccade.batch.tables import write_table
from saccade.errors import ConfigError

__all__ = ["SPLITS", "make_folds", "read_split", "write_folds"]

SPLITS = ("train", "val", "test")


def make_folds(
    ids: Sequence[str],
    *,
    folds: int,
    groups: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    val_fraction: float = 0.15,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Divide slides into folds; each fold in turn is the test set, and a part of the rest validates.

    Args:
        ids: Slides.
        folds: Number of folds, at least 2.
        groups: Patient of each slide; a patient's slides stay together. ``None``: each slide by itself.
        labels: Class of each slide; every part gets its share of each, as far as groups allow.
        val_fraction: Share of the slides outside the test fold that validate; 0 for none.
        seed: The same seed gives the same folds.

    Returns:
        One mapping from id to ``"train"``, ``"val"`` or ``"test"`` for each fold.

    Raises:
        ConfigError: If there are fewer groups, or fewer of a class, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2 or not 0 <= val_fraction < 1:
        raise ConfigError(f"folds must be at least 2 and val_fraction in [0, 1); got {folds}, {val_fraction}.")
    group = np.array(ids if groups is None else groups)
    label = np.array([""] * len(ids) if labels is None else labels)
    if len(set(group.tolist())) < folds:
        raise ConfigError(f"{len(set(group.tolist()))} patients cannot be divided into {folds} folds.")
    rare = [name for name in set(label.tolist()) if len(set(group[label == name].tolist())) < folds]
    if rare:
        raise ConfigError(f"Class {min(rare)!r} has fewer patients than there are folds ({folds}).")

    def parts(indices: NDArray[np.int64], count: int) -> list[list[int]]:
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        return [indices[held].tolist() for _, held in splitter.split(indices, label[indices], group[indices])]

    everything = np.arange(len(ids))
    count = round(1 / val_fraction) if val_fraction else 0
    result = []
    for test in parts(everything, folds):
        rest = np.setdiff1d(everything, test)
        names = dict.fromkeys(ids, "train") | {ids[i]: "test" for i in test}
        if count >= 2 and len(set(group[rest].tolist())) >= count:
            names |= {ids[i]: "val" for i in parts(rest, count)[0]}
        result.append(names)
    return result


def write_folds(folder: str | Path, folds: Sequence[Mapping[str, str]]) -> list[Path]:
    """Write ``fold0.csv``, ``fold1.csv``, ... with columns ``slide`` and ``split``."""
    paths = [Path(folder) / f"fold{number}.csv" for number in range(len(folds))]
    for path, fold in zip(paths, folds, strict=True):
        write_table(path, [{"slide": slide, "split": split} for slide, split in sorted(fold.items())])
    return paths


def read_split(path: str | Path) -> dict[str, str]:
    """Read a split: ours (``slide``, ``split``), or CLAM's (columns ``train``, ``val``, ``test`` of ids or booleans).

    Raises:
        ConfigError: If the columns are none of these, a word is no split, or a slide is in two parts.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        rows = list(reader)
    pairs: list[tuple[str, str]] = []
    slide = next((name for name in ("slide", "slide_id") if name in columns), None)
    if slide is not None and "split" in columns:
        pairs = [(row[slide].strip(), row["split"].strip()) for row in rows]
    elif set(SPLITS) <= set(columns):
        index = columns[0]
        if all(row[name] in ("True", "False") for row in rows for name in SPLITS):
            pairs = [(row[index].strip(), name) for row in rows for name in SPLITS if row[name] == "True"]
        else:
            pairs = [(row[name].strip(), name) for row in rows for name in SPLITS if row[name].strip()]
    else:
        raise ConfigError(
            f"{path} is no split: expected columns slide and split, or train, val and test; has {columns}."
        )
    result: dict[str, str] = {}
    for key, name in pairs:
        if name not in SPLITS:
            raise ConfigError(f"{path}: slide {key!r} has split {name!r}; expected train, val or test.")
        if result.setdefault(key, name) != name:
            raise ConfigError(f"{path}: slide {key!r} is in {result[key]} and in {name}.")
    return result
