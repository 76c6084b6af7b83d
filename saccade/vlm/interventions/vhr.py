"""VHR, vision-aware head reinforcement: heads that answer to the image speak louder.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025 (arXiv:2412.13949).
The official source was not available; where the paper is silent the settings named ``released_code`` are those on which
two independent ports agree.

With A_i the output of head i before the output projection at the last token of the prompt, and T_i the same for the
prompt without its image,

    VHD_i = dist(A_i, T_i),   0 if VHD_i and |T_i|^2 are both above mean + std over the heads
    A_i  <- alpha A_i         where VHD_i > median(VHD) (the lower median)

layer by layer, layers above seeing what was reinforced below. The heads are found once, at the first token, and the
factor holds for every token of prompt and answer. The prompt without its image costs one short forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from saccade.errors import ConfigError
from saccade.vlm.edits import HeadEdit
from saccade.vlm.intervention import check_layers
from saccade.vlm.model_facts import ModelFacts
from saccade.vlm.prompt import Prompt

__all__ = ["VHR", "VisionHeads", "vision_heads"]


@dataclass(frozen=True)
class VHR:
    """Parameters of vision-aware head reinforcement.

    Args:
        alpha: Factor of the reinforced heads.
        layers: Layers to change; ``None`` means the second and the last 14, those of the paper for 7B LLaVA models
            (for InstructBLIP the last 18).
        outlier_filter: Leave out heads whose output grows when the image goes.
        squared_distance: Whether dist is the squared Euclidean distance; it matters for the filter alone.
        min_std: The filter works in layers only where the VHD have a larger standard deviation.
    """

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    outlier_filter: bool = True
    squared_distance: bool = False
    min_std: float = 0.0
    name = "vhr"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return the settings of the paper and those of the ports of the released code."""
        return {"paper": cls(), "released_code": cls(squared_distance=True, min_std=1.0)}

    def start(self, facts: ModelFacts, tokenizer: Any) -> VHREdit:  # noqa: ANN401
        """Return the method at work on a model; see :class:`saccade.vlm.Intervention`."""
        if self.alpha < 0:
            raise ConfigError(f"VHR: alpha must not be negative; got {self.alpha}.")
        last = range(max(facts.num_layers - 14, 0), facts.num_layers)
        default = {min(1, facts.num_layers - 1), *last}
        return VHREdit(self, facts, check_layers("VHR", "layers", self.layers or default, facts))


class VHREdit(HeadEdit):
    """VHR at work; ``stats`` has ``divergence`` and ``heads`` ``(B, H)``, and ``text_only``, T_i ``(B, H, Dv)``."""

    whole_prompt = True

    def __init__(self, vhr: VHR, facts: ModelFacts, layers: frozenset[int]) -> None:
        super().__init__("VHR", facts, layers)
        self.vhr = vhr

    def prepare(self, prompt: Prompt) -> None:
        """Start with no head chosen."""
        super().prepare(prompt)
        self.text_only: dict[int, Tensor] = {}
        self.scales: dict[int, Tensor] = {}

    def text_only_pass(self) -> bool:
        """Return whether the prompt without its image is still to be run."""
        return not self.text_only

    def observe_text_only(self, layer: int, out: Tensor) -> None:
        """Keep ``T_i``."""
        self.text_only[layer] = out.float()
        self.record("text_only", layer, self.text_only[layer])

    def observe_output(self, layer: int, out: Tensor) -> None:
        """Choose the heads of a layer, once."""
        if layer in self.scales:
            return
        vhr = self.vhr
        found = vision_heads(
            out,
            self.text_only[layer],
            squared_distance=vhr.squared_distance,
            outlier_filter=vhr.outlier_filter,
            min_std=vhr.min_std,
        )
        self.record("divergence", layer, found.divergence)
        self.record("heads", layer, found.selected)
        self.scales[layer] = torch.where(found.selected, vhr.alpha, 1.0)

    def head_scale(self, layer: int) -> Tensor:
        """Return alpha for the chosen heads, 1 for the others."""
        return self.scales[layer]


class VisionHeads(NamedTuple):
    """What :func:`vision_heads` finds in a layer; all ``(B, H)``.

    Args:
        divergence: VHD, before the filter.
        text_activation: ``|T_i|^2``.
        outlier: Heads that the filter sets to 0.
        filtered: VHD, after it.
        selected: Heads above the median.
    """

    divergence: Tensor
    text_activation: Tensor
    outlier: Tensor
    filtered: Tensor
    selected: Tensor


def vision_heads(
    out: Tensor, text_only: Tensor, *, squared_distance: bool, outlier_filter: bool, min_std: float
) -> VisionHeads:
    """Find the heads of a layer that answer to the image.

    Args:
        out: ``A_i``, ``(B, H, Dv)``.
        text_only: ``T_i``, ``(B, H, Dv)``.
        squared_distance: As in :class:`VHR`, like the others.
        outlier_filter: As there.
        min_std: As there.
    """
    divergence = (out.float() - text_only.float()).square().sum(-1)
    if not squared_distance:
        divergence = divergence.sqrt()
    activation = text_only.float().square().sum(-1)
    spread = divergence.std(-1, keepdim=True)
    outlier = (divergence > divergence.mean(-1, keepdim=True) + spread) & (
        activation > activation.mean(-1, keepdim=True) + activation.std(-1, keepdim=True)
    )
    outlier = outlier & (spread > min_std) & outlier_filter
    filtered = divergence.masked_fill(outlier, 0.0)
    selected = filtered > filtered.median(-1, keepdim=True).values
    return VisionHeads(divergence, activation, outlier, filtered, selected)
