"""Contrastive decoding: the next token by two answers, with and without what it should depend on, in one batch.

Both branches are rows of the same batch of 2B, so that a step reads the weights once. The rules:

- :class:`VCD` (Leng et al., CVPR 2024, arXiv:2311.16922; DAMO-NLP-SG/VCD at d6568ff): the other branch sees noise.
- :class:`ImageGuidance`, the second half of PAI (LALBJ/PAI at 9bbd8bd): the other branch sees no image.
- :class:`CoDa` (arXiv:2502.16143), **experimental**: the other branch lacks words of the prompt. No code is published
  and the equations here are from memory; nothing vouches for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from saccade.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["VCD", "CoDa", "ContrastRule", "ImageGuidance", "contrast_logits", "contrastive_generate", "diffusion_noise"]


class ContrastRule(Protocol):
    """How the scores of two branches become one."""

    def combine(self, logits: Tensor, contrast: Tensor) -> Tensor:
        """Return scores ``(B, vocabulary)`` from the logits of both branches."""


@dataclass(frozen=True)
class VCD:
    """Visual contrastive decoding: ``(1 + alpha) l - alpha l'`` where ``l >= max l + log beta``.

    Args:
        alpha: Strength.
        beta: Least probability kept, relative to the largest; published scripts have 0.1 and 0.2.
    """

    alpha: float = 1.0
    beta: float = 0.1

    def combine(self, logits: Tensor, contrast: Tensor) -> Tensor:
        """Return the scores."""
        return contrast_logits(logits, contrast, alpha=self.alpha, cutoff=math.log(self.beta))


@dataclass(frozen=True)
class ImageGuidance:
    """Guidance by the answer without the image: ``gamma (s - u) + u`` of log-probabilities s with and u without it.

    Args:
        gamma: Strength; 1 is none.
        beta: As in :class:`VCD`.
    """

    gamma: float = 1.1
    beta: float = 0.1

    def combine(self, logits: Tensor, contrast: Tensor) -> Tensor:
        """Return the scores."""
        with_image, without = logits.log_softmax(-1), contrast.log_softmax(-1)
        return contrast_logits(with_image, without, alpha=self.gamma - 1, cutoff=math.log(self.beta))


@dataclass(frozen=True)
class CoDa:
    """Contrastive decoding against overshadowing; experimental, see the module.

    With ``top(X)`` the tokens of at least ``share`` of the largest probability, common tokens score
    ``log p(y|X) - log p(y|X')``, those only in ``top(X)`` ``log p(y|X) - min_{top(X')} log p(.|X')``. If the sum of the
    negative scores of common tokens and of the others' scores is positive, they replace ``log p(y|X)``.

    Args:
        share: Share of the largest probability.
    """

    share: float = 0.01

    def combine(self, logits: Tensor, contrast: Tensor) -> Tensor:
        """Return the scores."""
        p, q = logits.log_softmax(-1), contrast.log_softmax(-1)
        cutoff = math.log(self.share)
        top_p, top_q = (x >= x.amax(-1, keepdim=True) + cutoff for x in (p, q))
        floor = q.masked_fill(~top_q, torch.inf).amin(-1, keepdim=True)
        common, escaping = top_p & top_q, top_p & ~top_q
        score = torch.where(common, p - q, torch.where(escaping, p - floor, -torch.inf))
        lost = ((p - q).clamp(max=0) * common).sum(-1, keepdim=True)
        gained = ((p - floor) * escaping).sum(-1, keepdim=True)
        return torch.where(lost + gained > 0, score, p)


def contrast_logits(logits: Tensor, contrast: Tensor, *, alpha: float, cutoff: float) -> Tensor:
    """Return ``(1 + alpha) l - alpha l'`` where ``l >= max l + cutoff``, and ``-inf`` elsewhere.

    Args:
        logits: ``l``, ``(B, vocabulary)``.
        contrast: ``l'``, same shape.
        alpha: Strength.
        cutoff: Logarithm of the least probability kept, relative to the largest.
    """
    kept = logits >= logits.amax(-1, keepdim=True) + cutoff
    return torch.where(kept, (1 + alpha) * logits - alpha * contrast, -torch.inf)


def diffusion_noise(pixels: Tensor, step: int = 500, *, generator: torch.Generator | None = None) -> Tensor:
    """Return pictures after some steps of a diffusion of 1000 with a sigmoid schedule, VCD's other branch.

    Args:
        pixels: Normalised, any shape.
        step: 0..999; 999 is all but noise.
        generator: Source of the noise, on the device of the pixels.

    Raises:
        ConfigError: If the step is out of range.
    """
    if not 0 <= step < 1000:
        raise ConfigError(f"step must be in 0..999; got {step}.")
    betas = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - betas[: step + 1]).prod())
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device, dtype=pixels.dtype)
    return math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise


class ContrastProcessor:
    """A logits processor over a batch of 2B: both halves get the scores of the rule, and so the same token.

    Args:
        rule: How the scores of the halves become one.
        temperature: 0 takes the best token; above it one is drawn here, so that both halves get it.
    """

    def __init__(self, rule: ContrastRule, temperature: float = 0.0) -> None:
        self.rule = rule
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores ``(2B, vocabulary)``."""
        logits, contrast = scores.float().chunk(2)
        combined = self.rule.combine(logits, contrast)
        if self.temperature > 0:
            token = torch.multinomial((combined / self.temperature).softmax(-1), 1)
            combined = torch.full_like(combined, -torch.inf).scatter(1, token, 0.0)
        return torch.cat([combined, combined])


@torch.no_grad()
def contrastive_generate(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    contrast: dict[str, Tensor],
    rule: ContrastRule,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    pad_token_id: int = 0,
) -> Tensor:
    """Generate under a contrastive rule.

    It can stand inside :func:`saccade.vlm.intervene`; both branches are then edited, and both must have what the
    intervention needs.

    Args:
        model: A decoder-only model of transformers in eval mode.
        inputs: Model inputs with ``input_ids`` and ``attention_mask``, B samples, left-padded.
        contrast: The same for the other branch: for :class:`VCD` with ``pixel_values`` of :func:`diffusion_noise`, for
            :class:`ImageGuidance` without image and placeholders. Prompts may be of other lengths.
        rule: How the scores of the branches become one.
        max_new_tokens: Longest answer.
        temperature: 0 takes the best token, above it one is drawn from torch's global generator.
        pad_token_id: Fills shorter prompts and finished answers.

    Returns:
        New tokens, ``(B, tokens)``.

    Raises:
        ShapeError: If the branches have different numbers of samples.
    """
    batch = united(inputs, contrast, pad_token_id)
    generate: Any = model.generate
    ids: Tensor = generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_token_id,
        logits_processor=[ContrastProcessor(rule, temperature)],
    )
    return ids[: len(ids) // 2, batch["input_ids"].shape[1] :]


def united(inputs: dict[str, Tensor], contrast: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Return one batch of both branches, left-padded to the same length."""
    first, second = inputs["input_ids"], contrast["input_ids"]
    if first.shape[0] != second.shape[0]:
        raise ShapeError(f"The branches must have as many samples each; got {first.shape[0]} and {second.shape[0]}.")
    longest = max(first.shape[1], second.shape[1])
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys((*inputs, *contrast)):
        parts = []
        for branch in (inputs, contrast):
            tensor = branch.get(name)
            if tensor is None:  # the image of a branch that has none: its rows have no placeholder to fill
                continue
            if tensor.shape == branch["input_ids"].shape:
                fill = pad_token_id if name == "input_ids" else 0
                tensor = torch.nn.functional.pad(tensor, (longest - tensor.shape[1], 0), value=fill)
            parts.append(tensor)
        batch[name] = torch.cat(parts)
    return batch
