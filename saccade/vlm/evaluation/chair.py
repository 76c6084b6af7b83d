"""CHAIR: which of the objects that a caption mentions are not in the image.

Rohrbach et al., "Object hallucination in image captioning", EMNLP 2018 (arXiv:1809.02156). Recall and length as in the
script that OPERA and its followers use.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from saccade.errors import ConfigError
from saccade.vlm.evaluation.answers import AnswerFile, GivenAnswer, answer_facts
from saccade.vlm.evaluation.chair_objects import Mentions, ObjectFinder
from saccade.vlm.evaluation.pope_questions import read_json
from saccade.vlm.evaluation.statistics import Floats, Key, Measured, ratio
from saccade.vlm.questions import Question

__all__ = [
    "CHAIR_PROMPT",
    "CaptionScore",
    "ChairTruth",
    "chair_prompts",
    "chair_scores",
    "chair_truth",
    "measure_chair",
    "read_chair",
    "score_caption",
]

CHAIR_PROMPT = "Please describe this image in detail."


@dataclass(frozen=True)
class ChairTruth:
    """What is in each image.

    Args:
        objects: Classes by image id; the ids are text.
        images: Image id by file name.
        sources: The files it was read from.
    """

    objects: Mapping[str, frozenset[str]]
    images: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def image_id(self, answer: GivenAnswer) -> str:
        """Return which image an answer is about: by ``image_id``, by the file name in ``image``, or by its id.

        A file name that the annotations do not list counts by the number at its end, as COCO names its files.

        Raises:
            ConfigError: If none of them is known.
        """
        named = answer.row.get("image_id")
        if named is not None and str(named) in self.objects:
            return str(named)
        name = PurePosixPath(str(answer.row.get("image", ""))).name
        number = re.search(r"(\d+)\.\w+$", name)
        by_name = self.images.get(name) or (str(int(number[1])) if number else None)
        for key in (by_name, answer.id):
            if named is None and key is not None and key in self.objects:
                return key
        raise ConfigError(
            f"The answer {answer.id!r} is about no annotated image; its row has image_id={named!r}, image={name!r}."
        )


def chair_truth(
    instances: Iterable[Mapping[str, Any]],
    categories: Iterable[Mapping[str, Any]],
    captions: Iterable[Mapping[str, Any]],
    finder: ObjectFinder,
    *,
    images: Iterable[Any] = (),
) -> dict[str, frozenset[str]]:
    """Return the objects of each image: annotated, or mentioned in one of its captions by people.

    Args:
        instances: With ``image_id`` and ``category_id``.
        categories: With ``id`` and ``name``.
        captions: With ``image_id`` and ``caption``.
        finder: Vocabulary and variant.
        images: Ids of images that count although nothing may be in them.

    Raises:
        ConfigError: If a category is not in the finder's vocabulary.
    """
    names = {category["id"]: str(category["name"]) for category in categories}
    unknown = sorted(name for name in names.values() if name not in finder.class_of)
    if unknown:
        raise ConfigError(f"The vocabulary has no word for the annotated classes {', '.join(unknown)}.")
    found: dict[str, set[str]] = {str(image): set() for image in images}
    for row in instances:
        found.setdefault(str(row["image_id"]), set()).add(finder.class_of[names[row["category_id"]]])
    for row in captions:
        found.setdefault(str(row["image_id"]), set()).update(finder.find(row["caption"]).classes)
    return {image: frozenset(objects) for image, objects in found.items()}


def annotation_files(source: str | Path) -> tuple[list[Path], list[Path]]:
    """Return the files of instances and of captions in a folder or in ``annotations/`` within it."""
    folder = Path(source)
    places = [folder, folder / "annotations"]
    instances, captions = (
        [path for place in places for path in sorted(place.glob(f"{kind}*.json"))] for kind in ("instances", "captions")
    )
    if not instances:
        raise ConfigError(f"{folder} has no instances*.json, nor does {folder / 'annotations'}.")
    return instances, captions


def read_chair(source: str | Path, finder: ObjectFinder, files: Sequence[AnswerFile] = ()) -> ChairTruth:
    """Read COCO's annotations: ``instances*.json`` and ``captions*.json``, here or in ``annotations/``.

    Args:
        source: The folder.
        finder: Vocabulary and variant; captions by people go through it as well.
        files: If given, captions of other images than theirs are not analysed, which saves minutes on all of COCO.

    Raises:
        ConfigError: If there are no instances, or a file is not in COCO's layout.
    """
    instance_files, caption_files = annotation_files(source)
    tables = {path: read_json(path) for path in (*instance_files, *caption_files)}
    for path, table in tables.items():
        if not isinstance(table, dict) or "annotations" not in table:
            raise ConfigError(f"{path} is not in COCO's layout: an object with images, annotations and categories.")
    images = {str(row["file_name"]): str(row["id"]) for table in tables.values() for row in table.get("images", [])}
    everything = {image: frozenset[str]() for image in images.values()}
    for table in tables.values():
        everything |= {str(row["image_id"]): frozenset() for row in table["annotations"]}
    listed = ChairTruth(everything, images)
    wanted = {listed.image_id(answer) for file in files for answer in file.answers} or set(everything)

    def rows(paths: Sequence[Path]) -> Iterable[Mapping[str, Any]]:
        """Yield the annotations of the images that matter."""
        return (row for path in paths for row in tables[path]["annotations"] if str(row["image_id"]) in wanted)

    categories = [row for path in instance_files for row in tables[path].get("categories", [])]
    objects = chair_truth(rows(instance_files), categories, rows(caption_files), finder, images=wanted)
    return ChairTruth(objects, images, tuple(path.name for path in tables))


def chair_prompts(
    source: str | Path, image_folder: str | Path, *, count: int = 500, seed: int = 0, prompt: str = CHAIR_PROMPT
) -> list[Question]:
    """Draw images and ask for a description of each.

    Which images are drawn changes published scores by some points; report the mean of several seeds.

    Args:
        source: Folder of annotations; images are drawn from the last file of instances (of train and val, that is val).
        image_folder: Where their files are.
        count: How many.
        seed: Of drawing.
        prompt: The user's words.

    Raises:
        ConfigError: If there are not as many.
    """
    path = annotation_files(source)[0][-1]
    images = read_json(path).get("images", [])
    if len(images) < count:
        raise ConfigError(f"{path} lists {len(images)} images, {count} were asked for.")
    drawn = random.Random(seed).sample(images, count)
    folder = Path(image_folder)
    return [
        Question(str(row["id"]), str(row["file_name"]), prompt, folder / str(row["file_name"]), {"image_id": row["id"]})
        for row in drawn
    ]


@dataclass(frozen=True)
class CaptionScore:
    """A caption beside what is in its image.

    Args:
        mentions: What it mentions.
        truth: What is there.
    """

    mentions: Mentions
    truth: frozenset[str]

    @property
    def wrong(self) -> tuple[int, ...]:
        """Which mentions are of nothing that is there, counted from 0."""
        return tuple(i for i, name in enumerate(self.mentions.classes) if name not in self.truth)

    @property
    def hallucinated(self) -> tuple[tuple[str, str], ...]:
        """Word and class of each of those."""
        return tuple((self.mentions.words[i], self.mentions.classes[i]) for i in self.wrong)

    @property
    def matched(self) -> frozenset[str]:
        """Classes that are there and mentioned."""
        return self.truth & set(self.mentions.classes)

    def counts(self) -> list[int]:
        """Return captions, those with a wrong mention, mentions, wrong ones, matched classes, classes there, tokens."""
        mentions, wrong = len(self.mentions.words), len(self.wrong)
        return [1, int(wrong > 0), mentions, wrong, len(self.matched), len(self.truth), len(self.mentions.tokens)]


def score_caption(caption: str, truth: Iterable[str], finder: ObjectFinder) -> CaptionScore:
    """Return how a caption compares with the classes that are in its image."""
    return CaptionScore(finder.find(caption), frozenset(truth))


def chair_scores(sums: Floats) -> dict[str, Floats]:
    """Return CHAIR's scores; what would be divided by zero is 0.

    Args:
        sums: ``(..., 7)`` as :meth:`CaptionScore.counts` has them.

    Returns:
        ``CHAIRs``, captions with a wrong mention; ``CHAIRi``, wrong mentions among all; ``recall``, matched classes
        among those there; ``Len``, mean tokens of a caption, punctuation included.
    """
    captions, wrong_captions, mentions, wrong, matched, there, tokens = np.moveaxis(sums, -1, 0)
    return {
        "CHAIRs": ratio(wrong_captions, captions),
        "CHAIRi": ratio(wrong, mentions),
        "recall": ratio(matched, there),
        "Len": ratio(tokens, captions),
    }


def measure_chair(truth: ChairTruth, file: AnswerFile, finder: ObjectFinder) -> Measured:
    """Count the captions of a file; units are images.

    Raises:
        ConfigError: If an answer is about no annotated image.
    """
    about = sorted(
        ((truth.image_id(answer), answer) for answer in file.answers), key=lambda pair: (pair[0], pair[1].id)
    )
    units = tuple(dict.fromkeys(image for image, _ in about))
    place = {image: row for row, image in enumerate(units)}
    counts = np.zeros((len(units), 7))
    outcomes, rows = [], []
    for number, (image, answer) in enumerate(about):
        score = score_caption(answer.text, truth.objects[image], finder)
        counts[place[image]] += score.counts()
        outcomes.append(bool(score.wrong))
        rows.append(as_row(number, image, answer, score))

    def statistic(sums: Floats) -> Mapping[Key, Floats]:
        """Return the scores over all captions."""
        return {("all", metric): value for metric, value in chair_scores(sums).items()}

    key = ("all", "CHAIRs")
    facts = answer_facts([answer for _, answer in about])
    return Measured(file.name, file.intervention, units, counts, statistic, {key: np.array(outcomes)}, facts, rows)


def as_row(number: int, image: str, answer: GivenAnswer, score: CaptionScore) -> dict[str, Any]:
    """Return a row with lmms-eval's names of a sample, and ours."""
    mentions, wrong = score.mentions, score.wrong
    return {
        "doc_id": number,
        "target": sorted(score.truth),
        "resps": [[answer.text]],
        "filtered_resps": [answer.text],
        "id": answer.id,
        "image_id": image,
        "words": list(mentions.words),
        "classes": list(mentions.classes),
        "places": list(mentions.places),
        "hallucinated": [list(pair) for pair in score.hallucinated],
        "hallucinated_places": [mentions.places[i] for i in wrong],
        "missed": sorted(score.truth - score.matched),
        "CHAIRs": int(bool(wrong)),
        "CHAIRi": len(wrong) / len(mentions.words) if mentions.words else 0.0,
        "Len": len(mentions.tokens),
    }
