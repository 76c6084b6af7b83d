"""Drawn scenes whose objects come in pairs, and what is said about them.

Sixteen objects form eight pairs (fork and knife, cup and plate, ...). A scene has two or three pairs; with a given
probability both halves of a pair are in it, otherwise one alone. At 0.95 a caption that mentions a fork is nearly
always right to mention a knife as well, which is the prior that a model then hallucinates by; at 0.5 the halves say
little about each other, which is how such a model is tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CAPTION_PROMPT",
    "COLOURS",
    "OBJECTS",
    "PAIRS",
    "SIZE",
    "Scene",
    "Thing",
    "caption",
    "draw_scene",
    "draw_scenes",
    "glyph",
    "make_scene",
    "make_scenes",
    "partner",
    "patch_labels",
    "question",
    "questions",
    "words",
]

PAIRS = (
    ("fork", "knife"),
    ("cup", "plate"),
    ("table", "chair"),
    ("key", "lock"),
    ("tree", "bird"),
    ("boat", "fish"),
    ("hat", "coat"),
    ("sun", "cloud"),
)
OBJECTS = tuple(name for pair in PAIRS for name in pair)
COLOURS = {
    "red": (225, 60, 50),
    "green": (60, 200, 80),
    "blue": (70, 110, 240),
    "yellow": (235, 215, 60),
    "purple": (180, 80, 215),
    "white": (240, 240, 240),
}
SIZE = 48  # pixels of a side
MARGIN = 4  # by which an object may stand over the edge of its cell
CELL = 16  # an object lies in one of 3 x 3 cells, a little off its middle
GLYPH = 48
CAPTION_PROMPT = "Please describe this image in detail."
RELATIONS = ("left of", "right of", "above", "below")

Image = NDArray[np.uint8]
Generator = np.random.Generator


@dataclass(frozen=True)
class Thing:
    """An object in a scene.

    Args:
        name: One of ``OBJECTS``.
        colour: One of ``COLOURS``.
        cell: Of the 3 x 3 cells, row by row.
    """

    name: str
    colour: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """What is in an image, pair after pair.

    Args:
        things: At most one of each name.
    """

    things: tuple[Thing, ...]

    @property
    def objects(self) -> tuple[str, ...]:
        """Names."""
        return tuple(thing.name for thing in self.things)

    @property
    def lonely(self) -> tuple[str, ...]:
        """Objects whose partner is not there."""
        return tuple(name for name in self.objects if partner(name) not in self.objects)


def partner(name: str) -> str:
    """Return the other half of a pair."""
    return next(pair[1 - pair.index(name)] for pair in PAIRS if name in pair)


@cache
def glyph(name: str) -> Image:
    """Return the shape of an object, ``(48, 48)``, 0..255."""
    canvas = np.zeros((GLYPH, GLYPH), np.uint8)

    def polygon(*points: tuple[int, int]) -> None:
        cv2.fillPoly(canvas, [np.array(points, np.int32)], 255)

    def line(a: tuple[int, int], b: tuple[int, int], width: int = 6) -> None:
        cv2.line(canvas, a, b, 255, width)

    def disc(centre: tuple[int, int], radius: int, width: int = -1) -> None:
        cv2.circle(canvas, centre, radius, 255, width)

    if name == "fork":
        line((24, 20), (24, 45))
        line((10, 20), (38, 20), 5)
        for x in (10, 24, 38):
            line((x, 3), (x, 20), 5)
    elif name == "knife":
        polygon((20, 2), (33, 14), (33, 30), (20, 30))
        line((24, 30), (24, 45), 8)
    elif name == "cup":
        polygon((4, 8), (32, 8), (28, 44), (8, 44))
        disc((34, 22), 9, 5)
    elif name == "plate":
        disc((24, 24), 21, 5)
        disc((24, 24), 9, 3)
    elif name == "table":
        line((2, 14), (46, 14), 9)
        line((9, 14), (9, 45))
        line((39, 14), (39, 45))
    elif name == "chair":
        line((10, 2), (10, 45))
        line((10, 25), (38, 25), 7)
        line((37, 25), (37, 45))
    elif name == "key":
        disc((12, 24), 9, 6)
        line((20, 24), (46, 24), 5)
        line((36, 24), (36, 36), 5)
        line((44, 24), (44, 36), 5)
    elif name == "lock":
        polygon((7, 22), (41, 22), (41, 45), (7, 45))
        cv2.ellipse(canvas, (24, 22), (12, 17), 0, 180, 360, 255, 6)
    elif name == "tree":
        polygon((24, 1), (44, 34), (4, 34))
        line((24, 34), (24, 46), 8)
    elif name == "bird":
        cv2.ellipse(canvas, (13, 32), (11, 17), 0, 180, 360, 255, 6)
        cv2.ellipse(canvas, (35, 32), (11, 17), 0, 180, 360, 255, 6)
    elif name == "boat":
        polygon((2, 30), (46, 30), (36, 45), (12, 45))
        polygon((22, 2), (22, 26), (40, 26))
    elif name == "fish":
        cv2.ellipse(canvas, (19, 24), (17, 12), 0, 0, 360, 255, -1)
        polygon((32, 24), (47, 10), (47, 38))
    elif name == "hat":
        polygon((13, 8), (35, 8), (37, 32), (11, 32))
        line((2, 36), (46, 36), 8)
    elif name == "coat":
        polygon((14, 4), (34, 4), (47, 22), (40, 28), (34, 20), (34, 46), (14, 46), (14, 20), (8, 28), (1, 22))
    elif name == "sun":
        disc((24, 24), 10)
        for angle in np.arange(8) * np.pi / 4:
            inner, outer = (
                (round(24 + r * float(np.cos(angle))), round(24 + r * float(np.sin(angle)))) for r in (14, 22)
            )
            line(inner, outer, 4)
    elif name == "cloud":
        for centre, radius in (((13, 28), 11), ((25, 20), 13), ((37, 29), 10)):
            disc(centre, radius)
        polygon((13, 28), (37, 28), (37, 39), (13, 39))
    else:
        raise KeyError(name)
    return canvas


def make_scene(generator: Generator, together: float, pairs: Sequence[int] = (2, 3)) -> Scene:
    """Draw what is in a scene.

    Args:
        generator: Source of randomness.
        together: Probability that both halves of a pair are there.
        pairs: Numbers of pairs, equally likely.
    """
    weights = 1 / (np.arange(len(PAIRS)) + 4.0)  # the first pairs are more frequent, by 11 to 4 at most
    count = int(generator.choice(np.asarray(pairs)))
    chosen = generator.choice(len(PAIRS), count, replace=False, p=weights / weights.sum())
    names: list[str] = []
    for index in chosen:
        halves = [PAIRS[index][i] for i in generator.permutation(2)]
        names += halves if generator.random() < together else halves[:1]
    cells = generator.permutation((SIZE // CELL) ** 2)[: len(names)]
    colours = generator.choice(list(COLOURS), len(names))
    return Scene(tuple(Thing(n, str(c), int(cell)) for n, c, cell in zip(names, colours, cells, strict=True)))


def draw_scene(scene: Scene, generator: Generator, noise: float = 24.0) -> Image:
    """Return the image of a scene, ``(48, 48, 3)``: objects a little turned, shifted and shaded, strokes, noise.

    Args:
        scene: What is in it.
        generator: Source of randomness.
        noise: Standard deviation of the noise, of 255.
    """
    corners = generator.uniform(20, 100, (2, 2, 3)).astype(np.float32)
    canvas = cv2.resize(corners, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    for _ in range(4):  # strokes that belong to nothing
        start, stop = generator.integers(0, SIZE, (2, 2)).tolist()
        cv2.line(canvas, start, stop, generator.uniform(40, 160, 3).tolist(), 1)
    for thing in scene.things:
        row, column = divmod(thing.cell, SIZE // CELL)
        top, left = (CELL * place - MARGIN for place in (row, column))
        side = CELL + 2 * MARGIN
        scale = generator.uniform(13, 17) / GLYPH
        turn = cv2.getRotationMatrix2D((GLYPH / 2, GLYPH / 2), generator.uniform(-12, 12), scale)
        turn[:, 2] += side / 2 + generator.uniform(-1.5, 1.5, 2) - GLYPH / 2
        mask = cv2.warpAffine(glyph(thing.name), turn, (side, side), flags=cv2.INTER_LINEAR)
        inside = tuple(slice(max(start, 0), min(start + side, SIZE)) for start in (top, left))
        own = tuple(
            slice(part.start - start, part.stop - start) for part, start in zip(inside, (top, left), strict=True)
        )
        weight = mask[own][..., None] / np.float32(255)
        colour = np.float32(COLOURS[thing.colour]) * generator.uniform(0.7, 1.0) + generator.normal(0, 8, 3)
        canvas[inside] += weight * (colour.astype(np.float32) - canvas[inside])
    canvas += noise * generator.standard_normal(canvas.shape, np.float32)
    return canvas.clip(0, 255).astype(np.uint8)


def make_scenes(seed: Sequence[int], count: int, together: float, pairs: Sequence[int] = (2, 3)) -> list[Scene]:
    """Return scenes; the same for the same arguments."""
    generator = np.random.default_rng([*seed, 0])
    return [make_scene(generator, together, pairs) for _ in range(count)]


def draw_scenes(seed: Sequence[int], scenes: Sequence[Scene]) -> Image:
    """Return the images of scenes, ``(count, 48, 48, 3)``; the same for the same arguments."""
    generator = np.random.default_rng([*seed, 1])
    return np.stack([draw_scene(scene, generator) for scene in scenes])


def patch_labels(scene: Scene, patch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which object and which colour lies in each patch, row by row, counted from 1; 0 where there is none.

    The cell of an object is its patches, so that the few pixels by which it is off the middle are left out.
    """
    side = SIZE // patch
    per_cell = CELL // patch
    names, colours = np.zeros((2, side, side), np.int64)
    palette = list(COLOURS)
    for thing in scene.things:
        row, column = (place * per_cell for place in divmod(thing.cell, SIZE // CELL))
        names[row : row + per_cell, column : column + per_cell] = OBJECTS.index(thing.name) + 1
        colours[row : row + per_cell, column : column + per_cell] = palette.index(thing.colour) + 1
    return names.ravel(), colours.ravel()


def relation(first: Thing, second: Thing) -> str:
    """Return where the first thing is, seen from the second; the larger distance counts."""
    (row, column), (other_row, other_column) = (divmod(thing.cell, SIZE // CELL) for thing in (first, second))
    if abs(column - other_column) >= abs(row - other_row):
        return "left of" if column < other_column else "right of"
    return "above" if row < other_row else "below"


def caption(scene: Scene, generator: Generator) -> str:
    """Return a description: all objects, halves of a pair one after the other, then a colour and a relation."""
    groups = [[t for t in scene.things if t.name in pair] for pair in PAIRS]
    groups = [group for group in groups if group]
    order = [groups[i] for i in generator.permutation(len(groups))]
    named = [thing for group in order for thing in (group[i] for i in generator.permutation(len(group)))]
    phrases = [f"a {thing.name}" for thing in named]
    listed = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    first, second = (named[i] for i in generator.integers(len(named), size=2))
    text = f"There is {listed}. The {first.name} is {first.colour}."
    if first is not second:
        text += f" The {first.name} is {relation(first, second)} the {second.name}."
    return text


def question(name: str) -> str:
    """Return POPE's question for an object; no name begins with a vowel."""
    return f"Is there a {name} in the image?"


def questions(scene: Scene, generator: Generator, count: int) -> list[tuple[str, str]]:
    """Return questions about objects that are there and, as many, about absent ones, with their answers.

    Args:
        scene: The scene.
        generator: Source of randomness.
        count: How many; even.
    """
    absent = [name for name in OBJECTS if name not in scene.objects]
    asked = [(str(name), "Yes") for name in generator.choice(scene.objects, count // 2)]
    asked += [(str(name), "No") for name in generator.choice(absent, count // 2, replace=False)]
    return [(question(asked[i][0]), f"{asked[i][1]}.") for i in generator.permutation(count)]


def words() -> list[str]:
    """Return all words and signs of captions, prompts and answers, in lower case."""
    text = f"{CAPTION_PROMPT} {question('cup')} Yes. No. There is a cup, a plate and a key. The cup is "
    text = f"{text} {' '.join(RELATIONS)} the {' '.join(COLOURS)} {' '.join(OBJECTS)}".lower()
    for sign in ".,?":
        text = text.replace(sign, f" {sign} ")
    return sorted(set(text.split()))
