"""From what the user calls a model to a model with weights, its preprocessing and its class names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from saccade.checkpoints import (
    best_checkpoint,
    file_digest,
    filter_state_dict,
    load_weights,
    quiet_root_logger,
    read_checkpoint,
    read_state_dict,
)
from saccade.errors import CheckpointError, ConfigError, SaccadeError, require, suggest
from saccade.vision_backbones.hub import go_offline_if_unreachable, library_of, unusable
from saccade.vision_backbones.token_pooling_hooks import add_token_average_pooling

__all__ = ["LoadedModel", "ModelSource", "create_model", "load_model"]

HUB_PREFIXES = ("hf-hub:", "local-dir:")
WEIGHT_EXTENSIONS = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".npz")


@dataclass(frozen=True)
class ModelSource:
    """Which model, which weights, which preprocessing.

    Args:
        name: timm name; ``open_clip:MODEL[/TAG]``; ``hf-hub:ORG/NAME`` or ``local-dir:PATH`` (timm or open_clip, by the
            configuration file found there); or a checkpoint ``*.ckpt`` or a run folder written by ``saccade fit``.
        weights: State dict for a timm or open_clip name, under its own or the official key names. The number of classes
            is taken from it.
        pretrained: Use the weights that timm knows for this name, downloading them if need be.
        random_weights: Accept a model without trained weights.
        img_size: Input height and width in pixels; ``None`` means the model's.
        crop_pct: Share of the resized image that the centre crop keeps; ``None`` means the model's.
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` or ``"lanczos"``; ``None`` means the model's.
    """

    name: str
    weights: str | Path | None = None
    pretrained: bool = False
    random_weights: bool = False
    img_size: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, with what is needed to feed it and to read it.

    Args:
        model: The network in evaluation mode, on the CPU. Its output is logits, or features if ``num_classes`` is 0.
        name: The name as the user gave it.
        weights: Origin and identity of the weights: ``"file:<sha256>"``, ``"pretrained:<tag>"`` or ``"random"``.
        data_config: timm's description of the preprocessing: ``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct``, ``crop_mode``.
        class_names: Names by class index, or ``None`` if nobody knows them.
    """

    model: nn.Module
    name: str
    weights: str
    data_config: dict[str, Any] = field(repr=False)
    class_names: list[str] | None = field(default=None, repr=False)

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.model.parameters())


def create_model(name: str, *, token_pooling_scales: int | None = None, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """Build a model by its timm name, saccade's own included; see ``timm.create_model``.

    Args:
        name: timm name.
        token_pooling_scales: Give the blocks of a plain ViT token-aware average pooling with so many branches; see
            :func:`saccade.vision_backbones.token_pooling_hooks.add_token_average_pooling`.
        **kwargs: Passed to timm.

    Raises:
        ConfigError: If there is no such model, its constructor does not take the arguments, or its blocks cannot pool.
    """
    check_name(name)
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ConfigError(f"Model {name!r} cannot be built with {kwargs}: {error}.") from error
    if token_pooling_scales is not None:
        add_token_average_pooling(model, token_pooling_scales)
    return model


def load_model(source: str | ModelSource, *, seed: int = 0) -> LoadedModel:
    """Build a model with trained weights.

    Args:
        source: What to load; a bare name is short for ``ModelSource(name)``.
        seed: Seed of a random initialisation.

    Returns:
        The model in evaluation mode on the CPU, with its preprocessing.

    Raises:
        ConfigError: If the name is unknown, or the model would have no trained weights and that was not asked for.
        CheckpointError: If weights do not fit.
        MissingResourceError: If a download is needed and the hub cannot be reached.
    """
    source = ModelSource(source) if isinstance(source, str) else source
    name = source.name
    torch.manual_seed(seed)
    if name.endswith(".ckpt") or (Path(name).is_dir() and not timm.is_model(name)):
        loaded = from_training(source, best_checkpoint(name))
    elif name.startswith("open_clip:") or (name.startswith(HUB_PREFIXES) and library_of(name) == "open_clip"):
        loaded = from_open_clip(source)
    else:
        loaded = from_timm(source)
    overrides: dict[str, Any] = {"crop_pct": source.crop_pct, "interpolation": source.interpolation}
    if source.img_size is not None:
        overrides["input_size"] = (loaded.data_config["input_size"][0], source.img_size, source.img_size)
    loaded.data_config.update({key: value for key, value in overrides.items() if value is not None})
    loaded.model.eval()
    return loaded


def from_timm(source: ModelSource) -> LoadedModel:
    """Load a timm model from the registry, a hub repository or a local folder."""
    name, weights = source.name, source.weights
    from_source = name.startswith(HUB_PREFIXES)
    if not from_source:
        check_name(name)
        if not (weights or source.pretrained or source.random_weights):
            raise ConfigError(
                f"Model {name!r} would have random weights. Pass --weights FILE, --pretrained, a checkpoint, "
                "local-dir: or hf-hub:, or say --random-weights if that is what you want."
            )
    options = size_option(name, source.img_size)
    names = None
    if weights is not None:
        state = read_state_dict(weights)
        model = fit_classes(name, options, state)
        load_weights(model, state, source=weights)
        origin = f"file:{file_digest(weights)}"
    elif source.pretrained or from_source:
        model = download(name, options)
        cfg: Any = model.pretrained_cfg
        local = name.startswith("local-dir:")
        origin = folder_digest(name) if local else f"pretrained:{cfg.get('tag') or cfg.get('hf_hub_id')}"
        names = published_names(model)
    else:
        model = create_model(name, **options)
        origin = "random"
    return LoadedModel(model, name, origin, timm.data.resolve_model_data_config(model), names)


def from_training(source: ModelSource, path: Path) -> LoadedModel:
    """Load a checkpoint of ``saccade fit``; needs no Lightning."""
    if source.weights is not None:
        raise ConfigError(f"{path} has its own weights; leave --weights out, or pass the model's name instead.")
    content = read_checkpoint(path)
    facts = content.get("saccade")
    if not isinstance(facts, Mapping) or facts.get("task") != "image":
        raise CheckpointError(
            f"{path} was not written by `saccade fit` for images (no 'saccade' entry). "
            "For other weights pass the model's name with -m and the file with --weights."
        )
    state: Mapping[str, Tensor] = content["state_dict"]
    prefix = "ema." if any(key.startswith("ema.") for key in state) else "model."
    options = dict(facts["backbone_kwargs"])
    options |= size_option(facts["backbone"], source.img_size)
    model = create_model(facts["backbone"], num_classes=facts["num_classes"], **options)
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    load_weights(model, own, source=path)
    return LoadedModel(
        model, str(path), f"file:{file_digest(path)}", dict(facts["data_config"]), list(facts["class_names"])
    )


def from_open_clip(source: ModelSource) -> LoadedModel:
    """Load the image tower of an open_clip model; its output is the image embedding."""
    name, weights = source.name, source.weights
    open_clip = require("open_clip", purpose=f"Model {name!r}")
    published = name.startswith(HUB_PREFIXES)  # with its weights
    model_name, _, tag = (name, "", "") if published else name.removeprefix("open_clip:").partition("/")
    if not published and model_name not in open_clip.list_models():
        raise ConfigError(f"Unknown open_clip model {model_name!r}.{suggest(model_name, open_clip.list_models())}")
    tag_is_file = bool(tag) and Path(tag).is_file()
    if tag and not tag_is_file:
        known = open_clip.list_pretrained_tags_by_model(model_name)
        if tag not in known:
            raise ConfigError(
                f"Unknown weights {tag!r} of {model_name}.{suggest(tag, known)} Known: {', '.join(known) or 'none'}."
            )
        go_offline_if_unreachable()
    if not (tag or weights or source.random_weights or published):
        raise ConfigError(f"Model {name!r} would have random weights. Name a tag, pass --weights, or --random-weights.")
    trained = weights is None and (published or bool(tag))
    try:
        with quiet_root_logger():
            whole = open_clip.create_model(
                model_name,
                pretrained=tag or None,
                load_weights=trained,
                require_pretrained=trained,  # or a file that cannot be had would leave random weights and a log entry
                pretrained_text=False,
                force_image_size=source.img_size,
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise unusable(name, error) from error
    if weights is not None:
        load_weights(whole, read_state_dict(weights), source=weights)
    tower = whole.visual
    tower.num_classes = 0
    cfg = tower.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], tuple | list) else (cfg["size"], cfg["size"])
    data_config = {
        "input_size": (3, *size),
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": {"shortest": "center", "squash": "squash", "longest": "border"}[cfg["resize_mode"]],
    }
    if weights is not None or tag_is_file:
        origin = f"file:{file_digest(weights or tag)}"
    elif name.startswith("local-dir:"):
        origin = folder_digest(name)
    else:
        origin = f"pretrained:{tag or model_name}" if trained else "random"
    return LoadedModel(tower, name, origin, data_config)


def download(name: str, options: dict[str, Any]) -> nn.Module:
    """Build a timm model with the weights that it names."""
    if ":" not in name:
        cfg = timm.models.get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            tags = timm.list_pretrained(f"{name.split('.')[0]}*")[:5]
            raise ConfigError(
                f"timm has no weights for {name!r}. " + (f"Some it has: {', '.join(tags)}." if tags else "")
            )
        go_offline_if_unreachable()
    try:
        return create_model(name, pretrained=True, **options)
    except SaccadeError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise unusable(name, error) from error


def folder_digest(name: str) -> str:
    """Return the identity of the weights in a ``local-dir:`` folder."""
    files = sorted(Path(name.partition(":")[2]).iterdir())
    return "file:" + ",".join(file_digest(file) for file in files if file.suffix in WEIGHT_EXTENSIONS)


def check_name(name: str) -> None:
    """Raise a helpful error unless timm knows the name."""
    if name.startswith(HUB_PREFIXES) or timm.is_model(name):
        return
    raise ConfigError(f"Unknown model {name!r}.{suggest(name, timm.list_models())} All names: saccade list models.")


def size_option(name: str, img_size: int | None) -> dict[str, int]:
    """Return ``{"img_size": ...}`` for a model that is built for one input size, else nothing."""
    if img_size is None:
        return {}
    cfg: Any
    if name.startswith(HUB_PREFIXES):
        cfg = create_model(name).pretrained_cfg
    else:
        registered = timm.models.get_pretrained_cfg(name)
        cfg = {} if registered is None else registered.to_dict()
    return {"img_size": img_size} if cfg.get("fixed_input_size") else {}


def fit_classes(name: str, options: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Build a model with as many classes as the state dict has."""
    model = create_model(name, **options)
    default_cfg: Any = model.default_cfg
    classifier = default_cfg.get("classifier")
    first = classifier[0] if isinstance(classifier, tuple | list) else classifier
    weight = filter_state_dict(state, model).get(f"{first}.weight")
    classes = 0 if weight is None else weight.shape[0]
    return model if classes == model.num_classes else create_model(name, num_classes=classes, **options)


def published_names(model: nn.Module) -> list[str] | None:
    """Return the class names in a model's published configuration, or those of the ImageNet set of its size."""
    cfg: Any = model.pretrained_cfg
    names, descriptions = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if names:
        return [descriptions.get(name, name) for name in names]
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return None
    info = timm.data.ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(info.num_classes())]
