"""Optimiser groups, learning-rate schedule and class weights, as plain functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

__all__ = ["balanced_weights", "cosine_with_warmup", "parameter_groups", "scale_learning_rates"]


def parameter_groups(model: nn.Module, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Group trainable parameters by timm's rules.

    Biases, norms and what the model's ``no_weight_decay()`` names get ``weight_decay=0``; the other groups leave it to
    the optimiser.

    Args:
        model: A timm model.
        layer_decay: Factor of the learning rate from one layer to the one below it; ``None`` means equal rates.

    Returns:
        Groups for any torch optimiser. With ``layer_decay`` each holds its factor as ``lr_scale``.
    """
    exempt: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay=1.0, no_weight_decay_list=exempt, layer_decay=layer_decay)
    for group in groups:
        group.pop("param_names", None)
        if group["weight_decay"] > 0:
            del group["weight_decay"]
    return [group for group in groups if group["params"]]


def scale_learning_rates(optimizer: Optimizer, lr: float | None) -> None:
    """Set the learning rate of every group and apply its ``lr_scale``.

    Args:
        optimizer: Changed in place.
        lr: The rate; ``None`` keeps the optimiser's own.
    """
    for group in optimizer.param_groups:
        group["lr"] = (group["lr"] if lr is None else lr) * group.pop("lr_scale", 1.0)


def cosine_with_warmup(step: int, *, total: int, warmup: int) -> float:
    """Return the factor of the learning rate: linear up to 1 over ``warmup`` steps, then a half cosine down to 0.

    Args:
        step: Optimiser steps done, >= 0.
        total: Steps of the whole training; beyond them the factor stays 0.
        warmup: Steps of the rise, in [0, total].
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Return class weights inverse to frequency, with mean 1 over the samples; classes without samples get 0.

    Args:
        counts: Training samples of each class.
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]
