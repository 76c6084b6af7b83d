"""HDF5: saccade's own file, which keeps every field exactly, and pysaliency's layout.

saccade: flat datasets ``x, y, duration, objects`` with ``offsets``, a dataset per column of paths, ``boxes`` once per
image with ``box_offsets`` and ``box_index``; px from 0, seconds; ``meta`` as JSON. pysaliency (``Scanpaths`` version
1.0): ``xs, ys, n, lengths``, groups ``scanpath_attributes`` and ``fixation_attributes``; durations in seconds; ``n``
counts images, whose names are an attribute ``image``, or come from the caller.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saccade.batch.tables import atomic_path
from saccade.errors import ConfigError
from saccade.gaze.formats.common import Format, ReadOptions
from saccade.gaze.scanpath import STRINGS, ScanpathSet
from saccade.gaze.validation import Places

__all__ = ["HDF5", "PYSALIENCY", "from_pysaliency", "to_pysaliency"]

MAGIC = b"\x89HDF\r\n\x1a\n"
TYPE = "saccade scanpaths"
NUMBERS = ("offsets", "x", "y", "width", "height", "sample", "target_object", "target_box")


def open_file(path: Path, mode: str) -> Any:  # noqa: ANN401 - h5py has no types
    """Open an HDF5 file.

    Raises:
        ConfigError: If it is not one.
    """
    import h5py

    try:
        return h5py.File(path, mode)
    except OSError as error:
        if path.is_file() and mode == "r":
            raise ConfigError(f"{path.name} is not an HDF5 file: {error}.") from None
        raise


def write(paths: ScanpathSet, path: Path) -> None:
    """Write every field."""
    import h5py

    with atomic_path(path) as temporary, open_file(temporary, "w") as file:
        file.attrs["type"], file.attrs["version"] = TYPE, 1
        for name in NUMBERS:
            file[name] = getattr(paths, name)
        for name in ("duration", "objects"):
            if getattr(paths, name) is not None:
                file[name] = getattr(paths, name)
        text = h5py.string_dtype()
        for name in STRINGS:
            # null and the empty string differ: JSON says which
            file.create_dataset(name, data=[json.dumps(value) for value in paths.column(name)], dtype=text)
        file.create_dataset("meta", data=[json.dumps(dict(meta)) for meta in paths.meta], dtype=text)
        shared: dict[int, int] = {}
        index = [-1 if boxes is None else shared.setdefault(id(boxes), len(shared)) for boxes in paths.boxes]
        distinct = {id(boxes): boxes for boxes in paths.boxes if boxes is not None}
        file["box_index"] = np.array(index, np.int64)
        file["box_offsets"] = np.cumsum([0, *(len(boxes) for boxes in distinct.values())])
        file["boxes"] = np.concatenate([np.empty((0, 4)), *distinct.values()])


def read(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read a file that :func:`write` wrote."""
    with open_file(path, "r") as file:
        if decoded(file.attrs.get("type")) != TYPE:
            raise ConfigError(f"{path.name} is of type {decoded(file.attrs.get('type'))!r}, expected {TYPE!r}.")
        columns: dict[str, Any] = {name: file[name][...] for name in NUMBERS}
        for name in ("duration", "objects"):
            columns[name] = file[name][...] if name in file else None
        for name in STRINGS:
            columns[name] = [json.loads(value) for value in file[name][...]]
        columns["meta"] = [json.loads(value) for value in file["meta"][...]]
        offsets, boxes, index = (file[name][...] for name in ("box_offsets", "boxes", "box_index"))
    parts = [boxes[start:stop] for start, stop in itertools.pairwise(offsets)]
    for part in parts:
        part.flags.writeable = False
    columns["boxes"] = [None if number < 0 else parts[number] for number in index]
    lengths = np.diff(columns.pop("offsets"))
    return ScanpathSet.from_columns(lengths, places=Places(path.name), **columns)


