"""ACMIL: several attention branches that are pushed apart, and random masking of the highest-scoring instances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.attention import attention_pooling
from saccade.errors import ConfigError, ShapeError
from saccade.mil.abmil import BagClassifier, DimensionReduction
from saccade.mil.gated_attention import GatedAttention
from saccade.mil.model import Criterion, MILModel, MILOutput, check_bags, hide_padding, register

__all__ = ["ACMILGA", "ACMILMHA", "diversity_loss", "drop_top_instances"]

DROPPED_SCORE = -1e9  # scores are float32 here; where everything is dropped, the softmax is uniform as in the reference


def drop_top_instances(
    scores: Tensor, mask: Tensor | None, top: int, share: float, noise: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Choose instances to mask: of the ``K = min(top, N)`` best of each row exactly ``int(K share)``, at random.

    Args:
        scores: ``(B, R, N)``, rows that draw independently.
        mask: Bool ``(B, N)`` of real instances; N above is their number in each bag.
        top: K.
        share: Masked share p of those.
        noise: ``(B, R, min(top, N))``, uniform draws over the best instances in descending order of score; the
            smallest are masked. Drawn if not given.
        generator: Source of the draw.

    Returns:
        Bool ``(B, R, N)``, ``True`` = masked.

    Source:
        STKIM of ACMIL (arXiv:2311.07125), as coded in ``dazhangyu123/ACMIL``: an exact count, not a probability.
    """
    batch, rows, count = scores.shape
    width = min(top, count)
    visible = scores.detach()
    if mask is None:
        available = torch.full((batch,), count, device=scores.device)
    else:
        available = mask.sum(1)
        visible = visible.masked_fill(~mask[:, None], -torch.inf)
    best = visible.topk(width, dim=-1).indices
    if noise is None:
        noise = torch.rand(batch, rows, width, device=scores.device, generator=generator)
    elif noise.shape != best.shape:
        raise ShapeError(f"noise must be {tuple(best.shape)}; got {tuple(noise.shape)}.")
    candidates = available.clamp(max=width)
    # Truncated like int(K * p), whose product is in double precision.
    drops = (candidates.double() * share).long()[:, None, None]
    is_candidate = torch.arange(width, device=scores.device) < candidates[:, None, None]
    rank = noise.masked_fill(~is_candidate, torch.inf).argsort(-1).argsort(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, rank < drops)


def diversity_loss(attention: Tensor) -> Tensor:
    """Return the mean cosine similarity of branches, ``(B, M, N)`` or ``(B, M, H, N)``; 0 for one branch.

    With unit vectors u_m of M branches, ``(|sum_m u_m|^2 - sum_m |u_m|^2) / (M (M - 1))`` is the mean over pairs.
    """
    branches = attention.shape[1]
    if branches == 1:
        return attention.new_zeros(())
    unit = F.normalize(attention, dim=-1, eps=1e-8)
    together, alone = unit.sum(1).square().sum(-1), unit.square().sum(-1).sum(1)
    return (together - alone).mean() / (branches * (branches - 1))


