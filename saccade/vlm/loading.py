"""Multimodal models and their processors by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saccade.errors import CheckpointError, ConfigError, MissingResourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoadedVLM", "load_vlm"]


@dataclass(frozen=True)
class LoadedVLM:
    """A model with its processor.

    Args:
        name: As given.
        model: In eval mode on its device.
        processor: Turns pictures and text into inputs.
    """

    name: str
    model: PreTrainedModel
    processor: Any

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens, or ``None`` if the configuration does not say."""
        found = self.model.config.get_text_config(decoder=True).to_dict().get("max_position_embeddings")
        return None if found is None else int(found)


def load_vlm(
    name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> LoadedVLM:
    """Load a model and its processor.

    Args:
        name: ``local-dir:PATH`` or ``hf-hub:ORG/NAME``; the hub is asked for the latter only.
        device: Where the model goes.
        dtype: Of its weights.
        trust_remote_code: Allow a model to bring code of its own, which then runs on this machine.

    Raises:
        ConfigError: If the name has another form, or the model brings code and that is not allowed.
        CheckpointError: If a folder does not hold a model and a processor.
        MissingResourceError: If the hub does not have it, or cannot be reached.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source, _, place = name.partition(":")
    if source not in ("local-dir", "hf-hub") or not place:
        raise ConfigError(f"A model is local-dir:PATH or hf-hub:ORG/NAME; got {name!r}.")
    local = source == "local-dir"
    if local:
        check_folder(name, Path(place), trust_remote_code)
    options = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    try:
        reader: Any = AutoProcessor
        processor = reader.from_pretrained(place, **options)
        model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:  # what transformers raises for what is not there or does not fit
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in reason:
            raise remote_code(name) from error
        if local:
            raise CheckpointError(f"{name} cannot be loaded as an image-text-to-text model ({reason}).") from error
        raise MissingResourceError(
            f"Model {name!r} cannot be loaded from the hub or its cache ({reason}). Download it elsewhere and pass "
            "local-dir:PATH."
        ) from error
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    moved: Any = model
    return LoadedVLM(name, moved.to(device).eval(), processor)


def check_folder(name: str, folder: Path, trust_remote_code: bool) -> None:
    """Raise unless a folder holds the configuration of a model that may be loaded."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{name}: {path} does not exist; a folder written by save_pretrained holds it.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if "auto_map" in config and not trust_remote_code:
        raise remote_code(name)


def remote_code(name: str) -> ConfigError:
    """Return what to raise for a model that brings code."""
    return ConfigError(
        f"{name} brings Python code of its own, which would run on this machine. Read it, then pass "
        "--trust-remote-code; interventions work if it uses transformers' attention interface."
    )
