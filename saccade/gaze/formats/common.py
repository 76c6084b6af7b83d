"""What readers of recordings share: options, records with their place in the file, numbers of repetitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, DataError
from saccade.gaze.scanpath import Scanpath, ScanpathSet
from saccade.gaze.validation import Places

__all__ = ["Format", "ReadOptions", "collect", "grid_boxes", "read_json", "wanted", "xywh_to_xyxy"]


@dataclass(frozen=True)
class ReadOptions:
    """What a file does not say about itself.

    Args:
        size: Width and height of the images in px, for formats that have none.
        image: Name of the image, for files that hold one path.
        images: Names of the images that a file counts.
        grid: Rows and columns of objects, for search in collages.
        repeats: A second path of the same image, task and subject is an ``"error"``, or ``"number"`` gives it the next
            sample number.
        allow_pickle: Read pickled files; only plain values and numpy arrays are let in, but say so.
    """

    size: tuple[float, float] | None = None
    image: str | None = None
    images: Sequence[str] | None = None
    grid: tuple[int, int] | None = None
    repeats: str = "error"
    allow_pickle: bool = False


@dataclass(frozen=True)
class Format:
    """A file format of scanpaths.

    Args:
        name: Word for ``format=``.
        extensions: Of its files, the first for writing.
        summary: One line: units, where pixels are counted from.
        matches: Whether a file of one of the extensions looks like it, from its first 4 kB.
        read: From a path and options.
        write: To a path.
    """

    name: str
    extensions: tuple[str, ...]
    summary: str
    matches: Callable[[bytes], bool]
    read: Callable[[Path, ReadOptions], ScanpathSet]
    write: Callable[[ScanpathSet, Path], None]


def read_json(path: Path, kind: type) -> Any:  # noqa: ANN401 - a parsed document
    """Return a JSON document whose outermost value is a list or an object.

    Raises:
        ConfigError: If it is neither JSON nor of that kind.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not JSON: {error}.") from None
    if not isinstance(document, kind):
        raise ConfigError(f"{path.name} holds a {type(document).__name__}, expected a {kind.__name__}.")
    return document


def wanted(record: Mapping[str, Any], name: str, places: Places, number: int) -> Any:  # noqa: ANN401 - a JSON value
    """Return a field of a record.

    Raises:
        DataError: If it is not there.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{places.name(number)} is no object but {record!r:.40}.", reason="not_an_object")
    if name not in record:
        places.fail(number, name, f"missing; the record has {', '.join(record) or 'nothing'}", "missing_field")
    return record[name]


def scaled(values: Any, factor: float, shift: float, name: str, places: Places, number: int) -> Any:  # noqa: ANN401
    """Return ``values * factor + shift``, ``None`` for ``None``.

    Raises:
        DataError: If they are not a list of numbers.
    """
    if values is None:
        return None
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError):
        places.fail(number, name, f"{values!r:.60} is not a list of numbers", "not_a_number")
    if array.ndim != 1:
        places.fail(number, name, f"{values!r:.60} is not a flat list of numbers", "not_a_number")
    return array * factor + shift


def xywh_to_xyxy(box: Any) -> list[float] | None:  # noqa: ANN401 - a JSON value
    """Return corners of a box given by corner, width and height."""
    return None if box is None else [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def collect(records: Sequence[Mapping[str, Any]], places: Places, options: ReadOptions) -> ScanpathSet:
    """Make a set of the fields of each record; everything is checked, with the file's name in messages.

    Raises:
        ConfigError: If ``options.repeats`` is not known.
        DataError: As :class:`ScanpathSet`.
    """
    if options.repeats not in ("error", "number"):
        raise ConfigError(f"repeats is 'error' or 'number', got {options.repeats!r}.")
    fields = [dict(record) for record in records]
    if options.repeats == "number":
        seen: dict[tuple[Any, ...], int] = {}
        for record in fields:
            key = (str(record["image"]), record.get("task"), str(record.get("subject", "")))
            record["sample"] = seen.get(key, 0)
            seen[key] = record["sample"] + 1
    return ScanpathSet.from_paths([Scanpath.unchecked(**record) for record in fields], places=places)


def grid_boxes(rows: int, columns: int, width: float, height: float) -> NDArray[np.float64]:
    """Return the boxes of a uniform grid over an image, row by row, ``(rows columns, 4)`` px."""
    row, column = (axis.ravel() for axis in np.indices((rows, columns)))
    corner = np.stack([column * width / columns, row * height / rows], -1)
    boxes = np.concatenate([corner, corner + np.array([width / columns, height / rows])], -1)
    boxes.flags.writeable = False
    return boxes
