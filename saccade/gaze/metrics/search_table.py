"""Search efficiency of predictions beside that of the viewers and of chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from saccade.gaze.metrics.baselines import other_images, uniform_paths
from saccade.gaze.metrics.search import (
    BEHAVIOURS,
    behaviour,
    behaviour_difference,
    probability_mismatch,
    scanpath_ratio,
    steps_to_target,
    target_fixation_probability,
)
from saccade.gaze.scanpath import ScanpathSet

__all__ = ["SearchScore", "search_table"]


@dataclass(frozen=True)
class SearchScore:
    """One measure of search.

    Args:
        name: E.g. ``"tfp_sum"``.
        predicted: Of the predictions, against the viewers; ``None`` where the viewers are all there is.
        human: Mean over viewers, each against the others; ``None`` for a single viewer.
        random: Of uniform paths, against the viewers.
        other_image: Of viewers' paths of other images, against the viewers; ``None`` for a single image.
    """

    name: str
    predicted: float | None = None
    human: float | None = None
    random: float | None = None
    other_image: float | None = None


def search_table(
    predicted: ScanpathSet | None, human: ScanpathSet, *, max_step: int, chance: bool = True, seed: int = 0
) -> list[SearchScore]:
    """Measure how targets are found.

    ``found`` (share of paths that fixate the target), ``tfp_sum`` (sum of the target-fixation probability over steps 1
    to ``max_step + 1``, the mean over tasks), ``probability_mismatch`` (against the viewers' curve), ``scanpath_ratio``
    (mean over the paths that have one), and, where objects are known, OAT's five behaviours and their ``delta``.

    Args:
        predicted: Predictions with target boxes; ``None`` compares viewers alone.
        human: Paths of viewers with target boxes.
        max_step: As in :func:`target_fixation_probability`.
        chance: Also measure random paths and those of other images; needs image sizes.
        seed: Of chance.

    Returns:
        A score per measure; an empty list if a path has no target box.

    Raises:
        ConfigError: If ``max_step`` is negative.
    """
    sets = [human] if predicted is None else [human, predicted]
    if any(not len(paths) or np.isnan(paths.target_box).any() for paths in sets):
        return []
    objects = all(paths.objects is not None and (paths.target_object >= 0).all() for paths in sets)
    columns: dict[str, dict[str, float]] = {}
    if predicted is not None:
        columns["predicted"] = measures(predicted, human, max_step, objects)
    viewers = list(dict.fromkeys(human.subject))
    if len(viewers) > 1:
        alone = []
        for viewer in viewers:
            is_viewer = human.subject == viewer
            alone.append(measures(human[is_viewer], human[~is_viewer], max_step, objects))
        columns["human"] = {name: mean_known([one[name] for one in alone]) for name in alone[0]}
    makers: dict[str, Callable[..., ScanpathSet]] = {}
    if chance and not np.isnan(human.width).any() and not np.isnan(human.height).any():
        makers = {"random": uniform_paths} | ({"other_image": other_images} if len(set(human.image)) > 1 else {})
    for name, make in makers.items():
        columns[name] = measures(make(human, seed=seed), human, max_step, objects)
    names = next(iter(columns.values()), {})
    return [SearchScore(name, **{column: values[name] for column, values in columns.items()}) for name in names]


def measures(paths: ScanpathSet, against: ScanpathSet, max_step: int, objects: bool) -> dict[str, float]:
    """Return every measure of some paths."""
    curves = [target_fixation_probability(part, max_step=max_step) for part in (paths, against)]
    ratio = scanpath_ratio(paths, max_step=max_step)
    found = {
        "found": float(np.isfinite(steps_to_target(paths)).mean()),
        "tfp_sum": float(curves[0].sum()),
        "probability_mismatch": probability_mismatch(*curves),
        "scanpath_ratio": mean_known(ratio),
    }
    if objects:
        shown, expected = behaviour(paths).mean(0), behaviour(against).mean(0)
        found |= dict(zip((f"behaviour_{name}" for name in BEHAVIOURS), shown.tolist(), strict=True))
        found["behaviour_delta"] = behaviour_difference(shown, expected)
    return found


def mean_known(values: ArrayLike) -> float:
    """Return the mean without NaN, NaN where nothing is left."""
    array = np.asarray(values, np.float64)
    known = array[~np.isnan(array)]
    return float(known.mean()) if known.size else float("nan")
