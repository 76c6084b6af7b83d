"""Dynamic programmes over all pairs at once: anti-diagonals outside, pairs and cells inside.

The cells of one anti-diagonal do not depend on each other. On it, row i of the first sequence meets column d - i of the
second: with the second reversed, both are plain slices, and the costs are made as they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.gaze.metrics.bit_strings import WORD_BITS, common_in_words, edits_in_words
from saccade.gaze.metrics.sequences import Chunk, Sequences, chunks, shorter_first

__all__ = ["Alignment", "distance", "edit_distance", "global_alignment", "longest_common", "trace", "warp"]

Floats = NDArray[np.float64]
Cost = Callable[[Floats, Floats], NDArray[Any]]
DIAGONAL, RIGHT, DOWN = 0, 1, 2


def distance(a: Floats, b: Floats) -> Floats:
    """Euclidean distance of points ``(2, ..., K)``."""
    apart: Floats = a - b
    apart *= apart  # in place from here: these are the largest arrays of most metrics
    total: Floats = np.add(apart[0], apart[1], out=apart[0])
    return np.sqrt(total, out=total)


def equal(a: Floats, b: Floats) -> NDArray[np.int8]:
    """1 where labels ``(1, ..., K)`` are equal, else 0."""
    same: NDArray[np.int8] = np.equal(a[0], b[0]).view(np.int8)
    return same


def unequal(a: Floats, b: Floats) -> NDArray[np.int8]:
    """-1 where labels ``(1, ..., K)`` differ, else 0."""
    same = equal(a, b)
    return np.subtract(same, 1, out=same)


def global_alignment(
    first: Sequences, second: Sequences, score: Cost, *, gap: float = 0.0, whole: bool = False
) -> Floats:
    """Return the largest total score of a global alignment of each pair (Needleman and Wunsch 1970).

    ``F[i, j] = max(F[i-1, j-1] + score(i, j), F[i-1, j] + gap, F[i, j-1] + gap)``, ``F[i, 0] = i gap``.

    Args:
        first: P sequences.
        second: P sequences.
        score: Of elements ``(C, k, K)`` against ``(C, k, K)``.
        gap: Added per element that is skipped.
        whole: Scores are int8 of -1, 0 or 1, and the gap a whole number of them: tables in the smallest integers.

    Returns:
        ``(P,)``; NaN where a sequence is empty.
    """
    result = np.full(len(first.lengths), np.nan)
    for chunk in chunks(first, second):
        rows, columns = chunk.first.shape[1], chunk.second.shape[1]
        ending = ends(chunk, chunk.n + chunk.m)
        backwards = chunk.second[:, ::-1]
        kind = smallest_integer(rows + columns) if whole else np.dtype(np.float64)
        before, last, now = (np.zeros((rows + 1, len(chunk.pairs)), kind) for _ in range(3))
        skip = np.empty_like(now)
        last[:2] = step = kind.type(gap)
        for d in range(2, rows + columns + 1):
            low, high = max(1, d - columns), min(rows, d - 1) + 1
            # the cell (i, d - i) of the bordered table compares elements i - 1 and d - i - 1
            start = columns - d + low
            part = score(chunk.first[:, low - 1 : high - 1], backwards[:, start : start + high - low])
            here = np.add(before[low - 1 : high - 1], part, out=now[low:high])
            if gap:
                np.add(last[low - 1 : high], step, out=skip[low - 1 : high])
                np.maximum(here, skip[low - 1 : high - 1], out=here)
                np.maximum(here, skip[low:high], out=here)
            else:
                np.maximum(here, last[low - 1 : high - 1], out=here)
                np.maximum(here, last[low:high], out=here)
            if d <= columns:
                now[0] = d * gap
            if d <= rows:
                now[d] = d * gap
            if d in ending:
                done = ending[d]
                result[chunk.pairs[done]] = now[chunk.n[done], done]
            before, last, now = last, now, before
    return result


def smallest_integer(largest: int) -> np.dtype[Any]:
    """Return the smallest type that holds whole numbers from ``-largest`` to ``largest``."""
    return np.dtype(np.int8 if largest < 2**7 else np.int16 if largest < 2**15 else np.int32)


def ends(chunk: Chunk, diagonal: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Return which pairs of a chunk have their last cell on each anti-diagonal."""
    order, counts = np.argsort(diagonal, kind="stable"), np.bincount(diagonal)
    stops = counts.cumsum()
    return {d: order[stops[d] - counts[d] : stops[d]] for d in np.flatnonzero(counts).tolist()}


def longest_common(first: Sequences, second: Sequences) -> Floats:
    """Return the length of the longest common subsequence of labels, ``(P,)``; NaN where one is empty."""
    return labels_compared(first, second, common_in_words, lambda a, b: global_alignment(a, b, equal, whole=True))


