"""Predicted paths out of the journal of a run of ``saccade gaze predict``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["write_predictions"]


def write_predictions(entries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the paths of all finished images, sorted by image; nothing if there is none.

    Args:
        entries: Of the journal, by image; see ``saccade.batch.read_entries``.
        path: ``.csv``, ``.h5`` or another extension of ``saccade.gaze.write_scanpaths``.
    """
    from saccade.gaze.formats import write_scanpaths

    records = []
    for name, entry in sorted(entries.items()):
        row: dict[str, Any] = entry.get("row", {"paths": []})
        for stored in row["paths"]:
            xy = np.array(stored["xy"], np.float64)
            records.append(
                Scanpath(
                    image=name,
                    x=xy[:, 0],
                    y=xy[:, 1],
                    subject=stored["subject"],
                    task=stored["task"],
                    width=row["width"],
                    height=row["height"],
                    sample=stored["sample"],
                    objects=np.array(stored["objects"], np.int64),
                    target_object=stored["target"],
                    target_box=None if stored["box"] is None else np.array(stored["box"]),
                    meta={"log_prob": stored["log_prob"]},
                )
            )
    if records:
        write_scanpaths(ScanpathSet.from_paths(records), path)
