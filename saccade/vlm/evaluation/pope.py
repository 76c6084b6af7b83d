"""POPE: is the model's yes or no about an object right.

Li et al., "Evaluating object hallucination in large vision-language models", EMNLP 2023 (arXiv:2305.10355);
RUCAIBox/POPE (MIT) at 3df3ba1; the third scoring is that of EvolvingLMMs-Lab/lmms-eval (MIT) at 75571cf.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saccade.errors import ConfigError, suggest
from saccade.vlm.evaluation.answers import AnswerFile, GivenAnswer, answer_facts, match_answers, set_of_file
from saccade.vlm.evaluation.pope_questions import POPE_SETS, POPEQuestion
from saccade.vlm.evaluation.statistics import Floats, Key, Measured, ratio
from saccade.vlm.questions import Question, json_rows

__all__ = ["POPE_SCORINGS", "measure_pope", "pope_answer", "pope_prompts", "pope_scores", "read_pope"]

POPE_SCORINGS = ("official", "strict", "lmms_eval")
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
# cells of a set: said yes and yes is right, yes/no, no/no, no/yes, neither/yes, neither/no
TP, FP, TN, FN, OPEN_YES, OPEN_NO = range(6)
CELLS = 6


def read_pope(source: str | Path) -> list[POPEQuestion]:
    """Read questions with their labels.

    Args:
        source: A file in one of POPE's two layouts, JSON Lines or one JSON array, rows with ``question_id`` (or
            ``id``), ``image``, ``text`` (or ``prompt``, ``question``) and ``label``; its set is the rows' ``split`` or
            ``category``, or what the file's name tells. Or a folder: its files with ``random``, ``popular`` and
            ``adversarial`` in their names, or else ``questions.jsonl``.

    Raises:
        ConfigError: If nothing is found, two files are of one set, a row lacks something, a label is neither yes nor
            no, or an id comes twice in a set.
    """
    path = Path(source)
    files = pope_files(path) if path.is_dir() else [path]
    questions: dict[tuple[str, str], POPEQuestion] = {}
    for file in files:
        try:
            rows = json_rows(file.read_text(encoding="utf-8"), file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the questions in {file}: {error}.") from error
        for number, row in enumerate(rows, start=1):
            question = as_question(row, f"{file}, row {number}", set_of_file(file))
            if (question.split, question.id) in questions:
                raise ConfigError(f"{file}, row {number}: id {question.id!r} was there before; ids must be unique.")
            questions[question.split, question.id] = question
    if not questions:
        raise ConfigError(f"{path} holds no question.")
    return list(questions.values())


def pope_files(folder: Path) -> list[Path]:
    """Return the question files of a folder, in the order of ``POPE_SETS``."""
    candidates = [path for path in sorted(folder.glob("*.json*")) if set_of_file(path) in POPE_SETS]
    of_set = {name: [path for path in candidates if set_of_file(path) == name] for name in POPE_SETS}
    for name, paths in of_set.items():
        if len(paths) > 1:
            raise ConfigError(f"{folder} has several files of the set {name!r}: {', '.join(p.name for p in paths)}.")
    merged = folder / "questions.jsonl"
    files = [path for paths in of_set.values() for path in paths] or ([merged] if merged.is_file() else [])
    if not files:
        raise ConfigError(f"{folder} has no file named after random, popular or adversarial, and no questions.jsonl.")
    return files


def as_question(row: Any, where: str, split: str) -> POPEQuestion:  # noqa: ANN401 - whatever JSON holds
    """Return the question of one row."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not an object: {row!r}.")
    spellings = {
        "id": ("question_id", "id"),
        "image": ("image",),
        "text": ("text", "prompt", "question"),
        "label": ("label",),
    }
    found = {}
    for name, words in spellings.items():
        value = next((str(row[word]) for word in words if row.get(word) not in (None, "")), None)
        if value is None:
            raise ConfigError(f"{where} has no {' or '.join(words)}; it has {', '.join(row) or 'nothing'}.")
        found[name] = value
    label = found["label"].strip().lower()
    if label not in ("yes", "no"):
        raise ConfigError(f"{where}: label must be yes or no, got {found['label']!r}.")
    own = str(row.get("split") or row.get("category") or split)
    return POPEQuestion(own, found["id"].removeprefix(f"{own}/"), found["image"], found["text"], label)


def pope_prompts(questions: Sequence[POPEQuestion], image_folder: str | Path) -> list[Question]:
    """Return the questions as :func:`saccade.vlm.generate_answers` takes them; set and label go into the answers."""
    folder = Path(image_folder)
    return [
        Question(f"{q.split}/{q.id}", q.image, q.text, folder / q.image, {"split": q.split, "label": q.label})
        for q in questions
    ]


