"""Raw samples of an eye tracker to fixations, by pymovements (extra ``pymovements``)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saccade.errors import ConfigError, DataError
from saccade.gaze.formats.common import ReadOptions
from saccade.gaze.formats.events import from_events
from saccade.gaze.formats.table import floats, read_rows
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.validation import ScanpathWarning

__all__ = ["METHODS", "Screen", "from_samples", "read_samples"]

METHODS = {"ivt": "velocity_threshold", "idt": "dispersion_threshold"}


@dataclass(frozen=True)
class Screen:
    """What turns pixels into degrees.

    Args:
        size_px: Width and height.
        size_cm: Width and height.
        distance_cm: From the eye to the middle.
        rate_hz: Samples per second.

    Raises:
        ConfigError: If a number is not above 0.
    """

    size_px: tuple[float, float]
    size_cm: tuple[float, float]
    distance_cm: float
    rate_hz: float

    def __post_init__(self) -> None:
        if not min(*self.size_px, *self.size_cm, self.distance_cm, self.rate_hz) > 0:
            raise ConfigError(f"Sizes, distance and rate of a screen are above 0, got {self}.")


def from_samples(
    samples: Mapping[str, Sequence[Any]],
    screen: Screen,
    *,
    method: str = "ivt",
    threshold: float | None = None,
    minimum_s: float = 0.1,
) -> ScanpathSet:
    """Find the fixations in raw samples and return them as paths, a path per image, subject and task.

    Args:
        samples: Columns ``time`` (ms), ``x``, ``y`` (px of the screen from its upper left corner, NaN where the tracker
            was lost), and ``image``, ``subject``, ``task`` where there are several.
        screen: Its geometry; images are taken to fill it.
        method: ``"ivt"``, slower than a velocity (Salvucci and Goldberg 2000), or ``"idt"``, within a dispersion.
        threshold: Degrees per second, or degrees; ``None`` means pymovements' own, 20 and 1.
        minimum_s: Shorter fixations are none.

    Raises:
        ConfigError: If pymovements is not installed, a column is missing, or a value is out of range.
        DataError: If no fixation is found.

    Warns:
        ScanpathWarning: If a trial has none and is left out.
    """
    pymovements, polars = (imported(name) for name in ("pymovements", "polars"))
    missing = [name for name in ("time", "x", "y") if name not in samples]
    if missing:
        raise ConfigError(f"Samples lack {', '.join(missing)}; they have {', '.join(samples)}.")
    if method not in METHODS or not minimum_s > 0 or (threshold is not None and not threshold > 0):
        message = f"method is {' or '.join(METHODS)}, threshold and minimum_s above 0"
        raise ConfigError(f"{message}, got {method!r}, {threshold} and {minimum_s}.")
    count = len(samples["time"])
    trial = {name: list(samples[name]) for name in ("image", "subject", "task") if name in samples}
    trial.setdefault("image", [""] * count)
    numbers = {name: np.asarray(samples[name], np.float64) for name in ("time", "x", "y")}
    gaze = pymovements.Gaze(
        polars.DataFrame({**trial, **numbers}),
        experiment=pymovements.Experiment(
            *(round(side) for side in screen.size_px),
            *screen.size_cm,
            screen.distance_cm,
            origin="upper left",
            sampling_rate=screen.rate_hz,
        ),
        trial_columns=list(trial),
        time_column="time",
        time_unit="ms",
        pixel_columns=["x", "y"],
    )
    gaze.pix2deg()
    gaze.pos2vel("smooth")
    limit = {} if threshold is None else {METHODS[method]: threshold}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(.*): No events were detected")  # told below, with the trials' number
        gaze.detect(method, minimum_duration=round(minimum_s * 1000), **limit)
    if not len(gaze.events.frame):
        raise DataError(f"No fixation of {minimum_s:g} s in {count} samples.", reason="no_fixations")
    gaze.compute_event_properties(("location", {"position_column": "pixel"}))
    events = gaze.events.frame.to_dict(as_series=False)
    asked, found = (len(set(zip(*(table[name] for name in trial), strict=True))) for table in (trial, events))
    if found < asked:
        message = f"{asked - found} of {asked} trials have no fixation of {minimum_s:g} s and are left out."
        warnings.warn(message, ScanpathWarning, stacklevel=2)
    subject, task = (name if name in trial else None for name in ("subject", "task"))
    return from_events(events, subject=subject, task=task, options=ReadOptions(size=screen.size_px))


def imported(name: str) -> Any:  # noqa: ANN401 - a module
    """Return a module of the extra.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"Raw samples need {error.name}, which is not installed: pip install 'saccade[pymovements]'."
        raise ConfigError(message) from error


def read_samples(path: str | Path, screen: Screen, *, image: str | None = None, **detection: Any) -> ScanpathSet:  # noqa: ANN401
    """Read a CSV of raw samples, columns ``time, x, y`` and ``image, subject, task`` if it has them.

    Args:
        path: The file.
        screen: See :func:`from_samples`.
        image: Name of the image, for files without that column; ``None``: the file's name without extension.
        detection: Further arguments of :func:`from_samples`.

    Raises:
        ConfigError: As :func:`from_samples`.
        DataError: As :func:`from_samples`, and for a cell that is no number.
    """
    file = Path(path)
    columns: dict[str, Any] = dict(read_rows(file, ("time", "x", "y")))
    for name in ("time", "x", "y"):
        columns[name] = floats(columns, name, file.name)
    columns.setdefault("image", [image or file.stem] * len(columns["time"]))
    return from_samples(columns, screen, **detection)
