"""VAR, visual attention redistribution: weight on sink tokens moves to the rest of the image.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025 (arXiv:2503.03321);
official code seilk/VisAttnSink at 98e62d6 (Apache-2.0).

A sink of layer l is a token whose input x to the layer has a large value in one of a few channels:
``max_c |x[c]| / sqrt(mean(x^2) + 1e-6) > tau``. With the classes 0 sinks in the image, 1 other sinks, 2 rest of the
image, a head looks at the image if ``m_0 / (m_0 + m_2) <= 1 - min_nonsink_share`` and ``m_0 + m_2 >= min_visual_mass``.
In such heads, in rows behind the image, with the fraction f moved,

    O' = O - f (O_0 + O_1) + f (m_0 + m_1) / m_2 O_2

Differs from the code: the fraction *moved* is the parameter (the paper moves 0.6, the code keeps 0.6); sinks are
those of the prompt at hand (the code's are those of the first prompt of the process); any number of images and samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from saccade.errors import ConfigError
from saccade.vlm.call import AttentionCall, TokenTable
from saccade.vlm.edits import ClassEdit
from saccade.vlm.intervention import check_layers
from saccade.vlm.model_facts import ModelFacts
from saccade.vlm.presets import model_preset
from saccade.vlm.prompt import Prompt

__all__ = ["VAR", "image_centric", "sink_score", "sink_share", "var_gain"]

VISUAL_SINK, OTHER_SINK, VISUAL, REST = range(4)


@dataclass(frozen=True)
class VAR:
    """Parameters of visual attention redistribution; the defaults are the paper's for hallucination.

    Args:
        sink_channels: Channels of the hidden state that mark sinks; ``None`` takes the published ones of the model
            (:data:`saccade.vlm.MODEL_PRESETS`). :func:`saccade.vlm.find_sink_channels` finds them.
        tau: Sinks exceed it; at most the square root of the hidden size can be reached.
        move_fraction: Share of the sinks' weight that moves, 0..1.
        min_nonsink_share: Least share of the image's weight that must lie outside sinks: 0.5 for hallucination, 0.8
            for general questions, 0.9 for vision-centric ones in the paper.
        min_visual_mass: Least weight on the image.
        layers: Layers to change; ``None`` means from the third on.
        last_layer: Whether these include the last one.
    """

    sink_channels: tuple[int, ...] | None = None
    tau: float = 20.0
    move_fraction: float = 0.6
    min_nonsink_share: float = 0.5
    min_visual_mass: float = 0.2
    layers: tuple[int, ...] | None = None
    last_layer: bool = False
    name = "var"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return the settings of the paper and those that the released code runs with."""
        return {"paper": cls(), "released_code": cls(move_fraction=0.4, last_layer=True)}

    def start(self, facts: ModelFacts, tokenizer: Any) -> VAREdit:  # noqa: ANN401
        """Return the method at work on a model; see :class:`saccade.vlm.Intervention`."""
        for name in ("move_fraction", "min_nonsink_share", "min_visual_mass"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"VAR: {name} must be in 0..1; got {getattr(self, name)}.")
        preset = model_preset(facts)
        channels = self.sink_channels if self.sink_channels is not None or preset is None else preset.sink_channels
        if channels is None:
            raise ConfigError(
                f"VAR: no sink channels are published for {facts.name} with hidden size {facts.hidden_size}. Pass "
                "sink_channels; saccade.vlm.find_sink_channels(model, inputs) or `saccade vlm calibrate` finds them."
            )
        if not channels or not all(0 <= channel < facts.hidden_size for channel in channels):
            raise ConfigError(f"VAR: sink_channels must be in 0..{facts.hidden_size - 1}; got {channels}.")
        if self.tau >= math.sqrt(facts.hidden_size):
            raise ConfigError(
                f"VAR: tau must be below {math.sqrt(facts.hidden_size):.1f}, the square root of the hidden size, or no "
                f"token can be a sink; got {self.tau}."
            )
        last = facts.num_layers if self.last_layer else facts.num_layers - 1
        layers = check_layers("VAR", "layers", range(2, last) if self.layers is None else self.layers, facts)
        return VAREdit(self, facts, layers, channels)


