"""Features from any layer of any timm model, pooled as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saccade.errors import ConfigError, suggest

__all__ = ["feature_function", "pool_features"]


def feature_function(model: nn.Module, *, layer: str | None, pool: str | None) -> Callable[[Tensor], Tensor]:
    """Return a function from images ``(B, 3, Y, X)`` to features ``(B, ...)``.

    Args:
        model: timm model or open_clip image tower.
        layer: Name of a module, as in ``model.named_modules()``; ``None`` means the features before the classifier.
        pool: ``"avg"``, ``"token"``, ``"none"``, or ``None``: as the model pools for its classifier (without a layer),
            ``"avg"`` (with one).

    Raises:
        ConfigError: If there is no such layer, or the model has no class token.
    """
    if pool not in (None, "avg", "token", "none"):
        raise ConfigError(f"pool must be avg, token or none, got {pool!r}.")
    if layer is not None:
        modules = dict(model.named_modules())
        if layer not in modules or not layer:
            raise ConfigError(
                f"The model has no layer {layer!r}.{suggest(layer, modules)} Its blocks: {top_names(model)}."
            )
        return LayerOutput(model, modules[layer], pool or "avg")
    if not hasattr(model, "forward_features"):
        if pool is None:
            return model
        raise ConfigError("This model offers its own embedding only; leave --pool out.")

    network: Any = model  # timm's contract is not in nn.Module's type

    def features(images: Tensor) -> Tensor:
        maps = network.forward_features(images)
        if pool is None:
            pooled: Tensor = network.forward_head(maps, pre_logits=True)
            return pooled
        return pool_features(maps, model, pool)

    return features


class LayerOutput:
    """Runs a model and returns the output of one of its modules, pooled."""

    def __init__(self, model: nn.Module, module: nn.Module, pool: str) -> None:
        self.model = model
        self.pool = pool
        self.outputs: list[Tensor] = []
        module.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: object, output: object) -> None:
        """Keep the output of the module for the call under way."""
        if not isinstance(output, Tensor):
            raise ConfigError(f"The layer returns {type(output).__name__}, not a tensor; choose another one.")
        self.outputs.append(output)

    def __call__(self, images: Tensor) -> Tensor:
        self.outputs.clear()
        self.model(images)
        if not self.outputs:
            raise ConfigError("The layer is not used when the model runs; choose another one.")
        return pool_features(self.outputs.pop(), self.model, self.pool)


def pool_features(features: Tensor, model: nn.Module, pool: str) -> Tensor:
    """Pool tokens ``(B, N, C)`` or maps ``(B, C, Y, X)`` / ``(B, Y, X, C)`` to ``(B, C)``.

    Args:
        features: Output of a layer; ``(B, C)`` stays as it is.
        model: Tells how many prefix tokens it has (``num_prefix_tokens``) and whether its maps are channels last
            (``output_fmt``).
        pool: ``"avg"`` leaves prefix tokens out, ``"token"`` takes the first, ``"none"`` returns the input.

    Raises:
        ConfigError: If the class token is asked for and there is none.
    """
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if pool == "none" or features.ndim == 2:
        return features
    if pool == "token":
        if features.ndim != 3 or prefix == 0:
            raise ConfigError("This model has no class token; use --pool avg.")
        return features[:, 0]
    if features.ndim == 3:
        return features[:, prefix:].mean(1)
    channels_last = str(getattr(model, "output_fmt", "NCHW")).upper().endswith("NHWC")
    return features.mean((1, 2) if channels_last else (2, 3))


def top_names(model: nn.Module) -> str:
    """Return the names of the outermost modules, for a message."""
    return ", ".join(name for name, _ in model.named_children())
