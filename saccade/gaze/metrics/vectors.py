"""MultiMatch: five similarities of two aligned scanpaths (Jarodzka et al. 2010; Dewhurst et al. 2012)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError
from saccade.gaze.metrics.alignment import distance, trace, warp
from saccade.gaze.metrics.sequences import Chunk, Sequences, as_pairs, chunks
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["Grouping", "group_saccades", "multimatch"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Grouping:
    """Thresholds for merging saccades before the comparison.

    Args:
        direction_deg: Neighbours whose directions differ by less are merged (TDir).
        duration_s: Only across fixations shorter than this (TDur).
        amplitude_px: Saccades shorter than this are merged with the next (TAmp).
    """

    direction_deg: float = 45.0
    duration_s: float = 0.3
    amplitude_px: float = 100.0


def multimatch(
    predicted: Scanpath | ScanpathSet,
    human: Scanpath | ScanpathSet,
    *,
    grouping: Grouping | None = None,
    short: str = "nan",
) -> Floats:
    """Compare shape, direction, length, position and duration of paths whose saccades are aligned by shape.

    Saccade vectors ``u_i``, ``v_j``; the alignment is the cheapest way through ``M_ij = |u_i - v_j|`` with steps right,
    down and diagonal (on ties the last step prefers diagonal, then right, then down), its first cell free. Along it the
    medians of: ``|u - v|``, the angle between them, the difference of lengths, the distance of their starting points,
    and ``|d - e| / max(d, e)`` of the durations of the fixations before them (0 where both are 0). Similarities are 1
    minus these over twice the diagonal of the image, pi, the diagonal, the diagonal, and 1.

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number; the diagonal is this set's.
        grouping: Merge saccades first; ``None`` leaves them.
        short: Paths of fewer than three fixations: ``"nan"``, or ``"pad"`` to three with fixations at (1, 1) px, as
            code for visual search does. That makes short paths look alike; it is there for comparison.

    Returns:
        ``(P, 5)`` shape, direction, length, position, duration, each 1 for equal paths. Duration is NaN where a path
        has none. Symmetric but for ties.

    Raises:
        ConfigError: If the sets differ in size or ``short`` is not known.
        DataError: If an image size is not known, or a duration that grouping needs.
    """
    if short not in ("nan", "pad"):
        raise ConfigError(f"short is 'nan' or 'pad', got {short!r}.")
    first, second = as_pairs(predicted, human, duration=grouping is not None)
    diagonal = np.hypot(*second.sizes().T)
    result = np.full((len(first), 5), np.nan)
    for chunk in chunks(saccades(first, grouping, short), saccades(second, grouping, short), keeps="moves"):
        result[chunk.pairs] = similarities(chunk, diagonal[chunk.pairs])
    return result


def saccades(paths: ScanpathSet, grouping: Grouping | None, short: str) -> Sequences:
    """Return vector x, y, start x, y and the duration before each saccade; none for paths that are too short."""
    duration = np.full(len(paths.x), np.nan) if paths.duration is None else paths.duration
    fixations = np.stack([paths.x, paths.y, duration])
    offsets = paths.offsets
    if short == "pad":
        missing = np.maximum(3 - paths.lengths, 0)
        at = np.repeat(offsets[1:], missing)
        dummy = np.where(np.isnan(duration[np.maximum(at - 1, 0)]), np.nan, 1.0)
        fixations = np.insert(fixations, at, np.stack([np.ones(len(at)), np.ones(len(at)), dummy]), axis=1)
        offsets = offsets + np.concatenate([[0], np.cumsum(missing)])
    lengths = np.diff(offsets)
    start = np.ones(fixations.shape[1], bool)
    start[offsets[1:] - 1] = False  # the last fixation starts no saccade
    start &= np.repeat(lengths >= 3, lengths)
    at = np.flatnonzero(start)
    values = np.concatenate([fixations[:2, at + 1] - fixations[:2, at], fixations[:, at]])
    counts = np.where(lengths >= 3, lengths - 1, 0)
    sequences = Sequences.cut(values, np.concatenate([[0], np.cumsum(counts)]))
    return sequences if grouping is None else grouped(sequences, fixations[2, offsets[1:] - 1], grouping)


def grouped(sequences: Sequences, last_duration: Floats, grouping: Grouping) -> Sequences:
    """Merge the saccades of each path, one after the other: whether two are merged depends on those before."""
    parts = []
    for start, length, last in zip(sequences.starts, sequences.lengths, last_duration, strict=True):
        path = sequences.values[:, start : start + length]
        parts.append(group_saccades(path[:4], np.append(path[4], last), grouping))
    offsets = np.concatenate([[0], np.cumsum([part.shape[1] for part in parts])])
    return Sequences.cut(np.concatenate([np.empty((5, 0)), *parts], axis=1), offsets)


def group_saccades(saccade: Floats, duration: Floats, grouping: Grouping) -> Floats:
    """Merge the saccades of one path: by direction, then by amplitude, and again while that changes it.

    By direction, from left to right: i and i + 1 become one where the angle between them and the fixation between them
    are below their thresholds. By amplitude: a saccade below the threshold becomes one with the next where the fixation
    before or after it is short; a short last saccade joins its predecessor where one of the last two fixations is
    short. A single saccade is left alone. The first one's start and duration stay.

    Two habits of the toolbox are kept, for values that agree with it: what the last saccade joins is the predecessor as
    it was before the pass, even if that has just been merged itself; and a pass that joins nothing but the last saccade
    is the final one.

    Args:
        saccade: ``(4, n)`` vector x, y and start x, y in px.
        duration: ``(n + 1,)`` seconds of the fixations before each saccade and after the last.
        grouping: The thresholds.

    Returns:
        ``(5, m)``: the saccades, and the duration before each.
    """
    path = [list(column) for column in zip(*saccade.tolist(), strict=True)]
    held = duration.tolist()
    while True:
        before = len(path)
        path, held = merge_by_direction(path, held, grouping)
        path, held, joined = merge_by_amplitude(path, held, grouping)
        if len(path) + joined == before:
            return np.concatenate([np.array(path).reshape(-1, 4).T, np.array(held[:-1])[None]])


Path = list[list[float]]


def merged(path: Path, i: int) -> list[float]:
    """Return saccades i and i + 1 as one."""
    return [path[i][0] + path[i + 1][0], path[i][1] + path[i + 1][1], *path[i][2:]]


def merge_by_direction(path: Path, duration: list[float], grouping: Grouping) -> tuple[Path, list[float]]:
    """Merge neighbours in about the same direction, once from left to right."""
    limit = math.cos(math.radians(grouping.direction_deg))
    kept: Path = []
    held: list[float] = []
    i = 0
    while i < len(path):
        alike = False
        if i + 1 < len(path):
            (ax, ay), (bx, by) = path[i][:2], path[i + 1][:2]
            sizes = math.hypot(ax, ay) * math.hypot(bx, by)
            alike = sizes > 0 and (ax * bx + ay * by) / sizes > limit and duration[i + 1] < grouping.duration_s
        kept.append(merged(path, i) if alike else path[i])
        held.append(duration[i])
        i += 2 if alike else 1
    return kept, [*held, duration[-1]]


def merge_by_amplitude(path: Path, duration: list[float], grouping: Grouping) -> tuple[Path, list[float], bool]:
    """Merge short saccades with the next, once from left to right; say whether the last one joined its predecessor."""
    kept: Path = []
    held: list[float] = []
    i, joined = 0, False
    while i < len(path):
        short = math.hypot(*path[i][:2]) < grouping.amplitude_px
        near = min(duration[i], duration[i + 1]) < grouping.duration_s
        if short and near and i + 1 < len(path):
            kept.append(merged(path, i))
            held.append(duration[i])
            i += 2
        elif short and near and kept:
            kept[-1] = [*merged(path, i - 1)[:2], *kept[-1][2:]]
            joined = True
            i += 1
        else:
            kept.append(path[i])
            held.append(duration[i])
            i += 1
    return kept, [*held, duration[-1]], joined


def similarities(chunk: Chunk, diagonal: Floats) -> Floats:
    """Align a chunk of pairs and return their five similarities, ``(K, 5)``."""
    rows, columns, on_way = trace(warp(chunk, lambda a, b: distance(a[:2], b[:2]), start_free=True, moves=True))
    pairs = np.arange(len(chunk.pairs))
    u, v = chunk.first[:, rows, pairs], chunk.second[:, columns, pairs]  # (5, S, K)
    angle = np.abs(np.arctan2(u[1], u[0]) - np.arctan2(v[1], v[0]))
    longer = np.maximum(u[4], v[4])
    differences = [
        distance(u[:2], v[:2]),
        np.where(angle > np.pi, 2 * np.pi - angle, angle),
        np.abs(np.hypot(u[0], u[1]) - np.hypot(v[0], v[1])),
        distance(u[2:4], v[2:4]),
        np.abs(u[4] - v[4]) / np.where(longer == 0, 1.0, longer),
    ]
    one = np.ones_like(diagonal)
    scale = [2 * diagonal, np.pi * one, diagonal, diagonal, one]
    medians = [1 - median(part, on_way) / size for part, size in zip(differences, scale, strict=True)]
    return np.stack(medians, -1)


def median(values: Floats, where: NDArray[np.bool_]) -> Floats:
    """Return the median over the first axis of ``(S, K)`` where chosen, ``(K,)``; NaN where a value is NaN."""
    count = where.sum(0)
    ordered = np.sort(np.where(where, values, np.inf), axis=0)
    at = np.arange(values.shape[1])
    middle: Floats = (ordered[(count - 1) // 2, at] + ordered[count // 2, at]) / 2
    return np.where(np.isnan(np.where(where, values, 0)).any(0), np.nan, middle)