def edit_distance(first: Sequences, second: Sequences) -> Floats:
    """Return the Levenshtein distance of labels, ``(P,)``; NaN where one is empty."""
    return labels_compared(
        first, second, edits_in_words, lambda a, b: -global_alignment(a, b, unequal, gap=-1.0, whole=True)
    )


def labels_compared(
    first: Sequences, second: Sequences, in_words: Callable[..., Floats], in_tables: Callable[..., Floats]
) -> Floats:
    """Compare in the bits of words where the shorter sequence fits in one, else in tables."""
    shorter, longer = shorter_first(first, second)
    result = np.full(len(shorter.lengths), np.nan)
    fits = shorter.lengths <= WORD_BITS
    for compare, which in ((in_words, fits & (shorter.lengths > 0)), (in_tables, ~fits)):
        index = np.flatnonzero(which)
        result[index] = compare(shorter.take(index), longer.take(index))
    return result


@dataclass(frozen=True, eq=False)
class Alignment:
    """The cheapest monotone alignments of a chunk of pairs.

    Args:
        chunk: The pairs.
        total: ``(K,)`` summed cost, or largest cost.
        moves: ``(n, m, K)`` uint8, how the cheapest way came to each cell; empty if not asked for.
    """

    chunk: Chunk
    total: Floats
    moves: NDArray[np.uint8]


def warp(
    chunk: Chunk, cost: Cost, *, largest: bool = False, start_free: bool = False, moves: bool = False
) -> Alignment:
    """Find the cheapest way from the first to the last cell with steps down, right and diagonal.

    Of ways that cost the same, the last step prefers diagonal, then right, then down.

    Args:
        chunk: Pairs of sequences.
        cost: Of entering a cell, from elements ``(C, k, K)`` and ``(C, k, K)``.
        largest: Take the largest cost on the way (discrete Frechet) in place of the sum (dynamic time warping).
        start_free: Do not count the first cell.
        moves: Keep the moves, for :func:`trace`.
    """
    rows, columns, count = chunk.first.shape[1], chunk.second.shape[1], len(chunk.pairs)
    ending = ends(chunk, chunk.n + chunk.m - 2)
    backwards = chunk.second[:, ::-1]
    total = np.empty(count)
    came = np.zeros((rows, columns, count) if moves else (0, 0, 0), np.uint8)
    came_by_diagonal = skewed(came) if moves else came
    before, last, now = (
        np.full((rows + 1, count), np.inf) for _ in range(3)
    )  # row i stands at i + 1, above it a border
    for d in range(rows + columns - 1):
        low, high = max(0, d - columns + 1), min(rows, d + 1)
        start = columns - 1 - d + low
        part = cost(chunk.first[:, low:high], backwards[:, start : start + high - low])
        here = now[low + 1 : high + 1]
        if d == 0:
            here[:] = 0.0 if start_free else part
        else:
            diagonal, right, down = before[low:high], last[low + 1 : high + 1], last[low:high]
            best = np.minimum(diagonal, right, out=here)
            if moves:
                move = (right < diagonal).view(np.uint8)
                move[down < best] = DOWN
                came_by_diagonal[d, low:high] = move
            np.minimum(best, down, out=best)
            (np.maximum if largest else np.add)(best, part, out=here)
        if d in ending:
            done = ending[d]
            total[done] = now[chunk.n[done], done]
        before, last, now = last, now, before
    return Alignment(chunk, total, came)


def skewed(table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a view whose element ``[d, i]`` is ``table[i, d - i]``; only cells inside the table may be touched."""
    rows, columns, count = table.shape
    down, right, inner = table.strides
    return np.lib.stride_tricks.as_strided(table, (rows + columns - 1, rows, count), (right, down - right, inner))


def trace(alignment: Alignment) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Follow the moves back from the last cell.

    Returns:
        Rows and columns of the cells of each way, ``(S, K)`` from last to first, and which entries belong to it.
    """
    chunk, pairs = alignment.chunk, np.arange(len(alignment.chunk.pairs))
    i, j = chunk.n - 1, chunk.m - 1
    rows, columns = [i], [j]
    while (i + j).any():
        move = alignment.moves[i, j, pairs]
        moving = (i + j) > 0
        i = i - (moving & (move != RIGHT))
        j = j - (moving & (move != DOWN))
        rows.append(i)
        columns.append(j)
    row_table, column_table = np.stack(rows), np.stack(columns)
    inside = np.ones(row_table.shape, bool)
    inside[1:] = (row_table[:-1] + column_table[:-1]) > 0
    return row_table, column_table, inside