def pope_answer(text: str, scoring: str = "official") -> str:
    """Return ``yes``, ``no``, or an empty string for neither.

    ``official``: of the text before the first full stop, without commas, ``no`` if a word is exactly No, no or not,
    else ``yes``; so an empty answer is a yes, and so is "NO". ``strict``: the first word, whatever its case.
    ``lmms_eval``: the whole answer, whatever its case; "yes." is neither.

    Raises:
        ConfigError: If there is no scoring of this name.
    """
    if scoring == "official":
        words = text.partition(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    if scoring == "strict":
        first = re.match(r"\W*([a-z]+)(?!['\u2019]?\w)", text.lower())
        word = "" if first is None else first[1]
    elif scoring == "lmms_eval":
        word = text.lower().strip()
    else:
        raise ConfigError(f"POPE has no scoring {scoring!r}.{suggest(scoring, POPE_SCORINGS)}")
    return word if word in ("yes", "no") else ""


def cell(label: str, said: str) -> int:
    """Return in which cell an answer counts."""
    if not said:
        return OPEN_YES if label == "yes" else OPEN_NO
    if said == "yes":
        return TP if label == "yes" else FP
    return FN if label == "yes" else TN


def pope_scores(sums: Floats, scoring: str = "official") -> dict[str, Floats]:
    """Return the scores of one question set.

    Accuracy is over all questions, precision over those answered yes, recall over those whose answer is yes. An answer
    that is neither is wrong. What would be divided by zero is 0. ``lmms_eval`` leaves such answers out of recall, and
    its yes ratio is that of the labels; elsewhere it is that of the answers.

    Args:
        sums: ``(..., 6)``: answered yes of label yes, yes of no, no of no, no of yes, neither of yes, neither of no.
        scoring: One of ``POPE_SCORINGS``.
    """
    tp, fp, tn, fn, open_yes, _ = np.moveaxis(sums, -1, 0)
    whole = sums.sum(-1)
    positive = tp + fn if scoring == "lmms_eval" else tp + fn + open_yes
    said_yes = tp + fn + open_yes if scoring == "lmms_eval" else tp + fp
    precision, recall = ratio(tp, tp + fp), ratio(tp, positive)
    return {
        "accuracy": ratio(tp + tn, whole),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(said_yes, whole),
    }


def measure_pope(questions: Sequence[POPEQuestion], file: AnswerFile, *, scoring: str = "official") -> Measured:
    """Count the answers of a file; units are images.

    Returns:
        Scores ``accuracy``, ``precision``, ``recall``, ``f1`` and ``yes_ratio`` of each set, and their mean over the
        sets as group ``macro`` if there are several. Facts say how many answers are ``unparsed``: not yes or no by
        the strict rule, whatever the scoring.

    Raises:
        ConfigError: As :func:`saccade.vlm.evaluation.match_answers` does, or if there is no such scoring.
    """
    answers = match_answers(file, [(question.split, question.id) for question in questions])
    sets = tuple(dict.fromkeys(question.split for question in questions))
    units = tuple(dict.fromkeys(question.image for question in questions))
    place = {image: row for row, image in enumerate(units)}
    counts = np.zeros((len(units), len(sets), CELLS))
    right: dict[str, list[bool]] = {name: [] for name in sets}
    rows = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        said = pope_answer(answer.text, scoring)
        counts[place[question.image], sets.index(question.split), cell(question.label, said)] += 1
        right[question.split].append(said == question.label)
        rows.append(as_row(number, question, answer, said, scoring))

    def statistic(sums: Floats) -> Mapping[Key, Floats]:
        """Return the scores of every set and their mean."""
        tables = sums.reshape(*sums.shape[:-1], len(sets), CELLS)
        by_set = [pope_scores(tables[..., i, :], scoring) for i in range(len(sets))]
        scores = {(name, metric): by_set[i][metric] for i, name in enumerate(sets) for metric in METRICS}
        if len(sets) > 1:
            for metric in METRICS:
                scores["macro", metric] = np.mean([part[metric] for part in by_set], 0)
        return scores

    outcomes = {(name, "accuracy"): np.array(found) for name, found in right.items()}
    if (
        len({len(found) for found in right.values()}) == 1 < len(sets)
    ):  # then the mean of the sets is that of all answers
        outcomes["macro", "accuracy"] = np.concatenate(list(outcomes.values()))
    return Measured(
        file.name,
        file.intervention,
        units,
        counts.reshape(len(units), -1),
        statistic,
        outcomes,
        {**answer_facts(answers), "unparsed": sum(not pope_answer(answer.text, "strict") for answer in answers)},
        rows,
    )


def as_row(number: int, question: POPEQuestion, answer: GivenAnswer, said: str, scoring: str) -> dict[str, Any]:
    """Return a row with lmms-eval's names of a sample, and ours."""
    score = {
        "question_id": question.id,
        "score": float(said == question.label),
        "prediction": answer.text.lower().strip() if scoring == "lmms_eval" else said,
        "ground_truth": question.label,
    }
    return {
        "doc_id": number,
        "target": question.label,
        "resps": [[answer.text]],
        "filtered_resps": [answer.text],
        **{f"pope_{metric}": score for metric in ("accuracy", "precision", "recall", "f1_score", "yes_ratio")},
        "split": question.split,
        "question_id": question.id,
        "image": question.image,
        "text": question.text,
        "unparsed": not pope_answer(answer.text, "strict"),
    }
