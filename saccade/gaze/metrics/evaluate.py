"""A table of scores beside what gives them meaning: human agreement, chance, intervals, counts of undefined values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError
from saccade.gaze.metrics.baselines import other_images, uniform_paths
from saccade.gaze.metrics.registry import Context, Metric, find_metrics
from saccade.gaze.scanpath import ScanpathSet

__all__ = ["Comparison", "Score", "compare_paths", "compare_viewers"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Strings = NDArray[np.object_]
IDENTITY = ("image", "task", "predicted", "predicted_sample", "human", "human_sample")


@dataclass(frozen=True)
class Score:
    """One column of the table: means of means, over the humans of an image and task, then over predictions.

    Args:
        name: Column.
        unit: ``"px"``, ``"deg"``, ``"%"`` or ``""``.
        best: ``"high"``, ``"low"`` or ``""``.
        mean: Over predictions that have a value.
        sd: Standard deviation over predictions (n - 1).
        n: Predictions with a value.
        undefined: Pairs without a value (NaN), left out of all means.
        low: Lower end of the 95 % bootstrap interval of the mean, over images.
        high: Upper end.
        best_human: Mean over predictions of the value against the most similar human; NaN for a description.
        best_of_k: Mean over images and tasks of the best prediction's value; ``None`` where none has several.
        human: Viewers against the other viewers, in the same way; ``None`` where an image has one viewer.
        random: Uniform paths against the viewers.
        other_image: Viewers' paths of other images against the viewers.
    """

    name: str
    unit: str
    best: str
    mean: float
    sd: float
    n: int
    undefined: int
    low: float
    high: float
    best_human: float
    best_of_k: float | None = None
    human: float | None = None
    random: float | None = None
    other_image: float | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Scores and what they were made of.

    Args:
        scores: One per column.
        definitions: Parameters of each metric, by name.
        left_out: Metrics that could not be computed, with what they lack; predictions without human paths.
        pairs: ``(2, N)`` numbers of the predicted and the human path of each pair.
        values: ``(N, columns)``.
        predicted: The paths scored.
        human: The paths compared with.
    """

    scores: list[Score]
    definitions: dict[str, str]
    left_out: dict[str, str]
    pairs: Integers
    values: Floats
    predicted: ScanpathSet
    human: ScanpathSet
    columns: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per pair: who was compared with whom, and every value; ``None`` for NaN."""
        first, second = self.pairs
        names = [
            self.predicted.image[first],
            self.predicted.task[first],
            self.predicted.subject[first],
            self.predicted.sample[first].tolist(),
            self.human.subject[second],
            self.human.sample[second].tolist(),
        ]
        table = self.values.astype(object)
        table[np.isnan(self.values)] = None
        header = [*IDENTITY, *self.columns]
        return [
            dict(zip(header, [*identity, *row], strict=True))
            for identity, row in zip(zip(*names, strict=True), table.tolist(), strict=True)
        ]


def compare_paths(
    predicted: ScanpathSet,
    human: ScanpathSet,
    *,
    metrics: Sequence[str] | None = None,
    maps: Mapping[str, NDArray[np.integer]] | None = None,
    pixels_per_degree: float | None = None,
    first: int | None = None,
    chance: bool = True,
    seed: int = 0,
) -> Comparison:
    """Compare predictions with the human paths of the same image and task.

    Args:
        predicted: Predictions; several of an image and task are samples.
        human: Paths of viewers.
        metrics: Names; ``None`` takes all that the data allow.
        maps: Labels of pixels by image.
        pixels_per_degree: Reports distances in degrees.
        first: Compares only this many first fixations of both; regions still come from the whole human paths.
        chance: Also score random paths and those of other images.
        seed: Of chance and bootstrap.

    Raises:
        ConfigError: If a metric is not known or lacks what it was asked for by name, no prediction has a human path, or
            an image has two sizes.
        DataError: As the metrics.
    """
    predicted, human = with_sizes(predicted, human)
    groups = human.group_by("image", "task")
    ours, theirs = [], []
    for key, members in predicted.group_by("image", "task").items():
        if key in groups:
            ours.append(np.repeat(members, len(groups[key])))
            theirs.append(np.tile(groups[key], len(members)))
    if not ours:
        a, b = (f"{paths.image[0]!r}, {paths.task[0]!r}" if len(paths) else "none" for paths in (predicted, human))
        raise ConfigError(f"No prediction has the image and task of a human path; e.g. {a} predicted, {b} human.")
    pairs = np.stack([np.concatenate(ours), np.concatenate(theirs)])
    missing = len(predicted) - len(np.unique(pairs[0]))
    left_out = {"predictions": f"{missing} without a human path of their image and task"} if missing else {}
    context = Context(human, maps, pixels_per_degree)
    chosen = choose(find_metrics(metrics), metrics is not None, (predicted, human), context, left_out)
    predicted, human = predicted.first(first), human.first(first)
    return compared(predicted, human, pairs, chosen, context, left_out, chance=chance, seed=seed, ceiling=True)


def compare_viewers(
    human: ScanpathSet,
    *,
    pairs: str = "within-image",
    metrics: Sequence[str] | None = None,
    maps: Mapping[str, NDArray[np.integer]] | None = None,
    pixels_per_degree: float | None = None,
    first: int | None = None,
    chance: bool = True,
    seed: int = 0,
) -> Comparison:
    """Compare the viewers of one set with each other: the agreement that a prediction can hope for.

    Args:
        human: Paths of viewers.
        pairs: ``"within-image"``: every viewer as the prediction of every other on the same image and task, both ways.
            ``"all"``: every two paths of the set once, whatever their image; metrics over regions and objects of one
            image and chance are left out.
        metrics: As in :func:`compare_paths`; likewise the rest.
        maps: See there.
        pixels_per_degree: See there.
        first: See there.
        chance: See there.
        seed: See there.

    Raises:
        ConfigError: If a word or metric is not known, or no two paths can be compared.
        DataError: As the metrics.
    """
    if pairs not in ("within-image", "all"):
        raise ConfigError(f"pairs is 'within-image' or 'all', got {pairs!r}.")
    left_out: dict[str, str] = {}
    context = Context(human, maps, pixels_per_degree)
    chosen = choose(find_metrics(metrics), metrics is not None, (human,), context, left_out)
    everyone = np.stack(np.triu_indices(len(human), 1)).astype(np.int64)
    numbers = viewer_pairs(human) if pairs == "within-image" else everyone
    if pairs == "all":
        for metric in chosen:
            if metric.within_image:
                left_out[metric.name] = "compares paths of one image"
        chosen = [metric for metric in chosen if not metric.within_image]
    if not numbers.size:
        raise ConfigError("No image and task has paths of two viewers to compare.")
    chance = chance and pairs == "within-image"
    human = human.first(first)
    return compared(human, human, numbers, chosen, context, left_out, chance=chance, seed=seed, ceiling=False)


def with_sizes(predicted: ScanpathSet, human: ScanpathSet) -> tuple[ScanpathSet, ScanpathSet]:
    """Return both sets with the sizes that either knows of an image.

    Raises:
        ConfigError: If an image has two.
    """
    known: dict[str, tuple[float, float]] = {}
    for paths in (human, predicted):
        for image, width, height in zip(paths.image, paths.width.tolist(), paths.height.tolist(), strict=True):
            size = (width, height)
            if not any(np.isnan(size)) and known.setdefault(image, size) != size:
                other = "x".join(f"{side:g}" for side in known[image])
                raise ConfigError(f"{image} is {other} for one path and {width:g}x{height:g} for another.")
    filled = []
    for paths in (predicted, human):
        sizes = np.array([known.get(image, (np.nan, np.nan)) for image in paths.image]).reshape(-1, 2)
        filled.append(paths.with_size(sizes))
    return filled[0], filled[1]


def choose(
    metrics: Sequence[Metric], named: bool, sets: Sequence[ScanpathSet], context: Context, left_out: dict[str, str]
) -> list[Metric]:
    """Return the metrics that the data allow; note the others, or raise for one that was asked for by name."""
    chosen = []
    for metric in metrics:
        lack = metric.lacks(*sets, context=context)
        if lack and named:
            raise ConfigError(f"{metric.name} needs {lack}, which the paths do not have.")
        if lack:
            left_out[metric.name] = f"needs {lack}"
        else:
            chosen.append(metric)
    return chosen


def viewer_pairs(human: ScanpathSet) -> Integers:
    """Return ordered pairs of paths of different viewers on the same image and task, ``(2, N)``."""
    found = [np.empty((2, 0), np.int64)]
    for members in human.group_by("image", "task").values():
        first, second = (axis.ravel() for axis in np.meshgrid(members, members, indexing="ij"))
        other = human.subject[first] != human.subject[second]
        found.append(np.stack([first[other], second[other]]))
    return np.concatenate(found, axis=1)


def score_pairs(
    metrics: Sequence[Metric], predicted: ScanpathSet, human: ScanpathSet, pairs: Integers, context: Context
) -> Floats:
    """Return all values of all pairs, ``(N, columns)``; a symmetric metric compares two paths of one set once."""
    unit = context.pixels_per_degree
    wanted, inverse = pairs, np.arange(pairs.shape[1], dtype=np.int64)
    if predicted is human:
        wanted, back = np.unique(np.sort(pairs, axis=0), axis=1, return_inverse=True)
        inverse = back.ravel().astype(np.int64)
    sides = predicted.take(pairs[0]), human.take(pairs[1])
    once_sides = predicted.take(wanted[0]), human.take(wanted[1])
    columns = []
    for metric in metrics:
        first, second = once_sides if metric.symmetric else sides
        values = metric.compare(first, second, context).reshape(len(first), -1)
        values = values[inverse] if metric.symmetric else values
        columns.append(values / unit if metric.in_pixels and unit is not None else values)
    return np.concatenate([np.empty((pairs.shape[1], 0)), *columns], axis=1)


def per_prediction(values: Floats, owner: Integers, count: int) -> Floats:
    """Return means over the humans that each prediction was compared with, ``(count, columns)``, NaN for none."""
    known = ~np.isnan(values)
    total, number = np.zeros((count, values.shape[1])), np.zeros((count, values.shape[1]))
    np.add.at(total, owner, np.where(known, values, 0))
    np.add.at(number, owner, known)
    means: Floats = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
    return means


def best_human(values: Floats, owner: Integers, count: int, best: Sequence[str]) -> Floats:
    """Return the value of each prediction against the most similar human, ``(count, columns)``, NaN for none."""
    closest = np.full((count, values.shape[1]), np.nan)
    for column, word in enumerate(best):
        if word:
            (np.fmax if word == "high" else np.fmin).at(closest[:, column], owner, values[:, column])
    return closest


def over_predictions(values: Floats) -> Floats:
    """Return means of the columns without NaN, NaN where nothing is left."""
    known = ~np.isnan(values)
    total, number = np.where(known, values, 0).sum(0), known.sum(0)
    means: Floats = np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)
    return means


def bootstrap(values: Floats, images: Strings, seed: int, draws: int = 1000) -> tuple[Floats, Floats]:
    """Return the 2.5 % and 97.5 % quantiles of the mean when images are drawn with replacement, ``(columns,)`` each."""
    _, image = np.unique(images.astype(str), return_inverse=True)
    groups = int(image.max()) + 1
    known = ~np.isnan(values)
    total, number = np.zeros((groups, values.shape[1])), np.zeros((groups, values.shape[1]))
    np.add.at(total, image, np.where(known, values, 0))
    np.add.at(number, image, known)
    weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), draws).astype(np.float64)
    sums, counts = weights @ total, weights @ number
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    some = ~np.isnan(means).all(0)
    low, high = np.full((2, values.shape[1]), np.nan)
    low[some], high[some] = np.nanquantile(means[:, some], (0.025, 0.975), axis=0)
    return low, high


def compared(
    predicted: ScanpathSet,
    human: ScanpathSet,
    pairs: Integers,
    metrics: Sequence[Metric],
    context: Context,
    left_out: dict[str, str],
    *,
    chance: bool,
    seed: int,
    ceiling: bool,
) -> Comparison:
    """Score the pairs, the viewers against each other, and chance."""
    values = score_pairs(metrics, predicted, human, pairs, context)
    means = per_prediction(values, pairs[0], len(predicted))
    used = np.unique(pairs[0])
    columns = [(column, metric) for metric in metrics for column in metric.columns]
    low, high = bootstrap(means[used], predicted.image[used], seed)
    best = best_of_k(means, predicted, used, [metric.best for _, metric in columns]) if ceiling else None
    closest = over_predictions(
        best_human(values, pairs[0], len(predicted), [metric.best for _, metric in columns])[used]
    )
    beside: dict[str, Floats] = {}
    viewers = viewer_pairs(human)
    if ceiling and viewers.size:
        agreement = score_pairs(metrics, human, human, viewers, context)
        beside["human"] = over_predictions(per_prediction(agreement, viewers[0], len(human)))
    if chance:
        # where no image has two viewers, a path is guessed and compared with itself
        against = viewers if viewers.size else np.tile(np.arange(len(human)), (2, 1))
        sources = {"random": uniform_paths}
        if len(set(human.image)) > 1:
            sources["other_image"] = other_images
        sized = not np.isnan(human.width).any() and not np.isnan(human.height).any()
        for name, make in sources.items() if sized else ():
            guessed = score_pairs(metrics, make(human, seed=seed), human, against, context)
            beside[name] = over_predictions(per_prediction(guessed, against[0], len(human)))
        if not sized:
            left_out["chance"] = "needs image sizes"
    mean, count = over_predictions(means[used]), (~np.isnan(means[used])).sum(0)
    scores = []
    for number, (column, metric) in enumerate(columns):
        known = means[used, number][~np.isnan(means[used, number])]
        distance = "deg" if context.pixels_per_degree is not None else "px"
        scores.append(
            Score(
                column,
                distance if metric.in_pixels else "",
                metric.best,
                float(mean[number]),
                float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
                int(count[number]),
                int(np.isnan(values[:, number]).sum()),
                float(low[number]),
                float(high[number]),
                float(closest[number]),
                None if best is None else float(best[number]),
                **{name: float(line[number]) for name, line in beside.items()},
            )
        )
    definitions = {metric.name: metric.definition for metric in metrics}
    names = [column for column, _ in columns]
    return Comparison(scores, definitions, left_out, pairs, values, predicted, human, names)


def best_of_k(means: Floats, predicted: ScanpathSet, used: Integers, best: Sequence[str]) -> Floats | None:
    """Return the mean over images and tasks of the best prediction, ``(columns,)``; ``None`` if none has several."""
    members_of = predicted.group_by("image", "task").values()
    groups = [scored for members in members_of if len(scored := np.intersect1d(members, used))]
    if max(map(len, groups)) < 2:
        return None
    rows = []
    for group in groups:
        part = means[group]
        row = np.full(part.shape[1], np.nan)
        for column, word in enumerate(best):
            known = part[~np.isnan(part[:, column]), column]
            if known.size and word:
                row[column] = known.max() if word == "high" else known.min()
        rows.append(row)
    return over_predictions(np.stack(rows))
