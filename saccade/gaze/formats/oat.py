"""OAT's training files: a pickled list of trials over products on a shelf.

Each trial is a dictionary with ``package_target`` [one index, from 1], ``package_seq`` (indices from 1), ``X, Y`` px,
``id`` (``Q1`` wine, ``Q2`` shampoo, ``Q3`` yogurt, ``amazon``), ``layout_id, sub_id, tgt_id, pair``. A pickle can run
any code when it is opened: it is read on request only, and then nothing but plain values and numpy arrays is let in.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from saccade.batch.tables import atomic_path
from saccade.errors import ConfigError, DataError
from saccade.gaze.formats.common import Format, ReadOptions, collect, grid_boxes, wanted
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import Places

__all__ = ["OAT_TRIALS"]

ALLOWED = {
    *((module, name) for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
      for name in ("ndarray", "dtype", "_reconstruct", "scalar")),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}  # fmt: skip
# rows, columns, height of a cell, width of a cell, strip with the title above, all px on a screen of 1680 x 1050
SHELVES = {"Q1": (2, 11, 449, 152, 152), "Q2": (3, 9, 305, 186, 135), "Q3": (3, 9, 305, 186, 135)}
SCREEN = (1680, 1050)


class PlainUnpickler(pickle.Unpickler):
    """Lets in plain values and numpy arrays, and nothing that could run."""

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401 - pickle's own
        """Return a permitted global.

        Raises:
            DataError: For any other.
        """
        if (module_name, global_name) not in ALLOWED:
            message = f"The pickle asks for {module_name}.{global_name}; only plain values and numpy arrays are let in."
            raise DataError(message, reason="unsafe_pickle")
        return super().find_class(module_name, global_name)


def read(path: Path, options: ReadOptions) -> ScanpathSet:
    """Read the trials.

    Raises:
        ConfigError: Without ``options.allow_pickle``, or if the file is no pickled list.
        DataError: If the pickle asks for anything but plain values and arrays.
    """
    if not options.allow_pickle:
        raise ConfigError(f"{path.name} is a pickle, which is read on request only: allow_pickle, --allow-pickle.")
    try:
        trials = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise ConfigError(f"{path.name} is not a pickle: {error}.") from None
    if not isinstance(trials, list):
        raise ConfigError(f"{path.name} holds a {type(trials).__name__}, expected a list of trials.")
    places = Places(path.name)
    shelves = {kind: shelf_boxes(*shape) for kind, shape in SHELVES.items()}
    records = []
    for number, trial in enumerate(trials):
        kind = str(wanted(trial, "id", places, number))
        boxes = shelves.get(kind)
        size = SCREEN if boxes is not None else options.size or (None, None)
        target = np.ravel(wanted(trial, "package_target", places, number))
        records.append(
            {
                "image": f"{kind}_{trial.get('layout_id', 0)}",
                "x": np.ravel(wanted(trial, "X", places, number)),
                "y": np.ravel(wanted(trial, "Y", places, number)),
                "subject": trial.get("sub_id", ""),
                "task": str(trial.get("tgt_id", target[0])),
                "condition": "present",
                "width": size[0],
                "height": size[1],
                "objects": np.ravel(wanted(trial, "package_seq", places, number)).astype(np.int64) - 1,
                "target_object": int(target[0]) - 1,
                "boxes": boxes,
                "meta": {name: plain(trial[name]) for name in ("id", "layout_id", "tgt_id", "pair") if name in trial},
            }
        )
    return collect(records, places, options)


def shelf_boxes(rows: int, columns: int, height: float, width: float, top: float) -> Any:  # noqa: ANN401 - an array
    """Return the boxes of a shelf below its title, ``(rows columns, 4)`` px."""
    boxes = grid_boxes(rows, columns, columns * width, rows * height) + np.array([0, top, 0, top])
    boxes.flags.writeable = False
    return boxes


def plain(value: Any) -> Any:  # noqa: ANN401 - any value
    """Return numpy's scalars and arrays as Python's."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def write(paths: ScanpathSet, path: Path) -> None:
    """Write the trials as plain values; crops of the products are not part of a scanpath and stay out.

    Raises:
        DataError: If a path has no objects or no target.
    """
    trials = []
    for number, one in enumerate(paths):
        if one.objects is None or one.target_object is None:
            paths.places.fail(number, "objects, target_object", "unknown; this format needs them", "no_objects")
        trials.append(
            {
                "package_target": [one.target_object + 1],
                "package_seq": (one.objects + 1).tolist(),
                "X": one.x.tolist(),
                "Y": one.y.tolist(),
                "id": one.meta.get("id", one.image),
                "layout_id": one.meta.get("layout_id", 0),
                "tgt_id": one.meta.get("tgt_id", one.task),
                "sub_id": one.subject,
            }
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(pickle.dumps(trials, protocol=4))


OAT_TRIALS = Format(
    "oat",
    (".pickle", ".pkl"),
    "OAT's pickled trials, read on request only; px from 0, objects from 1, no durations",
    lambda head: True,
    read,
    write,
)
