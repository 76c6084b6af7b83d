"""Tile encoders by name: what the published ones are, and how tiles become features."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.checkpoints import file_digest, first_line, load_weights, quiet_root_logger, read_state_dict
from saccade.errors import ConfigError, MissingDependencyError, MissingResourceError, require, suggest
from saccade.mil.encoder_facts import ENCODERS, IMAGENET, EncoderFacts, Normalization
from saccade.mil.stain_texture import FEATURE_NAMES, stain_texture

__all__ = ["ENCODERS", "Encoder", "EncoderFacts", "load_encoder", "wrap_model"]


@dataclass(frozen=True)
class Encoder:
    """Tiles to features.

    Args:
        name: For folder names; no separators.
        function: Maps normalised images ``(B, 3, Y, X)`` to ``(B, D)``.
        dim: D.
        size: Side of the input in pixels; 0 takes tiles as they are.
        resize: Side that tiles are resized to before their middle is cut out; 0 is ``size``.
        normalization: Mean and standard deviation of values in 0..1.
        weights: Where the weights come from, for the record.
        facts: What is known of a published one, for warnings.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    dim: int
    size: int = 224
    normalization: Normalization = IMAGENET
    weights: str = ""
    facts: EncoderFacts | None = None
    resize: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What features depend on, as plain values."""
        geometry = {"size": self.size} | ({"resize": self.resize} if self.resize else {})
        return {"encoder": self.name, "weights": self.weights, **geometry, "normalization": self.normalization}

    def to(self, device: torch.device) -> Encoder:
        """Move the model and return itself."""
        if isinstance(self.function, nn.Module):
            self.function.to(device)
        return self

    def notices(self, tile_px: int, mpp: float) -> list[str]:
        """Return sentences about tiles that do not match what the encoder was trained for."""
        if self.facts is None or (self.facts.tile_px == tile_px and abs(self.facts.mpp / mpp - 1) < 0.05):
            return []
        return [
            f"{self.name} was trained on tiles of {self.facts.tile_px} px at {self.facts.mpp:g} um/px; these are "
            f"{tile_px} px at {mpp:g}"
        ]

    @torch.inference_mode()
    def __call__(self, tiles: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Encode tiles.

        Args:
            tiles: RGB uint8 ``(B, Y, X, 3)`` on the model's device.
            dtype: Of matrix products; less than float32 through autocast.

        Returns:
            ``(B, D)`` float32.
        """
        images = tiles.movedim(-1, 1).float() / 255
        side = self.resize or self.size
        if side and images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(
                0, 1
            )
        if side > self.size:
            middle = slice((side - self.size) // 2, (side + self.size) // 2)
            images = images[..., middle, middle]
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in self.normalization)
        with torch.autocast(tiles.device.type, dtype, enabled=dtype != torch.float32):
            return self.function((images - mean) / std).float()


def load_encoder(
    name: str, *, weights: str | Path | None = None, pretrained: bool = False, random_weights: bool = False
) -> Encoder:
    """Load an encoder by its name here: ``stain-texture`` (no weights, no download) or a published one.

    Published ones are the keys of ``ENCODERS``. Any other timm or open_clip model becomes one by :func:`wrap_model`.

    Args:
        name: Case does not matter.
        weights: File with its weights, where the hub cannot be reached; or a folder, a download of its repository.
        pretrained: Allow the download; gated ones need a token in the environment.
        random_weights: Run although there are no trained weights, to try a pipeline.

    Raises:
        ConfigError: If the name is unknown, or no source of weights is given.
        MissingResourceError: If weights cannot be had.
    """
    if name.lower() == "stain-texture":
        identity: Normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Encoder("stain-texture", stain_texture, len(FEATURE_NAMES), 0, identity, "none needed")
    known = {key.lower(): facts for key, facts in ENCODERS.items()}
    if name.lower() not in known:
        names = ["stain-texture", *ENCODERS]
        raise ConfigError(f"No encoder {name!r}.{suggest(name, names)} There are: {', '.join(names)}.")
    facts = known[name.lower()]
    if weights is None and not (pretrained or random_weights):
        licence = f" Its weights need a licence: https://huggingface.co/{facts.hub}." if facts.gated else ""
        raise ConfigError(
            f"Encoder {facts.name} would have random weights. Pass --weights FILE or --pretrained, or say "
            f"--random-weights if that is what you want.{licence}"
        )
    given = None if weights is None else Path(weights)
    folder = given if given is not None and given.is_dir() else None
    check_source(facts, has_file=given is not None and folder is None, pretrained=pretrained, folder=folder)
    try:
        if facts.library == "conch":
            network = build_conch(facts, given)
        else:
            network = build(facts, pretrained=pretrained and weights is None, folder=folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingResourceError(
            f"The weights of {facts.name} cannot be had ({first_line(error)}). Pass --weights FILE, or a folder with a "
            f"download of https://huggingface.co/{facts.hub}."
        ) from error
    origin = f"pretrained:{facts.hub or facts.model}" if pretrained else "random"
    if given is not None and folder is None:
        if facts.library != "conch":  # whose package has read the file
            load_weights(network.model, image_tower(read_state_dict(given), facts), source=given)
        origin = f"file:{file_digest(given)}"
    elif folder is not None:
        origin = f"folder:{folder.name}"
    return Encoder(facts.name, network.eval(), facts.dim, facts.size, facts.normalization, origin, facts, facts.resize)


def check_source(facts: EncoderFacts, *, has_file: bool, pretrained: bool, folder: Path | None) -> None:
    """Raise if an encoder cannot be loaded from what is given.

    Raises:
        ConfigError: Says from what it can be.
    """
    place = f"https://huggingface.co/{facts.hub}"
    if not facts.model and not pretrained and folder is None:
        raise ConfigError(
            f"{facts.name}'s architecture is described in its repository only: pass --pretrained, or --weights with a "
            f"folder, a download of {place}."
        )
    if facts.library == "conch" and not (pretrained or has_file):
        raise ConfigError(f"CONCH takes --weights with its file pytorch_model.bin of {place}, or --pretrained.")
    if not facts.loads_from_hub and not has_file and pretrained:
        raise ConfigError(f"{facts.name} cannot be downloaded by itself: pass --weights with its file of {place}.")


def wrap_model(
    model: nn.Module, *, name: str, data_config: Mapping[str, Any], weights: str, pool: Callable[[Tensor], Tensor]
) -> Encoder:
    """Make an encoder of any model.

    Args:
        model: Anything that ``pool`` maps images through.
        name: For folder names.
        data_config: timm's description of the preprocessing (``input_size``, ``mean``, ``std``).
        weights: Where they come from, for the record.
        pool: Maps normalised images ``(B, 3, Y, X)`` to features ``(B, D)``.
    """
    channels, height, width = data_config["input_size"]
    if height != width:
        raise ConfigError(f"{name} takes images of {height} x {width} pixels; tiles are square.")
    model.eval()
    with torch.inference_mode():
        dim = pool(torch.zeros(1, channels, height, width)).shape[-1]
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).strip(".-")
    norm = (tuple(data_config["mean"]), tuple(data_config["std"]))
    return Encoder(safe, Pooled(model, pool), dim, height, norm, weights)


