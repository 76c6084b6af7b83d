"""The attention diversification loss of whole models: every layer of spatial attention gives one number.

saccade's own models have a :class:`DiversityPoint` in each such layer. timm's have none, but they hand query, key and
bias to ``scaled_dot_product_attention`` once per layer; :class:`DiversityCollector` looks at that call while the layer
runs, and leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from timm.layers import DiffAttention
from timm.models.cait import ClassAttn
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.attention import attention_diversification
from saccade.errors import ConfigError
from saccade.vision_backbones.attention_maps import attention_points

__all__ = ["DiversityCollector", "DiversityPoint", "DiversityReceiver", "spatial_attention"]

# They use the fused operator for something else than weighing places by places: channels, a class token's query, or the
# difference of two attentions.
NOT_SPATIAL = (XCA, ClassAttn, DiffAttention)


class DiversityReceiver(Protocol):
    """What a :class:`DiversityPoint` hands the tensors of its layer to."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None,
        logit_multiplier: Tensor | None,
        prefix_tokens: int,
    ) -> None:
        """Take the arguments of :func:`saccade.attention.attention_diversification` for one layer."""


class DiversityPoint(nn.Module):
    """The place in a layer of spatial attention that tells a collector its query and key; does nothing without one.

    It has no parameters and no state, and is left out under TorchScript.
    """

    def __init__(self) -> None:
        super().__init__()
        self.receiver: DiversityReceiver | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        scale: float | None = None,
        logit_multiplier: Tensor | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        """Hand on what attention is about to be computed from.

        Args:
            query: ``(B, H, N, D)``.
            key: ``(B, H, N, D)``.
            scale: Factor of the products; ``None`` means ``D ** -0.5``.
            logit_multiplier: ``(H, N, N)``, factor of the scaled products.
            prefix_tokens: Class and register tokens in front.
        """
        if self.receiver is not None:
            self.receiver(query, key, scale=scale, logit_multiplier=logit_multiplier, prefix_tokens=prefix_tokens)

    def __prepare_scriptable__(self) -> nn.Module:
        """Stand aside for TorchScript."""
        return SilentPoint()