class ACMIL(MILModel):
    """What both variants share: masking, the loss, checks.

    Args:
        feature_dim: Width of the features.
        num_classes: Number of logits.
        branches: M, number of attention branches (paper: 5).
        mask_top: K, best instances considered for masking in training (paper: 10; 0 = no masking).
        mask_share: p, the share of them that is masked (paper: 0.6).
    """

    def __init__(self, feature_dim: int, num_classes: int, branches: int, mask_top: int, mask_share: float) -> None:
        super().__init__(feature_dim, num_classes)
        if branches < 1 or mask_top < 0 or not 0 <= mask_share <= 1:
            raise ConfigError(
                f"ACMIL needs branches >= 1, mask_top >= 0 and 0 <= mask_share <= 1; got {branches}, {mask_top}, "
                f"{mask_share}."
            )
        self.branches, self.mask_top, self.mask_share = branches, mask_top, mask_share

    def drop(
        self, scores: Tensor, mask: Tensor | None, noise: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return scores ``(B, R, N)`` with the dropped ones at -1e9, and which those are; in training only."""
        if not self.training or self.mask_top == 0 or scores.shape[-1] == 0:
            return scores, None
        dropped = drop_top_instances(scores, mask, self.mask_top, self.mask_share, noise, generator)
        return scores.masked_fill(dropped, DROPPED_SCORE), dropped

    def loss(self, output: MILOutput, target: Tensor, criterion: Criterion = F.cross_entropy) -> dict[str, Tensor]:
        """Return ``loss = bag + branch + diversity``, each with weight 1.

        ``bag`` is the criterion of the bag logits; ``branch`` its mean over the branches' own logits and ``diversity``
        the mean cosine similarity of their attention, both 0 for a single branch.
        """
        if output.branch_logits is None or output.branch_attention is None:
            raise ShapeError("ACMIL.loss needs the output of an ACMIL model, with branch logits.")
        bag = criterion(output.logits, target)
        branch = bag.new_zeros(())
        if self.branches > 1:
            branch = torch.stack([criterion(logits, target) for logits in output.branch_logits.unbind(1)]).mean()
        diversity = diversity_loss(output.branch_attention)
        return {"loss": bag + branch + diversity, "bag": bag, "branch": branch, "diversity": diversity}


@register("acmil_ga")
class ACMILGA(ACMIL):
    r"""ACMIL with gated attention: M score rows over shared V and U, one classifier a branch, one for their mean.

    .. math:: z_m = \mathrm{softmax}_n(S_m) h, \quad \bar z = \tfrac1M \sum_m z_m

    Args:
        feature_dim: Width of the features.
        num_classes: Number of logits.
        hidden_dim: D.
        attention_dim: A, 128 in the reference.
        branches: M.
        mask_top: K of the masking in training.
        mask_share: p of the masking in training. The authors later found 0 better on some data.

    Source:
        Zhang et al., ECCV 2024 (arXiv:2311.07125); keys as in ``dazhangyu123/ACMIL``.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        branches: int = 5,
        mask_top: int = 10,
        mask_share: float = 0.6,
    ) -> None:
        super().__init__(feature_dim, num_classes, branches, mask_top, mask_share)
        self.dimreduction = DimensionReduction(feature_dim, hidden_dim)
        self.attention = GatedAttention(hidden_dim, attention_dim, branches)
        self.classifier = nn.ModuleList(BagClassifier(hidden_dim, num_classes) for _ in range(branches))
        self.Slide_classifier = BagClassifier(hidden_dim, num_classes)

    def forward(
        self,
        bags: Tensor,
        mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MILOutput:
        """Classify bags.

        Args:
            bags: ``(B, N, feature_dim)``.
            mask: Bool ``(B, N)``, ``True`` = real instance.
            noise: ``(B, M, min(mask_top, N))``, draws of the masking; see :func:`drop_top_instances`.
            generator: Source of those draws.

        Raises:
            ShapeError: If shapes do not fit.
        """
        check_bags(bags, mask, self.feature_dim)
        hidden, scores = self.attention.project(bags, self.dimreduction.fc1.weight)
        scores, dropped = self.drop(scores, mask, noise, generator)  # (B, M, N)
        pooled = attention_pooling(scores, hidden, mask=None if mask is None else mask[:, None])
        features = pooled.out.mean(1)  # the mean of the softmaxes applied to h
        return MILOutput(
            logits=self.Slide_classifier(features),
            attention=pooled.weights.mean(1),
            scores=hide_padding(scores, mask),
            features=features,
            branch_logits=torch.stack([self.classifier[m](pooled.out[:, m]) for m in range(self.branches)], 1),
            branch_attention=pooled.weights,
            dropped=dropped,
        )


class BranchAttention(nn.Module):
    """Projections of one branch; the bag's own has no query and key.

    Args:
        hidden_dim: D.
        dropout: After the output projection.
        scores: Whether the branch makes scores of its own.
    """

    def __init__(self, hidden_dim: int, dropout: float, *, scores: bool = True) -> None:
        super().__init__()
        if scores:
            self.q_proj = nn.Linear(hidden_dim, hidden_dim)
            self.k_proj = nn.Linear(hidden_dim, hidden_dim)
        self.v_proj = nn.Linear(hidden_dim, hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        self.layer_norm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def readout(self, pooled: Tensor, weight: Tensor) -> Tensor:
        """Map instances averaged per head ``(B, H, D)`` to ``(B, D)``; ``weight (B, H)`` is 0 for empty bags."""
        heads, dim = pooled.shape[1:]
        value = self.v_proj.weight.view(heads, dim // heads, dim)
        out = torch.einsum("bhd,hed->bhe", pooled, value.to(pooled.dtype)).flatten(1)
        bias = self.v_proj.bias.view(heads, -1) * weight[..., None]  # each head's weights sum to 1, or to 0
        normed: Tensor = self.layer_norm(self.dropout(self.out_proj(out + bias.flatten(1).to(out.dtype))))
        return normed

    def folded_query(self, query: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Return ``W_k^T q`` per head ``(H, D)`` and ``b_k q`` ``(H, 1)``, scaled: scores without projecting keys."""
        q = self.q_proj(query).view(heads, -1)  # (H, d)
        q = q * q.shape[1] ** -0.5
        dim = query.shape[-1]
        folded = torch.einsum("he,hed->hd", q, self.k_proj.weight.view(heads, -1, dim).to(q.dtype))
        return folded, (q * self.k_proj.bias.view(heads, -1)).sum(1, keepdim=True)


@register("acmil_mha")
class ACMILMHA(ACMIL):
    r"""ACMIL with multi-head attention: learned queries, own projections in every branch.

    Keys and values are never projected: with one query a branch, ``q (W_k h) = (W_k^T q) h`` and
    ``P (h W_v) = (P h) W_v``, so scores and averages are taken on ``h`` itself.

    Args:
        feature_dim: Width of the features.
        num_classes: Number of logits.
        hidden_dim: D, a multiple of ``num_heads``.
        num_heads: H, 8 in the reference.
        branches: M.
        mask_top: K of the masking in training.
        mask_share: p of the masking in training.
        dropout: After each output projection, 0.1 in the reference.

    Source:
        Zhang et al., ECCV 2024 (arXiv:2311.07125); keys as in ``dazhangyu123/ACMIL``.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        num_heads: int = 8,
        branches: int = 5,
        mask_top: int = 10,
        mask_share: float = 0.6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(feature_dim, num_classes, branches, mask_top, mask_share)
        if hidden_dim % num_heads:
            raise ConfigError(f"hidden_dim must be a multiple of num_heads; got {hidden_dim} and {num_heads}.")
        self.num_heads = num_heads
        self.dimreduction = DimensionReduction(feature_dim, hidden_dim)
        self.q = nn.Parameter(torch.zeros(1, branches, hidden_dim))
        nn.init.normal_(self.q, std=1e-6)
        self.sub_attention = nn.ModuleList(BranchAttention(hidden_dim, dropout) for _ in range(branches))
        self.bag_attention = BranchAttention(hidden_dim, dropout, scores=False)
        self.classifier = nn.ModuleList(BagClassifier(hidden_dim, num_classes) for _ in range(branches))
        self.Slide_classifier = BagClassifier(hidden_dim, num_classes)

    def attentions(self) -> Iterator[BranchAttention]:
        """Yield the branches' modules."""
        return (cast(BranchAttention, module) for module in self.sub_attention)

    def score(self, hidden: Tensor) -> Tensor:
        """Return scores ``(B, M H, N)``, float32 (float64 for float64)."""
        folds = [
            branch.folded_query(query, self.num_heads)
            for branch, query in zip(self.attentions(), self.q[0], strict=True)
        ]
        weight, bias = (torch.cat(parts) for parts in zip(*folds, strict=True))
        scores = weight.to(hidden.dtype) @ hidden.transpose(1, 2)
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return scores.to(dtype) + bias.to(dtype)

    def forward(
        self,
        bags: Tensor,
        mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MILOutput:
        """Classify bags.

        Args:
            bags: ``(B, N, feature_dim)``.
            mask: Bool ``(B, N)``, ``True`` = real instance.
            noise: ``(B, M, H, min(mask_top, N))``, draws of the masking; see :func:`drop_top_instances`.
            generator: Source of those draws.

        Raises:
            ShapeError: If shapes do not fit.
        """
        check_bags(bags, mask, self.feature_dim)
        hidden = self.dimreduction(bags)
        rows = None if noise is None else noise.flatten(1, 2)
        scores, dropped = self.drop(self.score(hidden), mask, rows, generator)
        pooled = attention_pooling(scores, hidden, mask=None if mask is None else mask[:, None])
        shape = (self.branches, self.num_heads)
        per_head = pooled.out.unflatten(1, shape)  # (B, M, H, D)
        attention = pooled.weights.unflatten(1, shape)  # (B, M, H, N)
        total = attention.detach().sum(-1)  # 1, or 0 for an empty bag
        branch = [
            self.classifier[m](module.readout(per_head[:, m], total[:, m]))
            for m, module in enumerate(self.attentions())
        ]
        features = self.bag_attention.readout(per_head.mean(1), total.mean(1))
        return MILOutput(
            logits=self.Slide_classifier(features),
            attention=attention.mean((1, 2)),
            scores=hide_padding(scores, mask).unflatten(1, shape),
            features=features,
            branch_logits=torch.stack(branch, 1),
            branch_attention=attention,
            dropped=None if dropped is None else dropped.unflatten(1, shape),
        )
