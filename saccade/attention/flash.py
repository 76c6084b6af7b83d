"""Backend ``triton`` of the softmax operators: one registered operator over all keys or over parts of them.

Imports no Triton; the kernels (:mod:`saccade.attention.kernels.softmax`) are loaded by the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.dispatch import Decision
from saccade.attention.kernels.runtime import can_run_triton, dot_precision, padded
from saccade.attention.merge import AttentionEntropy, AttentionLSE
from saccade.attention.problem import Problem

__all__ = ["can_run_flash", "flash_attention_entropy", "flash_attention_lse", "softmax_attention", "softmax_parts"]

WIDEST = 256  # columns of a block of rows

AXES = {"query": "bhld", "key": "bhsd", "value": "bhsd", "mask": "bhls", "bias": "bhls"}


def can_run_flash(problem: Problem) -> Decision:
    """Say whether the kernels can serve."""
    if problem.bias_requires_grad:
        return Decision(False, "the kernel gives no gradient of the bias")
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Decision(False, f"the kernel computes in float32, not in {problem.dtype}")
    if max(problem.head_dim, problem.value_dim) > WIDEST:
        return Decision(False, f"the kernel takes heads up to {WIDEST} wide")
    if problem.empty or problem.value_dim == 0:
        return Decision(False, "the kernel needs at least one sample, query, key and value column")
    return can_run_triton(problem.device, exporting=problem.exporting)


def flash_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
) -> AttentionLSE:
    """Run the kernel over all keys."""
    out, lse, _ = run_whole(query, key, value, mask, bias, causal, scale, entropy=False)
    return AttentionLSE(out, lse)


def flash_attention_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
) -> AttentionEntropy:
    """Run the kernel over all keys with one more sum for each query."""
    return AttentionEntropy(*run_whole(query, key, value, mask, bias, causal, scale, entropy=True))


def run_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator on one part that holds all keys, and drop the axis of the parts."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = (as_bytes(mask), bias, None, None, None, None, None, 0, causal, scale, entropy)
    out, lse, entropies = softmax_attention(query, key, value, *options)
    return out[:, :, 0], lse[:, :, 0], entropies[:, :, 0] if entropy else entropies


def softmax_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    bounds: Tensor,
    *,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_bias: Tensor | None = None,
    weighted_part: int = 0,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to each part of the keys by itself; differentiable in query, key, value and key bias through both results.

    Part ``p`` holds the keys ``order[..., bounds[..., p] : bounds[..., p + 1]]``. For it the results are those of
    :func:`saccade.attention.attention_lse` over these keys alone. Keys outside of all bounds take no part. With a key
    bias there is one more part, the last: the keys of part ``weighted_part`` again, ``key_bias`` added to their scores.

    Args:
        query: ``(B, H, L, D)``, float32, float16 or bfloat16; B, H, L and S at least 1. Any strides, as all below.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        order: int32 ``(B, Hs, S)``, Hs = 1 or H, contiguous; each row a permutation of ``0 .. S - 1``. Where
            ``causal``, key positions must not descend within a part (a stable sort by part of keys in ascending
            position does that).
        bounds: int32 ``(B, Hs, P + 1)``, contiguous, ascending, within ``0 .. S``. Equal bounds make an empty part.
        mask: Bool, broadcastable to ``(B, H, L, S)``, by original key index, ``True`` = takes part.
        query_positions: int32 or int64 ``(B or 1, L)``; ``None`` means ``i + S - L``.
        key_positions: int32 or int64 ``(B or 1, S)``, by original key index; ``None`` means ``j``.
        key_bias: float32 ``(B, Hs, S)``, contiguous, by original key index; ``-inf`` leaves a key out.
        weighted_part: Which part the extra one repeats, ``0 .. P - 1``.
        causal: A query sees keys with ``key position <= query position``.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.

    Returns:
        Output ``(B, H, Pr, L, Dv)`` in the dtype of the query, log-sum-exp ``(B, H, Pr, L)`` float32, Pr = P, or P + 1
        with a key bias. A query that sees nothing of a part has output 0 and ``-inf`` there, and no gradient.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    places = (order, bounds, query_positions, key_positions, key_bias, weighted_part)
    out, lse, _ = softmax_attention(query, key, value, as_bytes(mask), None, *places, causal, scale, False)
    return out, lse


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """Return a bool mask as bytes over the same memory, the type that kernels read."""
    return None if mask is None else mask.view(torch.uint8)


def widest(query: Tensor, value: Tensor) -> int:
    """Return the width of the widest block of rows."""
    return max(padded(query.shape[3]), padded(value.shape[3]))


def out_arguments(out: Tensor) -> dict[str, Any]:
    """Return the output and its strides by name; its last axis is contiguous."""
    return {"out": out, **dict(zip(("out_b", "out_h", "out_p", "out_l"), out.stride(), strict=False))}


def ceil_div(count: int, size: int) -> int:
    """Return how many blocks of ``size`` hold ``count``."""
    return -(-count // size)


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Return the strides of a 4-D tensor, zeros for none."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def common_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    bounds: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_bias: Tensor | None,
    weighted_part: int,
    causal: bool,
    scale: float,
) -> dict[str, Any]:
    """Return the arguments by name that all kernels take, sizes of tiles aside."""
    scores = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    arguments: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "bias": bias,
        "order": order,
        "bounds": bounds,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "key_bias": key_bias,
    }
    for name, axes in AXES.items():
        tensor = arguments[name]
        if name in ("mask", "bias") and tensor is not None:
            tensor = tensor.expand(scores)
        arguments |= zip((f"{name}_{axis}" for axis in axes), strides(tensor), strict=True)
    for name in ("query_positions", "key_positions"):
        tensor = arguments[name]
        arguments[name + "_b"] = 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)
    return arguments | {
        "heads": query.shape[1],
        "group": query.shape[1] // key.shape[1],
        "order_heads": 1 if order is None else order.shape[1],
        "queries": query.shape[2],
        "keys": key.shape[2],
        "parts": 1 if bounds is None else bounds.shape[2] - 1,
        "weighted_part": weighted_part,
        "scale": scale,
        "CAUSAL": causal,
        "D": query.shape[3],
        "DV": value.shape[3],
        "BLOCK_D": padded(query.shape[3]),
        "BLOCK_DV": padded(value.shape[3]),
        "PRECISION": dot_precision(query.dtype),
    }


def empty_results(
    query: Tensor, value: Tensor, bounds: Tensor | None, key_bias: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate output ``(B, H, P, L, Dv)``, heads of a query side by side, log-sum-exp and entropy ``(B, H, P, L)``."""
    batch, heads, queries, _ = query.shape
    parts = 1 if bounds is None else bounds.shape[2] - 1 + (key_bias is not None)
    out = query.new_empty(batch, parts, queries, heads, value.shape[3]).permute(0, 3, 1, 2, 4)
    lse = query.new_empty(batch, heads, parts, queries, dtype=torch.float32)
    return out, lse, torch.empty_like(lse) if entropy else lse.new_empty(0)


