"""Losses of scanpath models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.gaze.decoding import path_classes

__all__ = ["path_loss"]


def path_loss(logits: Tensor, paths: Tensor, *, pad_logit: Tensor | None = None) -> Tensor:
    """Compute the cross entropy of every step of human paths, the end included.

    Args:
        logits: ``(B, K, T + 1, 1 + N)``, of ``model(scenes, paths)``.
        paths: int64 ``(B, K, T)``, -1 behind the end; a path of no object counts nothing.
        pad_logit: ``(B, K, T + 1, 1)``, a further class that is never right; the official loss has it.

    Returns:
        Mean over all steps of the batch, a float32 scalar.

    Source:
        OAT (ECCV 2024), oat_eccv24: teacher forcing, mean over tokens, padding ignored.
    """
    classes, there = path_classes(paths)
    if pad_logit is not None:
        logits = torch.cat([logits, pad_logit], -1)
    return F.cross_entropy(logits[there].float(), classes[there])
