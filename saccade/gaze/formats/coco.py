"""COCO-Search18 and COCO-FreeView JSON (Chen et al. 2021, 2022), also the layout of predictions for them.

Records with ``name, subject, task, condition, bbox [x, y, w, h], X, Y (px), T (ms), length, correct, RT, fixOnTarget,
split``. Two coordinate systems circulate, the display of 1680 x 1050 and images of 512 x 320, and no record says which:
the size must be given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from saccade.batch.tables import write_json
from saccade.errors import ConfigError
from saccade.gaze.formats.common import Format, ReadOptions, collect, read_json, scaled, wanted, xywh_to_xyxy
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import Places

__all__ = ["COCO", "SIZES"]

SIZES = ((1680, 1050), (512, 320))
EXTRA = ("correct", "RT", "fixOnTarget")
SPLITS = {"valid": "val"}


def read(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read the records.

    Raises:
        ConfigError: If no size is given, or the fixations do not fit it.
    """
    if options.size is None:
        raise ConfigError(f"{path.name} does not say its coordinates: give the size, 1680x1050 (display) or 512x320.")
    places = Places(path.name)
    records = []
    for number, row in enumerate(read_json(path, list)):
        x, y = (scaled(wanted(row, name, places, number), 1, 0, name, places, number) for name in ("X", "Y"))
        if row.get("length", len(x)) != len(x):
            places.fail(number, "length", f"{row['length']}, but X has {len(x)} values", "length_mismatch")
        task = row.get("task")
        records.append(
            {
                "image": wanted(row, "name", places, number),
                "x": x,
                "y": y,
                "duration": scaled(row.get("T"), 1e-3, 0, "T", places, number),
                "subject": row.get("subject", ""),
                "task": None if task == "none" else task,
                "condition": row.get("condition"),
                "width": options.size[0],
                "height": options.size[1],
                "target_box": xywh_to_xyxy(row.get("bbox")),
                "split": SPLITS.get(row.get("split"), row.get("split")),
                "meta": {name: row[name] for name in EXTRA if name in row},
            }
        )
    paths = collect(records, places, options)
    check_size(paths, options.size, path.name)
    return paths


def check_size(paths: ScanpathSet, size: tuple[float, float], source: str) -> None:
    """Raise if the coordinates are those of the other system.

    Raises:
        ConfigError: If a tenth of the fixations lies outside, or all lie in the corner that the small images take.
    """
    if not len(paths.x):
        return
    beyond = float(((paths.x > size[0]) | (paths.y > size[1])).mean())
    reach = f"largest X {paths.x.max():g}, largest Y {paths.y.max():g}"
    if beyond > 0.1:
        raise ConfigError(f"{source}: {beyond:.0%} of the fixations lie outside {size[0]:g}x{size[1]:g} ({reach}).")
    fits_small = bool((paths.x <= SIZES[1][0]).all() and (paths.y <= SIZES[1][1]).all())
    if tuple(size) == SIZES[0] and len(paths) > 1 and fits_small:
        raise ConfigError(f"{source}: all fixations fit 512x320 ({reach}); is that the size, rather than 1680x1050?")


def write(paths: ScanpathSet, path: Path) -> None:
    """Write the records; sizes and boxes of objects are lost."""
    back = {ours: theirs for theirs, ours in SPLITS.items()}
    records: list[dict[str, Any]] = []
    for number, one in enumerate(paths):
        record: dict[str, Any] = {
            "name": one.image,
            "subject": int(one.subject) if one.subject.isdigit() else one.subject,
            "task": "none" if one.task is None else one.task,
        }
        if one.condition is not None:
            record["condition"] = one.condition
        if one.target_box is not None:
            x1, y1, x2, y2 = one.target_box.tolist()
            record["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        record |= {"X": one.x.tolist(), "Y": one.y.tolist()}
        if one.duration is not None:
            record["T"] = np.round(one.duration * 1000, 6).tolist()
        record |= {"length": len(one), **{name: one.meta[name] for name in EXTRA if name in one.meta}}
        if one.split is not None:
            record["split"] = back.get(one.split, one.split)
        if paths.sample[number]:
            record["sample"] = int(paths.sample[number])
        records.append(record)
    write_json(path, records)


COCO = Format(
    "coco",
    (".json",),
    "COCO-Search18 / COCO-FreeView records; px of the size given, milliseconds",
    lambda head: head.lstrip().startswith(b"[") and b'"X"' in head,
    read,
    write,
)
