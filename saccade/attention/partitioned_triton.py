"""The Triton path of :func:`saccade.attention.partitioned_attention`: classes as parts of one launch, then their merge.

Keys stay where they are; the kernel reads them through a permutation into class order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.flash import softmax_parts
from saccade.attention.key_classes import PartitionedAttention, by_class

__all__ = ["partitioned_triton"]


def partitioned_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    mask: Tensor | None,
    causal: bool,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float | None,
    key_log_weight: Tensor | None,
    weighted_class: int | None,
) -> PartitionedAttention:
    """Attend to every class by itself in one launch, and scale each by its share of the common normaliser.

    Args:
        query: As in :func:`saccade.attention.partitioned_attention`, like all others.
        key: As there.
        value: As there.
        key_class: Labels ``(B, S)`` or ``(B, H, S)``.
        num_classes: As there.
        mask: As there; best without what only excludes keys, which labels do better.
        causal: As there.
        query_positions: As there.
        key_positions: As there.
        scale: As there.
        key_log_weight: As there.
        weighted_class: As there.
    """
    labels = key_class if key_class.ndim == 3 else key_class.unsqueeze(1)  # (B, Hs, S)
    key_bias = None
    if key_log_weight is not None:
        key_bias = key_log_weight if key_log_weight.ndim == 3 else key_log_weight.unsqueeze(1)
        heads = max(labels.shape[1], key_bias.shape[1])
        labels, key_bias = labels.expand(-1, heads, -1), key_bias.float().expand(-1, heads, -1).contiguous()
    order, bounds = class_order(labels, num_classes, key_positions)
    parts_out, parts_lse = softmax_parts(
        query,
        key,
        value,
        order,
        bounds,
        mask=mask,
        query_positions=as_rows(query_positions),
        key_positions=as_rows(key_positions),
        key_bias=key_bias,
        weighted_part=0 if weighted_class is None else weighted_class,
        causal=causal,
        scale=scale,
    )
    out, lse, scaled, mass = merge_classes(parts_out, parts_lse, num_classes)
    return by_class(out, lse, scaled, mass, num_classes)


def as_rows(positions: Tensor | None) -> Tensor | None:
    """Return positions ``(L,)`` or ``(B, L)`` as ``(1 or B, L)``."""
    return positions.unsqueeze(0) if positions is not None and positions.ndim == 1 else positions


def class_order(labels: Tensor, num_classes: int, key_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the keys ordered by class, then position, int32 ``(B, Hs, S)``, and where each class begins.

    The second is int32 ``(B, Hs, C + 1)``. Keys of no class are at the ends.
    """
    by_position = None
    if key_positions is not None:
        by_position = key_positions.argsort(dim=-1, stable=True).unsqueeze(-2).expand(labels.shape)
        labels = labels.gather(-1, by_position)
    labels, order = labels.sort(dim=-1, stable=True)
    order = order if by_position is None else by_position.gather(-1, order)
    firsts = torch.arange(num_classes + 1, device=labels.device).expand(*labels.shape[:2], -1)
    return order.int().contiguous(), torch.searchsorted(labels, firsts.contiguous()).int()


@torch.library.custom_op("saccade::merge_classes", mutates_args=())
def merge_classes(parts_out: Tensor, parts_lse: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale partial results by their share of the common normaliser; differentiable through all results.

    Args:
        parts_out: ``(B, H, P, L, Dv)``, one part for each class, and one more if a class is weighted.
        parts_lse: ``(B, H, P, L)``, contiguous.
        num_classes: C.

    Returns:
        Output, log-sum-exp, and output and mass of each part.
    """
    from saccade.attention.kernels import classes

    out, lse, scaled, mass = empty_results(parts_out, parts_lse)
    classes.merge(parts_out, parts_lse, out, lse, scaled, mass, num_classes)
    return out, lse, scaled, mass


def empty_results(parts_out: Tensor, parts_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results; in the output, heads of a query lie side by side."""
    batch, heads, _, queries, value_dim = parts_out.shape
    out = parts_out.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    lse = parts_lse.new_empty(batch, heads, queries)
    return out, lse, torch.empty_like(parts_out), torch.empty_like(parts_lse)


@merge_classes.register_fake
def merge_classes_fake(parts_out: Tensor, parts_lse: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return results of the right shapes, dtypes and strides."""
    return empty_results(parts_out, parts_lse)


@torch.library.custom_op("saccade::merge_classes_backward", mutates_args=())
def merge_classes_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_scaled: Tensor,
    grad_mass: Tensor,
    parts_out: Tensor,
    mass: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the partial results from the cotangents of all results."""
    from saccade.attention.kernels import classes

    grads = torch.empty_like(parts_out), torch.empty_like(mass)
    cotangents = (grad_out, grad_lse.contiguous(), grad_scaled, grad_mass.contiguous())
    classes.merge_backward(parts_out, mass, *cotangents, *grads, num_classes)
    return grads


@merge_classes_backward.register_fake
def merge_classes_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_scaled: Tensor,
    grad_mass: Tensor,
    parts_out: Tensor,
    mass: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Return gradients of the right shapes, dtypes and strides."""
    return torch.empty_like(parts_out), torch.empty_like(mass)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    """Keep the partial outputs and the masses."""
    parts_out, _, ctx.num_classes = inputs
    ctx.save_for_backward(parts_out, output[3])
    ctx.set_materialize_grads(False)
    ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in output]


def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Run the backward operator; cotangents that are absent are zeros without memory."""
    parts_out, mass = ctx.saved_tensors
    cotangents = [
        parts_out.new_zeros((), dtype=dtype).expand(shape) if grad is None else grad
        for grad, (shape, dtype) in zip(grads, ctx.shapes, strict=True)
    ]
    return *merge_classes_backward(*cotangents, parts_out, mass, ctx.num_classes), None


merge_classes.register_autograd(differentiate, setup_context=save_for_backward)
