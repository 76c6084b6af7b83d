"""PAI, pay attention to image: scores of image tokens are raised by a share of their size.

Liu et al., "Paying More Attention to Image", ECCV 2024 (arXiv:2407.21771); official code LALBJ/PAI at 9bbd8bd (MIT).

In the last row of the prompt and in generated rows, before the softmax, for image tokens j

    l_j <- l_j + alpha |l_j|

The other half of the method, guidance by the answer without the image, is :class:`saccade.vlm.ImageGuidance`.
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

__all__ = ["PAI", "pai_factor"]


@dataclass(frozen=True)
class PAI:
    """Parameters of the attention half of PAI.

    Args:
        alpha: Share of its size by which a score grows; the code's README uses 0.2.
        layers: Layers to change; ``None`` means from the third on.
    """

    alpha: float = 0.2
    layers: tuple[int, ...] | None = None
    name = "pai"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return the settings of the released code."""
        return {"released_code": cls()}

    def start(self, facts: ModelFacts, tokenizer: Any) -> PAIEdit:  # noqa: ANN401
        """Return the method at work on a model; see :class:`saccade.vlm.Intervention`."""
        layers = range(2, facts.num_layers) if self.layers is None else self.layers
        return PAIEdit(self, facts, check_layers("PAI", "layers", layers, facts))


class PAIEdit(LogitEdit):
    """PAI at work."""

    row_by_row = True

    def __init__(self, pai: PAI, facts: ModelFacts, layers: frozenset[int]) -> None:
        super().__init__("PAI", facts, layers)
        self.pai = pai

    def prepare(self, prompt: Prompt) -> None:
        """Note where the image is."""
        super().prepare(prompt)
        self.visual = TokenTable(prompt.image_mask.float(), 0.0)

    def first_row(self, prompt: Prompt) -> list[int]:
        """Change the last row of the prompt and what follows."""
        return prompt.last_row

    def factor(self, call: AttentionCall) -> Tensor:
        """Return 1 + alpha at positive, 1 - alpha at negative scores of image tokens."""
        visual = self.visual.columns(call).to(call.query.device)
        return pai_factor(call.query, call.key, visual, self.pai.alpha)


def pai_factor(query: Tensor, key: Tensor, visual: Tensor, alpha: float) -> Tensor:
    """Return ``1 + alpha sign(l_j)`` at image tokens, else 1, ``(B, H, S)``.

    Args:
        query: One query, ``(B, H, 1, D)``.
        key: ``(B, Hkv, S, D)``.
        visual: 1 at image tokens, else 0, ``(B, S)``.
        alpha: Share by which scores grow.
    """
    batch, heads, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], head_dim)
    sign = torch.sign(grouped @ key.transpose(2, 3)).reshape(batch, heads, -1)
    return 1 + alpha * sign * visual[:, None].to(sign.dtype)
