"""Trained scanpath models from files, without Lightning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade.checkpoints import best_checkpoint, load_weights, read_checkpoint
from saccade.errors import CheckpointError
from saccade.gaze.oat import OAT

__all__ = ["LoadedPredictor", "load_predictor"]


@dataclass(frozen=True)
class LoadedPredictor:
    """A trained model and what is needed to use it.

    Args:
        model: In evaluation mode, on the CPU.
        viewers: Names by viewer number.
        max_length: Longest path in training.
        features: What the model sees of objects: ``kind`` and what it takes to compute it.
    """

    model: OAT
    viewers: list[str]
    max_length: int
    features: dict[str, Any]


def load_predictor(path: str | Path) -> LoadedPredictor:
    """Load a checkpoint or run folder of ``saccade fit``, or a file of ``saccade convert -m oat``; needs no Lightning.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If it is not one of gaze, or its weights do not fit.
    """
    if str(path).endswith(".safetensors"):
        return load_converted(Path(path))
    checkpoint = best_checkpoint(path)
    content = read_checkpoint(checkpoint)
    facts = content.get("saccade")
    if not isinstance(facts, Mapping) or facts.get("task") != "gaze":
        raise CheckpointError(
            f"{checkpoint} was not written by `saccade fit -c gaze/...` (no 'saccade' entry of gaze)."
        )
    state = content["state_dict"].items()
    own = {key.removeprefix("model."): value for key, value in state if key.startswith("model.")}
    return build(facts, own, checkpoint)


def load_converted(path: Path) -> LoadedPredictor:
    """Load a file of ``saccade convert -m oat``, which says itself what it holds."""
    from safetensors import safe_open

    state = read_checkpoint(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "saccade" not in metadata:
        raise CheckpointError(
            f"{path} does not say what it holds: convert the official weights by `saccade convert -m oat`."
        )
    return build(json.loads(metadata["saccade"]), state, path)


def build(facts: Mapping[str, Any], state: Mapping[str, Tensor], source: Path) -> LoadedPredictor:
    """Return the model that a file describes."""
    model = OAT(**facts["options"])
    load_weights(model, state, source=source)
    return LoadedPredictor(model.eval(), list(facts["viewers"]), int(facts["max_length"]), dict(facts["features"]))
