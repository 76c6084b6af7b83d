"""GIFT, gaze-shift guided enhancement: image tokens are weighted by how attention to them rises over the question.

"GIFT", ICML 2026 (arXiv:2510.22067); the numbers agree with amazon-science/GIFT at e20b8a9 (CC BY-NC 4.0, of
which no code is used).

Saliency, from the prompt's own attention in layers L_s, over content tokens i of the question and image tokens j:

    D_hij = max(a_hij - a_h(i-1)j, 0),   s_j = mean of D over layers, the floor(H/2) heads with the largest sums, and i
    S_j   = s_j clamped to mean +- 3 std over the image, scaled to [0, 1]

Enhancement, in layers L_e, of the last row of the prompt and of every generated row: with H_V and H_Q the floor(H/2)
heads with most weight on the image V and on the question Q, and w_j = exp(alpha S_j),

    r = sum_{h in H_V} sum_{j in V} w_j a_hj / sum_{h in H_V} sum_{j in V} a_hj
    a_hj <- w_j a_hj (h in H_V, j in V),   a_hj <- beta r a_hj (h in H_Q, j in Q),   then each row is renormalised

Only rows i and i - 1 of the saliency layers are looked at. Where a layer to be enhanced lies below a saliency layer,
the prompt is run up to its last token first and the last token then like a generated one: one pass over the prompt.
Differs from the code: without a content token, or with a constant map, S is 0 and nothing changes (NaN there); the
question is found from the chat template; a repeated word counts each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from saccade.errors import ConfigError
from saccade.vlm.call import AttentionCall, TokenTable
from saccade.vlm.content_words import content_mask, question_mask
from saccade.vlm.edits import ClassEdit
from saccade.vlm.intervention import check_layers
from saccade.vlm.interventions.gift_saliency import SaliencyReader
from saccade.vlm.model_facts import ModelFacts
from saccade.vlm.presets import model_preset
from saccade.vlm.prompt import Prompt

__all__ = ["GIFT", "gift_gain", "top_heads"]

IMAGE, QUESTION, REST, WEIGHTED = range(4)
ContentWords = Callable[[str, list[tuple[int, int]]], list[bool]]


@dataclass(frozen=True, eq=False)
class GIFT:
    """Parameters of gaze-shift guided enhancement.

    Args:
        saliency_layers: L_s; ``None`` takes the published layers of the model, as for the next two.
        enhancement_layers: L_e. :func:`saccade.vlm.select_gift_layers` proposes both.
        alpha: Exponent of the weights of image tokens.
        beta: Factor of the compensation on the question.
        content_tokens: Which words of the question count: ``"closed_class"`` leaves out English function words,
            ``"spacy"`` takes nouns, names, verbs, adjectives, adverbs and numbers, ``"all"`` takes all; or a function
            of the question and the character range of each token that returns a bool for each; or a mask ``(B, N)``
            over the prompt. The first two and the function need a tokenizer.
    """

    saliency_layers: tuple[int, ...] | None = None
    enhancement_layers: tuple[int, ...] | None = None
    alpha: float | None = None
    beta: float = 1.0
    content_tokens: str | ContentWords | Tensor = "closed_class"
    name = "gift"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return the published settings; the layers and alpha are those of the model at hand."""
        return {"paper": cls(), "released_code": cls(content_tokens="spacy")}

    def start(self, facts: ModelFacts, tokenizer: Any) -> GIFTEdit:  # noqa: ANN401
        """Return the method at work on a model; see :class:`saccade.vlm.Intervention`."""
        preset = model_preset(facts)
        saliency = self.saliency_layers or (preset and preset.saliency_layers)
        enhancement = self.enhancement_layers or (preset and preset.enhancement_layers)
        alpha = self.alpha if self.alpha is not None or preset is None else preset.gift_alpha
        if not saliency or not enhancement or alpha is None:
            raise ConfigError(
                f"GIFT: no layers are published for {facts.name}. Pass saliency_layers, enhancement_layers and alpha; "
                "saccade.vlm.select_gift_layers(model, inputs) or `saccade vlm calibrate` proposes them."
            )
        if isinstance(self.content_tokens, str) and self.content_tokens not in ("closed_class", "spacy", "all"):
            raise ConfigError(
                f"GIFT: content_tokens must be 'closed_class', 'spacy', 'all', a function or a mask; "
                f"got {self.content_tokens!r}."
            )
        if tokenizer is None and not isinstance(self.content_tokens, Tensor) and self.content_tokens != "all":
            raise ConfigError(
                "GIFT finds the content words of the question with the model's tokenizer: intervene(model, GIFT(...), "
                "tokenizer=processor). Without one, pass content_tokens='all' or a mask."
            )
        return GIFTEdit(
            self,
            facts,
            check_layers("GIFT", "saliency_layers", saliency, facts),
            check_layers("GIFT", "enhancement_layers", enhancement, facts),
            float(alpha),
            getattr(tokenizer, "tokenizer", tokenizer),
        )


