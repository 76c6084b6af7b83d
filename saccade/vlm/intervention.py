"""What an intervention is: its parameters, and how it starts to work on a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, Self, runtime_checkable

from saccade.errors import ConfigError
from saccade.vlm.edits import Edit
from saccade.vlm.model_facts import ModelFacts

__all__ = ["Intervention", "check_layers"]


@runtime_checkable
class Intervention(Protocol):
    """Parameters of a method that edits attention while a model generates; immutable and reusable."""

    @property
    def name(self) -> str:
        """The method's name in lower case, e.g. ``"var"``."""

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return published settings by name: ``paper``, ``released_code``."""

    def start(self, facts: ModelFacts, tokenizer: Any) -> Edit:  # noqa: ANN401 - a tokenizer or processor
        """Return the method at work on a model.

        Args:
            facts: The model.
            tokenizer: Tokenizer or processor of the model, or ``None``.

        Raises:
            ConfigError: If the method does not fit the model.
        """


def check_layers(name: str, what: str, layers: Collection[int], facts: ModelFacts) -> frozenset[int]:
    """Return layers as a set, after checking that a model has them.

    Args:
        name: The intervention.
        what: What the layers are for.
        layers: Indices from 0.
        facts: The model.

    Raises:
        ConfigError: If there is none, or one that the model does not have.
    """
    wrong = sorted(layer for layer in layers if not 0 <= layer < facts.num_layers)
    if wrong or not layers:
        raise ConfigError(
            f"{name}: {what} must be indices from 0 to {facts.num_layers - 1} of the layers of {facts.name}; "
            f"got {sorted(layers)}."
        )
    return frozenset(layers)
