"""Where the words of an answer looked: attention to each visual token while each word was written.

The weights are those of the row that a word was read off: the last of the prompt for the first token, then the row of
each token for the one behind it. They are taken as interventions leave them, from masses and log-sum-exp; only these
rows exist.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from saccade.errors import ConfigError, DataError
from saccade.vlm.answering import Answerer, ends_of, written
from saccade.vlm.attention_function import first_rows
from saccade.vlm.call import AttentionCall
from saccade.vlm.content_words import token_pieces
from saccade.vlm.edits import ClassEdit, Edit, HeadEdit, LogitEdit, ReadingEdit, edited_gains, scaled
from saccade.vlm.intervention import check_layers
from saccade.vlm.interventions.gift_saliency import thin_weights
from saccade.vlm.interventions.var import VAR, sink_score
from saccade.vlm.model_facts import ModelFacts, read_facts
from saccade.vlm.presets import model_preset
from saccade.vlm.prompt import Prompt
from saccade.vlm.questions import Question

__all__ = ["AnswerMaps", "answer_words", "edited_weights", "map_answer", "sink_marks"]

STANDS_OUT = 5.0  # times the mean over the image: ACT's rule for tokens with too much attention


@dataclass(frozen=True)
class AnswerMaps:
    """Attention of an answer's tokens to the image.

    Args:
        text: The answer, without special tokens.
        token_ids: ``(T,)``, the end included.
        words: Words of the answer, punctuation attached.
        word_tokens: For each word, the indices of its tokens.
        weights: ``(T, V)`` float32: weight on each visual token at the step that wrote a token, mean over the layers
            and over heads; a head counts as much as a method of head outputs (VHR) lets it.
        sinks: Visual tokens that are attention sinks, bool ``(V,)``.
        sink_rule: How they were found: ``"channels"``, from the hidden state as in VAR, in most of the layers; or
            ``"weights"``, their mean weight exceeds five times that of the image.
        layers: Layers that were read.
        inputs: Model inputs of the prompt.
    """

    text: str
    token_ids: Tensor
    words: tuple[str, ...]
    word_tokens: tuple[tuple[int, ...], ...]
    weights: Tensor
    sinks: Tensor
    sink_rule: str
    layers: tuple[int, ...]
    inputs: dict[str, Tensor]

    @property
    def word_weights(self) -> Tensor:
        """Weights of each word, the mean over its tokens, ``(W, V)``."""
        rows = [self.weights[list(tokens)].mean(0) for tokens in self.word_tokens]
        return torch.stack(rows) if rows else self.weights[:0]

    @property
    def mean_weights(self) -> Tensor:
        """Mean over the words, ``(V,)``."""
        return self.word_weights.mean(0) if self.words else torch.zeros(self.weights.shape[1])

    @property
    def image_share(self) -> float:
        """Mean weight of the words on the image, 0..1."""
        return float(self.mean_weights.sum())

    @property
    def sink_share(self) -> float:
        """Mean weight of the words on sinks of the image, 0..1."""
        return float(self.mean_weights[self.sinks].sum())


@dataclass(frozen=True)
class Reading:
    """What reads an answer, in the form of an intervention that changes nothing.

    Args:
        layers: Layers to read.
        sink_channels: Channels that mark sinks, or ``None``.
        tau: Sinks exceed it.
    """

    layers: tuple[int, ...]
    sink_channels: tuple[int, ...] | None
    tau: float
    name = "reading"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return nothing: nobody has published one."""
        return {}

    def start(self, facts: ModelFacts, tokenizer: Any) -> AnswerReader:  # noqa: ANN401
        """Return the reader of a model."""
        return AnswerReader(self, facts)