class GIFTEdit(ClassEdit):
    """GIFT at work.

    ``stats`` has ``saliency`` ``(B, N)`` at the last saliency layer, and of the last row changed ``vision_heads``,
    ``question_heads`` ``(B, H, R)`` and ``question_scale`` r ``(B, 1, R)``.
    """

    num_classes = 3
    weighted_class = IMAGE
    normalise = True

    def __init__(
        self,
        gift: GIFT,
        facts: ModelFacts,
        saliency_layers: frozenset[int],
        layers: frozenset[int],
        alpha: float,
        tokenizer: Any,  # noqa: ANN401
    ) -> None:
        super().__init__("GIFT", facts, layers)
        self.gift = gift
        self.saliency_layers = saliency_layers
        self.alpha = alpha
        self.tokenizer = tokenizer

    @property
    def observed_layers(self) -> frozenset[int]:
        """The saliency layers."""
        return self.saliency_layers

    def prepare(self, prompt: Prompt) -> None:
        """Find the question and its content words."""
        super().prepare(prompt)
        question = prompt.query_mask
        if question is None:
            question = question_mask(prompt, self.tokenizer)
        question = question & prompt.valid & ~prompt.image_mask
        content = content_mask(prompt, question, self.gift.content_tokens, self.tokenizer)
        labels = torch.full_like(prompt.image_mask, REST, dtype=torch.int64)
        labels = labels.masked_fill(question, QUESTION).masked_fill(prompt.image_mask, IMAGE)
        self.labels = TokenTable(labels.masked_fill(~prompt.valid, -1), REST)
        self.reader = SaliencyReader(prompt, content, self.saliency_layers)
        self.log_weights: TokenTable | None = None

    def first_row(self, prompt: Prompt) -> list[int]:
        """Change the last row of the prompt and what follows."""
        return prompt.last_row

    def first_pass(self, prompt: Prompt) -> bool:
        """Return whether the map is needed in layers below those that yield it."""
        return not self.reader.complete and min(self.layers) <= max(self.saliency_layers)

    def reads_last_row(self, prompt: Prompt) -> bool:
        """Return whether the last token of the prompt is a content word."""
        return self.reader.last_row >= prompt.length - 1

    def observe(self, call: AttentionCall) -> None:
        """Read the rows of content words in a saliency layer."""
        self.reader.read(call)

    def log_weight(self, call: AttentionCall) -> Tensor:
        """Return ``alpha S_j`` of the image tokens."""
        if self.log_weights is None:
            saliency = self.reader.saliency()
            self.record("saliency", max(self.saliency_layers), saliency)
            self.log_weights = TokenTable(self.alpha * saliency, 0.0)
        return self.log_weights.columns(call).to(call.query.device)

    def key_class(self, call: AttentionCall) -> Tensor:
        """Return image, question or rest."""
        return self.labels.columns(call).to(call.query.device)

    def gain(self, layer: int, mass: Tensor) -> Tensor:
        """Weigh the image in its heads, the question in its own."""
        vision, question = top_heads(mass[:, :, IMAGE]), top_heads(mass[:, :, QUESTION])
        scale = question_scale(mass, vision)
        self.record("vision_heads", layer, vision)
        self.record("question_heads", layer, question)
        self.record("question_scale", layer, scale)
        return gift_gain(vision, question, self.gift.beta * scale)


def top_heads(mass: Tensor) -> Tensor:
    """Return the floor(H/2) heads with the largest mass in each row, bool ``(B, H, R)``, from ``(B, H, R)``."""
    chosen = mass.topk(mass.shape[1] // 2, dim=1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, chosen, True)


def question_scale(mass: Tensor, vision: Tensor) -> Tensor:
    """Return ``r``, ``(B, 1, R)``: how much the weight on the image grows over the vision heads; 1 where it has none.

    Args:
        mass: ``(B, H, 4, R)``: image, question, rest, weighted image.
        vision: H_V, bool ``(B, H, R)``.
    """
    before = (mass[:, :, IMAGE] * vision).sum(1, keepdim=True)
    after = (mass[:, :, WEIGHTED] * vision).sum(1, keepdim=True)
    return torch.where(before > 0, after / torch.where(before > 0, before, 1.0), 1.0)


def gift_gain(vision: Tensor, question: Tensor, scale: Tensor) -> Tensor:
    """Return the factors of image, question, rest and weighted image, ``(B, H, 4, R)``, before renormalising.

    Args:
        vision: H_V, bool ``(B, H, R)``.
        question: H_Q, bool ``(B, H, R)``.
        scale: ``beta r``, ``(B, 1, R)``.
    """
    weighted = vision.to(scale.dtype)
    return torch.stack([1 - weighted, torch.where(question, scale, 1.0), torch.ones_like(weighted), weighted], 2)
