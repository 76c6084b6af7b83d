"""Checkpoints under official key names, or of ``saccade fit``, rewritten as plain safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade import __version__
from saccade.batch.tables import atomic_path
from saccade.checkpoints import (
    KeyReport,
    best_checkpoint,
    file_sha256,
    filter_state_dict,
    match_keys,
    read_checkpoint,
    read_state_dict,
)
from saccade.errors import CheckpointError, ConfigError
from saccade.vision_backbones.loading import check_name, fit_classes, load_model

__all__ = ["Conversion", "convert_checkpoint"]


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Args:
        model: Name for ``-m``.
        num_classes: Classes of the classifier in the file; 0 if there is none.
        report: How the keys fit; complete.
    """

    model: str
    num_classes: int
    report: KeyReport


def convert_checkpoint(
    source: str | Path, *, model: str | None = None, out: str | Path, overwrite: bool = False
) -> Conversion:
    """Write a checkpoint as safetensors that saccade (``ModelSource(model, weights=out)``) and timm load as they are.

    Official key names and shapes are translated by the ``checkpoint_filter_fn`` of the model's module; every key of the
    file and of the model must be accounted for. The number of classes is that of the file. Of a ``*.ckpt`` written by
    ``saccade fit`` the backbone is taken, its averaged weights if it has them.

    The metadata holds ``model``, ``source_sha256``, ``saccade_version`` and, from a ``*.ckpt``, JSON of
    ``backbone_kwargs``, ``class_names`` and ``data_config``.

    Args:
        source: ``.pth``, ``.pt``, ``.safetensors`` or similar; or a ``*.ckpt`` or run folder of ``saccade fit``.
        model: timm name of the model; a ``*.ckpt`` knows its own.
        out: ``*.safetensors``.
        overwrite: Replace ``out`` if it exists.

    Returns:
        The name of the model, its classes and the report on the keys.

    Raises:
        ConfigError: If a name or file cannot be used, or ``out`` exists.
        CheckpointError: If a key is missing, unexpected or of another shape (the message lists them all), or the file
            holds more than tensors and plain values. Nothing is written then.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ConfigError(f"The output must end in .safetensors, got {path.name!r}.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another name, or replace it with --overwrite.")
    if str(source).endswith(".ckpt") or Path(source).is_dir():
        source = best_checkpoint(source)
        name, network, state, facts = from_training(source, model)
    elif model is None:
        raise ConfigError(f"Say with -m which model the weights in {source} belong to.")
    else:
        check_name(model)
        name, facts = model, {}
        official = read_state_dict(source)
        network = fit_classes(name, {}, official)
        state = filter_state_dict(official, network)
    report = match_keys(state, network)
    if not report.complete:
        raise CheckpointError(f"The weights in {source} do not fit {name}; nothing was written.\n{report.details()}")
    metadata = {"format": "pt", "model": name, "source_sha256": file_sha256(source), "saccade_version": __version__}
    metadata |= {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    with atomic_path(path) as temporary:
        tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
        save_file(tensors, temporary, metadata)
    return Conversion(name, int(getattr(network, "num_classes", 0)), report)


def from_training(source: Path, model: str | None) -> tuple[str, nn.Module, Mapping[str, Tensor], Mapping[str, Any]]:
    """Return name, network, weights and facts of a checkpoint of ``saccade fit``."""
    network = load_model(str(source)).model
    facts = read_checkpoint(source)["saccade"]
    name = facts["backbone"]
    if model not in (None, name):
        raise ConfigError(f"{source} holds {name!r}, not {model!r}; leave -m out.")
    kept = ("backbone_kwargs", "class_names", "data_config")
    return name, network, network.state_dict(), {key: facts[key] for key in kept}
