"""Tile encoders by name: what the published ones are, and how tiles become features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.checkpoints import file_digest, load_weights, read_state_dict
from saccade.errors import ConfigError, MissingResourceError, require, suggest
from saccade.mil.stain_texture import FEATURE_NAMES, stain_texture

__all__ = ["ENCODERS", "Encoder", "EncoderFacts", "load_encoder", "wrap_model"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class EncoderFacts:
    """What is known of a published encoder.

    Args:
        name: Name here.
        library: ``"timm"`` or ``"open_clip"``.
        model: Architecture in that library.
        hub: Repository of the weights on the Hugging Face hub; empty for timm's own.
        dim: Width of the features.
        options: Arguments of the architecture.
        normalization: Mean and standard deviation.
        size: Side of the input in pixels.
        pooling: ``"model"`` (the model's own), ``"cls+mean"`` (class token beside the mean of patch tokens), or
            ``"stage3"`` (mean of the third stage's map).
        prefix_tokens: Class and register tokens, for ``"cls+mean"``.
        tile_px: Tile size it was trained for.
        mpp: Resolution it was trained for, microns per pixel.
        gated: Whether a licence must be accepted first.
    """

    name: str
    library: str
    model: str
    hub: str
    dim: int
    options: Mapping[str, Any] = field(default_factory=dict)
    normalization: Normalization = IMAGENET
    size: int = 224
    pooling: str = "model"
    prefix_tokens: int = 1
    tile_px: int = 256
    mpp: float = 0.5
    gated: bool = False


def swiglu(**options: Any) -> dict[str, Any]:  # noqa: ANN401 - timm's own
    """Return options of a vision transformer with packed SwiGLU; the layers are named, as timm is not imported yet."""
    return {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", **options}


VIRCHOW = swiglu(init_values=1e-5, mlp_ratio=5.3375, global_pool="", dynamic_img_size=True)
ENCODERS: dict[str, EncoderFacts] = {
    facts.name: facts
    for facts in (
        EncoderFacts(
            "resnet50",
            "timm",
            "resnet50.tv_in1k",
            "",
            1024,
            {"features_only": True, "out_indices": (3,)},
            pooling="stage3",
        ),
        EncoderFacts(
            "UNI",
            "timm",
            "vit_large_patch16_224",
            "MahmoodLab/uni",
            1024,
            {"init_values": 1e-5, "dynamic_img_size": True},
            gated=True,
        ),
        EncoderFacts(
            "UNI2",
            "timm",
            "vit_giant_patch14_224",
            "MahmoodLab/UNI2-h",
            1536,
            swiglu(
                depth=24,
                num_heads=24,
                init_values=1e-5,
                embed_dim=1536,
                mlp_ratio=2.66667 * 2,
                no_embed_class=True,
                reg_tokens=8,
                dynamic_img_size=True,
            ),
            gated=True,
        ),
        EncoderFacts(
            "Virchow",
            "timm",
            "vit_huge_patch14_224",
            "paige-ai/Virchow",
            2560,
            VIRCHOW,
            pooling="cls+mean",
            tile_px=224,
            gated=True,
        ),
        EncoderFacts(
            "Virchow2",
            "timm",
            "vit_huge_patch14_224",
            "paige-ai/Virchow2",
            2560,
            {**VIRCHOW, "reg_tokens": 4},
            pooling="cls+mean",
            prefix_tokens=5,
            tile_px=224,
            gated=True,
        ),
        EncoderFacts(
            "GigaPath",
            "timm",
            "vit_giant_patch14_dinov2",
            "prov-gigapath/prov-gigapath",
            1536,
            {
                "img_size": 224,
                "patch_size": 16,
                "embed_dim": 1536,
                "depth": 40,
                "num_heads": 24,
                "mlp_ratio": 5.33334,
                "init_values": 1e-5,
            },
            gated=True,
        ),
        EncoderFacts(
            "H-optimus-0",
            "timm",
            "vit_giant_patch14_reg4_dinov2",
            "bioptimus/H-optimus-0",
            1536,
            {"img_size": 224, "init_values": 1e-5, "global_pool": "token"},
            H_OPTIMUS,
            tile_px=224,
            gated=True,
        ),
        EncoderFacts(
            "H-optimus-1",
            "timm",
            "vit_giant_patch14_reg4_dinov2",
            "bioptimus/H-optimus-1",
            1536,
            {"img_size": 224, "init_values": 1e-5, "global_pool": "token"},
            H_OPTIMUS,
            tile_px=224,
            gated=True,
        ),
        EncoderFacts(
            "Kaiko-S16",
            "timm",
            "vit_small_patch16_224",
            "1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
            384,
            {"dynamic_img_size": True},
            HALF,
        ),
        EncoderFacts(
            "Kaiko-B16",
            "timm",
            "vit_base_patch16_224",
            "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms",
            768,
            {"dynamic_img_size": True},
            HALF,
        ),
        EncoderFacts(
            "Lunit-S8", "timm", "vit_small_patch8_224", "1aurent/vit_small_patch8_224.lunit_dino", 384, {}, gated=False
        ),
        EncoderFacts("PLIP", "open_clip", "ViT-B-32-quickgelu", "vinid/plip", 512, {}, CLIP, tile_px=224),
        EncoderFacts(
            "QuiltNet", "open_clip", "ViT-B-32-quickgelu", "wisdomik/QuiltNet-B-32", 512, {}, CLIP, tile_px=224
        ),
    )
}


@dataclass(frozen=True)
class Encoder:
    """Tiles to features.

    Args:
        name: For folder names; no separators.
        function: Maps normalised images ``(B, 3, Y, X)`` to ``(B, D)``.
        dim: D.
        size: Side of the input in pixels; 0 takes tiles as they are.
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

    @property
    def settings(self) -> dict[str, Any]:
        """What features depend on, as plain values."""
        return {"encoder": self.name, "weights": self.weights, "size": self.size, "normalization": self.normalization}

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
        if self.size and images.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
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
        weights: File with its weights, where the hub cannot be reached.
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
    try:
        network = build(facts, pretrained=pretrained and weights is None)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingResourceError(
            f"The weights of {facts.name} cannot be had ({str(error).splitlines()[0]}). Pass --weights FILE."
        ) from error
    origin = f"pretrained:{facts.hub or facts.model}" if pretrained else "random"
    if weights is not None:
        load_weights(network.model, read_state_dict(weights), source=weights)
        origin = f"file:{file_digest(weights)}"
    return Encoder(facts.name, network.eval(), facts.dim, facts.size, facts.normalization, origin, facts)


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


def build(facts: EncoderFacts, *, pretrained: bool) -> Pooled:
    """Build the network of a published encoder."""
    if facts.library == "open_clip":
        open_clip = require("open_clip", purpose=f"Encoder {facts.name}")
        name = f"hf-hub:{facts.hub}" if pretrained else facts.model
        tower: nn.Module = open_clip.create_model(name, load_weights=pretrained).visual
        return Pooled(tower, tower)
    import timm

    layers = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "SiLU": nn.SiLU}
    options = {
        key: layers.get(value, value) if isinstance(value, str) else value for key, value in facts.options.items()
    }
    name = f"hf-hub:{facts.hub}" if pretrained and facts.hub else facts.model
    if "features_only" not in options:
        options["num_classes"] = 0
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    if facts.pooling == "stage3":
        return Pooled(model, lambda images: model(images)[0].mean((2, 3)))
    if facts.pooling == "cls+mean":
        return Pooled(model, lambda images: class_and_mean(model(images), facts.prefix_tokens))
    return Pooled(model, model)


def class_and_mean(tokens: Tensor, prefix_tokens: int) -> Tensor:
    """Return the class token beside the mean of the patch tokens, ``(B, 2 D)``."""
    return torch.cat([tokens[:, 0], tokens[:, prefix_tokens:].mean(1)], -1)
