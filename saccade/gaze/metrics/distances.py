"""Distances of paths as curves or as sets of points: DTW, Frechet, Hausdorff, Eyenalysis, time-delay embedding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError
from saccade.gaze.metrics.alignment import distance, warp
from saccade.gaze.metrics.sequences import Chunk, Sequences, as_pairs, chunks, points, shorter_first, valid_cells
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["dtw", "eyenalysis", "frechet", "hausdorff", "scaled_time_delay_embedding", "time_delay_embedding"]

Floats = NDArray[np.float64]
Paths = Scanpath | ScanpathSet


def dtw(predicted: Paths, human: Paths) -> Floats:
    """Dynamic time warping: the least summed distance over monotone alignments, in px, not normalised.

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number.

    Returns:
        ``(P,)`` px. Symmetric.

    Raises:
        ConfigError: If the sets differ in size.
    """
    return warped(predicted, human, largest=False)


def frechet(predicted: Paths, human: Paths) -> Floats:
    """Discrete Frechet distance: the least largest distance over monotone alignments (Eiter and Mannila 1994).

    Arguments, result and errors as of :func:`dtw`.
    """
    return warped(predicted, human, largest=True)


def warped(predicted: Paths, human: Paths, *, largest: bool) -> Floats:
    """Return sum or largest distance along the best alignment, ``(P,)``."""
    first, second = as_pairs(predicted, human)
    result = np.empty(len(first))
    for chunk in chunks(*shorter_first(points(first), points(second))):
        result[chunk.pairs] = warp(chunk, distance, largest=largest).total
    return result


def nearest(chunk: Chunk) -> tuple[Floats, Floats]:
    """Return the distance of each point to the nearest of the other path, ``(n, K)`` and ``(m, K)``, 0 where padded."""
    table = distance(chunk.first[:, :, None], chunk.second[:, None])
    table[~valid_cells(chunk)] = np.inf
    to_second, to_first = table.min(1), table.min(0)
    to_second[np.isinf(to_second)] = 0.0
    to_first[np.isinf(to_first)] = 0.0
    return to_second, to_first


def hausdorff(predicted: Paths, human: Paths) -> Floats:
    """Hausdorff distance of the two sets of points: the farthest that a point is from the other path, either way.

    Arguments, result and errors as of :func:`dtw`.
    """
    first, second = as_pairs(predicted, human)
    result = np.empty(len(first))
    for chunk in chunks(points(first), points(second), keeps="tables"):
        there, back = nearest(chunk)
        result[chunk.pairs] = np.maximum(there.max(0), back.max(0))
    return result


def eyenalysis(predicted: Paths, human: Paths) -> Floats:
    """Eyenalysis (Mathot et al. 2012): nearest distances both ways, summed, over the length of the longer path.

    Arguments, result and errors as of :func:`dtw`.
    """
    first, second = as_pairs(predicted, human)
    result = np.empty(len(first))
    for chunk in chunks(points(first), points(second), keeps="tables"):
        there, back = nearest(chunk)
        result[chunk.pairs] = (there.sum(0) + back.sum(0)) / np.maximum(chunk.n, chunk.m)
    return result


def time_delay_embedding(
    predicted: Paths, human: Paths, *, k: int = 2, mode: str = "mean", norm: str = "mean"
) -> Floats:
    """TDE (Wang et al. 2011): how far each k-point window of the prediction is from the nearest human window.

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number.
        k: Points per window.
        mode: ``"mean"`` over the windows of the prediction, or ``"max"`` ("Hausdorff" in the literature).
        norm: Distance of two windows: the ``"mean"`` distance of their points, or ``"frobenius"``, the norm of the
            difference over k, as another collection has it.

    Returns:
        ``(P,)`` px, NaN where a path has fewer than k points. Not symmetric.

    Raises:
        ConfigError: If the sets differ in size, k is below 1, or a word is not known.
    """
    if k < 1 or mode not in ("mean", "max") or norm not in ("mean", "frobenius"):
        raise ConfigError(f"k >= 1, mode mean or max, norm mean or frobenius, got k={k}, mode={mode!r}, norm={norm!r}.")
    first, second = as_pairs(predicted, human)
    result = np.full(len(first), np.nan)
    for chunk in chunks(points(first), points(second), keeps="tables"):
        if min(chunk.first.shape[1], chunk.second.shape[1]) < k:
            continue
        table = distance(chunk.first[:, :, None], chunk.second[:, None])
        if norm == "frobenius":
            table = table**2
        windows = table
        for shift in range(1, k):
            windows = windows[:-1, :-1] + table[shift:, shift:]
        values = (np.sqrt(windows) if norm == "frobenius" else windows) / k
        result[chunk.pairs] = window_distance(values, chunk, k, mode)
    return result


def window_distance(values: Floats, chunk: Chunk, k: int, mode: str) -> Floats:
    """Reduce distances of windows ``(n - k + 1, m - k + 1, K)`` to one number per pair."""
    rows = np.arange(values.shape[0])[:, None] <= chunk.n - k
    columns = np.arange(values.shape[1])[:, None] <= chunk.m - k
    closest = np.where(columns, values, np.inf).min(1)  # (n - k + 1, K)
    enough = (chunk.n >= k) & (chunk.m >= k)
    if mode == "max":
        reduced = np.where(rows, closest, -np.inf).max(0)
    else:
        reduced = np.where(rows, closest, 0.0).sum(0) / np.maximum(chunk.n - k + 1, 1)
    return np.where(enough, reduced, np.nan)


def scaled_time_delay_embedding(
    predicted: Paths, human: Paths, *, mode: str = "mean", value: str = "similarity"
) -> Floats:
    """Scaled TDE: the mean of ``exp(-TDE_k)`` over k = 1 to the shorter length, coordinates over max(width, height).

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number.
        mode: As in :func:`time_delay_embedding`.
        value: ``"similarity"``, or ``"distance"``: the mean of ``TDE_k`` itself.

    Returns:
        ``(P,)``; the similarity is between 0 and 1, 1 where every window of the prediction occurs in the human path.
        Not symmetric.

    Raises:
        ConfigError: If the sets differ in size or a word is not known.
        DataError: If an image size is not known.
    """
    if mode not in ("mean", "max") or value not in ("similarity", "distance"):
        raise ConfigError(f"mode mean or max, value similarity or distance, got {mode!r}, {value!r}.")
    first, second = as_pairs(predicted, human)
    scaled = []
    for paths in (first, second):
        scale = np.repeat(paths.sizes().max(-1), paths.lengths)
        scaled.append(Sequences.cut(np.stack([paths.x, paths.y]) / scale, paths.offsets))
    total = np.zeros(len(first))
    for chunk in chunks(*scaled, keeps="tables"):
        table = distance(chunk.first[:, :, None], chunk.second[:, None])
        windows, shorter = table, np.minimum(chunk.n, chunk.m)
        for k in range(1, int(shorter.max()) + 1):
            if k > 1:
                windows = windows[:-1, :-1] + table[k - 1 :, k - 1 :]
            part = window_distance(windows / k, chunk, k, mode)
            total[chunk.pairs] += np.where(k <= shorter, np.exp(-part) if value == "similarity" else part, 0.0)
    return total / np.minimum(first.lengths, second.lengths)