def decoded(value: Any) -> Any:  # noqa: ANN401 - an attribute
    """Return bytes as text, anything else as it is."""
    return value.decode() if isinstance(value, bytes) else value


def to_pysaliency(paths: ScanpathSet) -> dict[str, Any]:
    """Return the arguments of pysaliency's ``Scanpaths``: ``Scanpaths(**to_pysaliency(paths))``.

    Subjects that are numbers stay numbers (pysaliency counts from 0); others are numbered, names beside them.

    Returns:
        ``xs, ys`` as lists of arrays, ``n``, ``lengths``, ``scanpath_attributes``, ``fixation_attributes``,
        ``attribute_mapping``.
    """
    images = list(dict.fromkeys(paths.image))
    names = list(dict.fromkeys(paths.subject))
    numbered = all(name.isdigit() for name in names)
    attributes: dict[str, Any] = {
        "subject": np.array([int(s) if numbered else names.index(s) for s in paths.subject], np.int64),
        "image": np.array(paths.image, str),
    }
    if not numbered:
        attributes["subject_name"] = np.array(paths.subject, str)
    for name in ("task", "condition", "split"):
        if all(value is not None for value in paths.column(name)):
            attributes[name] = np.array(paths.column(name), str)
    for name in ("width", "height"):
        if not np.isnan(paths.column(name)).any():
            attributes[name] = paths.column(name)
    if not np.isnan(paths.target_box).any():
        corner = paths.target_box[:, :2]
        attributes["target_bbox"] = np.concatenate([corner, paths.target_box[:, 2:] - corner], 1)

    def split(flat: Any) -> list[Any]:  # noqa: ANN401 - an array
        return [flat[start:stop] for start, stop in zip(paths.offsets[:-1], paths.offsets[1:], strict=True)]

    fixations = {"ts": [np.arange(n, dtype=np.float64) for n in paths.lengths]}
    if paths.duration is not None and not np.isnan(paths.duration).any():
        fixations["durations"] = split(paths.duration)
    return {
        "xs": split(paths.x),
        "ys": split(paths.y),
        "n": np.array([images.index(image) for image in paths.image], np.int64),
        "lengths": paths.lengths,
        "scanpath_attributes": attributes,
        "fixation_attributes": fixations,
        "attribute_mapping": {"ts": "t", "durations": "duration"},
    }


def from_pysaliency(
    scanpaths: Mapping[str, Any], *, options: ReadOptions | None = None, places: Places | None = None
) -> ScanpathSet:
    """Build a set from the fields of pysaliency's ``Scanpaths``.

    Args:
        scanpaths: ``xs, ys`` (lists of arrays, flat arrays, or NaN-padded matrices), ``n``, ``lengths`` where flat, and
            the attribute dictionaries.
        options: ``images`` are the stimuli's names in their order, ``size`` that of all.
        places: For messages.

    Raises:
        ConfigError: If ``n`` counts more images than there are names.
        DataError: As the set.
    """
    options = options or ReadOptions()
    numbers = np.asarray(scanpaths["n"], np.int64)
    x, lengths = flattened(scanpaths["xs"], scanpaths.get("lengths"))
    y, _ = flattened(scanpaths["ys"], scanpaths.get("lengths"))
    columns: dict[str, Any] = {}
    attributes = {name: [decoded(v) for v in values] if np.asarray(values).dtype.kind in "OSU" else np.asarray(values)
                  for name, values in scanpaths.get("scanpath_attributes", {}).items()}  # fmt: skip
    if options.images is not None:
        if numbers.max(initial=-1) >= len(options.images):
            raise ConfigError(f"n counts to image {numbers.max()}, but {len(options.images)} names are given, from 0.")
        columns["image"] = [options.images[number] for number in numbers]
    else:
        columns["image"] = attributes.get("image", numbers)
    columns["subject"] = attributes.get("subject_name", attributes.get("subject", ""))
    for name in ("task", "condition", "split", "width", "height"):
        columns[name] = attributes.get(name)
    if options.size is not None:
        columns["width"], columns["height"] = options.size
    if "target_bbox" in attributes:
        boxes = np.asarray(attributes["target_bbox"], np.float64)
        columns["target_box"] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    fixation = scanpaths.get("fixation_attributes", {})
    if "durations" in fixation:
        columns["duration"] = flattened(fixation["durations"], scanpaths.get("lengths"))[0]
    return ScanpathSet.from_columns(lengths, x, y, places=places, **columns)


