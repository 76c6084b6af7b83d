"""Answers to many questions about pictures, as a batch run that survives anything."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saccade.attention import use_backend
from saccade.batch import BatchOptions, Item, Run, RunSummary, resolve_device, resolve_precision, seed_everything
from saccade.datasets.images import read_image
from saccade.errors import ConfigError, DataError
from saccade.vlm.intervene import intervene, make_intervention
from saccade.vlm.intervention import Intervention
from saccade.vlm.loading import LoadedVLM, load_vlm
from saccade.vlm.model_facts import read_facts
from saccade.vlm.questions import Question

__all__ = ["Answer", "Answerer", "GenerationOptions", "generate_answers"]

PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are written; the words are those of Hugging Face.

    Args:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token, above it samples.
        top_p: Sample from the likeliest tokens that have this probability together.
        num_beams: Beams; 1 is none.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ConfigError("max_new_tokens and num_beams must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature must be 0 or more, top_p above 0 and at most 1.")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        drawing = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.samples else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.samples,
            **drawing,
        }


@dataclass(frozen=True)
class Answer:
    """An answer.

    Args:
        text: Without special tokens and white space around it.
        tokens: How many were generated, the end included.
    """

    text: str
    tokens: int


@dataclass(frozen=True)
class Answerer:
    """A model that answers questions about pictures under interventions.

    Args:
        loaded: Model and processor.
        interventions: In the order in which they act; none is plain decoding.
        options: How answers are written.
        seed: Seed of sampling; each question draws from a stream of its own.
    """

    loaded: LoadedVLM
    interventions: Sequence[Intervention] = ()
    options: GenerationOptions = field(default_factory=GenerationOptions)
    seed: int = 0

    def check(self) -> None:
        """Raise now if an intervention does not fit the model.

        Raises:
            ConfigError: As :func:`saccade.vlm.intervene` does on entering.
        """
        facts = read_facts(self.loaded.model)
        for intervention in self.interventions:
            intervention.start(facts, self.loaded.processor)

    def prompt(self, text: str) -> str:
        """Return a user's words in the model's chat template, with the placeholder of one picture."""
        processor = self.loaded.processor
        token = str(vars(processor).get("image_token") or "<image>")
        if token in text:
            return text
        if processor.chat_template is None:
            return f"{token}\n{text}"
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rendered: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return rendered

    def inputs(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the model inputs of some questions, left-padded.

        Raises:
            DataError: With reason ``prompt_too_long`` if one does not fit into the context with its answer.
        """
        prompts = [self.prompt(question.prompt) for question in questions]
        encoded = self.loaded.processor(
            images=[[image] for image in images], text=prompts, padding=True, padding_side="left", return_tensors="pt"
        )
        length = encoded["input_ids"].shape[1]
        context = self.loaded.context
        if context is not None and length + self.options.max_new_tokens > context:
            raise DataError(
                f"the prompt has {length} tokens, which with {self.options.max_new_tokens} of the answer is more than "
                f"the model's {context}",
                reason="prompt_too_long",
            )
        model = self.loaded.model
        moved = {}
        for name, tensor in encoded.items():
            moved[name] = tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        return moved

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[Answer]:
        """Answer some questions at once.

        Raises:
            DataError: If a prompt is too long, or lacks the image that an intervention needs.
        """
        inputs = self.inputs(questions, images)
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if self.options.samples:
            digest = hashlib.sha256(f"{self.seed} {questions[0].id}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        context: AbstractContextManager[Any] = nullcontext()
        if self.interventions:
            context = intervene(model, *self.interventions, tokenizer=self.loaded.processor)
        with context:
            generate: Any = model.generate
            ids: Tensor = generate(**inputs, **self.options.arguments(), pad_token_id=tokenizer.pad_token_id)
        given = inputs["input_ids"]
        returned = torch.equal(ids[:, : given.shape[1]], given)  # most families return the prompt as well
        new = ids[:, given.shape[1] :] if returned else ids
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        ends = ends_of(model)
        return [Answer(text.strip(), written(row, ends)) for text, row in zip(texts, new.tolist(), strict=True)]


def ends_of(model: Any) -> set[int]:  # noqa: ANN401
    """Return the ids of tokens that end an answer."""
    given = model.generation_config.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)


def written(row: Sequence[int], ends: set[int]) -> int:
    """Return the number of tokens up to the first end, which counts."""
    return next((place + 1 for place, token in enumerate(row) if token in ends), len(row))


def generate_answers(
    questions: Sequence[Question],
    *,
    model: str,
    out: str | Path,
    intervention: str | None = None,
    settings: dict[str, Any] | None = None,
    preset: str = "paper",
    generation: GenerationOptions | None = None,
    trust_remote_code: bool = False,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Answer questions and write one row per question.

    Rows have ``id``, ``image``, ``prompt``, ``answer``, ``intervention``, ``settings``, ``tokens``, ``seconds``, the
    other columns of the question, and as every table ``path`` (the id), ``status`` and ``error``. A question whose
    picture cannot be read, or whose prompt does not fit, is a failed row. A second call continues the first.

    Args:
        questions: Unique ids; see :func:`saccade.vlm.read_questions`.
        model: As in :func:`saccade.vlm.load_vlm`.
        out: Table, e.g. ``answers.jsonl``.
        intervention: Name of a method; ``None`` decodes plainly.
        settings: Its parameters that differ from the preset.
        preset: ``"paper"`` or ``"released_code"``.
        generation: How answers are written.
        trust_remote_code: Allow a model to bring code of its own.
        options: Device, batch size, shard and the like.

    Raises:
        ConfigError: If something is wrong that concerns all questions; nothing has been written then.
    """
    options = options or BatchOptions(batch_size=8)
    generation = generation or GenerationOptions()
    methods = [] if intervention is None else [make_intervention(intervention, settings, preset=preset)]
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    by_id = {question.id: question for question in questions}
    run_settings = {
        "model": model,
        "intervention": intervention,
        "preset": preset if methods else None,
        "settings": settings or {},
        "generation": generation.arguments(),
        "seed": options.seed if generation.samples else None,
        "precision": PRECISION_NAMES[dtype],
    }
    title = f"{model}  {device}  {PRECISION_NAMES[dtype]}  {intervention or 'plain'}"
    run = Run(
        "vlm generate",
        items=[Item(question.id, question.path) for question in sorted(questions, key=lambda q: q.id)],
        out=out,
        settings=run_settings,
        options=options,
        table=Path(out),
        title=title,
        unit="questions",
    )
    if options.dry_run:
        with run:
            return run.summary
    seed_everything(options.seed, deterministic=options.deterministic)
    loaded = load_vlm(model, device=str(device), dtype=dtype, trust_remote_code=trust_remote_code)
    answerer = Answerer(loaded, methods, generation, options.seed)
    answerer.check()
    named = {"intervention": intervention or "none", "settings": settings or {}}
    with run, use_backend(options.attention_backend):
        size = 1 if generation.samples else options.batch_size
        for items, images in readable(run, size, options.workers):
            answer_batch(run, answerer, [by_id[item.id] for item in items], items, images, named)
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
    run: Run,
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
