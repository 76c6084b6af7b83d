"""Features with the mean and standard deviation of the training tiles taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Standardize"]


class Standardize(nn.Module):
    """``(x - mean) / std``; does nothing where the configuration has no ``mean``.

    Args:
        config: ``mean`` and ``std``, lists of the width of the features.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.mean: Tensor | None
        self.std: Tensor | None
        has = "mean" in config
        self.register_buffer("mean", torch.tensor(config["mean"]) if has else None, persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]) if has else None, persistent=False)

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ``(B, N, D)`` to the same shape; padding stays finite and is masked by the model."""
        if self.mean is None or self.std is None:
            return bags
        return (bags - self.mean) / self.std
