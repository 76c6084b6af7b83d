"""Weights that no other key has a say in: each is a function of its own score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.problem import Problem
from saccade.attention.problem import describe as describe_tensors
from saccade.attention.softmax import example
from saccade.errors import ConfigError, suggest

__all__ = ["pointwise_attention"]

ACTIVATIONS = ("sigmoid", "elu1")
EPSILON = 1e-8  # added to the sum of the weights; part of the published form
BLOCK = 1 << 19  # scores that the CPU path holds at once, if that is at least 16 queries
WIDEST_KERNEL = 256  # head width that fits a program of the Triton kernel


def pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    activation: str = "sigmoid",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weigh values by a function of each query-key product, without a softmax.

    Computes ``out[i] = sum_j f(scale * query[i] . key[j] + bias_ij) value[j]`` over the keys that query ``i`` may see,
    ``f(s) = sigmoid(s)`` or ``elu(s) + 1``. The weights do not sum to 1: the output grows with the number of keys S
    unless it is normalised, or a bias of ``-log(S)`` keeps the sums near 1. Query head ``h`` reads key and value head
    ``h // (H / Hkv)``.

    Args:
        query: ``(B, H, L, D)``, any floating dtype; may be a strided view. Sums are float32.
        key: ``(B, Hkv, S, D)``; H is a multiple of Hkv.
        value: ``(B, Hkv, S, Dv)``.
        activation: ``"sigmoid"`` or ``"elu1"``.
        mask: Bool, broadcastable to ``(B, H, L, S)``, ``True`` = takes part.
        bias: Floating point, broadcastable to ``(B, H, L, S)``, from one number to the full size; may require a
            gradient; ``-inf`` gives the weight 0.
        causal: Query ``i`` sees keys ``j <= i + S - L`` (aligned bottom-right).
        normalise: Divide by the sum of the weights plus 1e-8.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``(B, H, L, Dv)``, dtype and device of ``query``; zeros for a query that sees no key.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        ConfigError: If the activation is unknown.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Gu et al., "When Attention Sink Emerges in Language Models", ICLR 2025 (arXiv:2410.10781), official code
        sail-sg/Attention-Sink (MIT) at commit af49727. Differs from it: no dropout, which it applies in evaluation.

    Example:
        >>> query, ones = torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 4, 8)
        >>> pointwise_attention(query, ones, ones)[..., 0]
        tensor([[[2.]]])
    """
    options = {"activation": activation, "mask": mask, "bias": bias, "causal": causal, "normalise": normalise}
    out: Tensor = POINTWISE.call((query, key, value), {**options, "scale": scale}, backend)
    return out


@dataclass(frozen=True)
class PointwiseProblem:
    """The facts about one call of :func:`pointwise_attention`.

    Args:
        tensors: What the tensors and ``causal`` say.
        activation: Name of the function.
        normalise: The output is divided by the sum of the weights.
    """

    tensors: Problem
    activation: str
    normalise: bool

    def __str__(self) -> str:
        return ", ".join([str(self.tensors), self.activation, *["normalise"] * self.normalise])


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    activation: str = "sigmoid",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float | None = None,
) -> PointwiseProblem:
    """Check the arguments of :func:`pointwise_attention` and return the facts about them."""
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(f"unknown activation {activation!r}; known: {known}.{suggest(activation, ACTIVATIONS)}")
    problem = describe_tensors(query, key, value, mask=mask, bias=bias, causal=causal, scale=scale)
    return PointwiseProblem(problem, activation, normalise)


def can_run_kernel(problem: PointwiseProblem) -> Decision:
    """Say whether the Triton kernels can serve."""
    tensors = problem.tensors
    if tensors.dtype == torch.float64:
        return Decision(False, "the kernel computes in float32")
    if tensors.bias_requires_grad:
        return Decision(False, "the kernel gives no gradient of the bias")
    if tensors.empty or tensors.value_dim == 0:
        return Decision(False, "the kernel needs at least one sample, query, key and value column")
    if max(tensors.head_dim, tensors.value_dim) > WIDEST_KERNEL:
        return Decision(False, f"the kernel has head widths of at most {WIDEST_KERNEL}")
    return can_run_triton(tensors.device, exporting=tensors.exporting)


