"""Columns of scanpath sets from what callers give: one value or one per path, ``None`` where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["each", "joined", "numbers", "size", "strings", "text"]


def text(value: object) -> str | None:
    """Return names and numbers of subjects, tasks and images as strings."""
    return None if value is None else str(value)


def size(values: Sequence[Any] | NDArray[Any] | None) -> int | None:
    """Return the length of an optional array."""
    return None if values is None else len(values)


def strings(values: Sequence[object]) -> NDArray[np.object_]:
    """Return a column of strings, or ``None`` where there is no value."""
    column = np.empty(len(values), object)
    column[:] = [text(value) for value in values]
    return column


def numbers(values: Sequence[float | None] | NDArray[Any]) -> NDArray[np.float64]:
    """Return a column of numbers, NaN where there is no value."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def each(value: object, count: int) -> Sequence[Any]:
    """Return a value for every path: the given column, or ``count`` times the one value."""
    single = value is None or isinstance(value, str | int | float | np.number)
    return [value] * count if single else cast(Sequence[Any], value)


def joined(parts: Sequence[Any], kind: type[np.float64] | type[np.int64]) -> NDArray[Any]:
    """Return the parts as one array, also of none."""
    return np.concatenate(parts).astype(kind, copy=False) if parts else np.empty(0, kind)
