"""Honest splits: no image, no target or no viewer of one part occurs in another; and what leaks all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, suggest
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import Notice

__all__ = ["PARTS", "find_leaks", "split_scanpaths"]

PARTS = ("train", "val", "test")
UNITS = {"image": "image", "target": "task", "subject": "subject"}


def split_scanpaths(
    paths: ScanpathSet,
    *,
    by: str | Sequence[str] = "image",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> dict[str, ScanpathSet]:
    """Divide paths so that the parts share none of the given units.

    Args:
        paths: All paths.
        by: ``"image"``, ``"target"`` (the task) or ``"subject"``; of several, each is divided by itself and a path
            stays if all put it in one part: the others are left out. ``"trial"`` divides paths and protects nothing.
        fractions: Shares of the units for train, val and test; a share of 0 leaves a part empty.
        seed: Of the shuffling; the result depends on it and on the units, not on the order of the paths.

    Returns:
        ``{"train": ..., "val": ..., "test": ...}``, each with its name in the column ``split``.

    Raises:
        ConfigError: If a unit is not known, fractions are negative or do not sum to 1, a task is missing, or there are
            fewer units than parts.
    """
    units = [by] if isinstance(by, str) else list(by)
    known = (*UNITS, "trial")
    for unit in units:
        if unit not in known:
            raise ConfigError(f"by is one of {', '.join(known)}, got {unit!r}.{suggest(unit, known)}")
    if not units or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"Give a unit, and three fractions from 0 that sum to 1, got {units} and {fractions}.")
    parts = np.stack([divide(unit_column(paths, unit), unit, fractions, seed) for unit in units])
    agreed = (parts == parts[0]).all(0)
    divided = {}
    for number, name in enumerate(PARTS):
        part = paths.take(np.flatnonzero(agreed & (parts[0] == number)))
        divided[name] = part.with_split(name)
    return divided


def unit_column(paths: ScanpathSet, unit: str) -> NDArray[np.object_]:
    """Return what a path belongs to, as strings."""
    if unit == "trial":
        names = zip(paths.image, paths.task, paths.subject, paths.sample, strict=True)
        return np.array([repr(name) for name in names], object)
    column = paths.column(UNITS[unit])
    missing = np.flatnonzero([value is None for value in column])
    if missing.size:
        raise ConfigError(f"{paths.places.name(int(missing[0]))} has no {UNITS[unit]} to divide by.")
    return column


def divide(
    column: NDArray[np.object_], unit: str, fractions: tuple[float, float, float], seed: int
) -> NDArray[np.int64]:
    """Return the part of each path, ``(P,)``, so that equal values are in one part."""
    values = sorted(set(column))
    used = sum(fraction > 0 for fraction in fractions)
    if len(values) < used:
        raise ConfigError(f"{len(values)} {unit}s cannot fill {used} parts without sharing one.")
    counts = [max(int(fraction > 0), round(fraction * len(values))) for fraction in fractions]
    while sum(counts) != len(values):  # rounding: the largest part gives or takes
        counts[int(np.argmax(counts))] += 1 if sum(counts) < len(values) else -1
    order = np.random.default_rng(seed).permutation(len(values))
    of_value = np.empty(len(values), np.int64)
    of_value[order] = np.repeat(np.arange(3), counts)
    part = dict(zip(values, of_value.tolist(), strict=True))
    return np.array([part[value] for value in column], np.int64)


def find_leaks(parts: Mapping[str, ScanpathSet]) -> list[Notice]:
    """Return what parts share: images, tasks, subjects, and identical paths, each with a count and an example.

    Args:
        parts: Paths by the name of their part.
    """
    found: list[Notice] = []
    for name in ("image", "task", "subject"):
        places: dict[object, list[str]] = {}
        for part, paths in parts.items():
            for value in set(paths.column(name)) - {None}:
                places.setdefault(value, []).append(part)
        add_shared(found, f"shared_{name}", f"{name}s", places)
    copies: dict[object, list[str]] = {}
    for part, paths in parts.items():
        keys = {(one.image, one.x.tobytes(), one.y.tobytes()): None for one in paths if len(one) > 1}
        for key in keys:
            copies.setdefault(key, []).append(part)
    named = {f"a path on {key[0]}, number {n}": where for n, (key, where) in enumerate(copies.items())}  # type: ignore[index]
    add_shared(found, "shared_path", "identical paths", named)
    return found


def add_shared(
    found: list[Notice], rule: str, what: str, places: Mapping[object, list[str]] | Mapping[str, list[str]]
) -> None:
    """Add a notice if something stands in several parts."""
    shared = {value: parts for value, parts in places.items() if len(parts) > 1}
    if shared:
        value, parts = min(shared.items(), key=lambda item: str(item[0]))
        message = f"{len(shared)} {what} stand in several parts, e.g. {value} in {' and '.join(parts)}."
        found.append(Notice(rule, len(shared), message))
