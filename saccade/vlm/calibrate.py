"""Settings that depend on the model, found by running it on a few prompts: sink channels and layers.

Both rules are ours, in the spirit of the papers: VAR's authors looked for channels in the model's activations, GIFT's
for layers in which the shares of attention move together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.errors import ConfigError
from saccade.vlm.call import AttentionCall, TokenTable
from saccade.vlm.content_words import question_mask
from saccade.vlm.edits import ReadingEdit
from saccade.vlm.engine import Engine
from saccade.vlm.interventions.gift_saliency import SaliencyReader
from saccade.vlm.model_facts import ModelFacts, read_facts
from saccade.vlm.prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GIFTLayers", "find_sink_channels", "select_gift_layers"]


class ChannelReader(ReadingEdit):
    """Counts how often a channel of the first token stands out."""

    needs_layer_input = True
    needs_image = False

    def __init__(self, facts: ModelFacts, tau: float) -> None:
        super().__init__("the search for sink channels", facts)
        self.tau = tau
        self.prompts = 0
        quarter = facts.num_layers // 4
        self.middle = range(max(quarter, 1), max(facts.num_layers - quarter, 2))
        self.counts = torch.zeros(facts.hidden_size)

    def prepare(self, prompt: Prompt) -> None:
        """Note where the prompts begin."""
        super().prepare(prompt)
        self.first = prompt.valid.long().argmax(1)
        self.prompts += prompt.batch

    def layer_input(self, layer: int, hidden: Tensor, position: int) -> None:
        """Count the channels of the first token that exceed tau in the middle layers."""
        if layer in self.middle and position == 0:
            first = hidden[torch.arange(hidden.shape[0], device=hidden.device), self.first.to(hidden.device)].float()
            size = first.abs() / (first.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            self.counts += (size > self.tau).sum(0).cpu()

    def channels(self) -> tuple[int, ...]:
        """Return the channels that stand out in most middle layers."""
        share = self.counts / (self.prompts * len(self.middle))
        return tuple(int(channel) for channel in (share > 0.5).nonzero()[:, 0])


@dataclass(frozen=True)
class GIFTLayers:
    """Proposed layers for GIFT, and the figures they follow from, one for each layer, means over prompts.

    Args:
        saliency_layers: The layer with the largest rise of attention to the image over the content words.
        enhancement_layers: The longest run of middle layers in which the shares of image and question at the last token
            rise and fall together.
        rise: ``sum_j mean_i max(a_ij - a_(i-1)j, 0)`` over image tokens j, upper half of the heads, ``(L,)``.
        visual_share: Weight of the last token on the image, mean over heads, ``(L,)``.
        question_share: The same on the question, ``(L,)``.
    """

    saliency_layers: tuple[int, ...]
    enhancement_layers: tuple[int, ...]
    rise: Tensor
    visual_share: Tensor
    question_share: Tensor


class ShareReader(ReadingEdit):
    """Reads the rise of attention to the image and the shares at the last token."""

    whole_prompt = True

    def __init__(self, facts: ModelFacts, tokenizer: Any) -> None:  # noqa: ANN401
        super().__init__("the search for layers", facts)
        self.tokenizer = tokenizer
        self.prompts = 0
        self.rise, self.visual, self.question = (torch.zeros(facts.num_layers) for _ in range(3))

    def prepare(self, prompt: Prompt) -> None:
        """Find image and question."""
        super().prepare(prompt)
        question = prompt.query_mask if prompt.query_mask is not None else question_mask(prompt, self.tokenizer)
        labels = torch.where(prompt.image_mask, 0, torch.where(question, 1, 2)).masked_fill(~prompt.valid, -1)
        self.labels = TokenTable(labels, 2)
        self.last = torch.tensor(prompt.last_row)
        self.prompt, self.content = prompt, question & ~prompt.image_mask
        self.prompts += prompt.batch

    def observe(self, call: AttentionCall) -> None:
        """Read a layer."""
        if call.position != 0:
            return
        reader = SaliencyReader(self.prompt, self.content, [call.layer])
        reader.read(call)
        self.rise[call.layer] += float(reader.rise().sum())
        rows = self.last.unique()
        parts = call.pick(rows.to(call.query.device)).partitioned(self.labels.columns(call).to(call.query.device), 3)
        mass = parts.class_mass.mean(1).cpu()  # (B, C, R)
        own = mass[torch.arange(len(self.last)), :, torch.searchsorted(rows, self.last)]  # (B, C)
        self.visual[call.layer] += float(own[:, 0].sum())
        self.question[call.layer] += float(own[:, 1].sum())

    def proposal(self) -> GIFTLayers:
        """Return the proposal."""
        rise, visual, question = (t / self.prompts for t in (self.rise, self.visual, self.question))
        quarter = self.facts.num_layers // 4
        together = (visual.diff() * question.diff() > 0).tolist()  # between layers l and l + 1
        best: tuple[int, ...] = (self.facts.num_layers // 2,)
        run: tuple[int, ...] = ()
        for layer in range(quarter, self.facts.num_layers - quarter):
            continues = bool(run) and together[layer - 1]
            run = (*run, layer) if continues else (layer,)
            best = run if len(run) > len(best) else best
        return GIFTLayers((int(rise.argmax()),), best, rise, visual, question)


@contextlib.contextmanager
def reading(model: PreTrainedModel, facts: ModelFacts, edit: ReadingEdit, query_mask: Tensor | None) -> Iterator[None]:
    """Let an edit read a model for a while."""
    engine = Engine(model, facts, None, query_mask)
    engine.set_edits([edit])
    engine.install()
    try:
        yield
    finally:
        engine.remove()


@torch.no_grad()
def find_sink_channels(
    model: PreTrainedModel, prompts: Iterable[dict[str, Tensor]], *, tau: float = 20.0
) -> tuple[int, ...]:
    """Find the channels that mark attention sinks, VAR's ``sink_channels``.

    They are the channels of the first token whose size, relative to the root mean square of the token, exceeds tau in
    most of the middle layers (the middle half) and prompts. The rule is ours.

    Args:
        model: A model of transformers in eval mode.
        prompts: Model inputs, a few are enough; with or without images.
        tau: As in :class:`saccade.vlm.VAR`.

    Returns:
        Channels, ascending.

    Raises:
        ConfigError: If no channel stands out.
    """
    facts = read_facts(model)
    reader = ChannelReader(facts, tau)
    with reading(model, facts, reader, None):
        for inputs in prompts:
            model(**inputs)
    channels = reader.channels()
    if not channels:
        raise ConfigError(
            f"No channel of {facts.name} exceeds {tau:g} times the root mean square in most middle layers. The model "
            "may have no such sinks, or tau is too high for its width."
        )
    return channels


@torch.no_grad()
def select_gift_layers(
    model: PreTrainedModel,
    prompts: Iterable[dict[str, Tensor]],
    *,
    tokenizer: Any = None,  # noqa: ANN401
    query_mask: Tensor | None = None,
) -> GIFTLayers:
    """Propose GIFT's layers from a few prompts with images; see :class:`GIFTLayers` for the rule.

    Args:
        model: A model of transformers in eval mode.
        prompts: Model inputs with images.
        tokenizer: The model's tokenizer or processor, to find the question; without, it is all behind the image.
        query_mask: Positions of the question, bool ``(B, N)``, the same for all prompts.
    """
    facts = read_facts(model)
    reader = ShareReader(facts, getattr(tokenizer, "tokenizer", tokenizer))
    with reading(model, facts, reader, query_mask):
        for inputs in prompts:
            model(**inputs)
    return reader.proposal()
