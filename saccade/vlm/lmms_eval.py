"""A model under interventions for lmms-eval, whose tasks then run with ``--model saccade``.

lmms-eval finds it by this package's entry point in the group ``lmms_eval.models``::

    lmms-eval --model saccade --model_args pretrained=local-dir:llava,intervention=var --tasks pope

Written for lmms-eval 0.7 (EvolvingLMMs-Lab/lmms-eval, MIT), which saccade does not depend on: its base class is
imported when the class is asked for.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from saccade.batch import resolve_device, resolve_precision
from saccade.errors import ConfigError
from saccade.vlm.answer_run import AnswerPlan
from saccade.vlm.answering import Answerer, GenerationOptions
from saccade.vlm.questions import Question

__all__ = ["answer_requests", "manifest"]

CLASS = "SaccadeModel"
GENERATION = ("max_new_tokens", "temperature", "top_p", "num_beams")


def manifest() -> Any:  # noqa: ANN401 - lmms-eval's ModelManifest
    """Return what lmms-eval's registry wants to know; called by the entry point."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="saccade", simple_class_path=f"{__name__}.{CLASS}")


def __getattr__(name: str) -> object:
    """Return the model's class, which needs lmms-eval."""
    if name == CLASS:
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def answer_requests(answerer: Answerer, requests: Sequence[Any], task_dict: Any, batch_size: int = 1) -> list[str]:  # noqa: ANN401
    """Answer requests of lmms-eval, in their order.

    Args:
        answerer: Model and interventions; its way of writing holds where a request says nothing.
        requests: Instances whose ``args`` are context, arguments of ``generate`` and ``until``, a function from a
            record to its pictures, and the record's place: id, task, split.
        task_dict: Records by task, split and id.
        batch_size: Requests answered at once, if they ask for the same way of writing.

    Raises:
        ConfigError: If a record has no picture or several.
    """
    texts = [""] * len(requests)
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
    for places in groups.values():
        arguments = requests[places[0]].args[1]
        given = {name: arguments[name] for name in GENERATION if arguments.get(name) is not None}
        way = replace(answerer, options=replace(answerer.options, **given))
        until = arguments.get("until") or []
        size = 1 if way.options.samples else batch_size
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            asked = [question_of(requests[place], task_dict) for place in batch]
            answers = way.answer([question for question, _ in asked], [image for _, image in asked])
            for place, answer in zip(batch, answers, strict=True):
                texts[place] = cut(answer.text, [until] if isinstance(until, str) else until)
    return texts


def question_of(request: Any, task_dict: Any) -> tuple[Question, Image.Image]:  # noqa: ANN401
    """Return the question of a request and its picture."""
    context, _, visuals_of, record, task, split = request.args
    visuals = visuals_of(task_dict[task][split][record])
    if len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
        raise ConfigError(
            f"Task {task}, record {record}: saccade's model for lmms-eval answers questions about one picture; "
            f"got {len(visuals)} visuals."
        )
    name = f"{task}/{split}/{record}"
    return Question(name, name, context, Path(name)), visuals[0].convert("RGB")


def cut(text: str, ends: Sequence[str]) -> str:
    """Return the text before the first of some strings."""
    for end in ends:
        text = text.split(end)[0] if end else text
    return text


@functools.cache
def model_class() -> type:
    """Return the class that lmms-eval makes models of."""
    base: Any = importlib.import_module("lmms_eval.api.model").lmms

    class SaccadeModel(base):  # type: ignore[misc]
        """A Hugging Face model under an intervention, as lmms-eval calls it.

        Args:
            pretrained: As in :func:`saccade.vlm.load_vlm`.
            intervention: Name of a method; ``None`` decodes plainly.
            settings: Its parameters that differ from the preset, a file with a JSON object.
            preset: ``"paper"`` or ``"released_code"``.
            batch_size: Requests answered at once.
            device: As of every command.
            precision: As of every command.
            trust_remote_code: Allow a model to bring code of its own.
            others: What lmms-eval passes besides; only ``max_batch_size`` may be there, and is not used.
        """

        def __init__(
            self,
            pretrained: str,
            intervention: str | None = None,
            settings: str | None = None,
            preset: str = "paper",
            batch_size: int | str = 1,
            device: str = "auto",
            precision: str = "auto",
            trust_remote_code: bool = False,
            **others: Any,  # noqa: ANN401
        ) -> None:
            super().__init__()
            unknown = sorted(set(others) - {"max_batch_size"})
            if unknown:
                raise ConfigError(f"--model_args of saccade has no {', '.join(unknown)}.")
            values = {} if settings is None else json.loads(Path(settings).read_text(encoding="utf-8"))
            plan = AnswerPlan(
                pretrained, intervention, values, preset, GenerationOptions(1024), trust_remote_code=trust_remote_code
            )
            where = resolve_device(device)
            self.answerer = plan.answerer(str(where), resolve_precision(precision, where))
            self.batch_size = int(batch_size)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Return an answer to each request."""
            return answer_requests(self.answerer, requests, self.task_dict, self.batch_size)

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Refuse tasks of several rounds."""
            raise NotImplementedError("saccade's model for lmms-eval answers single questions.")

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Refuse tasks that compare likelihoods."""
            raise NotImplementedError("saccade's model for lmms-eval writes answers; it compares no likelihoods.")

    SaccadeModel.__qualname__ = CLASS
    return SaccadeModel
