"""What the models of this package have in common where timm builds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

__all__ = ["build", "published", "register_variants"]

Model = TypeVar("Model", bound=nn.Module)


def published(**facts: Any) -> dict[str, Any]:  # noqa: ANN401 - entries of timm's configuration
    """Return timm's configuration of weights for ImageNet-1k at 224 px that their authors publish.

    It has no address: nothing is downloaded, files are converted. ``facts`` are the entries that differ.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **facts,
    }


def build(
    model_class: type[Model],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[Mapping[str, Any], nn.Module], dict[str, Tensor]],
    *,
    default_indices: tuple[int, ...] | int = (0, 1, 2, 3),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,  # noqa: ANN401 - passed through to timm
) -> Model:
    """Build a variant as timm does, on a device and in a dtype.

    Args:
        model_class: Has ``forward_intermediates``, and norms on its maps if it is built with ``dense``.
        variant: Name by which the model is registered.
        pretrained: Load the weights of its configuration.
        filter_fn: Translates these weights.
        default_indices: Maps that ``features_only`` gives unless told otherwise, or how many of the last.
        device: Where parameters and buffers are made; ``None`` means the present default.
        dtype: Of parameters and floating-point buffers; ``None`` means the present default.
        kwargs: Arguments of the class, and those of ``timm.create_model``.
    """
    features: dict[str, Any] = {"out_indices": default_indices, "feature_cls": "getter"}
    if kwargs.get("dense"):
        features["norm"] = True
    with nullcontext() if device is None else torch.device(device):
        model: Model = build_model_with_cfg(
            model_class, variant, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=features, **kwargs
        )
    return model.to(dtype=dtype)


def register_variants(module: str, variants: Iterable[str], build_variant: Callable[..., nn.Module]) -> None:
    """Register with timm an entry point for each variant of a family, and make it an attribute of the module.

    Args:
        module: Name of the family's module, which has ``default_cfgs``.
        variants: Names of the models.
        build_variant: Called with a name, ``pretrained`` and the arguments of ``timm.create_model``.
    """

    def register(variant: str) -> None:
        def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401 - passed through to timm
            return build_variant(variant, pretrained, **kwargs)

        entry_point.__name__ = entry_point.__qualname__ = variant
        entry_point.__module__ = module
        entry_point.__doc__ = f"Build {variant}; arguments as of ``timm.create_model``."
        setattr(sys.modules[module], variant, register_model(entry_point))

    for variant in variants:
        register(variant)
