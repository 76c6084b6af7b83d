"""Mean and max pooling of instance logits: the floor that every model must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.mil.model import MILModel, MILOutput, check_bags, hide_padding, register

__all__ = ["InstancePooling", "MaxPooling", "MeanPooling"]


class InstancePooling(MILModel):
    """Two layers that classify every instance; the bag's logits are pooled from them.

    Args:
        feature_dim: Width of the features.
        num_classes: Number of logits.
        hidden_dim: Width of the first layer.
        dropout: Between the layers, in training.

    Source:
        The mean and max baselines of ``dazhangyu123/ACMIL`` (Xavier-normal weights, zero biases).
    """

    def __init__(self, feature_dim: int, num_classes: int, hidden_dim: int = 512, dropout: float = 0.25) -> None:
        super().__init__(feature_dim, num_classes)
        self.head = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, num_classes)
        )
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def weights(self, instance_logits: Tensor, mask: Tensor) -> Tensor:
        """Return how much each instance counts for each class, ``(B, C, N)``, float32; zeros for an empty bag."""
        raise NotImplementedError

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> MILOutput:
        """Classify bags.

        Args:
            bags: ``(B, N, feature_dim)``.
            mask: Bool ``(B, N)``, ``True`` = real instance.

        Raises:
            ShapeError: If shapes do not fit.
        """
        check_bags(bags, mask, self.feature_dim)
        if mask is None:
            mask = torch.ones(bags.shape[:2], dtype=torch.bool, device=bags.device)
        hidden = self.head[:2](bags)  # (B, N, D)
        instance_logits = self.head[2:](hidden)  # (B, N, C)
        scores = instance_logits.transpose(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = self.weights(scores, mask)
        attention = weights.mean(1)
        return MILOutput(
            logits=(weights * scores.masked_fill(~mask[:, None], 0)).sum(-1).to(instance_logits.dtype),
            attention=attention,
            scores=hide_padding(scores, mask),
            features=(attention[:, None].to(hidden.dtype) @ hidden)[:, 0],
            branch_attention=weights,
            instance_logits=instance_logits,
        )


@register("mean")
class MeanPooling(InstancePooling):
    """The mean of the instance logits; every instance has the attention 1 / N."""

    def weights(self, instance_logits: Tensor, mask: Tensor) -> Tensor:
        """Return 1 / N for real instances."""
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return share[:, None].to(instance_logits.dtype).expand_as(instance_logits)


@register("max")
class MaxPooling(InstancePooling):
    """The largest logit of each class; its instance has all the attention of that class."""

    def weights(self, instance_logits: Tensor, mask: Tensor) -> Tensor:
        """Return 1 for the best real instance of each class."""
        if instance_logits.shape[-1] == 0:
            return torch.zeros_like(instance_logits)
        best = instance_logits.masked_fill(~mask[:, None], -torch.inf).argmax(-1, keepdim=True)
        return torch.zeros_like(instance_logits).scatter(-1, best, 1.0) * mask[:, None]
