"""Questions about pictures, one JSON object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.errors import ConfigError

__all__ = ["Question", "read_questions"]


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Args:
        id: Unique among the questions.
        image: Picture file, as the row has it.
        prompt: The user's words.
        path: Where the picture is.
        extra: Other columns of the row, e.g. ``label``; they are carried into the answers.
    """

    id: str
    image: str
    prompt: str
    path: Path
    extra: dict[str, Any] = field(default_factory=dict)


def read_questions(file: str | Path, *, image_folder: str | Path | None = None) -> list[Question]:
    """Read a file of questions.

    Args:
        file: JSON Lines, or one JSON array, of objects with ``id`` (or ``question_id``), ``image`` and ``prompt`` (or
            ``text``).
        image_folder: Where relative image paths begin; ``None`` means beside the file.

    Raises:
        ConfigError: If a row lacks one of them, or an id comes twice; the message names the row.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the questions in {path}: {error}.") from error
    folder = path.parent if image_folder is None else Path(image_folder)
    found: dict[str, Question] = {}
    for number, row in enumerate(json_rows(text, path), start=1):
        question = as_question(row, f"{path}, row {number}", folder)
        if question.id in found:
            raise ConfigError(f"{path}, row {number}: id {question.id!r} was there before; ids must be unique.")
        found[question.id] = question
    if not found:
        raise ConfigError(f"{path} holds no question.")
    return list(found.values())


def json_rows(text: str, path: Path) -> list[Any]:
    """Return the objects of JSON Lines or of one array."""
    try:
        if text.lstrip().startswith("["):
            rows: list[Any] = json.loads(text)
            return rows
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"{path} is neither JSON Lines nor a JSON array: {error}.") from error


def as_question(row: Any, where: str, folder: Path) -> Question:  # noqa: ANN401
    """Return the question of one row."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not an object: {row!r}.")
    names = {"id": ("id", "question_id"), "image": ("image",), "prompt": ("prompt", "text")}
    values: dict[str, str] = {}
    for name, spellings in names.items():
        given = next((row[spelling] for spelling in spellings if spelling in row), None)
        if given is None or not str(given).strip():
            raise ConfigError(f"{where} has no {' or '.join(spellings)}; it has {', '.join(row) or 'nothing'}.")
        values[name] = str(given)
    known = {spelling for spellings in names.values() for spelling in spellings}
    extra = {name: value for name, value in row.items() if name not in known}
    return Question(values["id"], values["image"], values["prompt"], folder / values["image"], extra)
