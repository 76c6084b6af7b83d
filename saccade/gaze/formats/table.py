"""Scanpaths as CSV in long form, a row per fixation; saccade's own table.

Columns ``image, task, subject, sample, index, x_px, y_px, duration_ms, width_px, height_px`` and, where known,
``condition, split, object, target_object, target_x1_px, target_y1_px, target_x2_px, target_y2_px``. Pixels from 0. Only
``image, x_px, y_px`` are needed. Rows of a path belong together by image, task, subject and sample wherever they stand,
in the order of ``index``. Boxes of all objects do not fit a table; HDF5 keeps them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.batch.tables import atomic_path
from saccade.errors import ConfigError, DataError
from saccade.gaze.formats.common import Format, ReadOptions
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import Places

__all__ = ["COLUMNS", "TABLE", "read_rows"]

COLUMNS = ("image", "task", "subject", "sample", "index", "x_px", "y_px", "duration_ms", "width_px", "height_px")
BOX = ("target_x1_px", "target_y1_px", "target_x2_px", "target_y2_px")
OPTIONAL = ("condition", "split", "object", "target_object", *BOX)
PATH_COLUMNS = {"width": "width_px", "height": "height_px", "condition": "condition", "split": "split"}

Columns = dict[str, list[str]]


def read_rows(path: Path, needed: Sequence[str], delimiter: str = ",") -> Columns:
    """Return the columns of a text table as strings.

    Raises:
        ConfigError: If there is no header or it lacks a column.
        DataError: If a row has more or fewer cells than the header.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        header = next(reader, [])
        missing = [name for name in needed if name not in header]
        if missing:
            have = ", ".join(header) or "nothing"
            raise ConfigError(f"{path.name} lacks the columns {', '.join(missing)}; its header has {have}.")
        rows = []
        for row in reader:
            if row and len(row) != len(header):
                message = f"{path.name} line {reader.line_num} has {len(row)} cells, the header {len(header)}."
                raise DataError(message, reason="bad_row")
            if row:
                rows.append(row)
    columns = zip(*rows, strict=True) if rows else [[] for _ in header]
    return {name: list(column) for name, column in zip(header, columns, strict=True)}


def floats(columns: Columns, name: str, source: str) -> NDArray[np.float64]:
    """Return a column as numbers, NaN for empty cells.

    Raises:
        DataError: Names the line and the cell.
    """
    try:
        return np.array([cell or "nan" for cell in columns[name]], np.float64)
    except ValueError:
        for line, cell in enumerate(columns[name], 2):
            try:
                float(cell or "nan")
            except ValueError:
                raise DataError(
                    f"{source} line {line}, {name}: {cell!r} is not a number.", reason="not_a_number"
                ) from None
        raise


def integers(columns: Columns, name: str, source: str) -> NDArray[np.int64]:
    """Return a column as whole numbers, -1 for empty cells.

    Raises:
        DataError: Names the line and the cell.
    """
    values = floats(columns, name, source)
    values[np.isnan(values)] = -1
    broken = np.flatnonzero(values != np.rint(values))
    if broken.size:
        line = int(broken[0]) + 2
        raise DataError(
            f"{source} line {line}, {name}: {values[broken[0]]:g} is not a whole number.", reason="not_whole"
        )
    return values.astype(np.int64)


