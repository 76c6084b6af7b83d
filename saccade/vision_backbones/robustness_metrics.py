"""Metrics of corruption and perturbation robustness, each under its exact name.

Corruption error and its mean, relative corruption error, flip rate and top-5 distance are those of Hendrycks and
Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019). "IN-C" in
papers means two things: mCE, an error in which AlexNet has 100, and mean accuracy (FAN's tables); here they have two
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from saccade.datasets.corruptions import GROUPS, SEVERITIES
from saccade.errors import ShapeError

__all__ = [
    "ALEXNET_CLEAN_ERROR",
    "ALEXNET_ERRORS",
    "COUNTED",
    "corruption_error",
    "corruption_metrics",
    "flip_probability",
    "frame_pairs",
    "ranks",
    "relative_corruption_error",
    "top5_distance",
    "zipf_distance",
]

# Top-1 errors of torchvision's AlexNet on ImageNet-C, severity 1 to 5; on clean images below.
ALEXNET_ERRORS = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
ALEXNET_CLEAN_ERROR = 0.43478
COUNTED = tuple(ALEXNET_ERRORS)  # the fifteen corruptions that means are taken over


def corruption_error(name: str, errors: Sequence[float]) -> float:
    """Return CE: the model's errors over AlexNet's, both summed over severities; 1 is as bad as AlexNet.

    Args:
        name: One of ``COUNTED``.
        errors: Top-1 errors at severity 1 to 5, 0..1.

    Raises:
        ShapeError: If there are not five.
    """
    check_five(name, errors)
    return sum(errors) / sum(ALEXNET_ERRORS[name])


def relative_corruption_error(name: str, errors: Sequence[float], clean_error: float) -> float:
    """Return relative CE: the errors that a corruption adds to those on clean images, over what it adds to AlexNet's.

    Args:
        name: One of ``COUNTED``.
        errors: Top-1 errors at severity 1 to 5, 0..1.
        clean_error: Top-1 error on clean images, 0..1.

    Raises:
        ShapeError: If there are not five errors.
    """
    check_five(name, errors)
    added = sum(error - clean_error for error in errors)
    return added / sum(error - ALEXNET_CLEAN_ERROR for error in ALEXNET_ERRORS[name])


def check_five(name: str, errors: Sequence[float]) -> None:
    """Raise unless there is an error for each severity."""
    if len(errors) != len(SEVERITIES):
        raise ShapeError(f"{name} needs the errors at severity 1, 2, 3, 4 and 5, got {len(errors)} values.")


def corruption_metrics(
    accuracy: Mapping[str, Mapping[int, float]], clean: float | None = None, *, alexnet: bool = True
) -> dict[str, float]:
    """Sum up accuracies under corruption. A metric whose ingredients are not all there is left out.

    - ``clean_top1_percent``: accuracy on the clean images.
    - ``mCE_percent``: mean over the fifteen counted corruptions of CE; AlexNet has 100.
    - ``relative_mCE_percent``: the same of relative CE; needs ``clean``.
    - ``mean_corruption_accuracy_15_percent``: mean top-1 accuracy over the fifteen ("IN-C" in FAN's tables).
    - ``retention_percent``: that over ``clean``.
    - ``noise_top1_percent``, ``blur_...``, ``weather_...``, ``digital_...``, ``extra_...``: means over the groups; the
      four extra corruptions enter nothing else.
    - ``mean_top1_of_N_folders_percent``: if some of the fifteen or of the severities are missing, the mean over those
      that are there, N in all, a folder being a corruption at a severity.

    Args:
        accuracy: Top-1 accuracy, 0..1, by corruption and severity.
        clean: Top-1 accuracy on clean images, 0..1.
        alexnet: Whether the errors are on ImageNet's thousand classes, so that AlexNet's apply.
    """
    metrics: dict[str, float] = {}
    complete = {name: [by[s] for s in SEVERITIES] for name, by in accuracy.items() if by.keys() >= set(SEVERITIES)}
    if clean is not None:
        metrics["clean_top1_percent"] = 100 * clean
    if complete.keys() >= set(COUNTED):
        errors = {name: [1 - value for value in complete[name]] for name in COUNTED}
        if alexnet:
            metrics["mCE_percent"] = 100 * mean([corruption_error(name, errors[name]) for name in COUNTED])
        if alexnet and clean is not None:
            relative = [relative_corruption_error(name, errors[name], 1 - clean) for name in COUNTED]
            metrics["relative_mCE_percent"] = 100 * mean(relative)
        whole = mean([mean(complete[name]) for name in COUNTED])
        metrics["mean_corruption_accuracy_15_percent"] = 100 * whole
        if clean:
            metrics["retention_percent"] = 100 * whole / clean
    elif values := [value for name in COUNTED for value in accuracy.get(name, {}).values()]:
        metrics[f"mean_top1_of_{len(values)}_folders_percent"] = 100 * mean(values)
    for group, names in GROUPS.items():
        if complete.keys() >= set(names):
            metrics[f"{group}_top1_percent"] = 100 * mean([mean(complete[name]) for name in names])
    return metrics


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def frame_pairs(count: int, *, noise: bool, difficulty: int = 1) -> NDArray[np.int64]:
    """Return which frames of a clip are compared, ``(P, 2)``, the earlier first.

    Noise: every frame with the first one. Otherwise: every frame with the one ``difficulty`` frames before.
    """
    step = 1 if noise else difficulty
    later = np.arange(step, count)
    return np.stack([np.zeros_like(later) if noise else later - step, later], axis=1)


def flip_probability(predictions: NDArray[np.integer], *, noise: bool, difficulty: int = 1) -> float:
    """Return how often the predicted class differs between the compared frames of a clip.

    Args:
        predictions: Classes ``(F,)``, or ``(V, F)`` for several clips, whose mean is taken; F > difficulty.
        noise: Whether the perturbation is noise, see ``frame_pairs``.
        difficulty: Step between compared frames.
    """
    clips = np.atleast_2d(predictions)
    pairs = frame_pairs(clips.shape[1], noise=noise, difficulty=difficulty)
    return float((clips[:, pairs[:, 0]] != clips[:, pairs[:, 1]]).mean())


def ranks(logits: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the rank of every class, 1 the best, ``(..., K)``; of equal logits the lower class comes first."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    places: NDArray[np.int64] = np.argsort(order, axis=-1) + 1
    return places


def top5_distance(places: NDArray[np.integer], *, noise: bool, difficulty: int = 1) -> float:
    """Return the mean top-5 distance of the compared frames.

    With ``s`` the place in the later frame of the class at place ``r`` of the earlier one, a pair's distance is the sum
    over ``r = 1..5`` of ``|F(r) - F(s)|``, where ``F(p)`` is 0 to 5 for places 1 to 6, and 5 behind: how far the top
    five classes moved, all places behind the fifth being one.

    Args:
        places: ``ranks`` of a clip ``(F, K)``, or of several ``(V, F, K)``, whose mean is taken; F > difficulty.
        noise: Whether the perturbation is noise, see ``frame_pairs``.
        difficulty: Step between compared frames.
    """
    before, after = ranking_pairs(places, noise=noise, difficulty=difficulty)
    moved = np.abs(np.minimum(before, 6) - np.minimum(after, 6))
    return float(np.where(before <= 5, moved, 0).sum(axis=-1).mean())


def zipf_distance(places: NDArray[np.integer], *, noise: bool, difficulty: int = 1) -> float:
    """Return the mean Zipf distance of the compared frames: the sum over all places r of ``|1/r - 1/s| / r``.

    Args:
        places: As in ``top5_distance``.
        noise: Whether the perturbation is noise, see ``frame_pairs``.
        difficulty: Step between compared frames.
    """
    before, after = ranking_pairs(places, noise=noise, difficulty=difficulty)
    return float((np.abs(1 / before - 1 / after) / before).sum(axis=-1).mean())


def ranking_pairs(
    places: NDArray[np.integer], *, noise: bool, difficulty: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the places of all classes in the earlier and the later frame of each pair, ``(V, P, K)``."""
    clips = places[None] if places.ndim == 2 else places
    pairs = frame_pairs(clips.shape[1], noise=noise, difficulty=difficulty)
    return clips[:, pairs[:, 0]].astype(np.float64), clips[:, pairs[:, 1]].astype(np.float64)