def can_run_torch(problem: PointwiseProblem) -> Decision:
    """Say whether the form in blocks of queries can serve."""
    if problem.tensors.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, "blocks of queries, scores computed again in the backward pass")


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    activation: str,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    normalise: bool,
    scale: float | None,
    triton: bool,
) -> Tensor:
    """Call the registered operator."""
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    out: Tensor = pointwise(query, key, value, mask, bias, activation, causal, normalise, scale, triton)[0]
    return out


@torch.library.custom_op("saccade::pointwise", mutates_args=())
def pointwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    activation: str,
    causal: bool,
    normalise: bool,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the sums of the weights; a registered operator, differentiable in its first result.

    Returns:
        Output ``(B, H, L, Dv)`` and, ``(B, H, L)`` in float32 or float64, what it was divided by: 1 if not normalised.
    """
    if triton:
        from saccade.attention.kernels import pointwise as kernels

        return kernels.forward(query, key, value, mask, bias, activation, causal, normalise, scale)
    wide = reference.wide(query)
    keys, values = reference.per_query_head(key, query), reference.per_query_head(value, query)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    total = query.new_ones(query.shape[:3], dtype=wide)
    for rows, seen in blocks(query, key, causal):
        weights = block_weights(query, keys, mask, bias, activation, causal, scale, rows, seen)
        sums = weights @ values[:, :, :seen]
        if normalise:
            total[:, :, rows] = weights.sum(-1) + EPSILON
            sums /= total[:, :, rows, None]
        out[:, :, rows] = sums
    return out, total


@pointwise.register_fake
def pointwise_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    activation: str,
    causal: bool,
    normalise: bool,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=reference.wide(query))


@torch.library.custom_op("saccade::pointwise_backward", mutates_args=())
def pointwise_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
    activation: str,
    causal: bool,
    normalise: bool,
    scale: float,
    triton: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and bias (empty unless needed); scores are computed again.

    With ``dN = dO / total`` it is ``ds = (dN v^T - dN . O) f'(s)``, the second term if normalised.
    """
    if triton:
        from saccade.attention.kernels import pointwise as kernels

        grads = kernels.backward(
            grad_out, query, key, value, mask, bias, out, total, activation, causal, normalise, scale
        )
        return *grads, query.new_empty(0)
    wide = reference.wide(query)
    keys, values = reference.per_query_head(key, query), reference.per_query_head(value, query)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    grad_bias = bias.new_zeros(four_axes(bias).shape, dtype=wide) if needs_bias and bias is not None else None
    for rows, seen in blocks(query, key, causal):
        weights = block_weights(query, keys, mask, bias, activation, causal, scale, rows, seen)
        grad = grad_out[:, :, rows].to(wide) / total[:, :, rows, None]
        grad_values[:, :, :seen] += weights.transpose(-1, -2) @ grad
        grad_scores = grad @ values[:, :, :seen].transpose(-1, -2)
        if normalise:
            grad_scores -= (grad * out[:, :, rows]).sum(-1, keepdim=True)
        # elu(s) + 1 is exp(s), its own derivative, below 1, and has the derivative 1 above; masked weights are 0
        grad_scores *= weights * (1 - weights) if activation == "sigmoid" else weights.clamp(max=1)
        if grad_bias is not None:
            part = slab(grad_bias, rows, seen)
            part += grad_scores.sum_to_size(part.shape)
        grad_query[:, :, rows] = scale * (grad_scores @ keys[:, :, :seen])
        grad_keys[:, :, :seen] += scale * (grad_scores.transpose(-1, -2) @ query[:, :, rows].to(wide))
    reduced = reference.sum_groups(grad_keys, key), reference.sum_groups(grad_values, value)
    if grad_bias is None or bias is None:
        return grad_query, *reduced, query.new_empty(0)
    return grad_query, *reduced, grad_bias.view(bias.shape).to(bias.dtype)


