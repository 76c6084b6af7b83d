"""VAF, visual amplification fusion: scores of image tokens are scaled up, those of the system prompt down.

"ClearSight", CVPR 2025; official code ustc-hyin/ClearSight at 5466c94.

In rows behind the image, before the softmax, ``l_j <- enhance l_j`` for image tokens and ``l_j <- suppress l_j`` for
the tokens before the image. (A negative score of an image token is pushed further down; that is the published method.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from saccade.vlm.call import AttentionCall, TokenTable
from saccade.vlm.edits import LogitEdit
from saccade.vlm.intervention import check_layers
from saccade.vlm.model_facts import ModelFacts
from saccade.vlm.prompt import Prompt

__all__ = ["VAF", "vaf_factor"]


@dataclass(frozen=True)
class VAF:
    """Parameters of visual amplification fusion.

    Args:
        enhance: Factor of the scores of image tokens.
        suppress: Factor of the scores of tokens before the image.
        layers: Layers to change; ``None`` means 9 to 14, those of the released script for LLaVA-1.5-7B.
    """

    enhance: float = 1.15
    suppress: float = 0.95
    layers: tuple[int, ...] | None = None
    name = "vaf"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return the settings of the released code."""
        return {"released_code": cls()}

    def start(self, facts: ModelFacts, tokenizer: Any) -> VAFEdit:  # noqa: ANN401
        """Return the method at work on a model; see :class:`saccade.vlm.Intervention`."""
        layers = range(9, 15) if self.layers is None else self.layers
        return VAFEdit(self, facts, check_layers("VAF", "layers", layers, facts))


class VAFEdit(LogitEdit):
    """VAF at work."""

    def __init__(self, vaf: VAF, facts: ModelFacts, layers: frozenset[int]) -> None:
        super().__init__("VAF", facts, layers)
        self.vaf = vaf

    def prepare(self, prompt: Prompt) -> None:
        """Make the factors of the prompt; generated tokens have 1."""
        super().prepare(prompt)
        self.factors = TokenTable(vaf_factor(prompt.image_mask, self.vaf.enhance, self.vaf.suppress), 1.0)

    def first_row(self, prompt: Prompt) -> list[int]:
        """Change rows behind the image."""
        return prompt.after_image

    def factor(self, call: AttentionCall) -> Tensor:
        """Return the factors of the keys, the same for all heads."""
        return self.factors.columns(call).to(call.query.device).unsqueeze(1)


def vaf_factor(image_mask: Tensor, enhance: float, suppress: float) -> Tensor:
    """Return the factor of each token, ``(B, N)`` float32: ``enhance`` in the image, ``suppress`` before it, else 1.

    Args:
        image_mask: Bool ``(B, N)``.
        enhance: For image tokens.
        suppress: For tokens before the first of them.
    """
    before = image_mask.long().cumsum(1) == 0
    before &= image_mask.any(1, keepdim=True)
    return torch.where(image_mask, enhance, torch.where(before, suppress, 1.0))
