"""Cross-recurrence of two scanpaths (Anderson et al. 2015)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError
from saccade.gaze.metrics.alignment import distance
from saccade.gaze.metrics.sequences import as_pairs, chunks, points
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["recurrence"]


def recurrence(
    predicted: Scanpath | ScanpathSet, human: Scanpath | ScanpathSet, *, radius: float = 64.0, minimal_line: int = 2
) -> NDArray[np.float64]:
    """Cross-recurrence quantification: which fixations of one path return to places of the other, and in what order.

    Both paths are cut to the shorter length N; ``c[i, j]`` is 1 where fixation i of the first and j of the second are
    closer than the radius, C their number. Recurrence ``100 C / N^2``; determinism, the percentage on diagonal lines;
    laminarity, ``100 (points on vertical + on horizontal lines) / 2 C``; centre of recurrence mass,
    ``100 sum (j - i) c[i, j] / ((N - 1) C)``, positive where the second path follows the first.

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number.
        radius: Of the same place, in px.
        minimal_line: Points that make a line.

    Returns:
        ``(P, 4)`` recurrence, determinism, laminarity, centre of recurrence mass; the last three NaN where nothing
        recurs, the last also where N is 1.

    Raises:
        ConfigError: If the sets differ in size, the radius is not above 0 or the line is below 2.
    """
    if not radius > 0 or minimal_line < 2:
        raise ConfigError(f"radius above 0 and minimal_line of 2 or more, got {radius} and {minimal_line}.")
    first, second = as_pairs(predicted, human)
    shorter = np.minimum(first.lengths, second.lengths)
    result = np.full((len(first), 4), np.nan)
    for chunk in chunks(points(first), points(second), keeps="tables"):
        size = shorter[chunk.pairs]
        inside = np.arange(size.max())[:, None] < size
        a, b = chunk.first[:, : size.max()], chunk.second[:, : size.max()]
        close = (distance(a[:, :, None], b[:, None]) < radius) & inside[:, None] & inside[None]
        count = close.sum((0, 1)).astype(np.float64)
        delay = np.arange(len(inside)) - np.arange(len(inside))[:, None]  # j - i
        with np.errstate(divide="ignore", invalid="ignore"):
            lines = [on_lines(close, step, minimal_line) for step in ((1, 1), (1, 0), (0, 1))]
            result[chunk.pairs] = np.stack(
                [
                    100 * count / size**2,
                    100 * lines[0] / count,
                    100 * (lines[1] + lines[2]) / (2 * count),
                    100 * np.tensordot(delay, close, ((0, 1), (0, 1))) / ((size - 1) * count),
                ],
                -1,
            )
    return result


def on_lines(close: NDArray[np.bool_], step: tuple[int, int], length: int) -> NDArray[np.int64]:
    """Count the points of ``(N, N, K)`` that lie on a run of at least ``length`` in a direction, ``(K,)``."""
    down, right = step
    rows, columns = close.shape[0] - down * (length - 1), close.shape[1] - right * (length - 1)
    if rows < 1 or columns < 1:
        return np.zeros(close.shape[2], np.int64)
    parts = [(slice(t * down, t * down + rows), slice(t * right, t * right + columns)) for t in range(length)]
    starts = np.logical_and.reduce([close[part] for part in parts])
    covered = np.zeros_like(close)
    for part in parts:
        covered[part] |= starts
    counted: NDArray[np.int64] = covered.sum((0, 1))
    return counted
