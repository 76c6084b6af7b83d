"""Where the last token of a prompt looks, as interventions leave it: the weights, for pictures and figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from saccade.errors import ConfigError
from saccade.vlm.call import AttentionCall
from saccade.vlm.edits import ClassEdit, Edit, HeadEdit, LogitEdit, edited_attention
from saccade.vlm.intervene import intervene
from saccade.vlm.intervention import Intervention
from saccade.vlm.model_facts import ModelFacts
from saccade.vlm.prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PromptAttention", "prompt_attention"]


@dataclass(frozen=True)
class PromptAttention:
    """What the values are multiplied by for the last token of each prompt.

    Args:
        weights: float32 ``(layers, B, H, N)``. A row sums to 1 unless a method does not keep its sum (GIFT) or
            multiplies the output of a head (VHR).
        image_mask: Visual tokens, bool ``(B, N)``.
    """

    weights: Tensor
    image_mask: Tensor

    @property
    def image_mass(self) -> Tensor:
        """Weight on the image, ``(layers, B, H)``."""
        return (self.weights * self.image_mask[None, :, None]).sum(-1)


@torch.no_grad()
def prompt_attention(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    *interventions: Intervention | str,
    image_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    tokenizer: Any = None,  # noqa: ANN401
) -> PromptAttention:
    """Run prompts once and return the attention of their last token in every layer.

    Inside a block of :func:`saccade.vlm.intervene` the interventions of the block count, too.

    Attention is linear in the values, so the weights that an intervention leaves are what it makes of an identity
    matrix in their place. Each layer sees what interventions did to the layers below.

    Args:
        model: A decoder-only model of transformers in eval mode.
        inputs: What the model takes; prompts of different lengths are padded on the left.
        interventions: As in :func:`saccade.vlm.intervene`; none for the model's own attention.
        image_mask: As there, like the others.
        query_mask: As there.
        tokenizer: As there.

    Raises:
        ConfigError: If prompts are padded on the right; or as :func:`saccade.vlm.intervene`.
        DataError: As :func:`saccade.vlm.intervene`.

    Example:
        >>> before, after = prompt_attention(model, inputs), prompt_attention(model, inputs, VAR())  # doctest: +SKIP
        >>> after.image_mass - before.image_mass  # doctest: +SKIP
    """
    given = {"image_mask": image_mask, "query_mask": query_mask, "tokenizer": tokenizer}
    with intervene(model, *interventions, LastRow(), **given) as ctx:
        model(**inputs)
        reader = ctx.edits[-1]
        assert isinstance(reader, LastRowReader)
        assert ctx.engine is not None
        weights = [reader.weights(layer, ctx.engine.edits) for layer in range(reader.facts.num_layers)]
    return PromptAttention(torch.stack(weights), reader.prompt.image_mask.cpu())


@dataclass(frozen=True)
class LastRow:
    """Changes nothing and keeps the calls of the last row."""

    name = "last_row"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return no settings: there are none."""
        return {}

    def start(self, facts: ModelFacts, tokenizer: Any) -> Edit:  # noqa: ANN401
        """Return the reader."""
        return LastRowReader("prompt_attention", facts, frozenset())


class LastRowReader(ClassEdit):
    """Keeps the call of the prompt's last row in every layer."""

    num_classes = 1
    needs_image = False

    @property
    def observed_layers(self) -> frozenset[int]:
        """All layers."""
        return frozenset(range(self.facts.num_layers))

    def first_row(self, prompt: Prompt) -> list[int]:
        """Change no row."""
        return [prompt.length] * prompt.batch

    def prepare(self, prompt: Prompt) -> None:
        """Start with a new prompt."""
        super().prepare(prompt)
        if any(row != prompt.length - 1 for row in prompt.last_row):
            raise ConfigError("prompt_attention needs prompts that end together; pad them on the left.")
        self.prompt = prompt
        self.calls: dict[int, AttentionCall] = {}

    def observe(self, call: AttentionCall) -> None:
        """Keep the last row."""
        assert call.position is not None
        if call.position + call.queries == self.prompt.length:
            row = torch.tensor([call.queries - 1], device=call.query.device)
            self.calls[call.layer] = call.pick(row)

    def weights(self, layer: int, edits: list[Edit]) -> Tensor:
        """Return the weights of a layer under edits, ``(B, H, N)`` on the CPU."""
        call = self.calls[layer]
        acting = [edit for edit in edits if layer in edit.layers]
        identity = torch.eye(call.keys, device=call.key.device).expand(*call.key.shape[:2], -1, -1)
        call = replace(call, query=call.query.float(), key=call.key.float(), value=identity)
        scores = [edit for edit in acting if isinstance(edit, LogitEdit)]
        classes = [edit for edit in acting if isinstance(edit, ClassEdit)]
        active = [self.active(edit, call) for edit in (*scores, *classes)]
        out = edited_attention(call, scores, classes, active)[:, :, 0]  # (B, H, S)
        for edit in acting:
            if isinstance(edit, HeadEdit):
                out = out * edit.head_scale(layer)[..., None]
        first = call.first_key
        assert isinstance(first, int)
        whole = out.new_zeros(*out.shape[:2], self.prompt.length)
        whole[..., first : first + call.keys] = out
        return whole.cpu()

    def active(self, edit: Edit, call: AttentionCall) -> Tensor:
        """Return for which samples an edit changes the last row, bool ``(B, 1)``."""
        starts = torch.tensor(edit.first_row(self.prompt), device=call.query.device)
        return (starts <= self.prompt.length - 1)[:, None]
