"""Intervals of scores, and tests of the difference between two runs over the same questions.

A run is a table of counts: a row per unit, which is an image or a question, and a column per thing counted. Every
score of the benchmarks is a function of the column sums, so that resampling units costs one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError
from saccade.vlm.evaluation.answers import some

__all__ = [
    "Comparison",
    "Evaluation",
    "Measured",
    "Score",
    "compare_runs",
    "evaluate_runs",
    "holm",
    "mcnemar",
    "ratio",
    "score_run",
]

Floats = NDArray[np.float64]
Key = tuple[str, str]  # group, metric
Statistic = Callable[[Floats], Mapping[Key, Floats]]
CELLS = 10_000_000  # of a weight matrix at a time


@dataclass(frozen=True)
class Measured:
    """One answers file, counted.

    Args:
        name: For tables.
        intervention: What the file says about it.
        units: What is resampled, e.g. image files, unique.
        counts: ``(N, K)``, a row per unit.
        statistic: From sums ``(..., K)`` to scores ``(...)``, by group and metric.
        outcomes: Per score that is a rate of single answers, whether each of them counted, ``(M,)`` of the same answers
            in every run; for McNemar's test.
        facts: What belongs beside the scores: length, refusals, unparsed answers and the like.
        rows: A row per answer, for tables.
    """

    name: str
    intervention: str
    units: tuple[str, ...]
    counts: Floats
    statistic: Statistic
    outcomes: Mapping[Key, NDArray[np.bool_]] = field(default_factory=dict)
    facts: Mapping[str, float | int | None] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Score:
    """A score of one run.

    Args:
        run: Name of the run.
        group: Question set, type, or ``all``.
        metric: E.g. ``accuracy``.
        value: The score.
        low: Lower end of its 95 % bootstrap interval over units.
        high: Upper end.
    """

    run: str
    group: str
    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A score of two runs.

    Args:
        first: Name of one run.
        second: Name of the other.
        group: As in :class:`Score`.
        metric: As in :class:`Score`.
        difference: Second minus first.
        low: Lower end of its 95 % paired bootstrap interval over units.
        high: Upper end.
        p: Two-sided, of the permutation test that swaps the runs within units.
        p_adjusted: The same, adjusted by Holm over all pairs of runs for this score.
        mcnemar_p: Exact two-sided McNemar test over single answers; ``None`` where the score is no rate of those. It
            takes answers about one image as independent.
    """

    first: str
    second: str
    group: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    mcnemar_p: float | None


@dataclass(frozen=True)
class Evaluation:
    """Everything about some runs.

    Args:
        scores: Of each run.
        comparisons: Of each pair of runs.
        facts: By run.
        interventions: By run.
        rows: By run, a row per answer.
    """

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    facts: Mapping[str, Mapping[str, float | int | None]]
    interventions: Mapping[str, str]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]

    def score(self, run: str, group: str, metric: str) -> Score:
        """Return one of the scores.

        Raises:
            KeyError: If there is none of this name.
        """
        for score in self.scores:
            if (score.run, score.group, score.metric) == (run, group, metric):
                return score
        raise KeyError((run, group, metric))