def read(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read the table; ``options.size`` fills in for absent sizes."""
    columns = read_rows(path, ("image", "x_px", "y_px"))
    count = len(columns["image"])
    text = {name: [cell or None for cell in columns[name]] if name in columns else [None] * count
            for name in ("task", "condition", "split")}  # fmt: skip
    subject = columns.get("subject", [""] * count)
    sample = integers(columns, "sample", path.name) if "sample" in columns else np.zeros(count, np.int64)
    sample = np.maximum(sample, 0)
    keys: dict[tuple[Any, ...], int] = {}
    named = zip(columns["image"], text["task"], subject, sample.tolist(), strict=True)
    owner = np.fromiter((keys.setdefault(key, len(keys)) for key in named), np.int64, count)  # fmt: skip
    index = integers(columns, "index", path.name) if "index" in columns else np.arange(count)
    order = np.lexsort((index, owner))
    again = np.flatnonzero((np.diff(owner[order]) == 0) & (np.diff(index[order]) == 0))
    if again.size:
        first, second = order[again[0]], order[again[0] + 1]
        message = f"{path.name} line {second + 2}, index: {index[second]} is also line {first + 2} of the same path."
        raise DataError(message, reason="duplicate")
    lengths = np.bincount(owner, minlength=len(keys))
    starts = order[np.concatenate([[0], np.cumsum(lengths)])[:-1]] if count else order
    values: dict[str, Any] = {}
    for name, column in PATH_COLUMNS.items():
        if column in columns:
            cells = np.array(text[column]) if column in text else floats(columns, column, path.name)
            values[name] = constant(cells, owner, starts, column, path.name)
    if "target_object" in columns:
        targets = integers(columns, "target_object", path.name)
        values["target_object"] = constant(targets, owner, starts, "target_object", path.name)
    if all(name in columns for name in BOX):
        corners = np.stack([floats(columns, name, path.name) for name in BOX], -1)
        values["target_box"] = corners[starts]
    for name, fill in zip(("width", "height"), options.size or (), strict=False):
        given = np.asarray(values.get(name, np.full(len(keys), np.nan)), np.float64)
        values[name] = np.where(np.isnan(given), fill, given)
    if "duration_ms" in columns:
        duration = floats(columns, "duration_ms", path.name)[order] / 1000
        values["duration"] = None if np.isnan(duration).all() else duration
    if "object" in columns:
        values["objects"] = integers(columns, "object", path.name)[order]
    return ScanpathSet.from_columns(
        lengths,
        floats(columns, "x_px", path.name)[order],
        floats(columns, "y_px", path.name)[order],
        image=[key[0] for key in keys],
        task=[key[1] for key in keys],
        subject=[key[2] for key in keys],
        sample=[key[3] for key in keys],
        places=Places(path.name, lines=order + 2),
        **values,
    )


def constant(
    cells: NDArray[Any], owner: NDArray[np.int64], starts: NDArray[np.int64], name: str, source: str
) -> NDArray[Any]:
    """Return the value of each path of a column that may not change within one.

    Raises:
        DataError: Names both lines.
    """
    first = cells[starts][owner] if len(starts) else cells
    both_empty = (cells != cells) & (first != first)  # NaN
    wrong = np.flatnonzero((cells != first) & ~both_empty)
    if wrong.size:
        line, other = int(wrong[0]), int(starts[owner[wrong[0]]])
        message = f"{cells[line]} differs from {cells[other]} in line {other + 2} of the same path"
        raise DataError(f"{source} line {line + 2}, {name}: {message}.", reason="not_constant")
    return cells[starts]


def write(paths: ScanpathSet, path: Path) -> None:
    """Write the table, optional columns where any path has them."""
    columns: dict[str, Any] = {}
    lengths = paths.lengths

    def per_path(values: Any, known: NDArray[np.bool_] | None = None) -> NDArray[Any]:  # noqa: ANN401 - a column
        cells = np.array(["" if v is None else str(v) for v in values], object)
        return np.repeat(cells if known is None else np.where(known, cells, ""), lengths)

    def number(values: NDArray[np.float64]) -> list[str]:
        return ["" if np.isnan(v) else repr(v).removesuffix(".0") for v in values.tolist()]

    for name in ("image", "task", "subject", "sample"):
        columns[name] = per_path(paths.column(name))
    columns["index"] = (np.arange(len(paths.x)) - np.repeat(paths.offsets[:-1], lengths)).astype(str)
    columns["x_px"], columns["y_px"] = number(paths.x), number(paths.y)
    # rounding to a nanosecond keeps 0.246 s from becoming 245.99999999999997 ms
    columns["duration_ms"] = (
        [""] * len(paths.x) if paths.duration is None else number(np.round(paths.duration * 1000, 6))
    )
    for name, side in (("width_px", paths.width), ("height_px", paths.height)):
        columns[name] = np.repeat(np.array(number(side), object), lengths)
    for name in ("condition", "split"):
        if any(value is not None for value in paths.column(name)):
            columns[name] = per_path(paths.column(name))
    if paths.objects is not None:
        columns["object"] = paths.objects.astype(str)
    if (paths.target_object >= 0).any():
        columns["target_object"] = per_path(paths.target_object, paths.target_object >= 0)
    if not np.isnan(paths.target_box).all():
        for name, side in zip(BOX, paths.target_box.T, strict=True):
            columns[name] = np.repeat(np.array(number(side), object), lengths)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


TABLE = Format(
    "csv",
    (".csv",),
    "long form, a row per fixation; px from 0, milliseconds",
    lambda head: b"x_px" in head.partition(b"\n")[0],
    read,
    write,
)
