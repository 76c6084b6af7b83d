"""Weights from files: read safely, matched to a model key by key, converted.

Nothing is unpickled beyond tensors and plain containers, so a downloaded file cannot run code.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import CheckpointError, ConfigError

__all__ = [
    "KeyReport",
    "best_checkpoint",
    "file_digest",
    "file_sha256",
    "filter_state_dict",
    "load_weights",
    "match_keys",
    "read_checkpoint",
    "read_state_dict",
    "unwrap_state_dict",
]

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher", "net", "params")
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class KeyReport:
    """How a state dict fits a model.

    Args:
        matched: Keys with equal shapes on both sides.
        missing: Keys of the model that the file lacks.
        unexpected: Keys of the file that the model lacks.
        reshaped: ``"key: file shape -> model shape"`` of keys with different shapes.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every key of both sides is accounted for."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} keys match"]
        for name in ("missing", "unexpected", "reshaped"):
            keys = getattr(self, name)
            if keys:
                shown = ", ".join(keys[:8]) + (f", ... ({len(keys) - 8} more)" if len(keys) > 8 else "")
                lines.append(f"{len(keys)} {name}: {shown}")
        return "; ".join(lines)

    def details(self) -> str:
        """Return every key that is not accounted for, one a line under its heading."""
        headings = {
            "missing": "missing: the model has them, the file does not",
            "unexpected": "unexpected: the file has them, the model does not",
            "reshaped": "reshaped: file -> model",
        }
        lines = [f"  {len(self.matched)} keys match"]
        for name, heading in headings.items():
            keys = getattr(self, name)
            if keys:
                lines += [f"  {len(keys)} {heading}", *(f"    {key}" for key in keys)]
        return "\n".join(lines)


def best_checkpoint(path: str | Path, *, prefer: str = "best") -> Path:
    """Find the checkpoint that the user means.

    Args:
        path: A checkpoint, a run folder, or a folder ``runs/NAME`` (its latest run).
        prefer: ``"best"`` or ``"last"``; the other is taken if this one is not there.

    Raises:
        ConfigError: If there is no such checkpoint.
    """
    given = Path(path)
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError(f"{str(path)!r} does not exist; expected a checkpoint or a run folder of `saccade fit`.")
    note = given / "latest"
    folder = given / note.read_text(encoding="utf-8").strip() if note.is_file() else given
    for name in (prefer, "best", "last"):
        checkpoint = folder / "checkpoints" / f"{name}.ckpt"
        if checkpoint.exists():
            return checkpoint
    raise ConfigError(f"{str(path)!r} is no run folder: it has no checkpoints/best.ckpt or checkpoints/last.ckpt.")


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256, its identity in manifests."""
    return file_sha256(path)[:16]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.safetensors`` file or a torch checkpoint on the CPU, refusing anything but tensors and plain values.

    Args:
        path: Checkpoint file.

    Returns:
        Its content: tensors by key, or whatever dictionary was saved.

    Raises:
        ConfigError: If the file does not exist.
        CheckpointError: If it is no checkpoint, is damaged, or holds objects that only unpickling code could rebuild.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"Checkpoint {str(path)!r} does not exist.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # the options of a run, in most training checkpoints
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip(file))
    except UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain values ({first_line(error)}). "
            "Save its state dict alone, in an environment that you trust, and pass that."
        ) from error
    except Exception as error:  # safetensors, zipfile and torch raise their own kinds on damaged files
        raise CheckpointError(f"{file} cannot be read as a checkpoint ({first_line(error)}).") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a state dict.")
    return dict(content)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, whatever they are wrapped in.

    Entries such as ``state_dict`` or ``model`` are opened (averaged weights first), the prefixes of
    DistributedDataParallel and ``torch.compile`` removed.

    Args:
        path: ``.safetensors``, ``.pth``, ``.pt`` or similar.

    Returns:
        Tensors by key.

    Raises:
        ConfigError: If the file does not exist.
        CheckpointError: If it holds no tensors.
    """
    content = read_checkpoint(path)
    state = unwrap_state_dict(content)
    if not state:
        raise CheckpointError(f"{path} holds no tensors; its keys are {sorted(map(str, content))[:8]}.")
    return state


def unwrap_state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in what a checkpoint holds.

    Args:
        content: A state dict, alone or in entries such as ``state_dict`` or ``model`` (averaged weights go first), with
            or without the prefixes of DistributedDataParallel and ``torch.compile``.

    Returns:
        Tensors by key; none if there are none.
    """
    for _ in range(3):  # {"model": {"state_dict": {...}}} occurs
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return {strip(key): value for key, value in content.items() if isinstance(value, Tensor)}


def filter_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translate official key names and shapes by the ``checkpoint_filter_fn`` of the model's module, if it has one.

    Args:
        state: Weights as published.
        model: The model that they are meant for.

    Raises:
        CheckpointError: If the translation finds neither the official nor the model's own names.
    """
    convert: Callable[..., dict[str, Tensor]] | None
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(state)
    try:
        return dict(convert(dict(state), model))
    except Exception as error:  # whatever a key map trips over in the weights of another model
        raise CheckpointError(
            f"The weights are not those of {type(model).__name__}: its key map fails with {error!r}. "
            f"Their keys begin with {', '.join(list(state)[:3])}."
        ) from error


def match_keys(state: Mapping[str, Tensor], model: nn.Module) -> KeyReport:
    """Compare the keys and shapes of a state dict with those of a model."""
    own = model.state_dict()
    common = [key for key in own if key in state]
    return KeyReport(
        matched=tuple(key for key in common if own[key].shape == state[key].shape),
        missing=tuple(key for key in own if key not in state),
        unexpected=tuple(key for key in state if key not in own),
        reshaped=tuple(
            f"{key}: {tuple(state[key].shape)} -> {tuple(own[key].shape)}"
            for key in common
            if own[key].shape != state[key].shape
        ),
    )


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load a state dict, every key of both sides accounted for.

    Args:
        model: Receives the weights.
        state: Weights under the model's or the official names.
        source: Name of the file for the message.

    Raises:
        CheckpointError: If a key is missing, unexpected or of another shape.
    """
    state = filter_state_dict(state, model)
    report = match_keys(state, model)
    if not report.complete:
        raise CheckpointError(f"The weights in {source} do not fit {type(model).__name__}: {report}.")
    model.load_state_dict(state)


def strip(key: str) -> str:
    """Remove wrapper prefixes from a key."""
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def is_zip(path: Path) -> bool:
    """Tell whether a file has torch's current, memory-mappable format."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Keep open_clip's log entries from installing a handler that prints them; handlers of the application get them."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
