"""Losses and concordance for survival: Cox's partial likelihood and discrete-time hazards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import ShapeError

__all__ = ["concordance_index", "cox_loss", "discrete_hazard_loss", "hazards_to_risk"]


def check(values: Tensor, target: Tensor) -> None:
    """Raise unless there is a pair of time and event for each row."""
    if target.shape != (len(values), 2):
        raise ShapeError(f"target must hold time and event, ({len(values)}, 2); got {tuple(target.shape)}.")


def cox_loss(risk: Tensor, target: Tensor) -> Tensor:
    """Return the negative log partial likelihood with Breslow's handling of ties, the mean over events.

    ``-(1/E) sum_{i: event} (r_i - log sum_{j: t_j >= t_i} exp(r_j))``; 0 where the batch holds no event.

    Args:
        risk: ``(B,)`` or ``(B, 1)``, log relative risks.
        target: ``(B, 2)``: time, and 1 for an event, 0 for censored.

    Raises:
        ShapeError: If shapes do not fit.

    Source:
        Cox 1972; Breslow 1974.
    """
    risk = risk.reshape(len(risk), -1)[:, 0].float()
    check(risk, target)
    time, event = target[:, 0], target[:, 1] > 0
    at_risk = time[None, :] >= time[:, None]
    log_sum = risk[None, :].masked_fill(~at_risk, -torch.inf).logsumexp(1)
    return ((log_sum - risk) * event).sum() / event.sum().clamp(min=1)


def discrete_hazard_loss(logits: Tensor, target: Tensor, edges: Tensor) -> Tensor:
    """Return the negative log likelihood of hazards in intervals of time, the mean over the batch.

    An event in interval k: ``-log h_k - sum_{j<k} log(1 - h_j)``; censored there: ``-sum_{j<=k} log(1 - h_j)``.

    Args:
        logits: ``(B, K)``, of the hazards.
        target: ``(B, 2)``: time and event.
        edges: ``(K - 1,)``, inner edges of the intervals.

    Raises:
        ShapeError: If shapes do not fit.

    Source:
        Zadeh and Schmid, IEEE TPAMI 2020.
    """
    check(logits, target)
    if len(edges) != logits.shape[1] - 1:
        raise ShapeError(f"{logits.shape[1]} intervals need {logits.shape[1] - 1} inner edges; got {len(edges)}.")
    interval = torch.bucketize(target[:, 0].contiguous(), edges.to(target), right=True)
    event = target[:, 1] > 0
    columns = torch.arange(logits.shape[1], device=logits.device)
    survived = (columns < interval[:, None]) | ((columns == interval[:, None]) & ~event[:, None])
    died = (columns == interval[:, None]) & event[:, None]
    losses = F.softplus(logits.float()) * survived + F.softplus(-logits.float()) * died
    return losses.sum(1).mean()


def hazards_to_risk(logits: Tensor) -> Tensor:
    """Return ``-sum_k S_k`` of the survival function in K intervals, ``(B,)``: larger means earlier."""
    return -torch.cumprod(1 - logits.float().sigmoid(), 1).sum(1)


def concordance_index(risk: Tensor, target: Tensor) -> float:
    """Return Harrell's C: the share of comparable pairs in which the one with the higher risk dies first.

    Equal risks count half; a pair is comparable if the earlier time is an event. NaN if there is no such pair.

    Args:
        risk: ``(B,)``.
        target: ``(B, 2)``: time and event.

    Source:
        Harrell et al., JAMA 1982.
    """
    check(risk, target)
    time, event = target[:, 0], target[:, 1] > 0
    comparable = (time[:, None] < time[None, :]) & event[:, None]
    higher = (risk[:, None] > risk[None, :]).double() + 0.5 * (risk[:, None] == risk[None, :]).double()
    return float((higher * comparable).sum() / comparable.sum()) if comparable.any() else float("nan")
