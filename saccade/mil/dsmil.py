"""DSMIL: every instance is compared with the most suspicious one of each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.attention import attention_pooling
from saccade.errors import ShapeError
from saccade.mil.model import Criterion, MILModel, MILOutput, check_bags, hide_padding, register

__all__ = ["DSMIL"]

QUERY_DIM = 128


class InstanceClassifier(nn.Module):
    """One linear layer under the official key ``fc.0``."""

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(feature_dim, num_classes))


class BagStream(nn.Module):
    """Queries, values and the classifier of the second stream, under the official key names."""

    def __init__(
        self, feature_dim: int, num_classes: int, nonlinear: bool, project_values: bool, dropout: float
    ) -> None:
        super().__init__()
        self.q: nn.Module = nn.Linear(feature_dim, QUERY_DIM)
        if nonlinear:
            self.q = nn.Sequential(self.q, nn.ReLU(), nn.Linear(QUERY_DIM, QUERY_DIM), nn.Tanh())
        self.v: nn.Module = nn.Identity()
        if project_values:
            self.v = nn.Sequential(nn.Dropout(dropout), nn.Linear(feature_dim, feature_dim), nn.ReLU())
        self.fcc = nn.Conv1d(num_classes, num_classes, kernel_size=feature_dim)


@register("dsmil")
class DSMIL(MILModel):
    r"""Two streams: instance logits with max pooling, and attention by similarity to the critical instance of a class.

    .. math:: m_c = \arg\max_n c_n, \quad A_c = \mathrm{softmax}_n(q(x_n)^\top q(x_{m_c}) / \sqrt{128}), \quad
        B_c = \sum_n A_{cn} v(x_n)

    Labels are multi-hot: a binary problem has ``num_classes = 1``. ``branch_attention`` is ``(B, C, N)``, ``features``
    ``(B, C, D)``.

    Args:
        feature_dim: Width of the features; there is no dimension reduction.
        num_classes: Number of logits.
        nonlinear: Queries from two layers instead of one.
        project_values: Values ``relu(W x)`` instead of the features.
        dropout: On the features before that layer, in training.

    Source:
        Li et al., CVPR 2021 (arXiv:2011.08939); keys as in ``binli123/dsmil-wsi``.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        nonlinear: bool = True,
        project_values: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(feature_dim, num_classes)
        self.i_classifier = InstanceClassifier(feature_dim, num_classes)
        self.b_classifier = BagStream(feature_dim, num_classes, nonlinear, project_values, dropout)

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> MILOutput:
        """Classify bags.

        Args:
            bags: ``(B, N, feature_dim)``, N at least 1.
            mask: Bool ``(B, N)``, ``True`` = real instance.

        Raises:
            ShapeError: If shapes do not fit, or bags have no place for an instance.
        """
        check_bags(bags, mask, self.feature_dim)
        if bags.shape[1] == 0:
            raise ShapeError("DSMIL needs a critical instance; the bags have none.")
        instance_logits = self.i_classifier.fc(bags)  # (B, N, C)
        ranked = instance_logits if mask is None else instance_logits.masked_fill(~mask[..., None], -torch.inf)
        critical = ranked.argmax(1)  # (B, C)
        query = self.b_classifier.q(bags)  # (B, N, 128)
        best = query.gather(1, critical[..., None].expand(-1, -1, QUERY_DIM))
        scores = best @ query.transpose(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * QUERY_DIM**-0.5  # (B, C, N)
        value = self.b_classifier.v(bags)
        pooled = attention_pooling(scores, value, mask=None if mask is None else mask[:, None])
        logits = self.b_classifier.fcc(pooled.out.to(value.dtype)).squeeze(-1)
        return MILOutput(
            logits=logits,
            attention=pooled.weights.mean(1),
            scores=hide_padding(scores, mask),
            features=pooled.out,
            branch_attention=pooled.weights,
            instance_logits=ranked,
        )

    def loss(
        self, output: MILOutput, target: Tensor, criterion: Criterion = F.binary_cross_entropy_with_logits
    ) -> dict[str, Tensor]:
        """Return ``loss = 0.5 bag + 0.5 instance``, the criterion of the bag logits and of the largest instance logits.

        Args:
            output: Result of this model.
            target: Multi-hot ``(B, C)``, or class indices ``(B,)``.
            criterion: Loss of logits ``(B, C)`` and that target.
        """
        if output.instance_logits is None:
            raise ShapeError("DSMIL.loss needs the output of a DSMIL model, with instance logits.")
        if criterion is F.binary_cross_entropy_with_logits:
            target = multi_hot(target, self.num_classes).to(output.logits.dtype)
        bag = criterion(output.logits, target)
        instance = criterion(output.instance_logits.amax(1), target)
        return {"loss": 0.5 * bag + 0.5 * instance, "bag": bag, "instance": instance}

    def probabilities(self, output: MILOutput) -> Tensor:
        """Return ``sigmoid`` of the bag logits, ``(B, C)``, float32; they need not sum to 1."""
        return output.logits.float().sigmoid()


def multi_hot(target: Tensor, num_classes: int) -> Tensor:
    """Turn class indices ``(B,)`` into ``(B, C)``; for one logit the index is the label itself."""
    if target.ndim == 2:
        return target
    return target[:, None] if num_classes == 1 else F.one_hot(target, num_classes)
