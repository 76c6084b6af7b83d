"""The two recordings of the shared data: OSIE free viewing, and search in collages of Amazon book covers, as JSON.

OSIE: records ``image, width, height, subject, task, x, y, duration_ms``; its pixels count from 1. Amazon: by image name
``fixations`` {viewer: [[x, y], ...]}, ``ground_truth`` (a box), ``size`` and ``target`` (file name of the cover),
without durations; the collage is a uniform grid of 6 x 14 covers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from saccade.batch.tables import write_json
from saccade.gaze.formats.common import Format, ReadOptions, collect, grid_boxes, read_json, scaled, wanted
from saccade.gaze.objects import assign_objects
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import Places

__all__ = ["AMAZON", "OSIE"]

GRID = (6, 14)


def read_osie(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read the records; positions move from 1-based to 0-based."""
    places = Places(path.name)
    records = []
    for number, row in enumerate(read_json(path, list)):
        x, y = (scaled(wanted(row, name, places, number), 1, -1, name, places, number) for name in ("x", "y"))
        records.append(
            {
                "image": wanted(row, "image", places, number),
                "x": x,
                "y": y,
                "duration": scaled(row.get("duration_ms"), 1e-3, 0, "duration_ms", places, number),
                "subject": row.get("subject", ""),
                "task": row.get("task"),
                "width": row.get("width", options.size and options.size[0]),
                "height": row.get("height", options.size and options.size[1]),
            }
        )
    return collect(records, places, options)


def write_osie(paths: ScanpathSet, path: Path) -> None:
    """Write the records, pixels counted from 1; objects and boxes are lost."""
    records = []
    for one in paths:
        record: dict[str, Any] = {"image": one.image, "width": one.width, "height": one.height}
        record |= {"subject": int(one.subject) if one.subject.isdigit() else one.subject, "task": one.task}
        # 0.1 px and 1 us are finer than any recording, and keep 395.5 from becoming 395.50000000000006
        record |= {"x": np.round(one.x + 1, 6).tolist(), "y": np.round(one.y + 1, 6).tolist()}
        if one.duration is not None:
            record["duration_ms"] = np.round(one.duration * 1000, 6).tolist()
        records.append(record)
    write_json(path, records)


def read_amazon(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read the collages; objects are the cells of ``options.grid``, 6 x 14 unless given."""
    rows, columns = options.grid or GRID
    records = []
    for image, entry in read_json(path, dict).items():
        place = Places(f"{path.name} {image}")
        size, truth = wanted(entry, "size", place, 0), wanted(entry, "ground_truth", place, 0)[0]
        width, height = wanted(size, "width", place, 0), wanted(size, "height", place, 0)
        boxes = grid_boxes(rows, columns, width, height)
        corners = [wanted(truth, name, place, 0) for name in ("xmin", "ymin", "xmax", "ymax")]
        centre = [(corners[0] + corners[2]) / 2], [(corners[1] + corners[3]) / 2]
        for viewer, fixations in wanted(entry, "fixations", place, 0).items():
            if not all(isinstance(point, list) and len(point) == 2 for point in fixations):
                place.fail(0, f"fixations {viewer}", f"{fixations!r:.60} is not a list of [x, y]", "not_a_number")
            x, y = ([point[axis] for point in fixations] for axis in (0, 1))
            records.append(
                {
                    "image": image,
                    "x": x,
                    "y": y,
                    "subject": viewer,
                    "task": Path(wanted(entry, "target", place, 0)).stem,
                    "condition": "present",
                    "width": width,
                    "height": height,
                    "objects": grid_cells(x, y, (rows, columns), (width, height)),
                    "target_object": int(assign_objects(*centre, boxes)[0]),
                    "target_box": corners,
                    "boxes": boxes,
                }
            )
    return collect(records, Places(path.name), options)


def grid_cells(x: list[float], y: list[float], grid: tuple[int, int], size: tuple[float, float]) -> list[int]:
    """Return the row-major cell of each fixation, ``floor(y / height rows) columns + floor(x / width columns)``."""
    row = np.clip(np.floor(np.asarray(y, np.float64) / size[1] * grid[0]), 0, grid[0] - 1)
    column = np.clip(np.floor(np.asarray(x, np.float64) / size[0] * grid[1]), 0, grid[1] - 1)
    return [int(cell) for cell in row * grid[1] + column]


def write_amazon(paths: ScanpathSet, path: Path) -> None:
    """Write the collages; needs sizes and target boxes, and one path per viewer.

    Raises:
        DataError: If a size or target box is missing, or a viewer has a second path on an image.
    """
    paths.sizes()
    document: dict[str, Any] = {}
    for number, one in enumerate(paths):
        if one.target_box is None:
            paths.places.fail(number, "target_box", "unknown; this format needs it", "no_target")
        x1, y1, x2, y2 = (whole(value) for value in one.target_box)
        entry = document.setdefault(
            one.image,
            {
                "fixations": {},
                "ground_truth": [{"xmin": x1, "xmax": x2, "ymin": y1, "ymax": y2}],
                "size": {"width": whole(one.width), "height": whole(one.height)},
                "target": f"{one.task}.jpg",
            },
        )
        if one.subject in entry["fixations"]:
            paths.places.fail(number, "subject", f"{one.subject} has a second path on {one.image}", "duplicate")
        entry["fixations"][one.subject] = [[whole(x), whole(y)] for x, y in zip(one.x, one.y, strict=True)]
    write_json(path, document)


def whole(value: Any) -> int | float:  # noqa: ANN401 - a number
    """Return a number without a fraction as an integer."""
    return int(value) if float(value).is_integer() else float(value)


OSIE = Format(
    "osie",
    (".json",),
    "OSIE records; px from 1, milliseconds",
    lambda head: head.lstrip().startswith(b"[") and b'"x"' in head and b'"X"' not in head,
    read_osie,
    write_osie,
)
AMAZON = Format(
    "amazon",
    (".json",),
    "Amazon book covers by collage; px from 0, no durations",
    lambda head: head.lstrip().startswith(b"{") and b'"fixations"' in head,
    read_amazon,
    write_amazon,
)