@torch.library.custom_op("saccade::softmax_attention", mutates_args=())
def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    bounds: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_bias: Tensor | None,
    weighted_part: int,
    causal: bool,
    scale: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel; arguments as :func:`softmax_parts`, no axis empty.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        mask: uint8, broadcastable to ``(B, H, L, S)``.
        bias: Floating point, broadcastable to ``(B, H, L, S)``; gets no gradient.
        order: ``None`` for one part that holds every key.
        bounds: ``None`` without an order.
        query_positions: Only with an order.
        key_positions: Only with an order.
        key_bias: Only with an order.
        weighted_part: Which part the extra one repeats.
        causal: A query sees keys with ``key position <= query position``.
        scale: Factor of the products.
        with_entropy: Compute the third result.

    Returns:
        Output ``(B, H, P, L, Dv)``, log-sum-exp ``(B, H, P, L)`` and entropy likewise, or an empty tensor.
    """
    from saccade.attention.kernels import softmax as kernels

    out, lse, entropy = empty_results(query, value, bounds, key_bias, with_entropy)
    arguments = common_arguments(
        query, key, value, mask, bias, order, bounds, query_positions, key_positions, key_bias, weighted_part, causal,
        scale,
    )  # fmt: skip
    arguments |= kernels.launch_options(kernels.FORWARD, widest(query, value), query.dtype)
    if query.shape[2] <= 32:  # decoding
        arguments |= {"BLOCK_M": padded(query.shape[2]), "num_warps": 4}
    blocks = ceil_div(query.shape[2], arguments["BLOCK_M"])
    kernels.forward_kernel[(blocks * lse.shape[0] * lse.shape[1] * lse.shape[2],)](
        **arguments, **out_arguments(out), lse=lse, entropy=entropy if with_entropy else None
    )
    return out, lse, entropy


@softmax_attention.register_fake
def softmax_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, order: Tensor | None,
    bounds: Tensor | None, query_positions: Tensor | None, key_positions: Tensor | None, key_bias: Tensor | None,
    weighted_part: int, causal: bool, scale: float, with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return results of the right shapes, dtypes and strides."""
    return empty_results(query, value, bounds, key_bias, with_entropy)


