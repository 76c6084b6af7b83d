"""What every multiple-instance model here takes and gives: bags with a mask in, a :class:`MILOutput` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.errors import ConfigError, ShapeError, suggest

__all__ = ["Criterion", "MILModel", "MILOutput", "check_bags", "create_model", "hide_padding", "models", "register"]

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MILOutput:
    """Result of one forward pass over B bags of at most N instances.

    Args:
        logits: ``(B, C)``, of the bags.
        attention: ``(B, N)``, the distribution over instances that made the bag's embedding, float32; it sums to 1,
            and is 0 for padding. ACMIL: the mean of its branches' softmaxes. Models without attention: their pooling
            weights.
        scores: Before the softmax: ``(B, M, N)`` or ``(B, M, H, N)``, float32; -inf for padding. In training instances
            that ACMIL dropped hold -1e9.
        features: ``(B, D)`` (DSMIL, CLAM-MB: ``(B, C, D)``), embedding of the bags.
        branch_logits: ``(B, M, C)``, of models with several branches.
        branch_attention: ``(B, M, N)`` or ``(B, M, H, N)``, softmax of ``scores``.
        instance_logits: ``(B, N, C)``, of models that classify instances.
        instance_features: ``(B, N, D)``, where the loss looks at instances (CLAM).
        dropped: Bool, shape of ``scores``: instances masked at random in this pass (ACMIL in training).
    """

    logits: Tensor
    attention: Tensor
    scores: Tensor
    features: Tensor
    branch_logits: Tensor | None = None
    branch_attention: Tensor | None = None
    instance_logits: Tensor | None = None
    instance_features: Tensor | None = None
    dropped: Tensor | None = None


class MILModel(nn.Module):
    """Base of the models: ``forward(bags, mask) -> MILOutput``, ``loss``, ``probabilities``.

    Results never depend on the other bags of a batch, nor on padding.

    Args:
        feature_dim: Width of the instances' features.
        num_classes: Number of logits.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        if feature_dim < 1 or num_classes < 1:
            raise ConfigError(f"feature_dim and num_classes must be at least 1; got {feature_dim}, {num_classes}.")
        self.feature_dim = feature_dim
        self.num_classes = num_classes

    def loss(self, output: MILOutput, target: Tensor, criterion: Criterion = F.cross_entropy) -> dict[str, Tensor]:
        """Return the named terms of the training loss, ``"loss"`` being their sum.

        Args:
            output: Result of this model in this step.
            target: What ``criterion`` takes; for the default ``(B,)`` class indices.
            criterion: Loss of bag logits ``(B, C)``.
        """
        bag = criterion(output.logits, target)
        return {"loss": bag, "bag": bag}

    def probabilities(self, output: MILOutput) -> Tensor:
        """Return class probabilities ``(B, C)``, float32."""
        return output.logits.float().softmax(-1)


def check_bags(bags: Tensor, mask: Tensor | None, feature_dim: int) -> None:
    """Raise if bags are not ``(B, N, feature_dim)`` or the mask is not bool ``(B, N)``.

    Raises:
        ShapeError: Says what arrived.
    """
    if bags.ndim != 3 or bags.shape[2] != feature_dim:
        raise ShapeError(
            f"bags must be (B, N, {feature_dim}); got {tuple(bags.shape)}. One bag (N, D) is passed as bag[None]; "
            "features of another encoder need a model made for their width."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != bags.shape[:2]):
        raise ShapeError(
            f"mask must be bool (B, N) = {tuple(bags.shape[:2])}, True for real instances; "
            f"got {mask.dtype} {tuple(mask.shape)}."
        )


def hide_padding(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return scores ``(B, M, N)`` with -inf where the mask ``(B, N)`` says padding."""
    return scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)


REGISTRY: dict[str, Callable[..., MILModel]] = {}


def register(name: str) -> Callable[[type[MILModel]], type[MILModel]]:
    """Put a model class into the registry under a name."""

    def add(model: type[MILModel]) -> type[MILModel]:
        REGISTRY[name] = model
        return model

    return add


def models() -> list[str]:
    """Return the names that :func:`create_model` knows, sorted."""
    return sorted(REGISTRY)


def create_model(name: str, *, feature_dim: int, num_classes: int, **options: object) -> MILModel:
    """Build a model by name.

    Args:
        name: One of :func:`models`.
        feature_dim: Width of the features in the bags.
        num_classes: Number of logits.
        options: Further arguments of the model's class.

    Raises:
        ConfigError: If the name is unknown, or an option does not exist or fit.

    Example:
        >>> bags = torch.randn(2, 5, 8)
        >>> create_model("abmil", feature_dim=8, num_classes=3)(bags).logits.shape
        torch.Size([2, 3])
    """
    if name not in REGISTRY:
        raise ConfigError(f"No MIL model {name!r}.{suggest(name, REGISTRY)} There are: {', '.join(models())}.")
    try:
        return REGISTRY[name](feature_dim=feature_dim, num_classes=num_classes, **options)
    except TypeError as error:
        raise ConfigError(f"MIL model {name!r}: {error}.") from error
