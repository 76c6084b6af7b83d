"""The CPU path of :func:`saccade.attention.partitioned_attention`: one operator forward, one backward.

Attention over disjoint sets of keys merges exactly (:mod:`saccade.attention.merge`), so every class runs through
torch's fused CPU kernel on its own and is scaled by its share of the common normaliser.

Backward: with ``G_c`` the cotangent of what class ``c`` puts out and ``M_c`` that of its mass, keys of the class have
``ds = p * (G_c v^T + M_c - delta)``. The kernel computes ``p * (dO v^T - rowsum(dO * O))``, so it gets the merged
log-sum-exp, O = 0, and one more column, 1 in v and ``M_c - delta`` in dO. The weighted class has no delta of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.key_groups import Part, blocks, make_groups
from saccade.attention.reference import wide
from saccade.attention.sdpa import flash_cpu, flash_cpu_backward, kernel_view

__all__ = ["partitioned_cpu"]


@torch.library.custom_op("saccade::partitioned_cpu", mutates_args=(), device_types="cpu")
def partitioned_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    key_log_weight: Tensor | None,
    weighted_class: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run every class through the kernel and merge; differentiable through all results.

    Args:
        query: ``(B, H, L, D)``, no axis empty.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        key_class: Labels ``(B, S)`` or ``(B, H, S)``.
        num_classes: C.
        query_positions: ``(L,)`` or ``(B, L)``; ``None`` means not causal.
        key_positions: ``(S,)`` or ``(B, S)``; ``None`` means 0, 1, ...
        scale: Factor of the products.
        key_log_weight: ``(B, S)`` or ``(B, H, S)``.
        weighted_class: The class that it weighs.

    Returns:
        Output, log-sum-exp, and the results ``(B, H, P, L, Dv)`` and masses ``(B, H, P, L)`` of the parts: one for each
        class and, with a weight, one more for the weighted class.
    """
    value_dim, accumulate = value.shape[-1], wide(query)
    shape = parts_shape(query, num_classes, key_log_weight)
    part_out = torch.zeros(*shape, value_dim, dtype=accumulate)
    part_mass = torch.zeros(shape, dtype=accumulate)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=accumulate)
    width = max(query.shape[-1], value_dim)
    layout = (key_class, num_classes, query_positions, key_positions, key_log_weight, weighted_class)
    for group in make_groups(query, key, *layout):
        own = (group.batch, group.heads)
        q = kernel_view(query[own], width)
        k, v = kernel_view(group.keys(key), width), kernel_view(group.keys(value), width)
        results = [attend_part(part, q, k, v, scale) for part in group.parts]
        lses = [part_lse for part, (_, part_lse) in zip(group.parts, results, strict=True) if part.row < num_classes]
        if lses:
            lse[own] = torch.stack(lses).logsumexp(0)
        normaliser = finite(lse[own])
        for part, (out, part_lse) in zip(group.parts, results, strict=True):
            mass = torch.exp(part_lse - normaliser)
            part_mass[own][:, :, part.row] += mass
            part_out[own][:, :, part.row].addcmul_(out[..., :value_dim], mass.unsqueeze(-1))
    out = part_out[:, :, :num_classes].sum(2)
    return out.to(query.dtype), lse, part_out.to(query.dtype), part_mass


def finite(lse: Tensor) -> Tensor:
    """Return the log-sum-exp with 0 where a query sees nothing: there ``exp(-inf - 0)`` is the weight 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def attend_part(part: Part, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention over the keys of one part, normalised among themselves, and its log-sum-exp."""
    found = [
        flash_cpu(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, False, scale)
        for rows, keys, mask in blocks(part, query.shape[2], wide(query))
    ]
    if len(found) == 1:
        return found[0]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def parts_shape(query: Tensor, num_classes: int, key_log_weight: Tensor | None) -> tuple[int, int, int, int]:
    """Return ``(B, H, P, L)``, P being one for each class and one for the weighted class."""
    batch, heads, queries, _ = query.shape
    return batch, heads, num_classes + (key_log_weight is not None), queries


@partitioned_cpu.register_fake
def partitioned_cpu_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    key_log_weight: Tensor | None,
    weighted_class: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    shape, value_dim = parts_shape(query, num_classes, key_log_weight), value.shape[-1]
    return (
        query.new_empty(*query.shape[:3], value_dim),
        query.new_empty(query.shape[:3], dtype=wide(query)),
        query.new_empty(*shape, value_dim),
        query.new_empty(shape, dtype=wide(query)),
    )


