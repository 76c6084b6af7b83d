"""Intervals and tests agree with what is known exactly, and repeat."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from saccade.errors import ConfigError
from saccade.vlm.evaluation import Measured, compare_runs, evaluate_runs, holm, mcnemar, score_run, statistics

KEY = ("all", "rate")


def run(name, hits, units=None):
    hits = np.asarray(hits, dtype=np.float64)
    counts = np.stack([hits, np.ones_like(hits)], -1)
    names = tuple(units or map(str, range(len(hits))))
    return Measured(name, "", names, counts, lambda s: {KEY: statistics.ratio(s[..., 0], s[..., 1])}, {KEY: hits > 0})


def noisy(share, count, seed):
    return np.random.default_rng(seed).random(count) < share


def test_interval_is_scipys():
    hits = noisy(0.3, 200, 0)
    (score,) = score_run(run("a", hits), resamples=4000)
    expected = stats.bootstrap((hits.astype(float),), np.mean, n_resamples=4000, method="percentile", rng=1)
    assert score.value == hits.mean()
    assert (score.low, score.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.011)


def test_permutation_is_the_exact_test():
    first, second = noisy(0.3, 10, 1).astype(float), noisy(0.8, 10, 2).astype(float)
    change = second - first
    null = [abs(np.dot(sign, change)) for sign in product((1, -1), repeat=10)]
    exact = np.mean(np.array(null) >= abs(change.sum()) - 1e-9)
    (comparison,) = compare_runs(run("a", first), run("b", second), resamples=20000)
    assert 0.01 < exact < 0.9
    assert comparison.p == pytest.approx(exact, abs=0.012)
    assert comparison.difference == pytest.approx(change.mean())


def test_pairing_narrows():
    first = noisy(0.5, 300, 3)
    second = first | noisy(0.1, 300, 4)
    (comparison,) = compare_runs(run("a", first), run("b", second))
    alone = score_run(run("b", second))[0]
    assert comparison.high - comparison.low < 0.6 * (alone.high - alone.low)
    assert comparison.low > 0
    assert comparison.p < 0.05
    assert comparison.mcnemar_p == pytest.approx(mcnemar(first, second))


def test_equal_runs():
    hits = noisy(0.5, 40, 5)
    (comparison,) = compare_runs(run("a", hits), run("b", hits))
    assert (comparison.difference, comparison.low, comparison.high) == (0, 0, 0)
    assert (comparison.p, comparison.mcnemar_p) == (1, 1)


def test_repeats_and_does_not_depend_on_memory(monkeypatch):
    runs = [run("a", noisy(0.4, 30, 6)), run("b", noisy(0.6, 30, 7)), run("c", noisy(0.6, 30, 8))]
    once = evaluate_runs(runs, seed=5)
    monkeypatch.setattr(statistics, "CELLS", 1000)
    assert evaluate_runs(runs, seed=5) == once
    assert evaluate_runs(runs, seed=6) != once
    assert len(once.comparisons) == 3
    assert all(c.p_adjusted >= c.p for c in once.comparisons)


def test_mcnemar():
    first = np.array([True] * 9 + [False] + [True] * 5)
    second = np.array([False] * 9 + [True] + [True] * 5)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10) / 2**10)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]


def test_what_cannot_be_compared():
    with pytest.raises(ConfigError, match=r"a and b cannot be paired: 2 are in one of them alone, x, y"):
        evaluate_runs([run("a", [1, 0], ["x", "z"]), run("b", [1, 0], ["y", "z"])])
    with pytest.raises(ConfigError, match=r"same name"):
        evaluate_runs([run("a", [1]), run("a", [1])])
    with pytest.raises(ConfigError, match=r"100 resamples are needed"):
        evaluate_runs([run("a", [1])], resamples=10)
    with pytest.raises(KeyError):
        evaluate_runs([run("a", [1])], resamples=100).score("a", "all", "f1")
