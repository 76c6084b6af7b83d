"""Survival: the partial likelihood, hazards and concordance against their formulas written out."""

import math

import pytest
import torch

from saccade.errors import ShapeError
from saccade.mil.survival import concordance_index, cox_loss, discrete_hazard_loss, hazards_to_risk

TARGET = torch.tensor([[3.0, 1], [1, 1], [3, 0], [7, 1], [2, 0]])
RISK = torch.tensor([0.3, -0.2, 1.0, 0.4, 0.0])


def test_cox_loss():
    total = 0.0
    for i in range(5):
        if TARGET[i, 1]:
            among = sum(math.exp(RISK[j]) for j in range(5) if TARGET[j, 0] >= TARGET[i, 0])
            total -= float(RISK[i]) - math.log(among)
    torch.testing.assert_close(cox_loss(RISK, TARGET), torch.tensor(total / 3))
    assert cox_loss(RISK[:1], torch.tensor([[1.0, 0.0]])) == 0
    risk = RISK.double().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(cox_loss(risk, TARGET.double()), risk)[0]).all()


def test_discrete_hazards():
    logits, edges = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0, 5.0])
    hazards = logits.sigmoid()
    total = 0.0
    for row, (time, event) in enumerate(TARGET.tolist()):
        k = 0 if time < 2 else 1 if time < 5 else 2
        survived = [math.log(1 - hazards[row, j]) for j in range(k)]
        last = math.log(hazards[row, k]) if event else math.log(1 - hazards[row, k])
        total -= sum(survived) + last
    torch.testing.assert_close(discrete_hazard_loss(logits, TARGET, edges), torch.tensor(total / 5))
    early, late = torch.tensor([[5.0, -5, -5]]), torch.tensor([[-5.0, -5, 5]])
    assert hazards_to_risk(early) > hazards_to_risk(late)


def test_concordance():
    time = torch.tensor([[1.0, 1], [2, 1], [3, 0], [4, 1]])
    assert concordance_index(torch.tensor([4.0, 3, 2, 1]), time) == 1
    assert concordance_index(torch.tensor([1.0, 2, 3, 4]), time) == 0
    assert concordance_index(torch.zeros(4), time) == 0.5
    assert math.isnan(concordance_index(torch.zeros(2), torch.tensor([[1.0, 0], [2, 0]])))
    assert concordance_index(torch.tensor([4.0, 1, 3, 2]), time) == 3 / 5


def test_shapes():
    with pytest.raises(ShapeError, match="time and event"):
        cox_loss(RISK, TARGET[:, 0])
    with pytest.raises(ShapeError, match="3 intervals need 2 inner edges"):
        discrete_hazard_loss(torch.zeros(5, 3), TARGET, torch.tensor([1.0]))
