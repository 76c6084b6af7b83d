"""ABMIL: attention-based multiple instance learning, gated or not."""

from __future__ import annotations

from torch import Tensor, nn

from saccade.attention import attention_pooling
from saccade.mil.gated_attention import GatedAttention
from saccade.mil.model import MILModel, MILOutput, check_bags, hide_padding, register

__all__ = ["ABMIL", "BagClassifier", "DimensionReduction"]


class DimensionReduction(nn.Module):
    """``relu(x W^T)``; the reference has no bias, MIL-Lab has one.

    Args:
        feature_dim: Width of the features.
        hidden_dim: Width of the result.
        bias: Whether there is one.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature_dim, hidden_dim, bias=bias)

    def forward(self, bags: Tensor) -> Tensor:
        """Map ``(B, N, D_feat)`` to ``(B, N, D)``."""
        hidden: Tensor = self.fc1(bags)
        return hidden.relu_()


class BagClassifier(nn.Module):
    """A linear layer under the key ``fc``.

    Args:
        hidden_dim: Width of the embedding.
        num_classes: Number of logits.
    """

    def __init__(self, hidden_dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden_dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(..., D)`` to ``(..., C)``."""
        logits: Tensor = self.fc(features)
        return logits


@register("abmil")
class ABMIL(MILModel):
    r"""The bag is the attention-weighted mean of its instances.

    .. math:: h_n = \mathrm{relu}(W_r x_n), \quad a = \mathrm{softmax}_n(s(h_n)), \quad
        \text{logits} = W \sum_n a_n h_n + b

    Args:
        feature_dim: Width of the features.
        num_classes: Number of logits.
        hidden_dim: D.
        attention_dim: A.
        gated: Gated scores (eq. 9 of the paper) or plain ones (eq. 8).
        dropout: In the attention network, in training (MIL-Lab: 0.25).
        projection_bias: Bias of the first layer (MIL-Lab has one).

    Source:
        Ilse et al., ICML 2018 (arXiv:1802.04712). Keys as in ``dazhangyu123/ACMIL``; MIL-Lab's are translated by
        :func:`saccade.mil.load_model`.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        *,
        gated: bool = True,
        dropout: float = 0.0,
        projection_bias: bool = False,
    ) -> None:
        super().__init__(feature_dim, num_classes)
        self.dimreduction = DimensionReduction(feature_dim, hidden_dim, bias=projection_bias)
        self.attention = GatedAttention(hidden_dim, attention_dim, gated=gated, dropout=dropout)
        self.classifier = BagClassifier(hidden_dim, num_classes)

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> MILOutput:
        """Classify bags.

        Args:
            bags: ``(B, N, feature_dim)``.
            mask: Bool ``(B, N)``, ``True`` = real instance. A bag without one gives the logits of a zero embedding.

        Raises:
            ShapeError: If shapes do not fit.
        """
        check_bags(bags, mask, self.feature_dim)
        hidden = self.dimreduction(bags)
        scores = self.attention(hidden)  # (B, 1, N)
        pooled = attention_pooling(scores, hidden, mask=None if mask is None else mask[:, None])
        features = pooled.out[:, 0]  # (B, D)
        return MILOutput(self.classifier(features), pooled.weights[:, 0], hide_padding(scores, mask), features)
