"""Generated search scenes: drawn objects, and simulated viewers who look for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from saccade.batch import write_table
from saccade.errors import ConfigError
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["DrawnScene", "save_scenes", "search_scenes"]

COLOURS = {"red": (214, 60, 60), "blue": (60, 90, 214), "green": (50, 160, 80), "orange": (235, 160, 40)}
SHAPES = ("circle", "square", "triangle", "cross")
CELL = 40  # px
LONGEST = 30  # fixations of a simulated path


@dataclass(frozen=True)
class DrawnScene:
    """A picture with known objects.

    Args:
        name: Its name.
        image: RGB.
        boxes: ``(N, 4)`` x1 y1 x2 y2 px.
        colour: ``(N,)`` index into the colours.
        shape: ``(N,)`` index into the shapes.
        target: Index of the object to look for, the only one of its colour and shape.
    """

    name: str
    image: Image.Image
    boxes: NDArray[np.float64]
    colour: NDArray[np.int64]
    shape: NDArray[np.int64]
    target: int

    @property
    def labels(self) -> list[str]:
        """Colour and shape of each object, e.g. ``"red circle"``."""
        pairs = zip(self.colour.tolist(), self.shape.tolist(), strict=True)
        return [f"{list(COLOURS)[colour]} {SHAPES[shape]}" for colour, shape in pairs]

    @property
    def task(self) -> str:
        """What to look for: the label of the target."""
        return self.labels[self.target]


def search_scenes(count: int, *, viewers: int = 3, seed: int = 0) -> tuple[list[DrawnScene], ScanpathSet]:
    """Draw scenes and simulate viewers.

    A viewer begins in the middle and goes from object to object: near ones, and ones that look like the target, with
    greater probability, seen ones hardly ever; viewers differ in both. The path ends on the target.

    Args:
        count: Scenes, of 8 to 20 objects each, at irregular places.
        viewers: Viewers of each scene, named ``"1"``, ``"2"``, ...
        seed: Equal seeds give equal scenes and paths; scene i is the same whatever ``count`` is.

    Returns:
        The scenes, and everybody's paths with boxes and target, fixations 0.1 to 0.5 s long.

    Raises:
        ConfigError: If a number is below 1.
    """
    if count < 1 or viewers < 1:
        raise ConfigError(f"count and viewers must be at least 1, got {count} and {viewers}.")
    scenes = [draw_scene(index, seed) for index in range(count)]
    paths = []
    for index, scene in enumerate(scenes):
        for viewer in range(viewers):
            paths.append(look_for_target(scene, viewer, np.random.default_rng([seed, 1, index, viewer])))
    return scenes, ScanpathSet.from_paths(paths)


def save_scenes(scenes: Sequence[DrawnScene], folder: str | Path) -> None:
    """Write the pictures, and ``boxes.csv`` and ``queries.csv`` as ``saccade gaze predict`` reads them.

    Args:
        scenes: Drawn scenes.
        folder: Created if need be.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    boxes, queries = [], []
    for scene in scenes:
        scene.image.save(place / scene.name)
        for box, label in zip(scene.boxes.tolist(), scene.labels, strict=True):
            boxes.append(dict(zip(("image", "x1", "y1", "x2", "y2", "label"), (scene.name, *box, label), strict=True)))
        queries.append({"image": scene.name, "target": scene.task})
    write_table(place / "boxes.csv", boxes)
    write_table(place / "queries.csv", queries)


def draw_scene(index: int, seed: int) -> DrawnScene:
    """Draw one scene on a jittered grid."""
    rng = np.random.default_rng([seed, 0, index])
    rows, columns = int(rng.integers(3, 6)), int(rng.integers(4, 7))
    image = Image.new("RGB", (columns * CELL, rows * CELL), (236, 236, 230))
    draw = ImageDraw.Draw(image)
    cells = np.sort(rng.permutation(rows * columns)[: int(rng.integers(8, min(21, rows * columns + 1)))])
    side = rng.uniform(16, 26, len(cells))
    slack = CELL - side - 2
    left = cells % columns * CELL + 1 + rng.uniform(0, 1, len(cells)) * slack
    top = cells // columns * CELL + 1 + rng.uniform(0, 1, len(cells)) * slack
    boxes = np.stack([left, top, left + side, top + side], -1).round()
    kinds = rng.permutation(len(COLOURS) * len(SHAPES))
    target = int(rng.integers(len(cells)))
    kind = rng.choice(kinds[1:], len(cells))
    kind[target] = kinds[0]
    for box, number in zip(boxes.tolist(), kind.tolist(), strict=True):
        draw_object(draw, box, number)
    return DrawnScene(f"scene-{index:04d}.png", image, boxes, kind // len(SHAPES), kind % len(SHAPES), target)


def draw_object(draw: ImageDraw.ImageDraw, box: list[float], kind: int) -> None:
    """Draw one object into its box."""
    colour, shape = list(COLOURS.values())[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)]
    x1, y1, x2, y2 = box
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x1, y2), ((x1 + x2) / 2, y1), (x2, y2)], fill=colour)
    else:
        third = (x2 - x1) / 3
        draw.rectangle([x1 + third, y1, x2 - third, y2], fill=colour)
        draw.rectangle([x1, y1 + third, x2, y2 - third], fill=colour)


def look_for_target(scene: DrawnScene, viewer: int, rng: np.random.Generator) -> Scanpath:
    """Simulate one viewer."""
    width, height = scene.image.size
    centre = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
    alike = (scene.colour == scene.colour[scene.target]) * 1.0 + (scene.shape == scene.shape[scene.target]) * 0.5
    patience, guidance = 0.5 + 0.3 * (viewer % 3), 1.2 - 0.3 * (viewer % 4)
    here = np.array([width, height]) / 2
    seen = np.zeros(len(centre))
    objects: list[int] = []
    while len(objects) < LONGEST and (not objects or objects[-1] != scene.target):
        logits = guidance * alike - patience * np.hypot(*(centre - here).T) / CELL - 3.0 * seen
        weight = np.exp(logits - logits.max())
        objects.append(int(rng.choice(len(centre), p=weight / weight.sum())))
        here = centre[objects[-1]]
        seen[objects[-1]] = 1.0
    half = (scene.boxes[objects, 2:] - scene.boxes[objects, :2]) / 2
    spot = centre[objects] + rng.uniform(-0.5, 0.5, half.shape) * half
    return Scanpath(
        image=scene.name,
        x=spot[:, 0],
        y=spot[:, 1],
        duration=rng.uniform(0.1, 0.5, len(objects)),
        subject=str(viewer + 1),
        task=scene.task,
        condition="present",
        width=float(width),
        height=float(height),
        objects=np.array(objects, np.int64),
        target_object=scene.target,
        target_box=scene.boxes[scene.target],
        boxes=scene.boxes,
    )