@torch.library.custom_op("saccade::softmax_attention_backward", mutates_args=())
def softmax_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, grad_entropy: Tensor | None, out: Tensor, lse: Tensor, entropy: Tensor,
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, order: Tensor | None,
    bounds: Tensor | None, query_positions: Tensor | None, key_positions: Tensor | None, key_bias: Tensor | None,
    weighted_part: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the gradient kernels.

    Returns:
        Gradients of query, key, value, and of the key bias, an empty tensor without one.
    """
    from saccade.attention.kernels import softmax as kernels

    arguments = common_arguments(
        query, key, value, mask, bias, order, bounds, query_positions, key_positions, key_bias, weighted_part, causal,
        scale,
    )  # fmt: skip
    arguments |= zip((f"grad_out_{axis}" for axis in "bhpld"), grad_out.stride(), strict=True)
    arguments |= {
        "lse": lse,
        "grad_out": grad_out,
        "delta": torch.empty_like(lse),
        "entropy": None,
        "grad_entropy": None,
    }
    if grad_entropy is not None:
        arguments |= {"entropy": entropy, "grad_entropy": grad_entropy.contiguous()}
    grad_query, grad_key, grad_value, grad_key_bias = empty_gradients(query, key, value, order, key_bias)
    batch, heads, queries, _ = query.shape
    arguments |= kernels.launch_options(kernels.QUERY_GRADIENT, widest(query, value), query.dtype)
    kernels.query_gradient_kernel[(ceil_div(queries, arguments["BLOCK_M"]) * batch * heads,)](
        **arguments, **out_arguments(out), grad_lse=grad_lse.contiguous(), grad_query=grad_query
    )
    arguments |= kernels.launch_options(kernels.KEY_GRADIENT, widest(query, value), query.dtype)
    owners = grad_key.shape[1]
    key_blocks = ceil_div(key.shape[2], arguments["BLOCK_N"])
    kernels.key_gradient_kernel[(key_blocks * arguments["parts"] * batch * owners,)](
        **arguments, grad_key=grad_key, grad_value=grad_value, grad_key_bias=grad_key_bias, owners=owners
    )
    if owners != key.shape[1]:  # heads of a group read the keys in different orders
        grad_key = grad_key.unflatten(1, (key.shape[1], -1)).sum(2).to(key.dtype)
        grad_value = grad_value.unflatten(1, (key.shape[1], -1)).sum(2).to(value.dtype)
    if key_bias is not None and key_bias.shape[1] != owners:
        grad_key_bias = grad_key_bias.sum(1, keepdim=True)
    return grad_query, grad_key, grad_value, grad_key_bias


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor | None, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate what the gradient kernels write, zeros where they leave out the keys that are in no part.

    Where the query heads of a group have orders of their own, each gets its gradients of key and value, in float32.
    """
    batch, heads, keys, _ = key.shape
    per_query_head = order is not None and order.shape[1] > 1 and order.shape[1] != heads
    owners, dtype = (query.shape[1], torch.float32) if per_query_head else (heads, key.dtype)
    make = torch.empty if order is None else torch.zeros
    grad_key = make(batch, owners, keys, key.shape[3], dtype=dtype, device=key.device)
    grad_value = make(batch, owners, keys, value.shape[3], dtype=dtype, device=key.device)
    shape = (0,) if key_bias is None else (batch, owners, keys)
    grad_key_bias = torch.zeros(shape, dtype=torch.float32, device=key.device)
    return query.new_empty(query.shape), grad_key, grad_value, grad_key_bias


@softmax_attention_backward.register_fake
def softmax_attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor, grad_entropy: Tensor | None, out: Tensor, lse: Tensor, entropy: Tensor,
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, order: Tensor | None,
    bounds: Tensor | None, query_positions: Tensor | None, key_positions: Tensor | None, key_bias: Tensor | None,
    weighted_part: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of the right shapes, dtypes and strides."""
    grad_query, grad_key, grad_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return grad_query, grad_key, grad_value, lse.new_empty(0 if key_bias is None else key_bias.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep what the gradient kernels read: inputs and results, nothing of the size of the scores."""
    *tensors, ctx.weighted_part, ctx.causal, ctx.scale, ctx.with_entropy = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def differentiate(
    ctx: Any,  # noqa: ANN401
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Run the backward operator; cotangents that are absent are zeros without memory."""
    out, lse, entropy, *tensors = ctx.saved_tensors
    if not ctx.with_entropy:
        grad_entropy = None  # an empty tensor has a cotangent too
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    if grad_lse is None:
        grad_lse = lse.new_zeros(()).expand(lse.shape)
    options = (ctx.weighted_part, ctx.causal, ctx.scale)
    grads = softmax_attention_backward(grad_out, grad_lse, grad_entropy, out, lse, entropy, *tensors, *options)
    grad_query, grad_key, grad_value, grad_key_bias = grads
    no_bias = tensors[-1] is None
    return grad_query, grad_key, grad_value, *[None] * 6, None if no_bias else grad_key_bias, None, None, None, None


softmax_attention.register_autograd(differentiate, setup_context=save_for_backward)
