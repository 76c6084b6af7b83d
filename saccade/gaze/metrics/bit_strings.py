"""Strings of labels compared in the bits of machine words, all pairs at once.

A word holds a whole column of the table: its bits say by how much neighbouring cells differ, and one column follows
from the last in a handful of word operations. The shorter string is the word; the table is never made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.gaze.metrics.sequences import Sequences

__all__ = ["WORD_BITS", "common_in_words", "edits_in_words"]

Floats = NDArray[np.float64]
Words = NDArray[Any]
WORD_BITS = 64
BATCH_PAIRS = 2**13
BLOCK_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs whose shorter sequence fits in words of one size, those with the longest partner first.

    Args:
        pairs: ``(K,)`` their numbers.
        columns: ``(K,)`` lengths of the longer sequences, falling.
        ones: ``(K,)`` words with all bits set.
        inside: ``(K,)`` words with a bit for each element of the shorter sequence.
        shorter: All shorter sequences.
        longer: All longer ones.
    """

    pairs: NDArray[np.int64]
    columns: NDArray[np.int64]
    ones: Words
    inside: Words
    shorter: Sequences
    longer: Sequences

    def matches(self) -> Iterator[tuple[int, Words]]:
        """Yield for each column how many pairs have it, and which elements of their shorter sequence equal its own."""
        kind = self.ones.dtype
        bits = 8 * kind.itemsize
        word = self.shorter.between(0, bits, self.pairs)[0].T
        having = np.searchsorted(-self.columns, -np.arange(self.columns[0]), side="left")
        block = max(1, BLOCK_BYTES // word.size)
        for start in range(0, len(having), block):
            among = slice(0, having[start])
            labels = self.longer.between(start, min(start + block, len(having)), self.pairs[among])[0]
            equal = (word[among] == labels[..., None]).ravel()
            packed = np.packbits(equal, bitorder="little").view(kind).reshape(labels.shape)
            for column, matching in enumerate(packed, start):
                yield int(having[column]), matching[: having[column]]


def batches(shorter: Sequences, longer: Sequences) -> Iterator[Batch]:
    """Yield all pairs, in words of 8, 16, 32 or 64 bits."""
    low = shorter.values.min(initial=0)
    small = np.min_scalar_type(int(shorter.values.max(initial=0)) - int(low))
    labels = (shorter.values - low).astype(small)
    shorter, longer = (Sequences(labels, side.starts, side.lengths) for side in (shorter, longer))
    bits = np.maximum(8, 2 ** np.ceil(np.log2(np.maximum(shorter.lengths, 1)))).astype(np.int64)
    for size in np.unique(bits).tolist():
        kind = np.dtype(f"<u{size // 8}")
        members = np.flatnonzero(bits == size)
        members = members[np.argsort(-longer.lengths[members], kind="stable")]
        for start in range(0, len(members), BATCH_PAIRS):
            pairs = members[start : start + BATCH_PAIRS]
            ones = np.full(len(pairs), np.iinfo(kind).max, kind)
            inside = ones >> (size - shorter.lengths[pairs]).astype(kind)
            yield Batch(pairs, longer.lengths[pairs], ones, inside, shorter, longer)


def common_in_words(shorter: Sequences, longer: Sequences) -> Floats:
    """Return the length of the longest common subsequence (Hyyro 2004), ``(P,)``.

    Args:
        shorter: P sequences of 1 to 64 labels.
        longer: P sequences of the same array of labels, none shorter than its partner.
    """
    result = np.empty(len(shorter.lengths))
    for batch in batches(shorter, longer):
        level = batch.ones.copy()  # a bit is 0 where the next row's cell is larger by one
        for among, matching in batch.matches():
            before = level[:among]
            kept = before & matching
            level[:among] = (before + kept) | (before - kept)
        result[batch.pairs] = np.bitwise_count(~level & batch.inside)
    return result


def edits_in_words(shorter: Sequences, longer: Sequences) -> Floats:
    """Return the Levenshtein distance (Myers 1999, in the form of Hyyro 2003), ``(P,)``.

    Args:
        shorter: P sequences of 1 to 64 labels.
        longer: P sequences of the same array of labels, none shorter than its partner.
    """
    result = np.empty(len(shorter.lengths))
    for batch in batches(shorter, longer):
        one = batch.ones.dtype.type(1)
        more, less = (
            batch.ones.copy(),
            np.zeros_like(batch.ones),
        )  # where a cell exceeds the one above it, or falls short
        for among, matching in batch.matches():
            up, down = more[:among], less[:among]
            same = (((matching & up) + up) ^ up) | matching | down  # as the cell before it, diagonally
            right_more = ((down | ~(same | up)) << one) | one
            right_less = (up & same) << one
            more[:among] = right_less | ~(same | right_more)
            less[:among] = right_more & same
        rises, falls = (np.bitwise_count(side & batch.inside).astype(np.int64) for side in (more, less))
        result[batch.pairs] = batch.columns + rises - falls
    return result
