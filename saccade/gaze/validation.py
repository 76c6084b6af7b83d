"""What a set of scanpaths must be (errors), and what its owner should know (notices)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from saccade.errors import DataError

if TYPE_CHECKING:
    from saccade.gaze.scanpath import ScanpathSet

__all__ = ["Notice", "Places", "ScanpathWarning", "check_paths", "notices", "outside_image"]


@dataclass(frozen=True)
class Places:
    """Where paths came from, so that a message can say which record or line is wrong.

    Args:
        source: A file's name, or ``""``.
        records: ``(P,)`` number of each path in the source; ``None`` counts from 0.
        lines: ``(T,)`` line of each fixation, for tables with a row per fixation.
    """

    source: str = ""
    records: NDArray[np.int64] | None = None
    lines: NDArray[np.int64] | None = None

    def name(self, path: int) -> str:
        """Return e.g. ``"human.json record 17"`` for a path of the set."""
        number = path if self.records is None else int(self.records[path])
        return f"{self.source} record {number}".strip()

    def take(self, index: NDArray[np.int64]) -> Places:
        """Return the places of some paths; lines do not follow."""
        return replace(self, records=index if self.records is None else self.records[index], lines=None)

    def fail(self, path: int, name: str, problem: str, reason: str, fixation: int | None = None) -> NoReturn:
        """Raise for a path of the set.

        Args:
            path: Number of the path.
            name: The field.
            problem: Value and what is wrong with it.
            reason: Word for tables.
            fixation: Number in the flat arrays, where the source has a line for it.

        Raises:
            DataError: Always.
        """
        where = self.name(path)
        if fixation is not None and self.lines is not None:
            where = f"{self.source} line {int(self.lines[fixation])}"
        raise DataError(f"{where}, {name}: {problem}.", reason=reason)

    def check_lengths(self, records: Sequence[Mapping[str, int | None]]) -> None:
        """Raise if the fields of a record differ in length.

        Args:
            records: Per record the length of each field, ``None`` for one that is not there.

        Raises:
            DataError: Names both fields and lengths.
        """
        for number, sizes in enumerate(records):
            (first, length), *rest = [(name, size) for name, size in sizes.items() if size is not None]
            for name, size in rest:
                if size != length:
                    self.fail(number, name, f"{size} values, but {first} has {length}", "length_mismatch")


class ScanpathWarning(UserWarning):
    """Something that :func:`notices` found in recordings that were read."""


@dataclass(frozen=True)
class Notice:
    """Something true of a data set that its user should know, and that is no error.

    Args:
        rule: Short stable word, e.g. ``"off_image"``.
        count: How many fixations or paths it is about.
        message: One sentence with an example.
    """

    rule: str
    count: int
    message: str


def check_paths(paths: ScanpathSet) -> None:
    """Raise if a path breaks a rule.

    Raises:
        DataError: Names the record (or the line), field and value.
    """
    places, owner = paths.places, paths.path_index
    empty = np.flatnonzero(paths.lengths < 1)
    if empty.size:
        places.fail(int(empty[0]), "x", "no fixation; leave such paths out", "empty_path")
    for name in ("x", "y"):
        values = getattr(paths, name)
        reject(paths, name, ~np.isfinite(values), values, "is not a finite number of pixels", "not_finite")
    if paths.duration is not None:
        values = paths.duration
        reject(paths, "duration", np.isinf(values), values, "is not a finite number of seconds", "not_finite")
        reject(paths, "duration", values < 0, values, "s is negative", "negative_duration")
        known = np.add.reduceat(~np.isnan(values), paths.offsets[:-1]) if len(paths) else np.empty(0, int)
        partly = np.isnan(values) & (known > 0)[owner] if len(paths) else np.zeros(0, bool)
        reject(paths, "duration", partly, values, "is not a finite number of seconds", "not_finite")
    for name in ("width", "height"):
        wrong = np.flatnonzero(~np.isnan(getattr(paths, name)) & ~(getattr(paths, name) > 0))
        if wrong.size:
            places.fail(int(wrong[0]), name, f"{getattr(paths, name)[wrong[0]]:g} is not a size in pixels", "bad_size")
    check_boxes(paths)
    seen: dict[tuple[object, ...], int] = {}
    for number, key in enumerate(zip(paths.image, paths.task, paths.subject, paths.sample, strict=True)):
        if key in seen:
            image, task, subject, sample = key
            again = f"{image!r}, {task!r}, {subject!r}, {sample} is also {places.name(seen[key])}"
            places.fail(number, "image, task, subject, sample", f"{again}; number repetitions with sample", "duplicate")
        seen[key] = number


def check_boxes(paths: ScanpathSet) -> None:
    """Raise if boxes have no area, or objects are not among them; data sets share boxes, so each array is seen once."""
    places = paths.places
    flat = paths.target_box
    wrong = np.flatnonzero((flat[:, 2] <= flat[:, 0]) | (flat[:, 3] <= flat[:, 1]) | np.isinf(flat).any(-1))
    if wrong.size:
        places.fail(int(wrong[0]), "target_box", f"{flat[wrong[0]].tolist()} {CORNERS}", "bad_box")
    checked: set[int] = set()
    count = np.full(len(paths), -1)
    for number, boxes in enumerate(paths.boxes):
        if boxes is None:
            continue
        count[number] = len(boxes)
        if id(boxes) in checked:
            continue
        checked.add(id(boxes))
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            places.fail(number, "boxes", f"shape {boxes.shape} is not (N, 4)", "bad_box")
        bad = np.flatnonzero(~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])))
        if bad.size:
            places.fail(number, f"boxes[{bad[0]}]", f"{boxes[bad[0]].tolist()} {CORNERS}", "bad_box")
    high = np.flatnonzero((count >= 0) & (paths.target_object >= count))
    if high.size:
        outside = f"{paths.target_object[high[0]]} is not among {count[high[0]]} objects, counted from 0"
        places.fail(int(high[0]), "target_object", outside, "bad_object")
    if paths.objects is not None:
        limit = np.where(count < 0, np.iinfo(np.int64).max, count)[paths.path_index]
        wrong_object = (paths.objects < -1) | (paths.objects >= limit)
        reject(paths, "objects", wrong_object, paths.objects, "is not among the boxes, counted from 0", "bad_object")


CORNERS = "is not x1, y1, x2, y2 with x1 < x2 and y1 < y2; a width and height must be added to the corner first"


def reject(
    paths: ScanpathSet, name: str, wrong: NDArray[np.bool_], values: NDArray[np.generic], problem: str, reason: str
) -> None:
    """Raise for the first fixation that is wrong."""
    if wrong.any():
        fixation = int(wrong.argmax())
        path = int(np.searchsorted(paths.offsets, fixation, side="right")) - 1
        at = f"{name}[{fixation - int(paths.offsets[path])}]"
        paths.places.fail(path, at, f"{values[fixation]:g} {problem}", reason, fixation)


def notices(paths: ScanpathSet) -> list[Notice]:
    """Return what is unusual about a data set: each finding once, with a count and an example.

    Rules: ``off_image`` (fixations outside their image), ``zero_duration``, ``duration_unit`` (all below 10 ms, or a
    median above 10 s: the other unit?), ``identical_paths`` (different viewers with the same path on an image),
    ``image_in_several_splits`` (likewise ``task``, ``subject``), ``forced_centre`` (every path starts at the centre of
    its image), ``long_paths`` (longer than mean + 3 standard deviations).
    """
    if not len(paths):
        return []
    found = [
        off_image(paths),
        *durations(paths),
        identical_paths(paths),
        *several_splits(paths),
        forced_centre(paths),
        long_paths(paths),
    ]
    return [notice for notice in found if notice is not None]


def outside_image(paths: ScanpathSet) -> NDArray[np.bool_]:
    """Return which fixations lie outside their image, ``(T,)``: centre of a pixel that the image does not have."""
    width, height = (np.repeat(side, paths.lengths) for side in (paths.width, paths.height))
    outside: NDArray[np.bool_] = (
        (paths.x < -0.5) | (paths.y < -0.5) | (paths.x > width - 0.5) | (paths.y > height - 0.5)
    )
    return outside


def off_image(paths: ScanpathSet) -> Notice | None:
    """Report fixations outside their image."""
    outside = outside_image(paths)
    if not outside.any():
        return None
    first, count = int(outside.argmax()), int(outside.sum())
    path = int(paths.path_index[first])
    example = f"{paths.places.name(path)}: ({paths.x[first]:g}, {paths.y[first]:g})"
    return Notice("off_image", count, f"{count} fixations lie outside their image, e.g. {example}.")


def durations(paths: ScanpathSet) -> list[Notice]:
    """Report durations of zero, and those that look like another unit."""
    if paths.duration is None:
        return []
    known = paths.duration[~np.isnan(paths.duration)]
    found = []
    if zero := int((known == 0).sum()):
        found.append(Notice("zero_duration", zero, f"{zero} fixations last 0 s."))
    if known.size and known.max() < 0.01:
        message = f"All {known.size} durations are below 10 ms (largest {known.max():g} s): were they seconds already?"
        found.append(Notice("duration_unit", known.size, message))
    if known.size and np.median(known) > 10:
        message = f"The median of {known.size} durations is {np.median(known):g} s: were they milliseconds?"
        found.append(Notice("duration_unit", known.size, message))
    return found


def identical_paths(paths: ScanpathSet) -> Notice | None:
    """Report viewers who share a path of at least two fixations on an image, as faulty preprocessing produces them."""
    first: dict[tuple[object, ...], int] = {}
    pairs = []
    for number in range(len(paths)):
        part = slice(paths.offsets[number], paths.offsets[number + 1])
        if part.stop - part.start < 2:
            continue
        key = (paths.image[number], paths.x[part].tobytes(), paths.y[part].tobytes())
        earlier = first.setdefault(key, number)
        if paths.subject[earlier] != paths.subject[number]:
            pairs.append((earlier, number))
    if not pairs:
        return None
    a, b = pairs[0]
    example = f"subjects {paths.subject[a]} and {paths.subject[b]} on {paths.image[a]}"
    message = f"{len(pairs)} paths are identical to another viewer's on the same image, e.g. {example}."
    return Notice("identical_paths", len(pairs), message)


def several_splits(paths: ScanpathSet) -> list[Notice]:
    """Report images, tasks and subjects that stand in more than one split."""
    found = []
    for name in ("image", "task", "subject"):
        splits: dict[object, set[object]] = {}
        for value, split in zip(paths.column(name), paths.split, strict=True):
            if value is not None and split is not None:
                splits.setdefault(value, set()).add(split)
        shared = [value for value, members in splits.items() if len(members) > 1]
        if shared:
            where = ", ".join(sorted(map(str, splits[shared[0]])))
            message = f"{len(shared)} {name}s stand in several splits, e.g. {shared[0]!r} in {where}."
            found.append(Notice(f"{name}_in_several_splits", len(shared), message))
    return found


def forced_centre(paths: ScanpathSet) -> Notice | None:
    """Report a data set whose paths all start exactly at the centre of their image, as some preparations force it."""
    start = paths.offsets[:-1]
    # halves: the centre of an even width lies between two pixels, and preparations round it one way or the other
    centred = np.ones(len(paths), bool)
    for values, sides in ((paths.x, paths.width), (paths.y, paths.height)):
        centred &= np.abs(values[start] - (sides - 1) / 2) <= 0.5
    if len(paths) < 2 or not centred.all():
        return None
    return Notice("forced_centre", len(paths), f"All {len(paths)} paths start at the centre of their image.")


def long_paths(paths: ScanpathSet) -> Notice | None:
    """Report paths longer than mean + 3 standard deviations."""
    lengths = paths.lengths
    limit = lengths.mean() + 3 * lengths.std()
    above = np.flatnonzero(lengths > limit)
    if not above.size:
        return None
    example = f"{paths.places.name(int(above[0]))} with {lengths[above[0]]}"
    message = (
        f"{above.size} paths are longer than mean + 3 standard deviations ({limit:.1f} fixations), e.g. {example}."
    )
    return Notice("long_paths", int(above.size), message)