class SilentPoint(nn.Module):
    """What is left of a :class:`DiversityPoint` in TorchScript."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        scale: float | None = None,
        logit_multiplier: Tensor | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        """Do nothing."""


class DiversityCollector:
    """Computes the attention diversification loss of a model while the model runs; one number per layer is kept.

    The loss is the sum over layers of :func:`saccade.attention.attention_diversification`, divided by ``L + 1e-6`` for
    ``L`` layers. Layers count that weigh places by places: of saccade's models those with a :class:`DiversityPoint`, of
    timm's those that call ``scaled_dot_product_attention`` with as many queries as keys. Attention over channels, of a
    class token, and with keys from a coarser map takes no part. Each window of windowed attention is a sample; relative
    position bias and the mask of shifted windows are part of the scores. Attention dropout comes after.

    What a layer returns stays as it is. Layers of timm that do not use the fused operator, as Swin's on the CPU, are
    told to (``fused_attn``).

    Installing it changes no parameter and no key. A layer computes its number whenever gradients are recorded, so that
    gradient checkpointing (``use_reentrant=False``, timm's own choice) finds the same work the second time; only what
    happens inside the ``with`` block is kept. A deep copy of the model has its own collector.

    Args:
        model: A timm model, saccade's included.
        threshold: Multiple of the uniform weight above which attention counts.
        layers: Which of the layers, in order of definition, negative numbers from the end; ``None`` means all.
        prefix_tokens: Class and register tokens in front of the patches; ``None`` means what the model says
            (``num_prefix_tokens``), 0 for models that have no such tokens.

    Attributes:
        names: The layers that are watched.
        enabled: Set to False between steps, e.g. to count diversity in every second step only; layers then do nothing.
        values: The number of each layer in the last ``with`` block, scalars in float32 (float64 for float64 models),
            detached after :meth:`loss`.

    Raises:
        ConfigError: If the model has no such layer, has a collector already, or ``layers`` names one that is not there.
            While the model runs: if a layer turns out to compute its attention in another way, to be called twice, or
            to be cut off from the gradient by reentrant checkpointing.

    Source:
        Guo et al., "Robustifying Token Attention for Vision Transformers", ICCV 2023 (arXiv:2303.11126), in the sum
        over layers of its official code (guoyongcs/TAPADL at commit 6e4dbff).

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
        >>> diversity = DiversityCollector(model)
        >>> with diversity:
        ...     logits = model(torch.randn(2, 3, 64, 64))
        >>> loss = F.cross_entropy(logits, torch.tensor([0, 1])) + diversity.loss()
        >>> list(diversity.values)
        ['blocks.0.attn', 'blocks.1.attn']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 2.0,
        layers: Iterable[int] | None = None,
        prefix_tokens: int | None = None,
    ) -> None:
        self.threshold = threshold
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0)) if prefix_tokens is None else prefix_tokens
        self.enabled = True
        self.collecting = False
        self.differentiable = False
        self.values: dict[str, Tensor] = {}
        self.unfused: list[Any] = []  # modules that did not use the fused operator
        self.layers = choose(spatial_attention(model), layers)
        module: Any
        for name, module in self.layers.items():
            if isinstance(module, DiversityPoint):
                if module.receiver is not None:
                    raise ConfigError(f"{name} has a collector already; call its remove() first.")
                module.receiver = partial(self.receive, name)
            else:
                if isinstance(module.forward, WatchedForward):
                    raise ConfigError(f"{name} has a collector already; call its remove() first.")
                module.forward = WatchedForward(self, name, module)
                if not module.fused_attn:
                    self.unfused.append(module)
                    module.fused_attn = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers that are watched."""
        return tuple(self.layers)

    def remove(self) -> None:
        """Put the model back as it was."""
        for module in self.layers.values():
            if isinstance(module, DiversityPoint):
                module.receiver = None
            else:
                del module.forward  # the instance's own, which hid that of the class
        for module in self.unfused:
            module.fused_attn = False
        self.layers, self.unfused = {}, []

    def __enter__(self) -> Self:
        self.collecting, self.differentiable, self.values = True, torch.is_grad_enabled(), {}
        return self

    def __exit__(self, *exception: object) -> None:
        self.collecting = False

    @property
    def computing(self) -> bool:
        """Whether layers compute their number now."""
        return self.enabled and (self.collecting or torch.is_grad_enabled())

    def loss(self) -> Tensor:
        """Return the loss of the last ``with`` block, a scalar, differentiable.

        Raises:
            ConfigError: If no layer gave its number there.
        """
        if not self.values:
            raise ConfigError(
                "No layer of spatial attention has run inside the collector's `with` block"
                + (", where it was not enabled." if not self.enabled else f"; it watches {', '.join(self.names)}.")
            )
        total = torch.stack(list(self.values.values())).sum() / (len(self.values) + 1e-6)
        self.values = {name: value.detach() for name, value in self.values.items()}
        return total

    def receive(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None,
        prefix_tokens: int,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        logit_multiplier: Tensor | None = None,
    ) -> None:
        """Take one layer's query and key; see :func:`saccade.attention.attention_diversification`."""
        if not self.computing:
            return
        if self.collecting and self.differentiable and not torch.is_grad_enabled():
            raise ConfigError(
                f"{name} runs without gradients, but the collector's `with` block began with them. Checkpointing must "
                "be use_reentrant=False (in timm set_reentrant_ckpt(False)), and torch.no_grad() around the block."
            )
        with torch.autocast(query.device.type, enabled=False):  # the sums over maps need float32
            value = attention_diversification(
                query,
                key,
                bias=bias,
                mask=mask,
                logit_multiplier=logit_multiplier,
                threshold=self.threshold,
                prefix_tokens=prefix_tokens,
                scale=scale,
            )
        if self.collecting:
            if name in self.values:
                raise ConfigError(f"{name} ran twice inside the collector's `with` block; run the model once in each.")
            self.values[name] = value


