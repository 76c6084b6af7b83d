"""Attention diversification of whole models: where a layer hands its query and key to whoever collects the loss."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

__all__ = ["DiversityPoint", "DiversityReceiver"]


class DiversityReceiver(Protocol):
    """What a :class:`DiversityPoint` hands the tensors of its layer to."""

    def __call__(
        self,
        point: DiversityPoint,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None,
        logit_multiplier: Tensor | None,
        prefix_tokens: int,
    ) -> None:
        """Take the arguments of :func:`saccade.attention.attention_diversification` for one layer."""


class DiversityPoint(nn.Module):
    """The place in a layer of spatial attention that tells a collector its query and key; does nothing without one.

    It has no parameters and no state, and is left out under TorchScript.
    """

    def __init__(self) -> None:
        super().__init__()
        self.receiver: DiversityReceiver | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        scale: float | None = None,
        logit_multiplier: Tensor | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        """Hand on what attention is about to be computed from.

        Args:
            query: ``(B, H, N, D)``.
            key: ``(B, H, N, D)``.
            scale: Factor of the products; ``None`` means ``D ** -0.5``.
            logit_multiplier: ``(H, N, N)``, factor of the scaled products.
            prefix_tokens: Class and register tokens in front.
        """
        if self.receiver is not None:
            self.receiver(self, query, key, scale=scale, logit_multiplier=logit_multiplier, prefix_tokens=prefix_tokens)

    def __prepare_scriptable__(self) -> nn.Module:
        """Stand aside for TorchScript."""
        return SilentPoint()


class SilentPoint(nn.Module):
    """What is left of a :class:`DiversityPoint` in TorchScript."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        scale: float | None = None,
        logit_multiplier: Tensor | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        """Do nothing."""
