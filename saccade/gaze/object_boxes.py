"""Where the objects of an image are: from a table, a grid, or a detector."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from saccade.checkpoints import load_weights, read_state_dict
from saccade.errors import ConfigError, DataError, suggest
from saccade.gaze.scenes import grid_boxes

__all__ = ["BoxSource", "ObjectBoxes", "boxes_by_detector", "boxes_on_grid", "find_target", "read_boxes"]


@dataclass(frozen=True)
class ObjectBoxes:
    """The objects of one image.

    Args:
        boxes: ``(N, 4)`` x1 y1 x2 y2 in px, float32.
        labels: A name for each, empty where nobody gave one.
    """

    boxes: Tensor
    labels: list[str] = field(default_factory=list)


BoxSource = Callable[[str, Image.Image], ObjectBoxes]


def boxes_on_grid(rows: int, columns: int) -> BoxSource:
    """Return a source of the cells of a regular grid, numbered row by row, whatever the image."""
    return lambda name, image: ObjectBoxes(grid_boxes(rows, columns, image.width, image.height))


def read_boxes(path: str | Path) -> BoxSource:
    """Read a table of boxes: columns ``image, x1, y1, x2, y2`` in px, and ``label`` if there are names.

    Objects are numbered in the order of their rows. An image is found by its name as in the table, or by its last part.

    Raises:
        ConfigError: If a column is missing or a number is none.
    """
    table: dict[str, list[tuple[list[float], str]]] = {}
    with Path(path).open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in ("image", "x1", "y1", "x2", "y2") if name not in (reader.fieldnames or [])]
        if missing:
            raise ConfigError(
                f"{path} lacks the columns {', '.join(missing)}: a table of boxes has image, x1, y1, x2, y2."
            )
        for row in reader:
            try:
                box = [float(row[side]) for side in ("x1", "y1", "x2", "y2")]
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {reader.line_num}: {error}.") from error
            table.setdefault(row["image"], []).append((box, row.get("label") or ""))

    def look_up(name: str, image: Image.Image) -> ObjectBoxes:
        rows = table.get(name) or table.get(Path(name).name)
        if rows is None:
            raise DataError(f"{path} has no boxes of {name!r}.{suggest(name, table)}", reason="no_boxes")
        return ObjectBoxes(torch.tensor([box for box, _ in rows]), [label for _, label in rows])

    return look_up


def boxes_by_detector(weights: str | Path, *, threshold: float = 0.5) -> BoxSource:
    """Return a source that finds objects with torchvision's Faster R-CNN (MobileNetV3, 320 px).

    Args:
        weights: State dict of ``fasterrcnn_mobilenet_v3_large_320_fpn``, which nothing here downloads.
        threshold: Keep detections above this score.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If the weights do not fit.
    """
    state = read_state_dict(weights)
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
    from torchvision.transforms.functional import to_tensor

    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, box_score_thresh=threshold
    ).eval()
    load_weights(detector, state, source=weights)

    @torch.inference_mode()
    def detect(name: str, image: Image.Image) -> ObjectBoxes:
        (found,) = detector([to_tensor(image)])
        boxes = found["boxes"].clone()
        if not len(boxes):
            raise DataError(f"The detector finds no object in {name!r}.", reason="no_objects")
        return ObjectBoxes(boxes)

    return detect


def find_target(objects: ObjectBoxes, target: str) -> int:
    """Return the index of the object that a word means.

    Args:
        objects: The objects of the image.
        target: A label; an index; or a box ``x1,y1,x2,y2`` in px, which means the object that overlaps it most.

    Raises:
        DataError: If there is no such object, or several have the label.
    """
    parts = target.split(",")
    if target in objects.labels:
        if objects.labels.count(target) > 1:
            raise DataError(
                f"{objects.labels.count(target)} objects are labelled {target!r}: give an index or a box.",
                reason="no_target",
            )
        return objects.labels.index(target)
    if target.isdigit() and int(target) < len(objects.boxes):
        return int(target)
    if len(parts) == 4 and all(part.strip().replace(".", "", 1).isdigit() for part in parts):
        box = torch.tensor([float(part) for part in parts])
        common = torch.minimum(objects.boxes[:, 2:], box[2:]) - torch.maximum(objects.boxes[:, :2], box[:2])
        area = common.clamp(min=0).prod(-1)
        if float(area.max()) > 0:
            return int(area.argmax())
        raise DataError(f"No object overlaps the box {target}.", reason="no_target")
    raise DataError(
        f"No object {target!r}: give an index from 0 to {len(objects.boxes) - 1}, a box x1,y1,x2,y2, or a label."
        f"{suggest(target, [label for label in objects.labels if label])}",
        reason="no_target",
    )
