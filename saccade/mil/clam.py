"""CLAM: attention pooling with instance classifiers trained on the most and least attended tiles."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.attention import attention_pooling
from saccade.errors import ConfigError, ShapeError
from saccade.mil.gated_attention import gated_scores, weights_and_biases
from saccade.mil.model import Criterion, MILModel, MILOutput, check_bags, hide_padding, register

__all__ = ["CLAMMB", "CLAMSB", "smooth_top1_svm"]

SIZES = {"small": (512, 256), "big": (512, 384)}  # hidden and attention width


def smooth_top1_svm(logits: Tensor, target: Tensor) -> Tensor:
    """Return the smooth top-1 SVM loss ``(B,)``: ``log sum_j exp(s_j - s_y + [j != y])``, margin and temperature 1.

    Source:
        Berrada, Zisserman and Kumar, ICLR 2018 (arXiv:1802.07595).
    """
    margin = 1 - F.one_hot(target, logits.shape[-1]).to(logits.dtype)
    return torch.logsumexp(logits + margin, -1) - logits.gather(-1, target[..., None]).squeeze(-1)


class PlainNetwork(nn.Module):
    """Ungated scores; the dropout module exists only where it does something, which the official key names show."""

    def __init__(self, hidden_dim: int, attention_dim: int, rows: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(hidden_dim, attention_dim), nn.Tanh()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        self.module = nn.Sequential(*layers, nn.Linear(attention_dim, rows))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, N, rows)``."""
        scores: Tensor = self.module(hidden)
        return scores


