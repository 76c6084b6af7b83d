"""Between recordings and models: scanpath records as scenes with paths over their objects, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import DataError
from saccade.gaze.decoding import DecodedPaths
from saccade.gaze.objects import assign_objects
from saccade.gaze.scanpath import Scanpath, ScanpathSet
from saccade.gaze.scenes import SceneBatch, box_positions, grid_boxes, stack_scenes

__all__ = ["Trial", "collate_trials", "lay_grid", "recordings_of", "scanpaths_of", "scene_of", "trials_of"]

PerObject = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """One image with one task, and everybody's paths.

    Args:
        scene: A batch of one.
        boxes: ``(N, 4)`` px.
        paths: Object indices of each path.
        viewers: Who looked, one per path.
        image: Name of the image.
        task: Search target or instruction.
        size: Width and height of the image in px.
    """

    scene: SceneBatch
    boxes: Tensor
    paths: tuple[NDArray[np.int64], ...]
    viewers: tuple[str, ...]
    image: str
    task: str | None
    size: tuple[float, float]


def scene_of(
    boxes: Tensor,
    *,
    size: tuple[float, float] | None = None,
    target: int = -1,
    features: Tensor | None = None,
    saliency: Tensor | None = None,
) -> SceneBatch:
    """Return the scene that boxes make, as a batch of one.

    Args:
        boxes: ``(N, 4)`` x1 y1 x2 y2 in px.
        size: Width and height of the image in px, in whose middle the gaze starts; ``None``: amid the boxes.
        target: Index of the object searched for; -1 for none.
        features: ``(N, F)``, or crops ``(N, 3, H, W)``.
        saliency: ``(N,)``, for the saliency baseline.

    Raises:
        DataError: If a box is empty, the target is no object, or the features are not one per box.
    """
    position, pitch = box_positions(boxes)
    if not -1 <= target < len(boxes):
        raise DataError(f"Target {target} is not among {len(boxes)} objects.", reason="bad_target")
    if features is not None and len(features) != len(boxes):
        raise DataError(f"There are {len(boxes)} boxes and features of {len(features)}.", reason="bad_features")
    first = ((boxes[:, :2] + boxes[:, 2:]) / 2).min(0).values.flip(0)
    if size is None:
        start = (position.min(0).values + position.max(0).values) / 2
    else:
        start = (torch.tensor([size[1] / 2, size[0] / 2]) - first) / pitch
    return SceneBatch(
        position=position[None],
        valid=torch.ones(1, len(boxes), dtype=torch.bool),
        start=start.float()[None],
        target=torch.tensor([target]),
        features=None if features is None else features[None],
        saliency=None if saliency is None else saliency[None],
    )


def trials_of(
    paths: ScanpathSet, *, features: PerObject | None = None, saliency: PerObject | None = None
) -> list[Trial]:
    """Group recordings into trials, fixations outside every object moved to the nearest.

    Args:
        paths: Recordings with boxes and, for search, a target object.
        features: Gives the features of an image's boxes, by its name and the boxes ``(N, 4)``.
        saliency: Gives their saliency ``(N,)`` likewise.

    Returns:
        One trial per image and task, in order of first appearance.

    Raises:
        DataError: If a path has no boxes, or those of one image differ.
    """
    trials = []
    for members in paths.group_by("image", "task").values():
        records = [paths.path(int(index)) for index in members]
        first = records[0]
        if first.boxes is None:
            raise DataError(
                f"{first!r} has no boxes of objects: read the recordings with boxes, or lay a grid over the images.",
                reason="no_boxes",
            )
        if any(record.boxes is None or not np.array_equal(record.boxes, first.boxes) for record in records):
            raise DataError(f"Paths on {first.image!r} have different boxes.", reason="bad_boxes")
        boxes = torch.from_numpy(np.array(first.boxes, np.float32))
        size = size_of(first, boxes)
        target = -1 if first.target_object is None else first.target_object
        extra = {
            name: None if function is None else function(first.image, boxes)
            for name, function in (("features", features), ("saliency", saliency))
        }
        trials.append(
            Trial(
                scene=scene_of(boxes, size=size, target=target, **extra),
                boxes=boxes,
                paths=tuple(objects_of(record) for record in records),
                viewers=tuple(record.subject for record in records),
                image=first.image,
                task=first.task,
                size=size,
            )
        )
    return trials


def lay_grid(paths: ScanpathSet, rows: int, columns: int) -> ScanpathSet:
    """Give every image the cells of a regular grid as objects, numbered row by row.

    The target is the cell with the middle of the target's box. Fixations outside the image belong to the nearest cell.

    Args:
        paths: Recordings with image sizes.
        rows: Cells from top to bottom.
        columns: Cells from left to right.

    Raises:
        DataError: If a path has no image size.
    """
    paths.sizes()
    grids: dict[tuple[float, float], NDArray[np.float64]] = {}
    records = []
    for record in paths:
        size = (record.width or 0.0, record.height or 0.0)
        if size not in grids:
            grids[size] = grid_boxes(rows, columns, *size).double().numpy()

        def cell(x: NDArray[np.float64], y: NDArray[np.float64], size: tuple[float, float] = size) -> NDArray[np.int64]:
            column = np.floor(x / size[0] * columns).clip(0, columns - 1)
            return np.asarray(np.floor(y / size[1] * rows).clip(0, rows - 1) * columns + column, np.int64)

        box = record.target_box
        target = None if box is None else int(cell((box[0:1] + box[2:3]) / 2, (box[1:2] + box[3:4]) / 2)[0])
        changed: dict[str, Any] = {"boxes": grids[size], "objects": cell(record.x, record.y), "target_object": target}
        records.append(replace(record, **changed))
    return ScanpathSet.from_paths(records)


def size_of(record: Scanpath, boxes: Tensor) -> tuple[float, float]:
    """Return width and height of the image, or of the area with boxes where nobody knows."""
    if record.width is None or record.height is None:
        return float(boxes[:, 2].max()), float(boxes[:, 3].max())
    return record.width, record.height


def objects_of(record: Scanpath) -> NDArray[np.int64]:
    """Return the object of each fixation, the nearest one where the record says none."""
    nearest = assign_objects(record.x, record.y, np.asarray(record.boxes))
    return nearest if record.objects is None else np.where(record.objects < 0, nearest, record.objects)


def collate_trials(
    trials: Sequence[Trial], *, viewers: Sequence[str] = (), max_length: int | None = None
) -> tuple[SceneBatch, Tensor, Tensor]:
    """Put trials into one batch.

    Args:
        trials: B trials with up to K paths.
        viewers: Names by number; others are unknown.
        max_length: Leave out longer paths; ``None`` keeps all.

    Returns:
        Scenes, paths ``(B, K, T)`` and viewers ``(B, K)``, int64, padded with -1.
    """
    number = {name: index for index, name in enumerate(viewers)}
    kept = [
        [
            (p, number.get(v, -1))
            for p, v in zip(t.paths, t.viewers, strict=True)
            if max_length is None or len(p) <= max_length
        ]
        for t in trials
    ]
    most = max(1, *(len(rows) for rows in kept))
    longest = max((len(path) for rows in kept for path, _ in rows), default=1)
    paths = torch.full((len(trials), most, longest), -1)
    who = torch.full((len(trials), most), -1)
    for row, columns in enumerate(kept):
        for column, (path, viewer) in enumerate(columns):
            paths[row, column, : len(path)] = torch.from_numpy(path)
            who[row, column] = viewer
    return stack_scenes([trial.scene for trial in trials]), paths, who


def recordings_of(trials: Sequence[Trial], *, max_length: int | None = None) -> ScanpathSet:
    """Return everybody's paths as records, fixations in the middle of their objects as in predicted paths.

    Args:
        trials: With paths of viewers.
        max_length: Leave out longer paths; ``None`` keeps all.
    """
    records = []
    for trial in trials:
        seen: dict[str, int] = {}
        for viewer, path in zip(trial.viewers, trial.paths, strict=True):
            if max_length is None or len(path) <= max_length:
                sample = seen[viewer] = seen.get(viewer, -1) + 1
                records.append(record_of(trial, path, subject=viewer, sample=sample))
    return ScanpathSet.from_paths(records)


def record_of(
    trial: Trial, objects: NDArray[np.int64], *, subject: str, sample: int, meta: Mapping[str, Any] | None = None
) -> Scanpath:
    """Return a path over a trial's objects as a record."""
    centre = ((trial.boxes[:, :2] + trial.boxes[:, 2:]) / 2).double().numpy()
    target = int(trial.scene.target)
    return Scanpath(
        image=trial.image,
        x=centre[objects, 0],
        y=centre[objects, 1],
        subject=subject,
        task=trial.task,
        width=trial.size[0],
        height=trial.size[1],
        sample=sample,
        objects=objects,
        target_object=target if target >= 0 else None,
        target_box=trial.boxes[target].double().numpy() if target >= 0 else None,
        boxes=trial.boxes.double().numpy(),
        meta=meta or {},
    )


def scanpaths_of(
    decoded: DecodedPaths, trials: Sequence[Trial], *, subject: str = "model", viewers: Sequence[str] | None = None
) -> ScanpathSet:
    """Return decoded paths as records, fixations in the middle of their objects.

    Args:
        decoded: K paths in each of B scenes.
        trials: The B scenes.
        subject: Name of the viewer in the records.
        viewers: Names of the K viewers in its place, e.g. whose paths were predicted.
    """
    records = []
    for row, trial in enumerate(trials):
        for number in range(decoded.objects.shape[1]):
            objects = np.array(decoded.path(row, number), np.int64)
            if len(objects):
                name = subject if viewers is None else viewers[number]
                meta = {"log_prob": float(decoded.log_prob[row, number]), "ended": bool(decoded.ended[row, number])}
                records.append(record_of(trial, objects, subject=name, sample=number, meta=meta))
    return ScanpathSet.from_paths(records)
