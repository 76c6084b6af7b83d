"""ScanMatch and the string edit distance: fixations as cells of a grid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError
from saccade.gaze.metrics.alignment import edit_distance, global_alignment
from saccade.gaze.metrics.sequences import Sequences, as_pairs, in_bins, shorter_first
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["scanmatch", "string_edit_distance"]

Floats = NDArray[np.float64]
Paths = Scanpath | ScanpathSet


def scanmatch(
    predicted: Paths,
    human: Paths,
    *,
    bins: tuple[int, int] = (16, 12),
    threshold: float = 3.5,
    bin_s: float | None = None,
    gap: float = 0.0,
) -> Floats:
    """ScanMatch (Cristino et al. 2010): global alignment of grid cells, near cells matching better.

    Cell ``(floor(x columns / width), floor(y rows / height))`` after clipping to the image; substitution ``threshold -
    distance of the cells`` in cells; score ``alignment / (threshold max(n, m))``. The first row and column of the
    alignment are ``i gap`` (a common port starts at ``(i + 1) gap``; for ``gap=0`` that is the same).

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number.
        bins: Columns and rows of the grid.
        threshold: Score of an exact match; cells farther apart than this count against. 3.5 as in Chen et al. 2021, the
            toolbox suggests two standard deviations of the saccades' amplitude.
        bin_s: Repeat each cell ``round(duration / bin_s)`` times (half to even), with a bin in seconds; ``None`` counts
            each fixation once.
        gap: Added per cell that is skipped.

    Returns:
        ``(P,)`` at most 1, the value of equal sequences; NaN where no fixation lasts half a bin. Symmetric.

    Raises:
        ConfigError: If the sets differ in size or a number is out of range.
        DataError: If an image size, or a duration that is needed, is not known.
    """
    if min(bins) < 1 or not threshold > 0 or (bin_s is not None and not bin_s > 0):
        raise ConfigError(f"bins, threshold and bin_s must be above 0, got {bins}, {threshold}, {bin_s}.")
    stride = 2 * bins[0] - 1
    substitution = threshold - cell_distances(bins)
    sequences = []
    for paths in as_pairs(predicted, human, duration=bin_s is not None):
        column, row = grid_cells(paths, bins).astype(np.int64)
        cells = Sequences.cut((column + stride * row)[None], paths.offsets)
        if bin_s is not None:
            cells = cells.repeated(np.rint(in_bins(paths.durations(), bin_s)).astype(np.int64))
        sequences.append(cells)
    first, second = shorter_first(*sequences)
    first = Sequences(first.values + len(substitution) // 2, first.starts, first.lengths)
    total = global_alignment(first, second, lambda a, b: substitution.take(a[0] - b[0]), gap=gap)
    return total / (threshold * np.maximum(second.lengths, 1))


def cell_distances(bins: tuple[int, int]) -> Floats:
    """Return how far apart cells numbered ``column + (2 columns - 1) row`` are, by the difference of their numbers.

    Any two steps from cell to cell have different differences; the step to the same cell stands in the middle.
    """
    columns, rows = bins
    down, right = np.arange(1 - rows, rows), np.arange(1 - columns, columns)
    return np.hypot(down[:, None], right).ravel()


def grid_cells(paths: ScanpathSet, bins: tuple[int, int]) -> Floats:
    """Return column and row of each fixation's cell, ``(2, T)``."""
    sizes = size_of_fixations(paths)
    cells = np.stack([paths.x, paths.y])
    np.clip(cells, 0, sizes - 1, out=cells)
    cells *= np.array(bins)[:, None]
    cells /= sizes
    return np.floor(cells, out=cells)


def size_of_fixations(paths: ScanpathSet) -> Floats:
    """Return width and height of each fixation's image, ``(2, T)``, or ``(2, 1)`` where all images have one size."""
    sizes = paths.sizes()
    if len(sizes) and (sizes == sizes[0]).all():
        return sizes[:1].T
    return np.repeat(sizes, paths.lengths, axis=0).T


def string_edit_distance(predicted: Paths, human: Paths, *, n: int = 5) -> Floats:
    """SED: Levenshtein distance of the cells of an n x n grid (Brandt and Stark 1997), not normalised.

    Cells are ``floor(width / n)`` by ``floor(height / n)`` px, coordinates whole px; what is left at the right and at
    the bottom, and what lies outside, belongs to the nearest cell.

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number.
        n: Cells per side.

    Returns:
        ``(P,)`` edits, 0 for equal strings. Symmetric.

    Raises:
        ConfigError: If the sets differ in size or n is below 1.
        DataError: If an image size is not known, or below n px.
    """
    if n < 1:
        raise ConfigError(f"n is the number of cells per side, got {n}.")
    labels = []
    for paths in as_pairs(predicted, human):
        if (small := (paths.sizes() < n).any(-1)).any():
            paths.places.fail(int(small.argmax()), "width, height", f"too small for {n} cells per side", "no_size")
        cells = np.trunc(np.stack([paths.x, paths.y]))
        cells /= np.floor(size_of_fixations(paths) / n)
        np.clip(np.floor(cells, out=cells), 0, n - 1, out=cells)
        labels.append(Sequences.cut((cells[0] + n * cells[1])[None].astype(np.int64), paths.offsets))
    return edit_distance(*labels)
