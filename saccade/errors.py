"""Every exception that saccade raises on purpose.

::

    SaccadeError
    |- ShapeError (ValueError)             a tensor does not have the shape, dtype or device asked for
    |- ConfigError (ValueError)            an option, name or file that the user chose is not usable
    |- DataError (ValueError)              the content of one input (image, slide, row) cannot be used
    |- CheckpointError (ValueError)        weights do not fit the model, or the file is not a checkpoint
    |- BackendError (RuntimeError)         the backend asked for cannot run this problem
    |- MissingDependencyError (ImportError)   a package is not installed
    `- MissingResourceError (RuntimeError)    a model file, device or other thing this machine does not have

Messages say what was expected, what arrived and what to do.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MissingDependencyError",
    "MissingResourceError",
    "SaccadeError",
    "ShapeError",
    "require",
    "suggest",
]


class SaccadeError(Exception):
    """Base of every exception that saccade raises on purpose."""


class ShapeError(SaccadeError, ValueError):
    """A tensor does not have the shape, dtype or device that the function needs."""


class ConfigError(SaccadeError, ValueError):
    """An option, name or file chosen by the user cannot be used."""


class DataError(SaccadeError, ValueError):
    """The content of one input cannot be used; ``reason`` is a short stable word for tables.

    Args:
        message: What is wrong with it.
        reason: One snake_case word, e.g. ``"unreadable_image"``.
    """

    def __init__(self, message: str, *, reason: str = "bad_data") -> None:
        super().__init__(message)
        self.reason = reason


class CheckpointError(SaccadeError, ValueError):
    """A file is not a checkpoint, or its weights do not fit the model."""


class BackendError(SaccadeError, RuntimeError):
    """The backend asked for cannot run this problem; the message says why."""


class MissingDependencyError(SaccadeError, ImportError):
    """A package that this feature needs is not installed."""


class MissingResourceError(SaccadeError, RuntimeError):
    """A model file, device or other resource is not available on this machine."""


def require(module: str, *, extra: str | None = None, purpose: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: Import name, e.g. ``"pyarrow"``.
        extra: Extra of saccade that brings it; ``None`` means that it belongs to the core dependencies.
        purpose: Start of the message, e.g. ``"Writing .parquet tables"``.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = f"saccade[{extra}]" if extra else "saccade"
        raise MissingDependencyError(f"{purpose} needs {module}: pip install '{package}'.") from error


def suggest(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` for a misspelt word, or an empty string.

    Args:
        word: What the user typed.
        known: The words that would have been right.
        count: Most suggestions given.
    """
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
