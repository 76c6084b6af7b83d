"""AEM: the negative entropy of a bag's attention as a loss term, for any attention model."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.errors import ShapeError

__all__ = ["attention_entropy_maximization"]


def attention_entropy_maximization(attention: Tensor) -> Tensor:
    """Return ``sum_n a_n log a_n``, the mean over bags; adding it to a loss spreads attention over more instances.

    Args:
        attention: ``(B, N)``, distributions over instances; zeros (padding) add nothing.

    Raises:
        ShapeError: If it is not 2-D.

    Source:
        Zhang et al., AEM (``dazhangyu123/AEM``); used with the weight 0.1 there.

    Example:
        >>> attention_entropy_maximization(torch.full((1, 4), 0.25))
        tensor(-1.3863)
    """
    if attention.ndim != 2:
        raise ShapeError(f"attention must be (B, N); got {tuple(attention.shape)}.")
    return torch.xlogy(attention, attention.clamp(min=torch.finfo(attention.dtype).tiny)).sum(-1).mean()
