"""Answers files: who wrote them is free, what stands in them is checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.errors import ConfigError

__all__ = ["AnswerFile", "GivenAnswer", "answer_facts", "looks_like_refusal", "match_answers", "read_answers"]

TEXTS = ("answer", "text", "caption")
IDS = ("id", "question_id", "image_id", "pid")
SETS = ("split", "category", "set")
SET_NAMES = ("random", "popular", "adversarial", "benign", "contrast")
REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|not able|unable)|i (?:can(?:not|'t| not)|won't|will not|must decline|apologi[sz]e)|"
    r"(?:sorry|unfortunately), (?:but )?i\b|as an ai\b|i am an ai\b|i'm an ai\b|"
    r"(?:not|isn't) (?:appropriate|ethical|safe) to|against my (?:guidelines|policy)|unable to (?:assist|help|comply))"
)


@dataclass(frozen=True)
class GivenAnswer:
    """One row of an answers file.

    Args:
        id: The question's, without a leading ``SPLIT/``.
        text: What was answered; empty if the row has null, NaN or nothing, or if the run failed there.
        split: Question set that the row or its file names; empty if neither does.
        row: The row as it stands.
    """

    id: str
    text: str
    split: str = ""
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the run that wrote the file could not answer."""
        return self.row.get("status") == "failed"


@dataclass(frozen=True)
class AnswerFile:
    """All answers of one model under one intervention.

    Args:
        name: For tables: the file's name without extension, or the folder's.
        answers: In the order of the file.
    """

    name: str
    answers: tuple[GivenAnswer, ...]

    @property
    def intervention(self) -> str:
        """What the rows say about the intervention; empty if they do not, ``mixed`` if they disagree."""
        names = {str(answer.row["intervention"]) for answer in self.answers if answer.row.get("intervention")}
        return names.pop() if len(names) == 1 else "mixed" if names else ""


def read_answers(source: str | Path) -> AnswerFile:
    """Read an answers file, or a folder with one per question set.

    Args:
        source: JSON Lines or one JSON array, rows with ``id`` (or ``question_id``, ``image_id``, ``pid``) and
            ``answer`` (or ``text``, ``caption``). The question set is read from ``split`` (or ``category``, ``set``).
            In a folder with several ``.jsonl`` or ``.json`` files each holds one set, which its name tells:
            ``random`` of ``coco_pope_random.json``; the last word, if none is known.

    Raises:
        ConfigError: If it cannot be read, a row has no id or an answer that is not text, an id comes twice in a set, or
            there is no answer at all; the message names file and row.
    """
    path = Path(source)
    if not path.is_dir():
        return AnswerFile(path.stem, unique(read_rows(path, ""), path))
    files = [p for p in sorted(path.glob("*.json*")) if p.suffix in (".json", ".jsonl") and not is_journal(p)]
    if not files:
        raise ConfigError(f"{path} holds no .jsonl or .json file of answers.")
    words = {file: set_of_file(file) if len(files) > 1 else "" for file in files}
    rows = [answer for file in files for answer in read_rows(file, words[file])]
    return AnswerFile(path.name, unique(rows, path))


def set_of_file(path: Path) -> str:
    """Return the question set that a file's name tells: a known one among its words, or else the last word."""
    words = re.split(r"[_\-. ]", path.stem)
    return next((word for word in reversed(words) if word in SET_NAMES), words[-1])


def is_journal(path: Path) -> bool:
    """Whether a batch run wrote the file beside its answers."""
    return path.name in ("items.jsonl", "run.json") or path.name.endswith((".items.jsonl", ".run.json"))


def read_rows(path: Path, split: str) -> list[GivenAnswer]:
    """Return the answers of one file."""
    try:
        text = path.read_text(encoding="utf-8")
        array = text.lstrip().startswith("[")
        rows = json.loads(text) if array else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the answers in {path}: {error}.") from error
    return [as_answer(row, f"{path}, row {number}", split) for number, row in enumerate(rows, start=1)]


