"""How efficiently targets are found: steps, target-fixation probability, scanpath ratio, OAT's behaviours."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saccade.errors import ConfigError
from saccade.gaze.scanpath import ScanpathSet

__all__ = [
    "BEHAVIOURS",
    "behaviour",
    "behaviour_difference",
    "length_error",
    "probability_mismatch",
    "scanpath_ratio",
    "steps_to_target",
    "target_fixation_probability",
]

Floats = NDArray[np.float64]
BEHAVIOURS = ("correct", "length", "search", "refixation", "revisit")


def target_boxes(paths: ScanpathSet) -> Floats:
    """Return the targets' boxes, or raise."""
    unknown = np.isnan(paths.target_box).any(-1)
    if unknown.any():
        paths.places.fail(int(unknown.argmax()), "target_box", "unknown; this needs the target's box", "no_target")
    return paths.target_box


def steps_to_target(paths: ScanpathSet) -> Floats:
    """Number of the first fixation strictly inside the target's box, counted from 1, ``(P,)``; infinite for none.

    Raises:
        DataError: If a path has no target box.
    """
    box = np.repeat(target_boxes(paths), paths.lengths, axis=0).T
    inside = (paths.x > box[0]) & (paths.x < box[2]) & (paths.y > box[1]) & (paths.y < box[3])
    step = np.where(inside, np.arange(len(paths.x)) - np.repeat(paths.offsets[:-1], paths.lengths) + 1.0, np.inf)
    return np.minimum.reduceat(step, paths.offsets[:-1]) if len(paths) else np.empty(0)


def target_fixation_probability(paths: ScanpathSet, *, max_step: int) -> Floats:
    """TFP (Yang et al. 2020): share of paths that have fixated the target within k fixations, the mean over tasks.

    Its sum is what the reference code calls TFP-AUC.

    Args:
        paths: Paths with target boxes.
        max_step: 6 for present, 10 for absent targets in COCO-Search18, 20 for free viewing.

    Returns:
        ``(max_step + 1,)`` for k = 1 to ``max_step + 1``.

    Raises:
        ConfigError: If ``max_step`` is negative or there is no path.
        DataError: If a path has no target box.
    """
    if max_step < 0 or not len(paths):
        raise ConfigError(f"max_step from 0 and at least one path, got {max_step} and {len(paths)}.")
    reached = steps_to_target(paths)[:, None] <= np.arange(1, max_step + 2)
    curves: Floats = np.stack([reached[members].mean(0) for members in paths.group_by("task").values()])
    mean: Floats = curves.mean(0)
    return mean


def probability_mismatch(predicted: ArrayLike, human: ArrayLike) -> float:
    """Sum of absolute differences of two curves of :func:`target_fixation_probability`.

    Raises:
        ConfigError: If their lengths differ.
    """
    ours, theirs = np.asarray(predicted, np.float64), np.asarray(human, np.float64)
    if ours.shape != theirs.shape:
        raise ConfigError(f"Both curves need the same max_step, got {len(ours)} and {len(theirs)} values.")
    return float(np.abs(ours - theirs).sum())


def scanpath_ratio(paths: ScanpathSet, *, max_step: int | None = None) -> Floats:
    """Straight distance from first fixation to target centre over the length of the path to its first landing there.

    Args:
        paths: Paths with target boxes.
        max_step: Paths that need more than ``max_step + 1`` fixations have no ratio; ``None`` sets no limit.

    Returns:
        ``(P,)``, at most 1; NaN for paths that do not find the target or start on it.

    Raises:
        DataError: If a path has no target box.
    """
    box = target_boxes(paths)
    steps = steps_to_target(paths)
    start = paths.offsets[:-1]
    leg = np.hypot(np.diff(paths.x), np.diff(paths.y))
    walked = np.concatenate([[0.0], np.cumsum(leg)])  # legs between paths cancel: only differences within one are taken
    found = np.isfinite(steps) & (steps > 1) & (steps <= (np.inf if max_step is None else max_step + 1))
    landing = start + np.where(found, steps, 1).astype(np.int64) - 1
    length = walked[landing] - walked[start]
    straight = np.hypot(
        (box[:, 0] + box[:, 2]) / 2 - paths.x[start],
        (box[:, 1] + box[:, 3]) / 2 - paths.y[start],
    )
    ratio = np.minimum(1.0, straight / np.where(length > 0, length, 1.0))
    return np.where(found, np.where(length > 0, ratio, 1.0), np.nan)


def length_error(predicted: ScanpathSet, human: ScanpathSet) -> NDArray[np.int64]:
    """Return ``|fixations predicted - fixations human|`` of pairs, ``(P,)``; mean and spread are what papers print.

    Raises:
        ConfigError: If the sets differ in size.
    """
    if len(predicted) != len(human):
        raise ConfigError(f"Paths are compared one by one, but there are {len(predicted)} and {len(human)}.")
    error: NDArray[np.int64] = np.abs(predicted.lengths - human.lengths)
    return error


def behaviour(paths: ScanpathSet) -> Floats:
    """OAT's five behaviours of each path over objects (Fang et al. 2024).

    Args:
        paths: Paths with objects and target objects.

    Returns:
        ``(P, 5)``: correct (the last object is the target, 0 or 1), length, and the shares of fixations that are first
        visits (search), repeat the object before (refixation), or come back to one seen earlier (revisit); the shares
        sum to 1.

    Raises:
        DataError: If a path has no objects or no target object.
    """
    objects = paths.objects
    if objects is None:
        paths.places.fail(0, "objects", "unknown; assign_objects finds them from boxes", "no_objects")
    if (unknown := paths.target_object < 0).any():
        paths.places.fail(int(unknown.argmax()), "target_object", "unknown", "no_target")
    owner = paths.path_index
    start = np.zeros(len(objects), bool)
    start[paths.offsets[:-1]] = True
    repeat = ~start & (objects == np.roll(objects, 1))
    _, first = np.unique(np.stack([owner, objects]), axis=1, return_index=True)
    visit = np.zeros(len(objects), bool)
    visit[first] = True
    lengths = paths.lengths
    counts = [np.add.reduceat(part.astype(np.float64), paths.offsets[:-1]) for part in (visit, repeat)]
    search, refixation = counts[0] / lengths, counts[1] / lengths
    correct = objects[paths.offsets[1:] - 1] == paths.target_object
    return np.stack([correct, lengths, search, refixation, 1 - search - refixation], -1)


def behaviour_difference(predicted: Floats, human: Floats) -> float:
    """OAT's delta: mean over the five of ``|prediction - human| / human``, of averages over paths.

    It compares averages only: exchanging all paths between trials leaves it at 0.

    Args:
        predicted: ``(5,)`` mean behaviour of predictions.
        human: ``(5,)`` mean behaviour of viewers.

    Returns:
        The difference; behaviours that viewers never show are left out, NaN if that is all.
    """
    ours, theirs = np.asarray(predicted, np.float64), np.asarray(human, np.float64)
    shown = theirs != 0
    return float((np.abs(ours - theirs)[shown] / theirs[shown]).mean()) if shown.any() else float("nan")
