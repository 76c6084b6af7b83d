"""The algebra of edits against the same edits made on the weights themselves."""

import pytest
import torch

from saccade.vlm.answer_maps import edited_weights
from saccade.vlm.call import AttentionCall, TokenTable
from saccade.vlm.edits import ClassEdit, LogitEdit, edited_attention, recombine
from tests.helpers import assert_close, randn

QUERIES, KEYS = 3, 11


class Scale(ClassEdit):
    """Multiplies classes by fixed factors and a function of the masses."""

    def __init__(self, labels, factors, *, normalise=False, weight=None):
        self.name, self.labels, self.factors = "scale", labels, torch.tensor(factors)
        self.num_classes, self.normalise, self.weight = len(factors), normalise, weight
        self.weighted_class = None if weight is None else 0

    def key_class(self, call):
        return self.labels

    def log_weight(self, call):
        return self.weight

    def gain(self, layer, mass):
        factors = self.factors.view(1, 1, -1, 1) * (1 + mass[:, :, :1])
        factors = factors.expand(*mass.shape[:2], self.num_classes, mass.shape[3])
        if self.weight is None:
            return factors
        return torch.cat([torch.zeros_like(factors[:, :, :1]), factors[:, :, 1:], factors[:, :, :1]], 2)

    def on_weights(self, weights):
        """Do the same to weights ``(B, H, R, S)``."""
        labels = (self.labels if self.labels.ndim == 3 else self.labels[:, None])[:, :, None]
        first = (weights * (labels == 0)).sum(-1, keepdim=True)
        factor = self.factors[labels.clamp(min=0)] * (1 + first)
        if self.weight is not None:
            factor = factor * torch.where(labels == 0, self.weight[:, None, None].exp(), 1.0)
        weights = weights * factor
        return weights / weights.sum(-1, keepdim=True) if self.normalise else weights


class Stretch(LogitEdit):
    def __init__(self, factors):
        self.name, self.factors = "stretch", factors

    def factor(self, call):
        return self.factors


def a_call():
    query, key, value = randn(2, 4, QUERIES, 8), randn(2, 2, KEYS, 8, seed=1), randn(2, 2, KEYS, 8, seed=2)
    return AttentionCall(0, query, key, value, None, True, 0.4, KEYS - QUERIES, 0)


def literal(call, edits, factor=1.0):
    return literal_weights(call, edits, factor) @ call.value.repeat_interleave(2, 1)


def literal_weights(call, edits, factor=1.0):
    key = call.key.repeat_interleave(2, 1)
    scores = call.scale * call.query @ key.transpose(2, 3) * factor
    visible = torch.arange(KEYS) <= torch.arange(KEYS - QUERIES, KEYS)[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    for edit in edits:
        weights = edit.on_weights(weights)
    return weights


def labels(classes, seed, heads=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (2, KEYS) if heads is None else (2, heads, KEYS), generator=generator)


EDITS = {
    "plain": Scale(labels(3, 1), [0.5, 2.0, 1.0]),
    "normalised": Scale(labels(2, 2), [3.0, 0.7], normalise=True),
    "per head": Scale(labels(2, 3, heads=4), [0.2, 1.5]),
    "weighted": Scale(labels(3, 4), [1.0, 0.4, 1.2], normalise=True, weight=randn(2, KEYS, seed=5)),
}
CHOICES = [[name] for name in EDITS] + [
    ["plain", "normalised"],
    ["weighted", "plain"],
    ["plain", "weighted"],
    ["per head", "weighted", "normalised"],
]


@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_edits_in_a_row_are_those_of_the_weights(names):
    edits = [EDITS[name] for name in names]
    all_rows = [torch.empty(0)] * len(edits)
    assert_close(edited_attention(a_call(), [], edits, all_rows), literal(a_call(), edits))


def test_rows_that_are_left_alone():
    call, rows = a_call(), torch.tensor([[False, True, True], [False, False, True]])
    plain = literal(call, [])
    for names in CHOICES:
        edits = [EDITS[name] for name in names]
        got = edited_attention(call, [], edits, [rows] * len(edits))
        assert_close(got, torch.where(rows[:, None, :, None], literal(call, edits), plain))


def test_scores_before_weights():
    factor = 1 + randn(2, 1, KEYS, seed=6).abs()
    edits = [EDITS["plain"]]
    none = torch.empty(0)
    got = edited_attention(a_call(), [Stretch(factor)], edits, [none, none])
    assert_close(got, literal(a_call(), edits, factor[:, :, None]))
    rows = torch.tensor([[False, True, True], [True, True, True]])
    got = edited_attention(a_call(), [Stretch(factor)], [], [rows])
    expected = torch.where(rows[:, None, :, None], literal(a_call(), [], factor[:, :, None]), literal(a_call(), []))
    assert_close(got, expected)


def test_weights_of_one_row_without_the_others():
    call, factor, columns = a_call(), 1 + randn(2, 1, KEYS, seed=6).abs(), torch.tensor([[1, 4, 9], [0, 2, 10]])
    picked = columns[:, None, None].expand(-1, 4, QUERIES, -1)
    for names in [[], *CHOICES]:
        edits = [EDITS[name] for name in names]
        expected = literal_weights(call, edits, factor[:, :, None]).gather(3, picked)
        for row in range(QUERIES):
            got = edited_weights(call.rows(row, row + 1), [Stretch(factor), *edits], None, columns)
            assert_close(got, expected[:, :, row : row + 1])


def test_a_row_without_weight_stays_zero():
    zero = recombine(torch.zeros(1, 1, 2, 1, 4), torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1), normalise=True)
    assert torch.equal(zero, torch.zeros(1, 1, 1, 4))


def test_a_table_grows_and_slides():
    table = TokenTable(torch.arange(5)[None], -7)
    call = a_call()
    assert table.columns(call)[0].tolist() == [0, 1, 2, 3, 4] + [-7] * 6
    late = AttentionCall(0, call.query, call.key, call.value, None, False, 1.0, 300, 290)
    assert table.columns(late)[0].tolist() == [-7] * 11
    assert table.columns(AttentionCall(0, call.query, call.key, call.value, None, False, 1.0, 9, 3))[
        0, :3
    ].tolist() == [3, 4, -7]
