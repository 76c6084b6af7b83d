"""Official OAT checkpoints rewritten as safetensors that saccade loads as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from saccade import __version__
from saccade.batch import atomic_path
from saccade.checkpoints import (
    KeyReport,
    file_sha256,
    filter_state_dict,
    match_keys,
    read_checkpoint,
    read_state_dict,
)
from saccade.errors import CheckpointError, ConfigError
from saccade.gaze.oat import OAT

__all__ = ["OATConversion", "convert_oat", "oat_options", "read_position_table"]

PYRAMIDS = {1440: 0, 160: 2, 672: 3, 2720: 4}  # inputs of the crop network's linear layer: levels of the pyramid
CROP_PX = (150, 93)  # official height and width
LONGEST = 54  # official limit on the recordings of book covers


@dataclass(frozen=True)
class OATConversion:
    """What a conversion wrote.

    Args:
        options: Of ``OAT``, as the weights' shapes say.
        report: How the keys fit; complete.
    """

    options: dict[str, Any]
    report: KeyReport


def convert_oat(
    source: str | Path,
    *,
    table: str | Path,
    out: str | Path,
    heads: int = 4,
    readout_scale: float = 512.0,
    overwrite: bool = False,
) -> OATConversion:
    """Write an official checkpoint as safetensors for ``load_predictor`` and ``saccade gaze predict``.

    Widths and depths follow from the shapes. Crops are given as RGB in [0, 1]; the official data of wine and yogurt
    stretches each crop to that range, that of book covers is BGR in 0..255, which a checkpoint does not say.

    Args:
        source: ``.ckpt``, ``.pth`` or ``.safetensors`` under the official names.
        table: The position table ``(R, P)``, which checkpoints do not hold; see :func:`read_position_table`.
        out: ``*.safetensors``.
        heads: Attention heads, which no shape shows; officially 4.
        readout_scale: ``dk`` of the object attention; officially 512.
        overwrite: Replace ``out`` if it exists.

    Raises:
        ConfigError: If a file cannot be used, or ``out`` exists.
        CheckpointError: If the weights are not OAT's, or a key is missing or unexpected; nothing is written then.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ConfigError(f"The output must end in .safetensors, got {path.name!r}.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another name, or replace it with --overwrite.")
    official = {key.removeprefix("model."): value for key, value in read_state_dict(source).items()}
    official["position.table"] = positions = read_position_table(table)
    options = oat_options(official) | {"heads": heads, "readout_scale": readout_scale}
    options |= {"position_rows": positions.shape[0], "position_columns": positions.shape[1]}
    model = OAT(**options)
    state = filter_state_dict(official, model)
    report = match_keys(state, model)
    if not report.complete:
        raise CheckpointError(f"The weights in {source} do not fit OAT; nothing was written.\n{report.details()}")
    facts = {
        "task": "gaze",
        "options": options,
        "viewers": [],
        "max_length": LONGEST,
        "features": {"kind": "crops", "crop_size": list(CROP_PX)},
    }
    metadata = {
        "format": "pt",
        "model": "oat",
        "saccade": json.dumps(facts),
        "saccade_version": __version__,
        "source_sha256": file_sha256(source),
    }
    with atomic_path(path) as temporary:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, temporary, metadata)
    return OATConversion(options, report)


def oat_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options of ``OAT`` that the shapes of official weights say.

    Raises:
        CheckpointError: If they are not OAT's.
    """
    first = "transformer_encoder.layers.0"
    try:
        width = state[f"{first}.self_attn.in_proj_weight"].shape[1]
        hidden = state[f"{first}.linear1.weight"].shape[0]
        inputs = state["cnn_embedding.fc.weight"].shape[1]
        readout_heads = count(state, r"cross_attentions\.(\d+)\.")
        return {
            "width": width,
            "hidden": hidden,
            "encoder_layers": count(state, r"transformer_encoder\.layers\.(\d+)\."),
            "decoder_layers": count(state, r"transformer_decoder\.layers\.(\d+)\."),
            "readout_heads": max(1, readout_heads),
            "vocabulary": None if readout_heads else state["generator.weight"].shape[0] - 2,
            "pyramid_levels": PYRAMIDS[inputs],
            "position": "table",
        }
    except KeyError as error:
        raise CheckpointError(f"The weights are not those of OAT: {error} is missing or unknown.") from error


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many numbers a part of the keys takes."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def read_position_table(path: str | Path) -> Tensor:
    """Read a table ``(R, P)`` from ``.npy``, a text file of numbers, or a torch or safetensors file with one tensor.

    Raises:
        ConfigError: If the file holds anything else.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"The position table {str(path)!r} does not exist.")
    if file.suffix in (".npy", ".csv", ".txt"):
        try:
            array = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.loadtxt(file, delimiter=",")
        except ValueError as error:
            raise ConfigError(f"{file} is no table of numbers ({error}).") from error
        table = torch.from_numpy(np.asarray(array, np.float32))
    else:
        tensors = [value for value in read_checkpoint(file).values() if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise ConfigError(f"{file} holds {len(tensors)} tensors, a position table is one.")
        table = tensors[0].float()
    if table.ndim != 2:
        raise ConfigError(f"The position table in {file} has shape {tuple(table.shape)}, expected (R, P).")
    return table