@pointwise_backward.register_fake
def pointwise_backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
    activation: str,
    causal: bool,
    normalise: bool,
    scale: float,
    triton: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    like = partial(torch.empty_like, memory_format=torch.contiguous_format)
    return like(query), like(key), like(value), like(bias) if needs_bias and bias is not None else query.new_empty(0)


def blocks(query: Tensor, key: Tensor, causal: bool) -> list[tuple[slice, int]]:
    """Return blocks of queries and how many keys each can see at most."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    count = min(128, max(16, BLOCK // max(1, batch * heads * keys)))
    ends = [min(start + count, queries) for start in range(0, queries, count)]
    seen = [max(0, end + keys - queries) if causal else keys for end in ends]
    return [(slice(start, end), limit) for start, end, limit in zip(range(0, queries, count), ends, seen, strict=True)]


def block_weights(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    activation: str,
    causal: bool,
    scale: float,
    rows: slice,
    seen: int,
) -> Tensor:
    """Return the weights of some queries over the first ``seen`` keys, 0 where a key takes no part."""
    scores = (scale * query[:, :, rows].to(keys.dtype)) @ keys[:, :, :seen].transpose(-1, -2)
    if bias is not None:
        scores += slab(four_axes(bias), rows, seen)
    weights = scores.sigmoid_() if activation == "sigmoid" else scores.clamp(max=0).exp_().add_(scores.clamp_(min=0))
    if causal:
        last = torch.arange(rows.start, rows.stop, device=query.device) + keys.shape[2] - query.shape[2]
        weights.masked_fill_(torch.arange(seen, device=query.device) > last[:, None], 0.0)
    return weights if mask is None else weights.masked_fill_(~slab(four_axes(mask), rows, seen), 0.0)


def four_axes(tensor: Tensor) -> Tensor:
    """Return a view with axes of size 1 in front, up to four axes."""
    return tensor[(None,) * (4 - tensor.ndim)]


def slab(tensor: Tensor, rows: slice, seen: int) -> Tensor:
    """Return the part of a 4-D tensor broadcastable to ``(B, H, L, S)`` for some queries and the first keys."""
    part = tensor if tensor.shape[2] == 1 else tensor[:, :, rows]
    return part if tensor.shape[3] == 1 else part[..., :seen]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep inputs and results."""
    query, key, value, mask, bias, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, mask, bias, *output)
    ctx.mark_non_differentiable(output[1])


def pointwise_grads(ctx: Any, grad_out: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Call the backward operator."""
    needs_bias = ctx.needs_input_grad[4]
    *grads, grad_bias = pointwise_backward(grad_out, *ctx.saved_tensors, *ctx.options, needs_bias)
    return *grads, None, grad_bias if needs_bias else None, *[None] * len(ctx.options)


pointwise.register_autograd(pointwise_grads, setup_context=save_for_backward)


def scripted_pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    activation: str = "sigmoid",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stand in for :func:`pointwise_attention` in TorchScript: its literal form."""
    return reference.pointwise_attention(query, key, value, activation, mask, bias, causal, normalise, scale)


pointwise_attention.__prepare_scriptable__ = lambda: scripted_pointwise_attention  # type: ignore[attr-defined]

POINTWISE = register(
    Operator(
        function=pointwise_attention,
        summary="sigmoid(scale q k^T + bias) v, or elu + 1: no softmax",
        backends=(
            Backend("triton", can_run_kernel, partial(run, triton=True)),
            Backend("torch", can_run_torch, partial(run, triton=False)),
            Backend(
                "reference",
                lambda problem: Decision(True, "literal form, holds the L x S scores"),
                reference.pointwise_attention,
            ),
        ),
        describe=describe,
        example=example,
    )
)
