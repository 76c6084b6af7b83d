"""Scenes as models see them: objects with features and positions, padded into a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from saccade.errors import ConfigError, DataError, ShapeError

__all__ = ["SceneBatch", "box_positions", "grid_boxes", "grid_scene", "parse_grid", "stack_scenes"]


@dataclass(frozen=True)
class SceneBatch:
    """B scenes of up to N objects each.

    Args:
        position: Row and column of each object in cells, float32 ``(B, N, 2)``; need not be whole numbers.
        valid: Bool ``(B, N)``; ``False`` is padding.
        start: Where the gaze rests before the first fixation, in cells, ``(B, 2)``.
        target: Index of the object searched for, int64 ``(B,)``; -1 if it is not among them or there is none.
        features: ``(B, N, 3, H, W)`` crops, ``(B, N, F)`` features, or ``None``: objects differ by their place alone.
        target_features: ``(B, F)``, e.g. the embedding of a text; ``None``: those of the target object.
        saliency: How much each object stands out, ``(B, N)``, not negative; only the saliency baseline reads it.

    Raises:
        ShapeError: If the shapes do not belong together.
    """

    position: Tensor
    valid: Tensor
    start: Tensor
    target: Tensor
    features: Tensor | None = None
    target_features: Tensor | None = None
    saliency: Tensor | None = None

    def __post_init__(self) -> None:
        batch, count = self.position.shape[:2]
        wanted = {
            "position": (batch, count, 2),
            "valid": (batch, count),
            "start": (batch, 2),
            "target": (batch,),
            "saliency": (batch, count),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ShapeError(f"SceneBatch.{name} must be {shape} beside this position, got {tuple(tensor.shape)}.")
        if self.features is not None and self.features.shape[:2] != (batch, count):
            raise ShapeError(f"SceneBatch.features must begin with {(batch, count)}, got {tuple(self.features.shape)}.")

    def __len__(self) -> int:
        return len(self.target)

    @property
    def num_objects(self) -> int:
        """Slots for objects, N."""
        return self.position.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.position.device

    def to(self, device: torch.device | str) -> SceneBatch:
        """Return the batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def is_target(self) -> Tensor:
        """Return a bool ``(B, N)``: which object is the one searched for."""
        return torch.arange(self.num_objects, device=self.device) == self.target[:, None]

    def __getitem__(self, rows: slice | Tensor) -> SceneBatch:
        """Return some of the scenes."""
        return self.map(lambda tensor: tensor[rows])

    def mirrored(self, vertically: bool, horizontally: bool) -> SceneBatch:
        """Return the scenes upside down, or left to right; what is seen of objects stays as it is."""
        flip = torch.tensor([vertically, horizontally], device=self.device)
        largest = self.position.masked_fill(~self.valid[..., None], -torch.inf).amax(1)
        position = torch.where(flip, largest[:, None] - self.position, self.position)
        return replace(self, position=position, start=torch.where(flip, largest - self.start, self.start))

    def map(self, function: Callable[[Tensor], Tensor]) -> SceneBatch:
        """Apply a function to every tensor that is there."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if t is None else function(t) for name, t in tensors.items()}
        return SceneBatch(**changed)


def stack_scenes(scenes: Sequence[SceneBatch]) -> SceneBatch:
    """Pad scenes to a common number of objects and put them behind each other.

    Raises:
        DataError: If some scenes have features, target features or saliency and others have not.
    """
    if not scenes:
        raise DataError("There are no scenes to stack.", reason="no_scenes")
    most = max(scene.num_objects for scene in scenes)
    joined: dict[str, Any] = {}
    for field in fields(SceneBatch):
        parts = [getattr(scene, field.name) for scene in scenes]
        if any(part is None for part in parts):
            if not all(part is None for part in parts):
                raise DataError(f"Some scenes have {field.name} and others have not.", reason="mixed_scenes")
            joined[field.name] = None
        elif field.name in ("start", "target", "target_features"):
            joined[field.name] = torch.cat(parts)
        else:
            joined[field.name] = torch.cat([pad_objects(part, most) for part in parts])
    return SceneBatch(**joined)


def pad_objects(tensor: Tensor, count: int) -> Tensor:
    """Extend the second axis to ``count`` with zeros."""
    missing = count - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1) if missing else tensor


def grid_scene(rows: int, columns: int, target: int = -1) -> SceneBatch:
    """Return one scene of objects on a regular grid, numbered row by row, the start in its middle as in OAT.

    Example:
        >>> grid_scene(2, 3).position[0, 4]
        tensor([1., 1.])
    """
    index = torch.arange(rows * columns)
    place = torch.stack([index // columns, index % columns], -1).float()
    return SceneBatch(
        position=place[None],
        valid=torch.ones(1, rows * columns, dtype=torch.bool),
        start=torch.tensor([[rows / 2, columns / 2]]),
        target=torch.tensor([target]),
    )


def grid_boxes(rows: int, columns: int, width: float, height: float) -> Tensor:
    """Return the cells of a regular grid over an image as boxes ``(rows * columns, 4)``, x1 y1 x2 y2 in pixels."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    left, top = x.flatten() * (width / columns), y.flatten() * (height / rows)
    return torch.stack([left, top, left + width / columns, top + height / rows], -1).float()


def box_positions(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and column of boxes in units of the typical distance between neighbours, and that distance.

    The unit is the cell of the boxes' typical shape of which N would cover the area that they are spread over. Cells of
    a regular grid get whole numbers; the smallest row and column are 0.

    Args:
        boxes: ``(N, 4)``, x1 y1 x2 y2 in pixels.

    Returns:
        ``(N, 2)`` float32, and that distance, vertical and horizontal ``(2,)``, in pixels.

    Raises:
        DataError: If a box is empty, or there are none.
    """
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or not len(boxes):
        raise DataError(f"Boxes must be (N, 4) with N > 0, got {tuple(boxes.shape)}.", reason="bad_boxes")
    size = (boxes[:, 2:] - boxes[:, :2]).flip(-1)
    if bool((size <= 0).any()):
        row = int((size <= 0).any(-1).nonzero()[0])
        raise DataError(f"Box {row} is empty: {boxes[row].tolist()} (x1, y1, x2, y2).", reason="bad_boxes")
    middle = (boxes[:, :2] + boxes[:, 2:]).flip(-1) / 2
    typical = size.median(0).values
    area = middle.max(0).values - middle.min(0).values + typical
    pitch = typical * (area.prod() / (len(boxes) * typical.prod())).sqrt()
    return ((middle - middle.min(0).values) / pitch).float(), pitch


def parse_grid(text: str) -> tuple[int, int]:
    """Return rows and columns of ``"6x14"``.

    Raises:
        ConfigError: If it is not two numbers from 1 up with an x between.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise ConfigError(f"A grid is ROWSxCOLUMNS, e.g. 6x14, got {text!r}.")
    return int(match[1]), int(match[2])
