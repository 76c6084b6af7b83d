"""Tables of eye-tracking software: pymovements' events, and MultiMatch's one path per file.

pymovements: rows ``name, onset, offset, duration`` (ms) with ``location_x, location_y`` (px) and the columns that name
the trial; fixations are the rows whose name begins with ``fixation``. MultiMatch: tab-separated ``start_x, start_y``
(px) and ``duration`` in **seconds**.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saccade.batch.tables import atomic_path
from saccade.errors import ConfigError
from saccade.gaze.formats.common import Format, ReadOptions
from saccade.gaze.formats.table import floats, read_rows
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import Places

__all__ = ["MULTIMATCH", "PYMOVEMENTS", "from_events", "to_events"]


def from_events(
    events: Mapping[str, Sequence[Any]],
    *,
    image: str = "image",
    subject: str | None = "subject",
    task: str | None = None,
    options: ReadOptions | None = None,
    places: Places | None = None,
) -> ScanpathSet:
    """Build a set from pymovements' events: ``from_events(gaze.events.frame.to_dict(as_series=False))``.

    Args:
        events: Columns by name: ``name``, ``onset`` (ms), ``duration`` (ms) and ``location`` (pairs, px) or
            ``location_x`` and ``location_y``.
        image: Column of the image, or of what else tells trials apart.
        subject: Column of the viewer; ``None`` where there is one.
        task: Column of the task.
        options: ``size`` of the images.
        places: For messages.

    Returns:
        A path per image, subject and task, fixations in the order of their onsets.

    Raises:
        ConfigError: If a column is missing.
        DataError: As the set.
    """
    needed = ["name", "onset", "duration", image, *(column for column in (subject, task) if column is not None)]
    missing = [name for name in needed if name not in events]
    if "location" not in events and "location_x" not in events:
        missing.append("location")
    if missing:
        raise ConfigError(f"Events lack {', '.join(missing)}; they have {', '.join(events)}.")
    rows = [row for row, name in enumerate(events["name"]) if str(name).startswith("fixation")]
    if "location" in events:
        location = np.array([events["location"][row] for row in rows], np.float64).reshape(len(rows), -1)[:, :2]
    else:
        sides = [[events[name][row] for row in rows] for name in ("location_x", "location_y")]
        location = np.array(sides, np.float64).T.reshape(-1, 2)
    keys: dict[tuple[Any, ...], int] = {}
    columns = [image, *(column for column in (subject, task) if column is not None)]
    owner = np.array(
        [keys.setdefault(tuple(events[column][row] for column in columns), len(keys)) for row in rows], np.int64
    )
    order = np.lexsort((np.array([float(events["onset"][row]) for row in rows]), owner))
    values: dict[str, Any] = {"image": [key[0] for key in keys]}
    if subject is not None:
        values["subject"] = [key[1] for key in keys]
    if task is not None:
        values["task"] = [key[-1] for key in keys]
    if options is not None and options.size is not None:
        values["width"], values["height"] = options.size
    places = places or Places()
    return ScanpathSet.from_columns(
        np.bincount(owner, minlength=len(keys)),
        location[order, 0],
        location[order, 1],
        duration=np.array([float(events["duration"][row]) for row in rows])[order] / 1000,
        places=Places(places.source, lines=np.array(rows, np.int64)[order] + 2 if places.source else None),
        **values,
    )


def to_events(paths: ScanpathSet) -> dict[str, list[Any]]:
    """Return the columns of pymovements' events; onsets are sums of durations, the saccades' time is not known.

    Raises:
        DataError: If durations are not known.
    """
    lengths, duration = paths.lengths, np.round(paths.durations() * 1000, 6)
    ends = np.cumsum(duration)
    offset = ends - np.repeat((ends - duration)[paths.offsets[:-1]], lengths) if len(paths) else ends
    return {
        "image": np.repeat(paths.image, lengths).tolist(),
        "subject": np.repeat(paths.subject, lengths).tolist(),
        "task": ["" if task is None else task for task in np.repeat(paths.task, lengths)],
        "name": ["fixation"] * len(paths.x),
        "onset": np.round(offset - duration, 6).tolist(),
        "offset": np.round(offset, 6).tolist(),
        "duration": duration.tolist(),
        "location_x": paths.x.tolist(),
        "location_y": paths.y.tolist(),
    }


def read_events(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read a table of events."""
    columns: dict[str, Any] = dict(read_rows(path, ("name", "onset", "duration", "location_x", "location_y")))
    for name in ("onset", "duration", "location_x", "location_y"):
        columns[name] = floats(columns, name, path.name)
    image = "image" if "image" in columns else "trial"
    if image not in columns:
        columns["image"], image = [options.image or path.stem] * len(columns["name"]), "image"
    task = "task" if any(columns.get("task", ())) else None
    subject = "subject" if "subject" in columns else None
    return from_events(columns, image=image, subject=subject, task=task, options=options, places=Places(path.name))


def write_events(paths: ScanpathSet, path: Path) -> None:
    """Write a table of events."""
    write_columns(to_events(paths), path, ",")


def write_columns(columns: Mapping[str, Sequence[Any]], path: Path, delimiter: str) -> None:
    """Write a text table."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_multimatch(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read one path; its image is ``options.image``, or the file's name without extension."""
    columns = read_rows(path, ("start_x", "start_y", "duration"), "\t")
    x, y, duration = (floats(columns, name, path.name) for name in ("start_x", "start_y", "duration"))
    width, height = options.size or (None, None)
    image = options.image or path.stem
    places = Places(path.name, lines=np.arange(len(x)) + 2)
    return ScanpathSet.from_columns(
        [len(x)], x, y, duration=duration, image=image, width=width, height=height, places=places
    )


def write_multimatch(paths: ScanpathSet, path: Path) -> None:
    """Write one path.

    Raises:
        ConfigError: If there are several.
        DataError: If durations are not known.
    """
    if len(paths) != 1:
        raise ConfigError(f"A MultiMatch file holds one path, but there are {len(paths)}: filter them first.")
    duration = paths.durations()
    table = {"start_x": paths.x.tolist(), "start_y": paths.y.tolist(), "duration": duration.tolist()}
    write_columns(table, path, "\t")


def first_line(head: bytes) -> bytes:
    """Return the header of a text table."""
    return head.partition(b"\n")[0]


PYMOVEMENTS = Format(
    "pymovements",
    (".csv",),
    "a row per event, fixations among them; px, milliseconds",
    lambda head: b"onset" in first_line(head) and b"location" in first_line(head),
    read_events,
    write_events,
)
MULTIMATCH = Format(
    "multimatch",
    (".tsv", ".txt"),
    "one path per file, tab-separated; px, seconds",
    lambda head: b"start_x" in first_line(head),
    read_multimatch,
    write_multimatch,
)