@torch.library.custom_op("saccade::partitioned_cpu_backward", mutates_args=(), device_types="cpu")
def partitioned_cpu_backward(
    grad: Tensor,
    grad_mass: Tensor,
    grad_lse: Tensor | None,
    part_out: Tensor,
    part_mass: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    key_log_weight: Tensor | None,
    weighted_class: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernel once for each part.

    Args:
        grad: ``G_c``, ``(B, H, P, L, Dv)``.
        grad_mass: ``M_c``, ``(B, H, P, L)``.
        grad_lse: ``(B, H, L)``.
        part_out: Result of the forward.
        part_mass: Result of the forward.
        lse: Result of the forward.
        query: Argument of the forward, like all that follow.
        key: As there.
        value: As there.
        key_class: As there.
        num_classes: As there.
        query_positions: As there.
        key_positions: As there.
        scale: As there.
        key_log_weight: As there.
        weighted_class: As there.

    Returns:
        Gradients of query, key, value and ``key_log_weight`` (no element without one).
    """
    value_dim, head_dim, dtype, accumulate = value.shape[-1], query.shape[-1], query.dtype, wide(query)
    columns = 1 if dtype == accumulate else 2  # in half precision the column is split in two, so that it loses nothing
    width = (max(head_dim, value_dim + columns) + 7) // 8 * 8  # the kernel is slower in between
    delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse
    for row in range(grad.shape[2]):
        delta += (grad[:, :, row] * part_out[:, :, row]).sum(-1, dtype=accumulate)
        delta += grad_mass[:, :, row] * part_mass[:, :, row]
    grad_query, grad_key, grad_value = (torch.zeros(t.shape, dtype=accumulate) for t in (query, key, value))
    grad_weight = torch.zeros(0 if key_log_weight is None else key_log_weight.shape, dtype=accumulate)
    layout = (key_class, num_classes, query_positions, key_positions, key_log_weight, weighted_class)
    for group in make_groups(query, key, *layout):
        own = (group.batch, group.heads)
        q, k, v = padded(query[own], width), padded(group.keys(key), width), padded(group.keys(value), width)
        v[..., value_dim : value_dim + columns] = 1.0
        cotangent = torch.empty_like(q)
        cotangent[..., value_dim:] = 0.0
        nothing = q.new_zeros(1, 1, 1, width).expand(q.shape)
        normaliser = finite(lse[own])
        grad_k, grad_v = torch.zeros(k.shape, dtype=accumulate), torch.zeros(v.shape, dtype=accumulate)
        grad_w = torch.zeros(k.shape[0], k.shape[2], dtype=accumulate)
        for part in group.parts:
            column = grad_mass[own][:, :, part.row] - (delta[own] if part.log_weight is None else 0.0)
            cotangent[..., :value_dim] = grad[own][:, :, part.row]
            cotangent[..., value_dim] = column
            if columns == 2:
                cotangent[..., value_dim + 1] = column - cotangent[..., value_dim]
            for rows, keys, mask in blocks(part, query.shape[2], accumulate):
                found_q, found_k, found_v = flash_cpu_backward(
                    cotangent[:, :, rows],
                    q[:, :, rows],
                    k[:, :, keys],
                    v[:, :, keys],
                    nothing[:, :, rows],
                    normaliser[:, :, rows],
                    mask,
                    False,
                    scale,
                )
                grad_query[own][:, :, rows] += found_q[..., :head_dim]
                grad_k[:, :, keys] += found_k
                grad_v[:, :, keys] += found_v
                if part.log_weight is not None:  # d/dw_j of p_ij exp(w_j) (G_i v_j + M_i), summed over i, is v_j dv_j
                    grad_w[:, keys] += (v[:, :, keys] * found_v.to(accumulate)).sum((1, 3))
        group.add_keys(grad_key[group.batch, group.kv_heads], grad_k[..., :head_dim], 2)
        group.add_keys(grad_value[group.batch, group.kv_heads], grad_v[..., :value_dim], 2)
        if key_log_weight is not None:
            weights = grad_weight[group.batch]
            group.add_keys(weights if weights.dim() == 2 else weights[:, group.heads.start], grad_w, 1)
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), grad_weight


def padded(tensor: Tensor, width: int) -> Tensor:
    """Return a copy with zero columns up to ``width``."""
    copy = tensor.new_empty(*tensor.shape[:-1], width)
    copy[..., : tensor.shape[-1]] = tensor
    copy[..., tensor.shape[-1] :] = 0.0
    return copy


@partitioned_cpu_backward.register_fake
def partitioned_cpu_backward_fake(
    grad: Tensor,
    grad_mass: Tensor,
    grad_lse: Tensor | None,
    part_out: Tensor,
    part_mass: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    key_log_weight: Tensor | None,
    weighted_class: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of the right shapes and dtypes."""
    weight_shape = 0 if key_log_weight is None else key_log_weight.shape
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    return grads[0], grads[1], grads[2], query.new_empty(weight_shape, dtype=wide(query))


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    """Keep the inputs and results; the order of the keys is found again."""
    query, key, value, key_class, ctx.num_classes, *positions, ctx.scale, key_log_weight, ctx.weighted_class = inputs
    ctx.save_for_backward(query, key, value, key_class, *positions, key_log_weight, *output[1:])
    ctx.set_materialize_grads(False)


def backward(
    ctx: Any,  # noqa: ANN401
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_part_out: Tensor | None,
    grad_part_mass: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Count the cotangent of the output among those of its classes, and run the backward operator."""
    *inputs, query_positions, key_positions, key_log_weight, lse, part_out, part_mass = ctx.saved_tensors
    classes = ctx.num_classes
    grad = part_out.new_zeros(()).expand(part_out.shape) if grad_part_out is None else grad_part_out
    if grad_out is not None:
        grad = torch.cat([grad[:, :, :classes] + grad_out.unsqueeze(2), grad[:, :, classes:]], 2)
    grad_mass = torch.zeros_like(part_mass) if grad_part_mass is None else grad_part_mass
    *grads, grad_weight = partitioned_cpu_backward(
        grad, grad_mass, grad_lse, part_out, part_mass, lse,
        *inputs, classes, query_positions, key_positions, ctx.scale, key_log_weight, ctx.weighted_class,
    )  # fmt: skip
    grad_weight = None if key_log_weight is None else grad_weight.to(key_log_weight.dtype)
    return *grads, None, None, None, None, None, grad_weight, None


partitioned_cpu.register_autograd(backward, setup_context=save_for_backward)