class AnswerReader(ReadingEdit):
    """Reads the rows of an answer; ``stats`` has ``weights`` ``(T, V)`` and ``sinks`` ``(V,)`` under layer -1."""

    compiles = False
    reorderable = False
    needs_cache = True

    def __init__(self, reading: Reading, facts: ModelFacts) -> None:
        super().__init__("The map of an answer", facts)
        self.reading = reading
        self.needs_layer_input = reading.sink_channels is not None

    @property
    def observed_layers(self) -> frozenset[int]:
        """Those read, for the layer input."""
        return frozenset(self.reading.layers)

    @property
    def watched_layers(self) -> frozenset[int]:
        """Those read."""
        return frozenset(self.reading.layers)

    def prepare(self, prompt: Prompt) -> None:
        """Find the image."""
        super().prepare(prompt)
        if prompt.batch != 1:
            raise ConfigError(f"{self.name} is made for one prompt at a time; got a batch of {prompt.batch}.")
        self.prompt = prompt
        self.columns = prompt.image_mask.nonzero()[:, 1].unsqueeze(0)  # (1, V)
        self.rows: dict[int, Tensor] = {}
        self.sink_layers = torch.zeros(self.columns.shape[1])

    def layer_input(self, layer: int, hidden: Tensor, position: int) -> None:
        """Count the layers in which a visual token is a sink."""
        if layer not in self.reading.layers or self.reading.sink_channels is None:
            return
        found = sink_score(hidden, self.reading.sink_channels)[0].cpu() > self.reading.tau
        place = self.columns[0].cpu() - position
        inside = (place >= 0) & (place < len(found))
        self.sink_layers += found[place.clamp(0, len(found) - 1)] & inside

    def watch(self, call: AttentionCall, acting: Sequence[Edit]) -> None:
        """Add the weights of the rows that write tokens."""
        assert call.position is not None
        for row in range(max(self.prompt.last_row[0] - call.position, 0), call.queries):
            one = call.rows(row, row + 1)
            weights = edited_weights(one, acting, self.prompt, self.columns.to(call.query.device))[0, :, 0]
            scale = weights.new_ones(weights.shape[0])
            for edit in acting:
                if isinstance(edit, HeadEdit):
                    scale = scale * edit.head_scale(call.layer)[0].to(scale)
            mean = (scale @ weights / scale.sum().clamp(min=torch.finfo(scale.dtype).tiny)).cpu()
            place = call.position + row
            self.rows[place] = self.rows.get(place, torch.zeros_like(mean)) + mean / len(self.reading.layers)

    def weights(self, count: int) -> Tensor:
        """Return the weights of the first ``count`` tokens of the answer, ``(count, V)``."""
        return torch.stack([self.rows[self.prompt.length - 1 + index] for index in range(count)])


def edited_weights(call: AttentionCall, acting: Sequence[Edit], prompt: Prompt | None, columns: Tensor) -> Tensor:
    """Return the weights of one query on some keys, as edits leave them, ``(B, H, 1, V)`` float32.

    Args:
        call: The query.
        acting: Edits of the layer, in order; those of head outputs change no weight.
        prompt: The prompt; ``None`` if all edits are known to act on the query.
        columns: Places of the keys in the sequence, ``(B, V)``.
    """
    changing = [edit for edit in acting if not isinstance(edit, HeadEdit) and max(first_rows(edit, call, prompt)) == 0]
    for edit in changing:
        if isinstance(edit, LogitEdit):
            call = call.with_key(scaled(call.key, edit.factor(call)))
    weights = thin_weights(call, columns, torch.ones_like(columns, dtype=torch.bool))
    edits = [edit for edit in changing if isinstance(edit, ClassEdit)]
    if not edits:
        return weights
    found = edited_gains(call, edits, [torch.empty(0)] * len(edits))
    start = call.first_key if isinstance(call.first_key, int) else 0
    place = (columns - start).clamp(0, call.keys - 1)[:, None].expand(-1, weights.shape[1], -1)  # (B, H, V)
    labels = found.labels if found.labels.ndim == 3 else found.labels[:, None]
    label = labels.expand(-1, weights.shape[1], -1).gather(2, place).clamp(min=0)
    gain = found.gain[..., 0]
    factor = gain.gather(2, label)
    if found.log_weight is not None:
        grown = found.log_weight[:, None].expand(-1, weights.shape[1], -1).gather(2, place).exp()
        first_copy = gain.shape[2] - len(found.copies)
        for index, part in enumerate(found.copies, start=first_copy):
            factor = factor + (label == part) * gain[:, :, index, None] * grown
    return weights * factor[:, :, None]