class VAREdit(ClassEdit):
    """VAR at work; ``stats`` has ``sinks`` ``(B, N)`` and ``selected`` ``(B, H, R)``, heads of the latest rows."""

    num_classes = 4
    needs_layer_input = True

    def __init__(self, var: VAR, facts: ModelFacts, layers: frozenset[int], channels: tuple[int, ...]) -> None:
        super().__init__("VAR", facts, layers)
        self.var = var
        self.channels = channels

    def prepare(self, prompt: Prompt) -> None:
        """Label image, text and padding; sinks are added layer by layer."""
        super().prepare(prompt)
        self.image_mask = prompt.image_mask
        self.labels = torch.where(prompt.image_mask, VISUAL, REST).masked_fill(~prompt.valid, -1)
        self.num_visual = prompt.num_visual
        self.sinks: dict[int, Tensor] = {}
        self.tables: dict[int, TokenTable] = {}
        self.has_sink: dict[int, Tensor] = {}

    def first_row(self, prompt: Prompt) -> list[int]:
        """Change rows behind the image."""
        return prompt.after_image

    def layer_input(self, layer: int, hidden: Tensor, position: int) -> None:
        """Find the sinks among the tokens of this part of the prompt."""
        labels, image_mask = self.labels.to(hidden.device), self.image_mask.to(hidden.device)
        sinks = self.sinks.get(layer)
        if sinks is None or position == 0:
            sinks = torch.zeros_like(image_mask)
        sinks[:, position : position + hidden.shape[1]] = sink_score(hidden, self.channels) > self.var.tau
        sinks &= labels >= 0
        self.sinks[layer] = sinks
        self.tables[layer] = TokenTable(torch.where(sinks, labels - 2, labels), REST)
        self.has_sink[layer] = (sinks & image_mask).any(1)
        self.record("sinks", layer, sinks)

    def key_class(self, call: AttentionCall) -> Tensor:
        """Return the labels of the layer."""
        return self.tables[call.layer].columns(call)

    def gain(self, layer: int, mass: Tensor) -> Tensor:
        """Move weight in the heads that look at the image."""
        num_visual, has_sink = self.num_visual.to(mass.device), self.has_sink[layer]
        selected = image_centric(
            mass, num_visual, 1 - self.var.min_nonsink_share, self.var.min_visual_mass
        ) & has_sink.view(-1, 1, 1)
        self.record("selected", layer, selected)
        return var_gain(mass, selected, self.var.move_fraction)


def sink_score(hidden: Tensor, channels: tuple[int, ...]) -> Tensor:
    """Return ``max_c |x[c]| / sqrt(mean(x^2) + 1e-6)``, ``(B, L)`` float32, of layer inputs ``(B, L, hidden)``."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    peak = hidden[..., list(channels)].abs().amax(-1).float()
    score: Tensor = peak / (norm.square() / hidden.shape[-1] + 1e-6).sqrt()
    return score


def sink_share(mass: Tensor, num_visual: Tensor) -> Tensor:
    """Return the sinks' share of the weight on the image, ``m_0 / (m_0 + m_2 + 1e-6 |V|)``, ``(B, H, R)``.

    Args:
        mass: ``(B, H, 4, R)``.
        num_visual: ``|V|``, ``(B,)``.
    """
    return mass[:, :, VISUAL_SINK] / (mass[:, :, VISUAL_SINK] + mass[:, :, VISUAL] + 1e-6 * num_visual.view(-1, 1, 1))


def image_centric(mass: Tensor, num_visual: Tensor, max_sink_share: float, min_visual_mass: float) -> Tensor:
    """Return which heads look at the image in which rows, bool ``(B, H, R)``; arguments as :func:`sink_share`."""
    visual = mass[:, :, VISUAL_SINK] + mass[:, :, VISUAL]
    return (sink_share(mass, num_visual) <= max_sink_share) & (visual >= min_visual_mass)


def var_gain(mass: Tensor, selected: Tensor, move_fraction: float) -> Tensor:
    """Return the factors ``(1 - f, 1 - f, 1 + f (m_0 + m_1) / m_2, 1)`` of the classes in selected heads, else 1.

    Args:
        mass: ``(B, H, 4, R)``.
        selected: Bool ``(B, H, R)``.
        move_fraction: ``f``.
    """
    moved = selected.to(mass.dtype) * move_fraction
    tiny = torch.finfo(mass.dtype).tiny
    raised = 1 + moved * (mass[:, :, VISUAL_SINK] + mass[:, :, OTHER_SINK]) / mass[:, :, VISUAL].clamp(min=tiny)
    return torch.stack([1 - moved, 1 - moved, raised, torch.ones_like(moved)], 2)
