"""The path metrics of a whole set of predictions as one line of figures, for tables of models and for training."""

from __future__ import annotations

import numpy as np

from saccade.errors import ConfigError
from saccade.gaze.metrics.grids import scanmatch
from saccade.gaze.metrics.search import (
    behaviour,
    behaviour_difference,
    probability_mismatch,
    target_fixation_probability,
)
from saccade.gaze.metrics.strings import object_sequence_score
from saccade.gaze.metrics.vectors import multimatch
from saccade.gaze.scanpath import ScanpathSet

__all__ = ["path_scores"]


def path_scores(predicted: ScanpathSet, human: ScanpathSet, *, max_step: int = 20) -> dict[str, float]:
    """Compare every predicted path with every human path of the same image and task, but for those of its own subject.

    Giving the human paths on both sides is therefore their agreement, leave one out.

    Args:
        predicted: Paths over objects, with image sizes.
        human: Paths of viewers likewise.
        max_step: As in :func:`target_fixation_probability`.

    Returns:
        Means over all pairs: ``sequence_score`` over objects, ``scanmatch``, ``multimatch_vector``, ``_direction``,
        ``_length``, ``_position`` (over pairs of at least three fixations, NaN without). Where all paths have a target:
        ``tfp_sum`` and ``tfp_mismatch`` against the human curve, and OAT's ``delta``. ``mean_length`` in fixations.

    Raises:
        ConfigError: If no two paths can be compared.
        DataError: If objects or an image size are not known.
    """
    groups = human.group_by("image", "task")
    pairs = [
        (number, int(other))
        for number, (image, task, subject) in enumerate(
            zip(predicted.image, predicted.task, predicted.subject, strict=True)
        )
        for other in groups.get((image, task), ())
        if human.subject[other] != subject
    ]
    if not pairs:
        raise ConfigError("No predicted path has the image and task of a human path of another subject.")
    first, second = np.array(pairs, np.int64).T
    ours, theirs = predicted.take(first), human.take(second)
    vectors = multimatch(ours, theirs)[:, :4]
    known = ~np.isnan(vectors[:, 0])
    vectors = vectors[known].mean(0) if known.any() else np.full(4, np.nan)
    scores = {
        "sequence_score": float(object_sequence_score(ours, theirs).mean()),
        "scanmatch": float(scanmatch(ours, theirs).mean()),
        "multimatch_vector": float(vectors[0]),
        "multimatch_direction": float(vectors[1]),
        "multimatch_length": float(vectors[2]),
        "multimatch_position": float(vectors[3]),
    }
    if all((paths.target_object >= 0).all() and not np.isnan(paths.target_box).any() for paths in (predicted, human)):
        curve, goal = (target_fixation_probability(part, max_step=max_step) for part in (predicted, human))
        scores |= {
            "tfp_sum": float(curve.sum()),
            "tfp_mismatch": probability_mismatch(curve, goal),
            "delta": behaviour_difference(behaviour(predicted).mean(0), behaviour(human).mean(0)),
        }
    return scores | {"mean_length": float(predicted.lengths.mean())}
