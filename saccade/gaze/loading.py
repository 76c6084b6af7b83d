"""Trained scanpath models from files, without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Load a checkpoint or run folder of ``saccade fit``; needs no Lightning trainer.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If it is not one of gaze, or its weights do not fit.
    """
    checkpoint = best_checkpoint(path)
    content = read_checkpoint(checkpoint)
    facts = content.get("saccade")
    if not isinstance(facts, Mapping) or facts.get("task") != "gaze":
        raise CheckpointError(
            f"{checkpoint} was not written by `saccade fit -c gaze/...` (no 'saccade' entry of gaze)."
        )
    model = OAT(**facts["options"])
    state = {
        key.removeprefix("model."): value for key, value in content["state_dict"].items() if key.startswith("model.")
    }
    load_weights(model, state, source=checkpoint)
    return LoadedPredictor(model.eval(), list(facts["viewers"]), int(facts["max_length"]), dict(facts["features"]))
