"""Scanpaths: one record with units, and a set of them in flat arrays.

Units everywhere: positions in pixels of the image, counted from 0 with pixel centres at integers, x to the right and y
down; durations in seconds; boxes ``(x1, y1, x2, y2)`` in pixels. Degrees of visual angle come from pixels per degree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saccade.errors import ConfigError, suggest
from saccade.gaze.columns import each, joined, numbers, size, strings, text
from saccade.gaze.validation import Places, check_paths

__all__ = ["Scanpath", "ScanpathSet"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Strings = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Scanpath:
    """One viewer's fixations on one image.

    Args:
        image: Name of the image.
        x: ``(n,)`` px from 0, float64; any sequence of numbers is taken.
        y: ``(n,)`` px from 0.
        duration: ``(n,)`` seconds, or ``None`` where they were not recorded.
        subject: Viewer; numbers become strings.
        task: Search target or instruction, e.g. ``"bottle"``.
        condition: E.g. ``"present"``, ``"absent"``, ``"freeview"``.
        width: Width of the image in px; metrics that normalise by the screen need it.
        height: Height of the image in px.
        sample: Number of the repetition, where one viewer (or a model) gives several paths for an image and task.
        objects: ``(n,)`` index of the fixated object, -1 where none.
        target_object: Index of the search target among the objects.
        target_box: ``(4,)`` x1, y1, x2, y2 of the search target.
        boxes: ``(N, 4)`` boxes of all objects.
        split: ``"train"``, ``"val"`` or ``"test"`` where the data set says so.
        meta: Anything else, plain values by name.

    Raises:
        DataError: By name of the field and position: lengths that differ, no fixation, NaN or infinite values, negative
            durations, an object that is not among the boxes, a box without area.
    """

    image: str
    x: Floats
    y: Floats
    duration: Floats | None = None
    subject: str = ""
    task: str | None = None
    condition: str | None = None
    width: float | None = None
    height: float | None = None
    sample: int = 0
    objects: Integers | None = None
    target_object: int | None = None
    target_box: Floats | None = None
    boxes: Floats | None = None
    split: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ScanpathSet.from_paths([self])

    @classmethod
    def unchecked(cls, **values: Any) -> Scanpath:  # noqa: ANN401 - as the fields are typed
        """Return a record as it stands, for a set that will check it and can say where it came from."""
        record = object.__new__(cls)
        defaults = {entry.name: entry.default for entry in fields(cls) if entry.default is not MISSING}
        for name, value in {**defaults, "meta": {}, **values}.items():
            object.__setattr__(record, name, value)
        return record

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        viewer = f", subject {self.subject}" if self.subject else ""
        task = f", task {self.task}" if self.task is not None else ""
        return f"Scanpath({self.image!r}{viewer}{task}, {len(self)} fixations)"


STRINGS = ("image", "subject", "task", "condition", "split")
FLAT = ("x", "y", "duration", "objects")


@dataclass(frozen=True, eq=False)
class ScanpathSet:
    """Many scanpaths in flat arrays: path ``p`` owns fixations ``offsets[p]`` to ``offsets[p + 1]``.

    Arrays are read-only. ``paths[3]`` is a :class:`Scanpath`; slices, index arrays and boolean masks give sets.

    Args:
        offsets: ``(P + 1,)`` int64, from 0 to T, strictly increasing.
        x: ``(T,)`` px.
        y: ``(T,)`` px.
        image: ``(P,)`` strings.
        subject: ``(P,)`` strings.
        task: ``(P,)`` strings or ``None``; likewise ``condition`` and ``split``.
        condition: See ``task``.
        split: See ``task``.
        duration: ``(T,)`` seconds, NaN for paths without; ``None`` where no path has any.
        width: ``(P,)`` px, NaN where unknown; likewise ``height``.
        height: See ``width``.
        sample: ``(P,)`` int64 repetition numbers.
        objects: ``(T,)`` int64, -1 for none; ``None`` where no path has any.
        target_object: ``(P,)`` int64, -1 where unknown.
        target_box: ``(P, 4)`` px, NaN where unknown.
        boxes: P arrays ``(N, 4)`` or ``None``.
        meta: P mappings.
        places: Where the paths came from, for messages.

    Raises:
        DataError: As :class:`Scanpath`, and for a second path of the same image, task, subject and sample.
    """

    offsets: Integers
    x: Floats
    y: Floats
    image: Strings
    subject: Strings
    task: Strings
    condition: Strings
    split: Strings
    width: Floats
    height: Floats
    sample: Integers
    target_object: Integers
    target_box: Floats
    boxes: tuple[Floats | None, ...]
    meta: tuple[Mapping[str, Any], ...]
    duration: Floats | None = None
    objects: Integers | None = None
    places: Places = field(default_factory=Places)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, np.ndarray):
                value = value.view()
                value.flags.writeable = False
                object.__setattr__(self, entry.name, value)
        check_paths(self)

    @classmethod
    def from_paths(cls, paths: Iterable[Scanpath], *, places: Places | None = None) -> ScanpathSet:
        """Collect records.

        Args:
            paths: The records, in the order that the set keeps.
            places: Where they came from, for messages.

        Raises:
            DataError: As the constructor.
        """
        records = list(paths)
        places = places or Places()
        for number, record in enumerate(records):
            normalise(record, number, places)
        lengths = [len(r.x) for r in records]
        places.check_lengths(
            [{"x": len(r.x), "y": len(r.y), "duration": size(r.duration), "objects": size(r.objects)} for r in records]
        )
        durations = [
            np.full(n, np.nan) if r.duration is None else r.duration for r, n in zip(records, lengths, strict=True)
        ]
        objects = [np.full(n, -1) if r.objects is None else r.objects for r, n in zip(records, lengths, strict=True)]
        return cls(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            x=joined([r.x for r in records], np.float64),
            y=joined([r.y for r in records], np.float64),
            **{name: strings([getattr(r, name) for r in records]) for name in STRINGS},
            width=numbers([r.width for r in records]),
            height=numbers([r.height for r in records]),
            sample=np.array([r.sample for r in records], np.int64),
            target_object=np.array([-1 if r.target_object is None else r.target_object for r in records], np.int64),
            target_box=np.array([[np.nan] * 4 if r.target_box is None else r.target_box for r in records]).reshape(
                -1, 4
            ),
            boxes=tuple(r.boxes for r in records),
            meta=tuple(r.meta for r in records),
            duration=joined(durations, np.float64) if any(r.duration is not None for r in records) else None,
            objects=joined(objects, np.int64) if any(r.objects is not None for r in records) else None,
            places=places,
        )

    @classmethod
    def from_columns(
        cls,
        lengths: ArrayLike,
        x: ArrayLike,
        y: ArrayLike,
        *,
        places: Places | None = None,
        **columns: Any,  # noqa: ANN401 - as the fields are typed
    ) -> ScanpathSet:
        """Build a set from flat arrays, the quick way for large recordings.

        Args:
            lengths: ``(P,)`` fixations of each path.
            x: ``(T,)`` px.
            y: ``(T,)`` px.
            places: Where they came from, for messages.
            columns: Any other field of the class; a single value holds for every path.

        Raises:
            ConfigError: If a column has no such name.
            DataError: As the constructor.
        """
        lengths = np.asarray(lengths, np.int64)
        count = len(lengths)
        known = [entry.name for entry in fields(cls) if entry.name not in ("offsets", "x", "y", "places")]
        for name in columns:
            if name not in known:
                raise ConfigError(f"Scanpaths have no column {name!r}.{suggest(name, known)}")
        values: dict[str, Any] = {name: strings(each(columns.get(name), count)) for name in STRINGS[2:]}
        values["image"] = strings(each(columns.get("image", ""), count))
        values["subject"] = strings(each(columns.get("subject", ""), count))
        for name in ("width", "height"):
            values[name] = numbers(each(columns.get(name), count))
        values["sample"] = np.asarray(each(columns.get("sample", 0), count), np.int64)
        values["target_object"] = np.asarray(each(columns.get("target_object", -1), count), np.int64)
        box = columns.get("target_box")
        values["target_box"] = np.full((count, 4), np.nan) if box is None else np.asarray(box, np.float64)
        values["boxes"] = tuple(each(columns.get("boxes"), count))
        values["meta"] = tuple(columns.get("meta", [{}] * count))
        places = places or Places()
        flat: dict[str, Any] = {"x": np.asarray(x, np.float64), "y": np.asarray(y, np.float64)}
        for name, kind in (("duration", np.float64), ("objects", np.int64)):
            flat[name] = values[name] = None if columns.get(name) is None else np.asarray(columns[name], kind)
        places.check_lengths([{"lengths": int(lengths.sum()), **{name: size(part) for name, part in flat.items()}}])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(offsets=offsets, places=places, **{**values, **flat})

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        images, subjects = len(set(self.image)), len(set(self.subject))
        return f"ScanpathSet({len(self)} paths, {len(self.x)} fixations, {images} images, {subjects} subjects)"

    def __iter__(self) -> Iterator[Scanpath]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Scanpath: ...
    @overload
    def __getitem__(self, index: slice | ArrayLike) -> ScanpathSet: ...
    def __getitem__(self, index: int | slice | ArrayLike) -> Scanpath | ScanpathSet:
        if isinstance(index, int | np.integer):
            return self.path(range(len(self))[index])
        return self.take(np.arange(len(self))[index if isinstance(index, slice) else np.asarray(index)])

    def path(self, index: int) -> Scanpath:
        """Return one path as a record of views; ``index`` counts from 0."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        duration = None if self.duration is None else self.duration[part]
        record = object.__new__(Scanpath)  # valid already
        values = {
            **{name: getattr(self, name)[index] for name in STRINGS},
            "x": self.x[part],
            "y": self.y[part],
            "duration": None if duration is None or np.isnan(duration[0]) else duration,
            "width": None if np.isnan(self.width[index]) else float(self.width[index]),
            "height": None if np.isnan(self.height[index]) else float(self.height[index]),
            "sample": int(self.sample[index]),
            "objects": None if self.objects is None else self.objects[part],
            "target_object": None if self.target_object[index] < 0 else int(self.target_object[index]),
            "target_box": None if np.isnan(self.target_box[index, 0]) else self.target_box[index],
            "boxes": self.boxes[index],
            "meta": self.meta[index],
        }
        for name, value in values.items():
            object.__setattr__(record, name, value)
        return record

    def take(self, index: Integers) -> ScanpathSet:
        """Return the paths of the given numbers, in that order; a number may come twice.

        Args:
            index: ``(K,)`` int64.
        """
        flat = self.positions(index)
        chosen: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "offsets":
                value = np.concatenate([[0], np.cumsum(self.lengths[index])]).astype(np.int64)
            elif entry.name == "places":
                value = value.take(index)
            elif entry.name in FLAT:
                value = None if value is None else value[flat]
            elif isinstance(value, tuple):
                value = tuple(value[i] for i in index)
            else:
                value = value[index]
            chosen[entry.name] = value
        subset = object.__new__(ScanpathSet)  # valid already, and pairs of paths name one path many times
        for name, value in chosen.items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
            object.__setattr__(subset, name, value)
        return subset

    def positions(self, index: Integers) -> Integers:
        """Return the rows of the flat arrays that belong to the given paths, ``(sum of lengths,)``."""
        lengths = self.lengths[index]
        starts = np.repeat(self.offsets[:-1][index] - np.cumsum(lengths) + lengths, lengths)
        return starts + np.arange(len(starts))

    @property
    def lengths(self) -> Integers:
        """``(P,)`` fixations of each path."""
        return np.diff(self.offsets)

    @property
    def path_index(self) -> Integers:
        """``(T,)`` number of the path that each fixation belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def filter(self, where: Callable[[Scanpath], bool] | None = None, **values: object) -> ScanpathSet:
        """Return the paths whose columns have the given values.

        ``paths.filter(task="bottle", subject=["1", "2"])``; a collection means any of its members.

        Args:
            where: A further condition on the record.
            values: Wanted value, or collection of values, by column.

        Raises:
            ConfigError: If a column has no such name.
        """
        keep = np.ones(len(self), bool)
        for name, wanted in values.items():
            column = self.column(name)
            several = isinstance(wanted, Collection) and not isinstance(wanted, str)
            chosen = {text(value) for value in wanted} if several else {text(wanted)}  # type: ignore[attr-defined]
            keep &= np.fromiter((text(value) in chosen for value in column), bool, len(self))
        if where is not None:
            keep &= np.fromiter((where(path) for path in self), bool, len(self))
        return self.take(np.flatnonzero(keep))

    def column(self, name: str) -> NDArray[Any]:
        """Return one of the columns that paths are grouped and filtered by: strings, sample, width or height.

        Raises:
            ConfigError: If there is no such column.
        """
        known = (*STRINGS, "sample", "width", "height", "target_object")
        if name not in known:
            raise ConfigError(f"Scanpaths have no column {name!r}: one of {', '.join(known)}.{suggest(name, known)}")
        column: NDArray[Any] = getattr(self, name)
        return column

    def group_by(self, *names: str) -> dict[tuple[Any, ...], Integers]:
        """Return the numbers of the paths that share the given columns, keys in order of first appearance.

        Raises:
            ConfigError: If a column has no such name.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, key in enumerate(zip(*(self.column(name) for name in names), strict=True)):
            groups.setdefault(key, []).append(index)
        return {key: np.array(members, np.int64) for key, members in groups.items()}

    def to_degrees(self, pixels_per_degree: float) -> Floats:
        """Return positions in degrees of visual angle from the image's centre, ``(T, 2)``, small-angle.

        Args:
            pixels_per_degree: Of the screen at the viewer's distance.

        Raises:
            ConfigError: If it is not above 0.
            DataError: If a path has no image size.
        """
        if not pixels_per_degree > 0:
            raise ConfigError(f"pixels_per_degree must be above 0, got {pixels_per_degree}.")
        centre = np.repeat((self.sizes() - 1) / 2, self.lengths, axis=0)
        return (np.stack([self.x, self.y], -1) - centre) / pixels_per_degree

    def sizes(self) -> Floats:
        """Return width and height of each path's image, ``(P, 2)`` px.

        Raises:
            DataError: If one is not known.
        """
        sizes = np.stack([self.width, self.height], -1)
        unknown = np.isnan(sizes).any(-1)
        if unknown.any():
            self.places.fail(int(unknown.argmax()), "width, height", "unknown; this needs the image size", "no_size")
        return sizes

    def durations(self) -> Floats:
        """Return the durations of all fixations, ``(T,)`` seconds.

        Raises:
            DataError: If those of a path are not known.
        """
        unknown = np.zeros(len(self.x), bool) | (self.duration is None)
        if self.duration is not None:
            unknown = np.isnan(self.duration)
        if unknown.any():
            path = int(np.searchsorted(self.offsets, unknown.argmax(), side="right")) - 1
            self.places.fail(path, "duration", "unknown; this needs durations", "no_duration")
        return np.empty(0) if self.duration is None else self.duration

    def first(self, count: int | None) -> ScanpathSet:
        """Return the paths cut to their first fixations; ``None`` keeps all.

        Raises:
            ConfigError: If ``count`` is below 1.
        """
        if count is None:
            return self
        if count < 1:
            raise ConfigError(f"The first fixations to keep are at least 1, got {count}.")
        keep = np.arange(len(self.x)) - np.repeat(self.offsets[:-1], self.lengths) < count
        flat: dict[str, Any] = {n: None if v is None else v[keep] for n in FLAT for v in [getattr(self, n)]}
        offsets = np.concatenate([[0], np.cumsum(np.minimum(self.lengths, count))]).astype(np.int64)
        return replace(self, offsets=offsets, places=replace(self.places, lines=None), **flat)

    def with_split(self, name: str) -> ScanpathSet:
        """Return the same paths with ``split`` set to a name."""
        column = np.full(len(self), name, object)
        return replace(self, split=column)

    def with_size(self, sizes: Floats) -> ScanpathSet:
        """Return the same paths with image sizes ``(P, 2)`` in px."""
        return replace(self, width=sizes[:, 0].copy(), height=sizes[:, 1].copy())

    def concatenate(self, *others: ScanpathSet) -> ScanpathSet:
        """Return one set of this one's paths and those of ``others``.

        Raises:
            DataError: If an image, task, subject and sample come twice.
        """
        return ScanpathSet.from_paths([path for part in (self, *others) for path in part])


def normalise(record: Scanpath, number: int, places: Places) -> None:
    """Bring the fields of a record to their types, as arrays that nobody can write to.

    Raises:
        DataError: If one does not hold numbers.
    """
    for name in ("x", "y", "duration", "target_box", "boxes", "objects"):
        value = getattr(record, name)
        kind = np.int64 if name == "objects" else np.float64
        frozen = isinstance(value, np.ndarray) and value.dtype == kind and not value.flags.writeable
        if value is None or frozen:
            continue
        try:
            array = np.array(value, kind)
        except (TypeError, ValueError) as error:
            places.fail(number, name, f"{value!r} is not numbers: {error}", "not_a_number")
        array.flags.writeable = False
        object.__setattr__(record, name, array)
    for name in STRINGS:
        object.__setattr__(record, name, text(getattr(record, name)))