class Forced:
    """A logits processor that allows given tokens only, one after the other."""

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids = token_ids.tolist()
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return 0 for the token of this step, minus infinity for the others."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token_ids[self.step]] = 0.0
        self.step += 1
        return forced


def map_answer(
    answerer: Answerer,
    question: Question,
    image: Image.Image,
    *,
    layers: Collection[int] | None = None,
    sink_channels: tuple[int, ...] | None = None,
    tau: float | None = None,
    token_ids: Tensor | None = None,
) -> AnswerMaps:
    """Answer a question and keep where each word looked.

    Args:
        answerer: Model and interventions.
        question: The question.
        image: Its picture, RGB.
        layers: Layers to read; ``None`` means the middle half.
        sink_channels: Channels that mark sinks; ``None`` takes VAR's, if it is among the interventions, or the
            published ones of the model; without any, sinks are found by their weight.
        tau: Sinks exceed it; ``None`` takes VAR's, or 20.
        token_ids: Write these tokens ``(T,)`` instead of the model's own, to compare methods on the same words.

    Raises:
        ConfigError: If a layer does not exist, or beams are asked for.
        DataError: If the prompt is too long, or with reason ``no_image_token`` if it has no image.
    """
    if answerer.options.num_beams > 1:
        raise ConfigError("The map of an answer follows one sequence; set num_beams to 1.")
    facts = read_facts(answerer.loaded.model)
    quarter = facts.num_layers // 4
    given = range(quarter, facts.num_layers - quarter) if layers is None else layers
    chosen = tuple(sorted(check_layers("The map of an answer", "layers", given, facts)))
    channels, limit = sink_marks(answerer, sink_channels, tau)
    reading = Reading(chosen, channels, limit)
    inputs = answerer.inputs([question], [image])
    forced = {}
    if token_ids is not None:
        forced = {"logits_processor": [Forced(token_ids)], "max_new_tokens": len(token_ids), "do_sample": False}
    with torch.inference_mode():
        ids, edits = answerer.generate(inputs, question.id, also=[reading], **forced)
    (reader,) = [edit for edit in edits if isinstance(edit, AnswerReader)]
    count = written(ids[0].tolist(), ends_of(answerer.loaded.model))
    ids = ids[0, :count].cpu()
    weights = reader.weights(count)
    if not weights.isfinite().all():
        raise DataError("the model's attention for it is not finite", reason="not_finite")
    text, words, tokens = answer_words(answerer.loaded.tokenizer, ids)
    if channels is None:
        mean = weights.mean(0)
        sinks, rule = mean > STANDS_OUT * mean.mean(), "weights"
    else:
        sinks, rule = reader.sink_layers > len(chosen) / 2, "channels"
    return AnswerMaps(text, ids, words, tokens, weights, sinks, rule, chosen, inputs)


def sink_marks(
    answerer: Answerer, sink_channels: tuple[int, ...] | None, tau: float | None
) -> tuple[tuple[int, ...] | None, float]:
    """Return channels that mark sinks, if any are known, and tau; arguments as :func:`map_answer`."""
    var = next((entry for entry in answerer.interventions if isinstance(entry, VAR)), VAR())
    preset = model_preset(read_facts(answerer.loaded.model))
    channels = sink_channels or var.sink_channels or (None if preset is None else preset.sink_channels)
    return channels, var.tau if tau is None else tau


def answer_words(tokenizer: Any, token_ids: Tensor) -> tuple[str, tuple[str, ...], tuple[tuple[int, ...], ...]]:  # noqa: ANN401
    """Return the text of an answer, its words and the indices of each word's tokens, special tokens left out."""
    special = set(tokenizer.all_special_ids)
    places = [place for place, token in enumerate(token_ids.tolist()) if token not in special]
    text, ranges = token_pieces(tokenizer, token_ids[places].tolist())
    words, tokens = [], []
    for found in re.finditer(r"\S+", text):
        own = [place for place, (a, b) in zip(places, ranges, strict=True) if a < found.end() and b > found.start()]
        words.append(found.group())
        tokens.append(tuple(own))
    return text.strip(), tuple(words), tuple(tokens)
