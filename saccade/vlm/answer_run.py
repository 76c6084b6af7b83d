"""Answers to many questions about pictures, as a batch run that survives anything."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from saccade.attention import use_backend
from saccade.batch import BatchOptions, Item, Run, RunSummary, resolve_device, resolve_precision, seed_everything
from saccade.datasets.images import read_image
from saccade.errors import DataError
from saccade.vlm.answering import Answerer, GenerationOptions
from saccade.vlm.intervene import make_intervention
from saccade.vlm.intervention import Intervention
from saccade.vlm.loading import load_vlm
from saccade.vlm.questions import Question

__all__ = ["AnswerPlan", "Outcomes", "answer_batch", "generate_answers", "items_of", "readable", "try_image"]

PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class AnswerPlan:
    """All that answers depend on besides the questions, the device and the precision.

    Args:
        model: As in :func:`saccade.vlm.load_vlm`.
        intervention: Name of a method; ``None`` decodes plainly.
        settings: Its parameters that differ from the preset.
        preset: ``"paper"`` or ``"released_code"``.
        generation: How answers are written.
        trust_remote_code: Allow a model to bring code of its own.
        seed: Seed of sampling.

    Raises:
        ConfigError: If there is no such intervention, preset or parameter.
    """

    model: str
    intervention: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    preset: str = "paper"
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.interventions()

    def interventions(self) -> list[Intervention]:
        """Return the method, if there is one."""
        if self.intervention is None:
            return []
        return [make_intervention(self.intervention, self.settings, preset=self.preset)]

    def run_settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return what a run of this plan must not mix, for its manifest."""
        return {
            "model": self.model,
            "intervention": self.intervention,
            "preset": None if self.intervention is None else self.preset,
            "settings": self.settings,
            "generation": self.generation.arguments(),
            "seed": self.seed if self.generation.samples else None,
            "precision": PRECISION_NAMES[dtype],
        }

    def title(self, device: str, dtype: torch.dtype) -> str:
        """Return what the header of a run says."""
        return f"{self.model}  {device}  {PRECISION_NAMES[dtype]}  {self.intervention or 'plain'}"

    def columns(self) -> dict[str, Any]:
        """Return the columns that every answer of this plan has."""
        return {"intervention": self.intervention or "none", "settings": self.settings}

    def answerer(self, device: str, dtype: torch.dtype) -> Answerer:
        """Load the model and check that the method fits it.

        Raises:
            ConfigError: If it does not, or the model cannot be had; see :func:`saccade.vlm.load_vlm` for other errors.
        """
        loaded = load_vlm(self.model, device=device, dtype=dtype, trust_remote_code=self.trust_remote_code)
        answerer = Answerer(loaded, self.interventions(), self.generation, self.seed)
        answerer.check()
        return answerer


class Outcomes(Protocol):
    """Where answers go: a :class:`saccade.batch.Run`, or what a process collects for one."""

    def done(self, item: Item, *, seconds: float, row: dict[str, Any]) -> None:
        """Take an answer."""

    def fail(self, item: Item, error: Exception, *, seconds: float) -> None:
        """Take the reason why there is none."""


def items_of(questions: Sequence[Question]) -> list[Item]:
    """Return the questions as items of a run, sorted by id."""
    return [Item(question.id, question.path) for question in sorted(questions, key=lambda q: q.id)]


def generate_answers(
    questions: Sequence[Question],
    plan: AnswerPlan,
    *,
    out: str | Path,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Answer questions and write one row per question.

    Rows have ``id``, ``image``, ``prompt``, ``answer``, ``intervention``, ``settings``, ``tokens``, ``seconds``, the
    other columns of the question, and as every table ``path`` (the id), ``status`` and ``error``. A question whose
    picture cannot be read, or whose prompt does not fit, is a failed row. A second call continues the first.

    Args:
        questions: Unique ids; see :func:`saccade.vlm.read_questions`.
        plan: Model, method and way of writing.
        out: Table, e.g. ``answers.jsonl``.
        options: Device, batch size, shard and the like; the seed is the plan's.

    Raises:
        ConfigError: If something is wrong that concerns all questions; nothing has been written then.
    """
    options = options or BatchOptions(batch_size=8)
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    by_id = {question.id: question for question in questions}
    run = Run(
        "vlm generate",
        items=items_of(questions),
        out=out,
        settings=plan.run_settings(dtype),
        options=options,
        table=Path(out),
        title=plan.title(str(device), dtype),
        unit="questions",
    )
    if options.dry_run:
        with run:
            return run.summary
    seed_everything(plan.seed, deterministic=options.deterministic)
    answerer = plan.answerer(str(device), dtype)
    with run, use_backend(options.attention_backend):
        size = 1 if plan.generation.samples else options.batch_size
        for items, images in readable(run, size, options.workers):
            answer_batch(run, answerer, [by_id[item.id] for item in items], items, images, plan.columns())
    return run.summary


def readable(run: Run, size: int, workers: int) -> Iterator[tuple[list[Item], list[Image.Image]]]:
    """Yield the pending items with their pictures, some at a time; those whose picture is broken are failed."""
    pending = run.pending
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for start in range(0, len(pending), size):
            batch = pending[start : start + size]
            items, images = [], []
            for item, found in zip(batch, pool.map(try_image, [item.path for item in batch]), strict=True):
                if isinstance(found, DataError):
                    run.fail(item, found)
                else:
                    items.append(item)
                    images.append(found)
            if items:
                yield items, images


def try_image(path: Path) -> Image.Image | DataError:
    """Return a picture, or why there is none."""
    try:
        return read_image(path)
    except DataError as error:
        return error


def answer_batch(
    run: Outcomes,
    answerer: Answerer,
    questions: Sequence[Question],
    items: Sequence[Item],
    images: Sequence[Image.Image],
    named: dict[str, Any],
) -> None:
    """Answer a batch; in halves if memory runs out or one of its questions cannot be answered."""
    started = time.monotonic()
    try:
        answers = answerer.answer(questions, images)
    except (DataError, torch.OutOfMemoryError) as error:
        if len(items) == 1:
            if not isinstance(error, DataError):
                raise
            run.fail(items[0], error, seconds=time.monotonic() - started)
            return
        middle = len(items) // 2
        for half in (slice(None, middle), slice(middle, None)):
            answer_batch(run, answerer, questions[half], items[half], images[half], named)
        return
    seconds = (time.monotonic() - started) / len(items)
    for item, question, answer in zip(items, questions, answers, strict=True):
        row = {
            "id": question.id,
            "image": question.image,
            "prompt": question.prompt,
            "answer": answer.text,
            **named,
            "tokens": answer.tokens,
            "seconds": round(seconds, 3),
            **question.extra,
        }
        run.done(item, seconds=seconds, row=row)
