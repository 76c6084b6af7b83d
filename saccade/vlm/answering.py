"""A model that answers questions about pictures under interventions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saccade.errors import ConfigError, DataError
from saccade.vlm.edits import Edit
from saccade.vlm.intervene import Intervening, intervene
from saccade.vlm.intervention import Intervention
from saccade.vlm.loading import LoadedVLM
from saccade.vlm.model_facts import read_facts
from saccade.vlm.questions import Question

__all__ = ["Answer", "Answerer", "GenerationOptions", "ends_of", "written"]


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

    def reference_ids(self, text: str) -> Tensor:
        """Return the token ids of a known answer, as they would stand behind the prompt, ``(T,)``."""
        ids: list[int] = self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[Answer]:
        """Answer some questions at once.

        Raises:
            DataError: If a prompt is too long, or lacks the image that an intervention needs.
        """
        new, _ = self.generate(self.inputs(questions, images), questions[0].id)
        texts = self.loaded.tokenizer.batch_decode(new, skip_special_tokens=True)
        ends = ends_of(self.loaded.model)
        return [Answer(text.strip(), written(row, ends)) for text, row in zip(texts, new.tolist(), strict=True)]

    def generate(
        self,
        inputs: dict[str, Tensor],
        name: str,
        *,
        also: Sequence[Intervention] = (),
        **options: Any,  # noqa: ANN401 - arguments of transformers' generate
    ) -> tuple[Tensor, list[Edit]]:
        """Generate under the interventions.

        Args:
            inputs: From :meth:`inputs`.
            name: Id of the question whose stream of random numbers is drawn from.
            also: More of them, which act last.
            options: Arguments of ``generate`` that differ from :attr:`options`.

        Returns:
            The new tokens, ``(B, T)``, and the edits with what they found.
        """
        model = self.loaded.model
        if self.options.samples:
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        acting = [*self.interventions, *also]
        context: Intervening | AbstractContextManager[None] = nullcontext()
        if acting:
            context = intervene(model, *acting, tokenizer=self.loaded.processor)
        with context:
            generate: Any = model.generate
            settings = {**self.options.arguments(), "pad_token_id": self.loaded.tokenizer.pad_token_id, **options}
            ids: Tensor = generate(**inputs, **settings)
        given = inputs["input_ids"]
        returned = torch.equal(ids[:, : given.shape[1]], given)  # most families return the prompt as well
        return (ids[:, given.shape[1] :] if returned else ids), context.edits if isinstance(
            context, Intervening
        ) else []


def ends_of(model: Any) -> set[int]:  # noqa: ANN401
    """Return the ids of tokens that end an answer."""
    given = model.generation_config.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)


def written(row: Sequence[int], ends: set[int]) -> int:
    """Return the number of tokens up to the first end, which counts."""
    return next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
