"""Ragged sequences, and pairs of them in padded chunks that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, DataError
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["Chunk", "Sequences", "as_pairs", "chunks", "in_bins", "points", "shorter_first", "valid_cells"]

ROW_CELLS = 2**14  # of a chunk: float64 rows of a dynamic programme stay in the second-level cache
FEW_CELLS = 2**11  # of a row, below which the calls take longer than the cells
MATRIX_CELLS = 2**18
MOVE_CELLS = 2**24
MOST_CELLS = {"tables": 2**26, "moves": 2**31}  # of one pair: half a GiB of float64, 2 GiB of bytes


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of different lengths in one array.

    Args:
        values: ``(C, T)``, C numbers per element.
        starts: ``(P,)`` first element of each sequence.
        lengths: ``(P,)`` elements of each sequence; one may be empty.
    """

    values: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def cut(cls, values: NDArray[Any], offsets: NDArray[np.int64]) -> Self:
        """Return the sequences that lie one behind the other, with ``(P + 1,)`` offsets."""
        return cls(values, offsets[:-1], np.diff(offsets))

    def take(self, index: NDArray[np.int64]) -> Sequences:
        """Return some of the sequences."""
        return Sequences(self.values, self.starts[index], self.lengths[index])

    def padded(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """Return some sequences as ``(C, longest, K)``; behind its end, a sequence repeats its last element."""
        return self.between(0, int(self.lengths[index].max()), index)

    def between(self, start: int, stop: int, index: NDArray[np.int64]) -> NDArray[Any]:
        """Return elements ``start`` to ``stop`` of some sequences, padded likewise, ``(C, stop - start, K)``."""
        steps = np.minimum(np.arange(start, stop)[:, None], self.lengths[index] - 1)
        return self.values.take(self.starts[index] + steps, axis=1)

    def repeated(self, counts: NDArray[np.int64]) -> Sequences:
        """Return the sequences with each element repeated.

        Args:
            counts: ``(T,)`` how often; 0 leaves an element out.
        """
        total = np.concatenate([[0], np.cumsum(counts)])
        starts = total[self.starts]
        return Sequences(np.repeat(self.values, counts, axis=1), starts, total[self.starts + self.lengths] - starts)

    def first(self, count: int | None) -> Sequences:
        """Return the first ``count`` elements of each sequence; ``None`` keeps all."""
        return self if count is None else Sequences(self.values, self.starts, np.minimum(self.lengths, count))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some pairs of sequences, padded, pairs last.

    Args:
        pairs: ``(K,)`` their numbers.
        first: ``(C, n, K)``.
        second: ``(C, m, K)``.
        n: ``(K,)`` lengths of the first sequences.
        m: ``(K,)`` lengths of the second.
    """

    pairs: NDArray[np.int64]
    first: NDArray[Any]
    second: NDArray[Any]
    n: NDArray[np.int64]
    m: NDArray[np.int64]


def chunks(first: Sequences, second: Sequences, *, keeps: str = "rows") -> Iterator[Chunk]:
    """Yield pairs of similar lengths together, each pair once; pairs with an empty sequence are left out.

    Args:
        first: P sequences.
        second: P sequences, each compared with the one of the same number.
        keeps: What the caller holds in memory: ``"rows"`` of a table, whole ``"tables"`` of numbers, or ``"moves"``,
            one byte per cell.

    Raises:
        DataError: If two paths are so long that their table would not fit in memory.
    """
    n, m = first.lengths, second.lengths
    largest = int((n * m).argmax()) if len(n) else 0
    if len(n) and n[largest] * m[largest] > MOST_CELLS.get(keeps, np.inf):
        message = f"Pair {largest} has {n[largest]} and {m[largest]} fixations, too many for one table of all with all"
        raise DataError(
            f"{message}; cut the paths, or use a metric that keeps rows (ScanMatch, DTW, SED).", reason="too_long"
        )
    band = (n + 3) // 4  # of similar first lengths; within one, by second lengths
    order = np.lexsort((m, band))
    order = order[(n > 0)[order] & (m > 0)[order]]
    start = 0
    while start < len(order):
        ahead = order[start : start + max(1, ROW_CELLS // int(n[order[start]]))]
        rows, columns = np.maximum.accumulate(n[ahead]), m[ahead]
        cells = np.arange(1, len(ahead) + 1) * rows
        similar = (band[ahead] == band[ahead[0]]) & (columns <= 1.25 * columns[0] + 4)
        fits = (cells <= ROW_CELLS) & (similar | (cells <= FEW_CELLS))
        if keeps != "rows":
            most = MATRIX_CELLS if keeps == "tables" else MOVE_CELLS
            fits &= cells * np.maximum.accumulate(columns) <= most
        count = len(fits) if fits.all() else max(1, int(fits.argmin()))
        pairs = order[start : start + count]
        yield Chunk(pairs, first.padded(pairs), second.padded(pairs), n[pairs], m[pairs])
        start += count


def as_pairs(
    predicted: Scanpath | ScanpathSet, human: Scanpath | ScanpathSet, *, duration: bool = False
) -> tuple[ScanpathSet, ScanpathSet]:
    """Return two sets of equal size, whose paths are compared one by one; a single path is a set of one.

    Args:
        predicted: P paths.
        human: P paths.
        duration: Whether durations are needed.

    Raises:
        ConfigError: If the sets differ in size.
        DataError: If durations are needed and a path has none.
    """
    sets = [ScanpathSet.from_paths([paths]) if isinstance(paths, Scanpath) else paths for paths in (predicted, human)]
    if len(sets[0]) != len(sets[1]):
        raise ConfigError(f"Paths are compared one by one, but there are {len(sets[0])} and {len(sets[1])}.")
    if duration:
        for paths in sets:
            paths.durations()
    return sets[0], sets[1]


def points(paths: ScanpathSet) -> Sequences:
    """Return positions in px as sequences with 2 numbers per fixation."""
    return Sequences.cut(np.stack([paths.x, paths.y]), paths.offsets)


def shorter_first(first: Sequences, second: Sequences) -> tuple[Sequences, Sequences]:
    """Return each pair with its shorter sequence first, where that compares the same: fewer, fuller rows."""
    values = np.concatenate([first.values, second.values], axis=1)
    starts = np.stack([first.starts, second.starts + first.values.shape[1]])
    lengths = np.stack([first.lengths, second.lengths])
    order = lengths.argsort(0, kind="stable")
    starts, lengths = np.take_along_axis(starts, order, 0), np.take_along_axis(lengths, order, 0)
    return Sequences(values, starts[0], lengths[0]), Sequences(values, starts[1], lengths[1])


def in_bins(duration: NDArray[np.float64], bin_s: float) -> NDArray[np.float64]:
    """Return durations in bins, free of the noise of decimals: 0.35 s are 3.5 bins of 0.1 s, not 3.4999999."""
    return np.round(duration / bin_s, 9)


def valid_cells(chunk: Chunk) -> NDArray[np.bool_]:
    """Return which cells of the padded tables belong to their pair, ``(n, m, K)``."""
    rows = np.arange(chunk.first.shape[1])[:, None, None] < chunk.n
    columns = np.arange(chunk.second.shape[1])[:, None] < chunk.m
    valid: NDArray[np.bool_] = rows & columns
    return valid