def as_answer(row: Any, where: str, split: str) -> GivenAnswer:  # noqa: ANN401 - whatever JSON holds
    """Return the answer of one row."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not an object: {row!r}.")
    key = next((str(row[name]) for name in IDS if row.get(name) not in (None, "")), None)
    if key is None:
        raise ConfigError(f"{where} has none of {', '.join(IDS)}; it has {', '.join(row) or 'nothing'}.")
    given = [name for name in TEXTS if name in row]
    if not given and row.get("status") != "failed":
        raise ConfigError(f"{where} has none of {', '.join(TEXTS)}; it has {', '.join(row)}.")
    value = row[given[0]] if given else None
    if value is None or (isinstance(value, float) and math.isnan(value)) or row.get("status") == "failed":
        value = ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {given[0]} must be text or null, got {value!r}.")
    own = next((str(row[name]) for name in SETS if row.get(name)), split)
    return GivenAnswer(key.removeprefix(f"{own}/"), value, own, row)


def unique(answers: Sequence[GivenAnswer], path: Path) -> tuple[GivenAnswer, ...]:
    """Return the answers if no id of a question set comes twice, and there is one."""
    seen = set()
    for number, answer in enumerate(answers, start=1):
        if (answer.split, answer.id) in seen:
            among = f" in {answer.split!r}" if answer.split else ""
            raise ConfigError(f"{path}, row {number}: id {answer.id!r} was there before{among}; ids must be unique.")
        seen.add((answer.split, answer.id))
    if not answers:
        raise ConfigError(f"{path} holds no answer.")
    return tuple(answers)


def match_answers(file: AnswerFile, questions: Sequence[tuple[str, str]]) -> list[GivenAnswer]:
    """Return the answer to each question.

    Args:
        file: Its answers to other sets than those of the questions are left out.
        questions: Set and id of each. With one set alone, or where no id is in two sets, answers need not name theirs.

    Raises:
        ConfigError: If questions have no answer, answers have no question, or an answer could belong to several sets.
    """
    sets = list(dict.fromkeys(split for split, _ in questions))
    of_id: dict[str, list[str]] = {}
    for split, key in questions:
        of_id.setdefault(key, []).append(split)
    asked = set(questions)
    found: dict[tuple[str, str], GivenAnswer] = {}
    unknown: list[str] = []
    others: list[str] = []
    for answer in file.answers:
        if answer.split and answer.split not in sets:
            others.append(answer.split)
            continue
        places = [answer.split] if answer.split else of_id.get(answer.id, [])
        if len(places) > 1:
            raise ConfigError(
                f"{file.name}: id {answer.id!r} is a question of {' and '.join(places)}. Give the rows a column "
                f"'split', or pass a folder with one file per set ({', '.join(f'{name}.jsonl' for name in sets)})."
            )
        if not places or (places[0], answer.id) not in asked:
            unknown.append(answer.id)
        elif (places[0], answer.id) in found:
            raise ConfigError(f"{file.name}: two answers to {answer.id!r} of {places[0]!r}; ids must be unique.")
        else:
            found[places[0], answer.id] = answer
    missing = ["/".join(part for part in question if part) for question in questions if question not in found]
    if missing:
        left_out = f" Rows of {' and '.join(sorted(set(others)))} were left out." if others else ""
        raise ConfigError(
            f"{file.name} lacks answers to {len(missing)} of {len(questions)} questions: {some(missing)}."
            f"{left_out} A run that was cut short can be continued with the same command."
        )
    if unknown:
        raise ConfigError(f"{file.name} answers {len(unknown)} questions that the data do not have: {some(unknown)}.")
    return [found[question] for question in questions]


def some(names: Sequence[str], count: int = 5) -> str:
    """Return the first of many names."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def looks_like_refusal(text: str) -> bool:
    """Whether a text holds one of the usual phrases of refusing; a screen by keywords, no benchmark's metric."""
    return REFUSAL.search(text.lower().replace("\u2019", "'")) is not None


def answer_facts(answers: Sequence[GivenAnswer]) -> dict[str, float | int | None]:
    """Return what belongs beside every score.

    Returns:
        ``answers``; ``words``, their mean number, split at white space; ``tokens``, the mean of the rows' own column,
        if all have it; how many are ``empty``, ``failed``, or ``refusals`` by keywords.
    """
    tokens = [answer.row.get("tokens") for answer in answers]
    counted = [float(number) for number in tokens if isinstance(number, int | float) and not math.isnan(number)]
    return {
        "answers": len(answers),
        "words": sum(len(answer.text.split()) for answer in answers) / len(answers),
        "tokens": sum(counted) / len(counted) if len(counted) == len(answers) else None,
        "empty": sum(not answer.text.strip() for answer in answers),
        "failed": sum(answer.failed for answer in answers),
        "refusals": sum(looks_like_refusal(answer.text) for answer in answers),
    }
