"""Files of scanpaths: readers and writers by name, and guesses from extension and content."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from saccade.errors import ConfigError, suggest
from saccade.gaze.formats.coco import COCO
from saccade.gaze.formats.collages import AMAZON, OSIE
from saccade.gaze.formats.common import Format, ReadOptions
from saccade.gaze.formats.events import MULTIMATCH, PYMOVEMENTS, from_events, to_events
from saccade.gaze.formats.hdf5 import HDF5, PYSALIENCY, from_pysaliency, to_pysaliency
from saccade.gaze.formats.oat import OAT_TRIALS
from saccade.gaze.formats.samples import Screen, from_samples, read_samples
from saccade.gaze.formats.table import TABLE
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import ScanpathWarning, notices, outside_image

__all__ = [
    "FORMATS",
    "Format",
    "ReadOptions",
    "Screen",
    "apply_off_image",
    "find_format",
    "from_events",
    "from_pysaliency",
    "from_samples",
    "read_samples",
    "read_scanpaths",
    "to_events",
    "to_pysaliency",
    "write_scanpaths",
]

# For files of one extension the first that recognises the content is taken.
FORMATS: tuple[Format, ...] = (TABLE, PYMOVEMENTS, COCO, OSIE, AMAZON, HDF5, PYSALIENCY, MULTIMATCH, OAT_TRIALS)
POLICIES = ("keep", "clip", "drop", "error")


def find_format(path: Path, name: str | None = None, *, writing: bool = False) -> Format:
    """Return the format of a file.

    Args:
        path: The file.
        name: Its word; ``None`` looks at the extension, and in reading at the content.
        writing: The file need not exist; the first format of its extension is meant.

    Raises:
        ConfigError: If no format has this name, or none fits.
    """
    words = [known.name for known in FORMATS]
    if name is not None:
        if name not in words:
            raise ConfigError(f"Unknown format {name!r}, one of {', '.join(words)}.{suggest(name, words)}")
        return FORMATS[words.index(name)]
    fitting = [known for known in FORMATS if path.suffix.lower() in known.extensions]
    if writing and fitting:
        return fitting[0]
    if fitting:
        with path.open("rb") as stream:
            head = stream.read(4096)
        if fitting[0] is HDF5 and head.startswith(b"\x89HDF"):
            return PYSALIENCY if is_pysaliency(path) else HDF5
        for known in fitting:
            if known.matches(head):
                return known
    raise ConfigError(f"{path.name} does not look like scanpaths; give the format, one of {', '.join(words)}.")


def is_pysaliency(path: Path) -> bool:
    """Whether an HDF5 file says that it is pysaliency's."""
    from saccade.gaze.formats.hdf5 import TYPE, decoded, open_file

    with open_file(path, "r") as file:
        return bool(decoded(file.attrs.get("type", TYPE)) != TYPE)


def read_scanpaths(
    path: str | Path,
    *,
    format: str | None = None,
    size: tuple[float, float] | None = None,
    image: str | None = None,
    images: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
    repeats: str = "error",
    off_image: str = "keep",
    allow_pickle: bool = False,
) -> ScanpathSet:
    """Read recordings or predictions of any known format.

    Args:
        path: The file.
        format: One of :data:`FORMATS` by name; ``None`` guesses from extension and content.
        size: Width and height of the images in px, for formats that have none.
        image: Name of the image, for files that hold one path.
        images: Names of the images that a file counts (pysaliency).
        grid: Rows and columns of objects (Amazon).
        repeats: A second path of the same image, task and subject: ``"error"`` or ``"number"``.
        off_image: Fixations outside their image: ``"keep"``, ``"clip"``, ``"drop"`` or ``"error"``.
        allow_pickle: Read a pickled file.

    Returns:
        The paths; pixels from 0, seconds.

    Raises:
        ConfigError: If the file is not of the format, or lacks what the format needs.
        DataError: If a record breaks a rule; names file, record or line, field and value.

    Warns:
        ScanpathWarning: For each finding of :func:`saccade.gaze.notices`.
    """
    file = Path(path)
    known = find_format(file, format)
    options = ReadOptions(size, image, images, grid, repeats, allow_pickle)
    paths = apply_off_image(known.read(file, options), off_image)
    for notice in notices(paths):
        warnings.warn(f"{file.name}: {notice.message}", ScanpathWarning, stacklevel=2)
    return paths


def write_scanpaths(
    paths: ScanpathSet,
    path: str | Path,
    *,
    format: str | None = None,
) -> None:
    """Write scanpaths; the file appears when it is complete.

    Args:
        paths: The paths.
        path: The file.
        format: One of :data:`FORMATS` by name; ``None`` takes the first of the extension.

    Raises:
        ConfigError: If no format fits.
        DataError: If the format needs what a path does not have.
    """
    file = Path(path)
    find_format(file, format, writing=True).write(paths, file)


def apply_off_image(paths: ScanpathSet, policy: str) -> ScanpathSet:
    """Return the paths with fixations outside their image kept, clipped to it, dropped, or refused.

    Dropping may leave a path without fixations; it is then left out.

    Raises:
        ConfigError: If the policy is not known.
        DataError: If it is ``"error"`` and there is one.
    """
    if policy not in POLICIES:
        raise ConfigError(f"off_image is one of {', '.join(POLICIES)}, got {policy!r}.{suggest(policy, POLICIES)}")
    outside = outside_image(paths)
    if policy == "keep" or not outside.any():
        return paths
    if policy == "error":
        first = int(outside.argmax())
        path = int(paths.path_index[first])
        where = f"({paths.x[first]:g}, {paths.y[first]:g}) is outside {paths.width[path]:g}x{paths.height[path]:g}"
        paths.places.fail(path, "x, y", where, "off_image", first)
    columns = {entry.name: getattr(paths, entry.name) for entry in fields(paths) if entry.name != "offsets"}
    if policy == "clip":
        width, height = (np.repeat(side, paths.lengths) for side in (paths.width, paths.height))
        columns["x"] = np.where(outside, np.clip(paths.x, 0, width - 1), paths.x)
        columns["y"] = np.where(outside, np.clip(paths.y, 0, height - 1), paths.y)
        return ScanpathSet.from_columns(paths.lengths, **columns)
    left = np.add.reduceat(~outside, paths.offsets[:-1])
    some = paths.take(np.flatnonzero(left > 0))
    inside = ~outside_image(some)
    columns = {entry.name: getattr(some, entry.name) for entry in fields(some) if entry.name != "offsets"}
    for name in ("x", "y", "duration", "objects"):
        if columns[name] is not None:
            columns[name] = columns[name][inside]
    return ScanpathSet.from_columns(left[left > 0], **columns)