def flattened(values: Any, lengths: Any) -> tuple[Any, Any]:  # noqa: ANN401 - arrays of any kind
    """Return values of all paths in one array, and the lengths."""
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype != object:
        return values, np.asarray(lengths)
    parts = [np.asarray(part, np.float64) for part in values]
    if isinstance(values, np.ndarray) and values.ndim == 2:  # older files: padded with NaN at the end
        parts = [part[: int(np.flatnonzero(~np.isnan(part)).max(initial=-1)) + 1] for part in parts]
    return np.concatenate([np.empty(0), *parts]), np.array([len(part) for part in parts], np.int64)


def write_pysaliency(paths: ScanpathSet, path: Path) -> None:
    """Write a file that ``pysaliency.Scanpaths.read_hdf5`` reads."""
    import h5py

    content = to_pysaliency(paths)
    with atomic_path(path) as temporary, open_file(temporary, "w") as file:
        file.attrs["type"], file.attrs["version"] = np.bytes_("Scanpaths"), np.bytes_("1.0")
        file.attrs["attribute_mapping"] = np.bytes_(json.dumps(content["attribute_mapping"]))
        file["xs"], file["ys"], file["n"], file["lengths"] = paths.x, paths.y, content["n"], paths.lengths
        for kind in ("scanpath_attributes", "fixation_attributes"):
            group = file.create_group(kind)
            for name, values in content[kind].items():
                if kind == "fixation_attributes":
                    group[name] = np.concatenate(values)
                elif values.dtype.kind == "U":
                    group.create_dataset(name, data=values.tolist(), dtype=h5py.string_dtype())
                else:
                    group[name] = values
            group.attrs["__attributes__"] = np.bytes_(json.dumps(sorted(content[kind])))


def read_pysaliency(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read a file of pysaliency.

    Raises:
        ConfigError: If it is of another type.
    """
    with open_file(path, "r") as file:
        kind = decoded(file.attrs.get("type"))
        if kind not in ("Scanpaths", "FixationTrains", "ScanpathFixations"):
            raise ConfigError(f"{path.name} is of type {kind!r}, expected pysaliency's 'Scanpaths'.")
        source = file["scanpaths"] if kind == "ScanpathFixations" else file
        old = "train_xs" in source
        names = {"xs": "train_xs", "ys": "train_ys", "n": "train_ns"} if old else {"xs": "xs", "ys": "ys", "n": "n"}
        content: dict[str, Any] = {ours: source[theirs][...] for ours, theirs in names.items()}
        for name in ("lengths", "length"):
            if name in source:
                content["lengths"] = source[name][...]
        for kind in ("scanpath_attributes", "fixation_attributes"):
            content[kind] = {name: values[...] for name, values in source[kind].items()} if kind in source else {}
        if old and "train_subjects" in source:
            content["scanpath_attributes"]["subject"] = source["train_subjects"][...]
    return from_pysaliency(content, options=options, places=Places(path.name))


HDF5 = Format(
    "hdf5",
    (".h5", ".hdf5"),
    "every field exactly; px from 0, seconds",
    lambda head: head.startswith(MAGIC),
    read,
    write,
)
PYSALIENCY = Format(
    "pysaliency",
    (".hdf5", ".h5"),
    "pysaliency's Scanpaths; px from 0, seconds",
    lambda head: False,
    read_pysaliency,
    write_pysaliency,
)