class Pooled(nn.Module):
    """A model and the function that reads its features, so that both move to a device."""

    def __init__(self, model: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features."""
        return self.pool(images)


def build(facts: EncoderFacts, *, pretrained: bool, folder: Path | None = None) -> Pooled:
    """Build the network of a published encoder, with weights from the hub, from a folder, or random ones."""
    source = f"hf-hub:{facts.hub}" if pretrained and facts.hub else facts.model
    if folder is not None:
        source = f"local-dir:{folder}"
    has_weights = pretrained or folder is not None
    if facts.library == "open_clip":
        open_clip = require("open_clip", purpose=f"Encoder {facts.name}")
        with quiet_root_logger():
            tower: nn.Module = open_clip.create_model(
                source,
                load_weights=has_weights,
                require_pretrained=has_weights,  # or a missing file would leave random weights and a log entry
                pretrained_text=False,
            ).visual
        return Pooled(tower, tower)
    if facts.library == "transformers":
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(str(folder or facts.hub), local_files_only=folder is not None)
        if facts.pooling == "projection":
            return Pooled(*image_half(model))
        return Pooled(model, lambda images: pooled_tokens(model(images).last_hidden_state, facts))
    import timm

    layers = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "SiLU": nn.SiLU}
    options = {
        key: layers.get(value, value) if isinstance(value, str) else value for key, value in facts.options.items()
    }
    if "features_only" not in options:
        options["num_classes"] = 0
    model = timm.create_model(source, pretrained=has_weights, **options)
    if facts.pooling == "stage3":
        return Pooled(model, lambda images: model(images)[0].mean((2, 3)))
    if facts.pooling == "cls+mean":
        return Pooled(model, lambda images: pooled_tokens(model(images), facts))
    return Pooled(model, model)


def image_tower(state: Mapping[str, Tensor], facts: EncoderFacts) -> dict[str, Tensor]:
    """Return the weights of the image tower, which open_clip's files hold beside the text tower's."""
    own = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    return own if own and facts.library == "open_clip" else dict(state)


def image_half(clip: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:  # noqa: ANN401 - transformers' own
    """Return the image tower of a CLIP with its projection, and the function that embeds images by them."""
    tower, projection = clip.vision_model, clip.visual_projection
    return nn.ModuleList([tower, projection]), lambda images: projection(tower(images).pooler_output)


def build_conch(facts: EncoderFacts, weights: Path | None) -> Pooled:
    """Load CONCH by the package of its authors, from a file or from the hub with the token in the environment.

    Raises:
        MissingDependencyError: If the package is not installed.
        CheckpointError: If the file holds more than weights, which that package would run.
    """
    try:
        from conch.open_clip_custom import create_model_from_pretrained
    except ImportError as error:
        raise MissingDependencyError(
            "Encoder CONCH needs the package of its authors: pip install git+https://github.com/mahmoodlab/CONCH. Its "
            f"weights need a licence: https://huggingface.co/{facts.hub}."
        ) from error
    if weights is not None:
        read_state_dict(weights)
    token = os.environ.get("HF_TOKEN")
    place = f"hf_hub:{facts.hub}" if weights is None else str(weights)
    model = create_model_from_pretrained(facts.model, checkpoint_path=place, hf_auth_token=token)[0]
    return Pooled(model, partial(model.encode_image, proj_contrast=False, normalize=False))


def pooled_tokens(tokens: Tensor, facts: EncoderFacts) -> Tensor:
    """Return the class token ``(B, D)``, or beside it the mean of the patch tokens, ``(B, 2 D)``."""
    if facts.pooling == "cls":
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], tokens[:, facts.prefix_tokens :].mean(1)], -1)
