"""POPE's three question sets, built from annotations of objects."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.errors import ConfigError

__all__ = [
    "POPE_SETS",
    "ImageObjects",
    "POPEQuestion",
    "build_pope",
    "co_occurring_objects",
    "object_counts",
    "read_coco_objects",
    "read_json",
    "sample_pope_images",
]

POPE_SETS = ("random", "popular", "adversarial")
TEMPLATE = "Is there a {} in the image?"


@dataclass(frozen=True)
class ImageObjects:
    """An image and what is in it.

    Args:
        image: File name.
        objects: Names, each once, in the order of the annotations.
    """

    image: str
    objects: tuple[str, ...]


@dataclass(frozen=True)
class POPEQuestion:
    """A question whether something is in an image.

    Args:
        split: ``random``, ``popular``, ``adversarial``, or what the data say.
        id: Unique in its set.
        image: File name.
        text: The question.
        label: ``yes`` or ``no``.
    """

    split: str
    id: str
    image: str
    text: str
    label: str

    def row(self) -> dict[str, Any]:
        """Return the row of a question file, with an ``id`` that is unique over the sets."""
        number: Any = int(self.id) if self.id.isdigit() else self.id
        return {
            "id": f"{self.split}/{self.id}",
            "question_id": number,
            "image": self.image,
            "text": self.text,
            "label": self.label,
            "split": self.split,
        }


def read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """Read a JSON document.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def read_coco_objects(source: str | Path) -> list[ImageObjects]:
    """Read the objects of each image from annotations in COCO's layout.

    Args:
        source: JSON with ``images`` (``id``, ``file_name``), ``annotations`` (``image_id``, ``category_id``) and
            ``categories`` (``id``, ``name``), e.g. ``instances_val2014.json``.

    Raises:
        ConfigError: If the file is something else, or an annotation is of an image or category that it does not list.
    """
    path = Path(source)
    content = read_json(path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise ConfigError(f"{path} is not in COCO's layout: an object with images, annotations and categories.")
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    objects: dict[Any, dict[str, None]] = {image["id"]: {} for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in objects or annotation["category_id"] not in names:
            raise ConfigError(
                f"{path}: an annotation is of an image or category that is not listed: {annotation!r:.200}."
            )
        objects[annotation["image_id"]][names[annotation["category_id"]]] = None
    return [ImageObjects(str(image["file_name"]), tuple(objects[image["id"]])) for image in content["images"]]


def sample_pope_images(
    images: Sequence[ImageObjects], count: int = 500, *, seed: int = 0, positives: int = 3
) -> list[ImageObjects]:
    """Draw images that hold at least ``positives`` objects.

    Raises:
        ConfigError: If there are fewer than ``count``.
    """
    rich = [image for image in images if len(image.objects) >= positives]
    if len(rich) < count:
        raise ConfigError(
            f"{count} images with {positives} or more objects are needed, the annotations have {len(rich)}."
        )
    return random.Random(seed).sample(rich, count)


def object_counts(images: Sequence[ImageObjects]) -> dict[str, int]:
    """Return in how many images each object is, in the order of first sight."""
    return dict(Counter(name for image in images for name in image.objects))


def co_occurring_objects(images: Sequence[ImageObjects]) -> dict[str, list[str]]:
    """Return for each object the others, by the images they share with it, equal ones in order of first sight."""
    shared: dict[str, Counter[str]] = {}
    for image in images:
        for name in image.objects:
            shared.setdefault(name, Counter()).update(other for other in image.objects if other != name)
    return {name: [other for other, _ in counter.most_common()] for name, counter in shared.items()}


def build_pope(
    images: Sequence[ImageObjects], split: str, *, seed: int = 0, positives: int = 3, legacy: bool = False
) -> list[POPEQuestion]:
    """Ask for the first objects of each image, and after each for one that is not there.

    The absent one is drawn uniformly (``random``), the most frequent (``popular``) or the one that shares most images
    with the object asked before (``adversarial``), among those neither in the image nor asked about it yet; where
    these run out, it is drawn uniformly.

    Args:
        images: As drawn; frequencies are counted over them alone.
        split: One of the three.
        seed: Of drawing.
        positives: Objects of each image asked for; an image needs as many.
        legacy: Misspell the question as the published builder does, where every letter a becomes "an".

    Raises:
        ConfigError: If there is no set of this name, an image has too few objects, or nothing absent is left for it.

    Source:
        Li et al., "Evaluating object hallucination in large vision-language models", EMNLP 2023 (arXiv:2305.10355);
        RUCAIBox/POPE (MIT) at 3df3ba1. Differs from it: the article is right.
    """
    if split not in POPE_SETS:
        raise ConfigError(f"POPE has the sets {', '.join(POPE_SETS)}, not {split!r}.")
    counts = object_counts(images)
    everything = list(counts)
    frequent = sorted(everything, key=lambda name: -counts[name])
    together = co_occurring_objects(images) if split == "adversarial" else {}
    generator = random.Random(seed)
    questions: list[POPEQuestion] = []
    for image in images:
        if len(image.objects) < positives:
            raise ConfigError(f"{image.image} has {len(image.objects)} objects; {positives} are needed.")
        taken = set(image.objects)
        if len(everything) < len(taken) + positives:
            raise ConfigError(f"{image.image}: no object is left that is not in it; give more or other images.")
        for name in image.objects[:positives]:
            order = {"random": [], "popular": frequent, "adversarial": together.get(name, [])}[split]
            absent = next((other for other in order if other not in taken), None)
            while absent is None or absent in taken:
                absent = generator.choice(everything)
            taken.add(absent)
            for asked, label in ((name, "yes"), (absent, "no")):
                number = str(len(questions) + 1)
                questions.append(POPEQuestion(split, number, image.image, question_text(asked, legacy), label))
    return questions


def question_text(name: str, legacy: bool) -> str:
    """Return the question for an object."""
    if name[:1].lower() not in set("aeiou"):
        return TEMPLATE.format(name)
    return (TEMPLATE.replace("a", "an") if legacy else TEMPLATE.replace(" a ", " an ")).format(name)