def spatial_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of attention over places whose diversity can be computed, by name, in order of definition.

    Args:
        model: A timm model, saccade's included.

    Raises:
        ConfigError: If there is none; the message names the classes of attention that the model has.
    """
    modules = dict(model.named_modules())
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, DiversityPoint)
        or (hasattr(module, "fused_attn") and not isinstance(module, NOT_SPATIAL))  # timm's mark of who can use SDPA
    }
    if not found:
        owners = {type(modules[point.rpartition(".")[0]]) for point in attention_points(model)}
        classes = ", ".join(sorted(f"{owner.__module__}.{owner.__name__}" for owner in owners))
        raise ConfigError(
            f"{type(model).__name__} has no attention over places computed by scaled_dot_product_attention"
            + (f"; its attention is of class {classes}." if classes else ".")
        )
    return found


def choose(found: Mapping[str, nn.Module], layers: Iterable[int] | None) -> dict[str, nn.Module]:
    """Return the layers at the given positions, all for ``None``."""
    names = list(found)
    if layers is None:
        return dict(found)
    wanted = list(layers)
    wrong = [index for index in wanted if not -len(names) <= index < len(names)]
    if wrong or not wanted:
        raise ConfigError(f"layers must name some of the {len(names)} layers of attention, from 0; got {wanted}.")
    kept = {names[index] for index in wanted}
    return {name: module for name, module in found.items() if name in kept}


class WatchedForward:
    """Stands in for the ``forward`` of a module and looks at its one call of ``scaled_dot_product_attention``.

    A plain object with references instead of a closure, so that a copied or pickled model is whole.

    Args:
        collector: Receives query and key.
        name: Name of the module in the model.
        module: The module.
    """

    def __init__(self, collector: DiversityCollector, name: str, module: nn.Module) -> None:
        self.collector, self.name, self.module = collector, name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the module takes and gives
        forward: Callable[..., Any] = type(self.module).forward
        if not self.collector.computing:
            return forward(self.module, *args, **kwargs)
        calls: list[None] = []
        with FusedAttentionWatch(partial(self.receive, calls)):
            result = forward(self.module, *args, **kwargs)
        if len(calls) != 1:
            raise ConfigError(
                f"{self} calls scaled_dot_product_attention {len(calls)} times in a forward pass; diversity is known "
                "for layers that do it once. Leave it out by `layers`."
            )
        return result

    def __str__(self) -> str:
        kind = type(self.module)
        return f"{self.name} ({kind.__module__}.{kind.__name__})"

    def receive(
        self,
        calls: list[None],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Take the arguments of ``scaled_dot_product_attention``."""
        calls.append(None)
        if query.shape[-2] != key.shape[-2]:
            return  # a class token's attention, or keys from a coarser map
        if query.ndim != 4 or is_causal:
            raise ConfigError(
                f"{self} attends "
                + ("causally" if is_causal else f"with a query of shape {tuple(query.shape)}")
                + "; diversity is known for (B, H, N, D), each token seeing all. Leave it out by `layers`."
            )
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool
        self.collector.receive(
            self.name,
            query,
            key,
            scale=scale,
            prefix_tokens=self.collector.prefix_tokens,
            bias=None if boolean else attn_mask,
            mask=attn_mask if boolean else None,
        )


class FusedAttentionWatch(TorchFunctionMode):
    """Shows the arguments of ``scaled_dot_product_attention`` to a function before each call.

    Args:
        show: Gets them as they were passed.
    """

    def __init__(self, show: Callable[..., None]) -> None:
        super().__init__()
        self.show = show

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run the function, after a look at it."""
        if func is F.scaled_dot_product_attention:
            self.show(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
