"""Contrastive decoding: the next token by the difference of two answers, with and without what matters."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["contrast_logits"]


def contrast_logits(logits: Tensor, contrast: Tensor, *, alpha: float, cutoff: float) -> Tensor:
    """Return ``(1 + alpha) l - alpha l'`` where ``l >= max l + cutoff``, and ``-inf`` elsewhere.

    Args:
        logits: ``l``, ``(B, vocabulary)``.
        contrast: ``l'``, same shape.
        alpha: Strength, >= 0.
        cutoff: Logarithm of the least probability kept, relative to the largest.
    """
    kept = logits >= logits.amax(-1, keepdim=True) + cutoff
    return torch.where(kept, (1 + alpha) * logits - alpha * contrast, -torch.inf)