class GatedNetwork(nn.Module):
    """Gated scores under the official key names."""

    def __init__(self, hidden_dim: int, attention_dim: int, rows: int, dropout: float) -> None:
        super().__init__()
        drop = [nn.Dropout(dropout)] if dropout > 0 else []
        self.attention_a = nn.Sequential(nn.Linear(hidden_dim, attention_dim), nn.Tanh(), *drop)
        self.attention_b = nn.Sequential(nn.Linear(hidden_dim, attention_dim), nn.Sigmoid(), *drop)
        self.attention_c = nn.Linear(attention_dim, rows)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, N, rows)``."""
        scores: Tensor
        if self.training and len(self.attention_a) == 3:
            scores = self.attention_c(self.attention_a(hidden) * self.attention_b(hidden))
            return scores
        layers = (self.attention_a[0], self.attention_b[0], self.attention_c)
        return gated_scores(hidden, *weights_and_biases(*layers))


class CLAM(MILModel):
    """What both variants share; :class:`CLAMSB` and :class:`CLAMMB` are to be used.

    Args:
        feature_dim: Width of the features.
        num_classes: Number of classes.
        size: ``"small"`` (512, 256), ``"big"`` (512, 384), or hidden and attention width.
        gated: Gated scores.
        dropout: After the first layer and in the attention network, in training.
        instances: B, tiles taken from each end of the attention (official: 8).
        subtyping: Classes exclude each other: top tiles of the other classes are negatives for them.
        bag_weight: Weight of the bag's loss (official: 0.7); the instances' loss has the rest.
        instance_loss: ``"ce"`` or ``"svm"`` (smooth top-1 SVM).

    Source:
        Lu et al., Nature Biomedical Engineering 2021 (arXiv:2004.09666); keys as in ``mahmoodlab/CLAM``.
    """

    row_per_class: ClassVar[bool]

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        size: str | tuple[int, int] = "small",
        *,
        gated: bool = True,
        dropout: float = 0.25,
        instances: int = 8,
        subtyping: bool = False,
        bag_weight: float = 0.7,
        instance_loss: str = "ce",
    ) -> None:
        super().__init__(feature_dim, num_classes)
        if isinstance(size, str) and size not in SIZES:
            raise ConfigError(f"CLAM size must be 'small', 'big' or two widths; got {size!r}.")
        if instance_loss not in ("ce", "svm") or instances < 1 or not 0 <= bag_weight <= 1:
            raise ConfigError(
                "CLAM needs instance_loss 'ce' or 'svm', instances >= 1 and 0 <= bag_weight <= 1; got "
                f"{instance_loss!r}, {instances}, {bag_weight}."
            )
        hidden_dim, attention_dim = SIZES[size] if isinstance(size, str) else size
        self.instances, self.subtyping = instances, subtyping
        self.bag_weight, self.instance_loss = bag_weight, instance_loss
        network = GatedNetwork if gated else PlainNetwork
        rows = num_classes if self.row_per_class else 1
        self.attention_net = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            network(hidden_dim, attention_dim, rows, dropout),
        )
        self.classifiers: nn.Module = nn.Linear(hidden_dim, num_classes)
        if self.row_per_class:
            self.classifiers = nn.ModuleList(nn.Linear(hidden_dim, 1) for _ in range(num_classes))
        self.instance_classifiers = nn.ModuleList(nn.Linear(hidden_dim, 2) for _ in range(num_classes))

    def classify(self, features: Tensor) -> Tensor:
        """Map embeddings ``(B, rows, D)`` to bag logits ``(B, C)``."""
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
        project, relu, dropout, network = self.attention_net
        hidden = dropout(relu(project(bags)))  # (B, N, D)
        scores = network(hidden).transpose(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (B, rows, N)
        pooled = attention_pooling(scores, hidden, mask=None if mask is None else mask[:, None])
        return MILOutput(
            logits=self.classify(pooled.out),
            attention=pooled.weights.mean(1),
            scores=hide_padding(scores, mask),
            features=pooled.out.squeeze(1),
            branch_attention=pooled.weights,
            instance_features=hidden,
        )

    def instance_predictions(self, output: MILOutput, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the instance classifiers say of the tiles that they are trained on.

        Args:
            output: Result of this model.
            target: ``(B,)`` class indices.

        Returns:
            Logits ``(B, C, 2k, 2)`` of the k most attended tiles and the k least attended, their targets
            ``(B, C, 2k)``, and bool ``(B, C, 2k)``: which of them count. k is ``min(instances, N // 2)``, at least 1;
            a bag of one tile counts nothing.
        """
        hidden, scores = output.instance_features, output.scores
        if hidden is None:
            raise ShapeError("CLAM.loss needs the output of a CLAM model, with its instance features.")
        (batch, _, count), classes = scores.shape, self.num_classes
        visible = scores.isfinite()
        available = visible[:, 0].sum(1)  # (B,)
        width = min(self.instances, max(count // 2, 1))
        per_bag = torch.minimum(available // 2, torch.tensor(width, device=scores.device)).clamp(min=1)
        per_bag = torch.where(available < 2, 0, per_bag)
        top = scores.topk(width).indices  # (B, rows, k)
        bottom = scores.masked_fill(~visible, torch.inf).topk(width, largest=False).indices
        chosen = torch.cat([top, bottom], -1).expand(batch, classes, 2 * width)
        rows = torch.arange(batch, device=scores.device)[:, None, None]
        weight = torch.stack([layer.get_parameter("weight") for layer in self.instance_classifiers])  # (C, 2, D)
        bias = torch.stack([layer.get_parameter("bias") for layer in self.instance_classifiers])
        tiles = hidden[rows, chosen]  # (B, C, 2k, D)
        logits = torch.einsum("bckd,ced->bcke", tiles, weight.to(tiles.dtype)) + bias[:, None].to(tiles.dtype)
        own = F.one_hot(target, classes).bool()[:, :, None]  # (B, C, 1)
        is_top = torch.arange(2 * width, device=scores.device) < width
        ordinal = torch.arange(width, device=scores.device).repeat(2)
        counts = (ordinal < per_bag[:, None, None]) & (own | (is_top & self.subtyping))
        return logits, (own & is_top).long(), counts

    def loss(self, output: MILOutput, target: Tensor, criterion: Criterion = F.cross_entropy) -> dict[str, Tensor]:
        """Return ``loss = bag_weight * bag + (1 - bag_weight) * instance``.

        ``instance``: for the true class its classifier must call the most attended tiles positive and the least
        attended negative; with ``subtyping`` the other classes must call their most attended tiles negative, and the
        sum is divided by the number of classes. The mean over bags.
        """
        bag = criterion(output.logits, target)
        logits, labels, counts = self.instance_predictions(output, target)
        if self.instance_loss == "svm":
            each = smooth_top1_svm(logits.float(), labels)
        else:
            each = F.cross_entropy(logits.float().movedim(-1, 1), labels, reduction="none")
        per_class = (each * counts).sum(-1) / counts.sum(-1).clamp(min=1)  # (B, C)
        instance = per_class.sum(1).mean() / (self.num_classes if self.subtyping else 1)
        return {"loss": self.bag_weight * bag + (1 - self.bag_weight) * instance, "bag": bag, "instance": instance}


@register("clam_sb")
class CLAMSB(CLAM):
    """CLAM with one attention row for all classes; arguments as of :class:`CLAM`."""

    row_per_class = False

    def classify(self, features: Tensor) -> Tensor:
        """Map ``(B, 1, D)`` to ``(B, C)``."""
        logits: Tensor = self.classifiers(features[:, 0])
        return logits


@register("clam_mb")
class CLAMMB(CLAM):
    """CLAM with one attention row and one linear unit for each class; arguments as of :class:`CLAM`."""

    row_per_class = True

    def classify(self, features: Tensor) -> Tensor:
        """Map ``(B, C, D)`` to ``(B, C)``."""
        units = cast(nn.ModuleList, self.classifiers)
        return torch.cat([unit(features[:, row]) for row, unit in enumerate(units)], -1)