def ratio(part: Floats, whole: Floats) -> Floats:
    """Return ``part / whole``, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole != 0)


def evaluate_runs(runs: Sequence[Measured], *, seed: int = 0, resamples: int = 2000) -> Evaluation:
    """Score runs and compare every two of them.

    Args:
        runs: At least one; all over the same units.
        seed: Of resampling; results repeat exactly.
        resamples: Of bootstrap and permutation, each; at least 100.

    Raises:
        ConfigError: If there is no run, two have the same name, their units differ, or ``resamples`` is too small.
    """
    if not runs or resamples < 100:
        raise ConfigError(f"At least one run and 100 resamples are needed, got {len(runs)} and {resamples}.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two runs have the same name: {', '.join(names)}. Rename one of the files.")
    comparisons = []
    for first, second in combinations(runs, 2):
        comparisons += compare_runs(first, second, seed=seed, resamples=resamples)
    return Evaluation(
        tuple(score for run in runs for score in score_run(run, seed=seed, resamples=resamples)),
        adjusted(comparisons),
        {run.name: run.facts for run in runs},
        {run.name: run.intervention for run in runs},
        {run.name: run.rows for run in runs},
    )


def score_run(run: Measured, *, seed: int = 0, resamples: int = 2000) -> list[Score]:
    """Return the scores of one run with percentile bootstrap intervals over its units."""
    values = run.statistic(run.counts.sum(0))
    drawn = [run.statistic(weights @ run.counts) for weights in bootstrap_weights(len(run.units), seed, resamples)]
    scores = []
    for key, value in values.items():
        low, high = interval(np.concatenate([part[key] for part in drawn]))
        scores.append(Score(run.name, *key, float(value), low, high))
    return scores


def compare_runs(first: Measured, second: Measured, *, seed: int = 0, resamples: int = 2000) -> list[Comparison]:
    """Compare two runs over the same units, score by score; nothing is adjusted for the number of runs.

    Raises:
        ConfigError: If their units differ.
    """
    if first.units != second.units:
        lacking = sorted(set(first.units) ^ set(second.units))
        raise ConfigError(
            f"{first.name} and {second.name} cannot be paired: {len(lacking)} are in one of them alone, "
            f"{some(lacking)}."
        )
    count = len(first.units)
    observed = difference(first, second, first.counts.sum(0), second.counts.sum(0))
    drawn: list[Mapping[Key, Floats]] = []
    for weights in bootstrap_weights(count, seed, resamples):
        drawn.append(difference(first, second, weights @ first.counts, weights @ second.counts))
    swapped: list[Mapping[Key, Floats]] = []
    total, change = first.counts.sum(0), second.counts - first.counts
    for swap in swaps(count, seed, resamples):
        moved = swap @ change
        swapped.append(difference(first, second, total + moved, total + change.sum(0) - moved))
    found = []
    for key, value in observed.items():
        low, high = interval(np.concatenate([part[key] for part in drawn]))
        null = np.abs(np.concatenate([part[key] for part in swapped]))
        p = (1 + int((null >= abs(float(value)) - 1e-12).sum())) / (1 + resamples)
        pair = [run.outcomes.get(key) for run in (first, second)]
        exact = None if pair[0] is None or pair[1] is None else mcnemar(pair[0], pair[1])
        found.append(Comparison(first.name, second.name, *key, float(value), low, high, p, p, exact))
    return found


def difference(first: Measured, second: Measured, before: Floats, after: Floats) -> dict[Key, Floats]:
    """Return the second run's scores minus the first's, from sums ``(..., K)`` of each."""
    old, new = first.statistic(before), second.statistic(after)
    return {key: np.asarray(new[key] - old[key]) for key in old}


def bootstrap_weights(count: int, seed: int, resamples: int) -> Iterator[Floats]:
    """Yield how often each of ``count`` units is drawn, ``(R, count)`` with all R together ``resamples``."""
    generator = np.random.default_rng([seed, 0])
    for size in chunks(count, resamples):
        yield generator.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def swaps(count: int, seed: int, resamples: int) -> Iterator[Floats]:
    """Yield for each unit whether two runs are swapped there, 0 or 1, ``(R, count)``."""
    generator = np.random.default_rng([seed, 1])
    for size in chunks(count, resamples):
        yield generator.integers(0, 2, size=(size, count)).astype(np.float64)


def chunks(count: int, resamples: int) -> Iterator[int]:
    """Yield parts of ``resamples`` that keep a matrix small."""
    step = max(1, CELLS // count)
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def interval(values: Floats) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p of McNemar's test for paired outcomes, ``(M,)`` each; 1 if none changed."""
    from scipy.stats import binomtest

    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's step-down rule, in the order given."""
    order = np.argsort(values, kind="stable")
    raised = np.asarray(values)[order] * np.arange(len(values), 0, -1)
    found = np.empty(len(values))
    found[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(value) for value in found]


def adjusted(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Return the comparisons with p values adjusted over the pairs of runs, score by score."""
    p: dict[Key, list[float]] = {}
    for comparison in comparisons:
        p.setdefault((comparison.group, comparison.metric), []).append(comparison.p)
    raised = {key: iter(holm(values)) for key, values in p.items()}
    return tuple(replace(c, p_adjusted=next(raised[c.group, c.metric])) for c in comparisons)
