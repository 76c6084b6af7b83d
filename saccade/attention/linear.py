"""State instead of scores: attention without a softmax, and the softmax that does not depend on the query.

Both are recurrences over the keys. They run in chunks: inside a chunk as products of small matrices, between chunks
through a state. All exponents are at most 0, so nothing overflows, whatever the decay and the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.decay import LinearAttention
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.problem import Problem, describe
from saccade.attention.softmax import example
from saccade.errors import ShapeError

__all__ = ["linear_attention"]

CHUNK = 64  # tokens that the CPU path takes at once
WIDEST_KERNEL = 256  # rows of the state that fit a program of the Triton kernel


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> LinearAttention:
    """Weigh values by query-key products without a softmax, in time linear in the length.

    Causal: ``out[i] = scale * q[i] S[i]`` with the state ``S[i] = exp(log_decay) S[i-1] + k[i]^T v[i]``, that is
    ``out[i] = scale * sum_{j<=i} exp(log_decay (i - j)) (q[i] . k[j]) v[j]``. Otherwise every query reads the state
    after the last key. Feature maps are applied to query and key beforehand. Query head ``h`` reads key and value head
    ``h // (H / Hkv)``.

    Args:
        query: ``(B, H, L, D)``, any floating dtype; may be a strided view. Sums and states are float32.
        key: ``(B, Hkv, S, D)``; H is a multiple of Hkv, and S = L if causal.
        value: ``(B, Hkv, S, Dv)``.
        log_decay: ``(H,)``, finite and at most 0: logarithm of what the state keeps from one token to the next, e.g.
            ``-decay_slopes(H)``; ``None`` keeps everything. Causal only. The fast backends give no gradient of it.
        mask: Bool, broadcastable to ``(B, 1, 1, S)``, ``True`` = takes part. A key left out still counts as a step.
        causal: Query ``i`` sees keys ``j <= i``; the keys before the first query are in ``initial_state``.
        normalise: Divide by the sum of the weights, 0 where that is 0; the weights should be positive.
        scale: Factor of the products; the published forms have none.
        initial_state: State before the first key, ``(B, H, D, Dv)``, or ``(B, H, D, Dv + 1)`` if normalised, float32
            (float64 with float64 input); ``None`` means zeros.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        Output and the state after the last key, both differentiable.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device; if a decay comes without ``causal``.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Katharopoulos et al., "Transformers are RNNs", ICML 2020 (arXiv:2006.16236); with decay: Qin et al., "Lightning
        Attention-2" (arXiv:2401.04658), official code OpenNLPLab/lightning-attention (MIT) at commit d15c385.

    Example:
        >>> first = linear_attention(*[torch.ones(1, 1, 2, 1)] * 3, causal=True)
        >>> first.out.flatten()
        tensor([1., 2.])
        >>> linear_attention(*[torch.ones(1, 1, 1, 1)] * 3, causal=True, initial_state=first.state).out.flatten()
        tensor([3.])
    """
    options = {"log_decay": log_decay, "mask": mask, "causal": causal, "normalise": normalise, "scale": scale}
    result: LinearAttention = LINEAR.call((query, key, value), {**options, "initial_state": initial_state}, backend)
    return result


@dataclass(frozen=True)
class LinearProblem:
    """The facts about one call of :func:`linear_attention`.

    Args:
        tensors: What query, key, value, mask and causal say.
        decay: A decay was given.
        decay_requires_grad: It wants a gradient.
        normalise: The output is divided by the sum of the weights.
    """

    tensors: Problem
    decay: bool
    decay_requires_grad: bool
    normalise: bool

    def __str__(self) -> str:
        return ", ".join([str(self.tensors), *["decay"] * self.decay, *["normalise"] * self.normalise])


def describe_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> LinearProblem:
    """Check the arguments of :func:`linear_attention` and return the facts about them; ``scale`` decides nothing."""
    problem = describe(query, key, value, mask=mask, causal=causal)
    if mask is not None and any(size != 1 for size in mask.shape[-3:-1]):
        raise ShapeError(
            f"mask of linear_attention must be broadcastable to (B, 1, 1, S); got {tuple(mask.shape)}. "
            "All queries read one state, so keys can be left out for all heads and queries only."
        )
    if causal and problem.queries != problem.keys:
        raise ShapeError(
            f"causal linear_attention needs as many queries as keys; got L = {problem.queries}, S = {problem.keys}. "
            "Earlier keys belong into initial_state."
        )
    if log_decay is not None:
        if not causal:
            raise ShapeError("log_decay needs causal=True: without an order of the tokens nothing decays.")
        check("log_decay", log_decay, (problem.heads,), query)
    if initial_state is not None:
        width = problem.value_dim + normalise
        check("initial_state", initial_state, (problem.batch, problem.heads, problem.head_dim, width), query)
        if initial_state.dtype != reference.wide(query):
            raise ShapeError(f"initial_state must be {reference.wide(query)}; got {initial_state.dtype}.")
    wants = log_decay is not None and log_decay.requires_grad and torch.is_grad_enabled()
    return LinearProblem(problem, log_decay is not None, wants, normalise)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """Raise unless a floating-point tensor has exactly this shape and lies beside ``query``."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ShapeError(f"{name} must be {shape}, floating point; got {tuple(tensor.shape)}, {tensor.dtype}.")
    if tensor.device != query.device:
        raise ShapeError(f"{name} must be on the device of query, {query.device}; got {tensor.device}.")


def can_run_kernel(problem: LinearProblem) -> Decision:
    """Say whether the Triton kernels can serve."""
    if problem.decay_requires_grad:
        return Decision(False, "no gradient of log_decay")
    if problem.tensors.dtype == torch.float64:
        return Decision(False, "the kernel computes in float32")
    if problem.tensors.empty or problem.tensors.value_dim == 0:
        return Decision(False, "the kernel needs at least one sample, query, key and value column")
    if max(problem.tensors.head_dim, problem.tensors.value_dim + problem.normalise) > WIDEST_KERNEL:
        return Decision(False, f"the kernel holds states of at most {WIDEST_KERNEL} rows and columns")
    return can_run_triton(problem.tensors.device, exporting=problem.tensors.exporting)


def can_run_torch(problem: LinearProblem) -> Decision:
    """Say whether the chunked form of torch operators can serve."""
    if not problem.tensors.causal:
        return Decision(True, "two matrix products")
    if problem.decay_requires_grad:
        return Decision(False, "no gradient of log_decay")
    if problem.tensors.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, f"chunks of {CHUNK} tokens, small matrix products")


def can_run_reference(problem: LinearProblem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, holds the L x L weights" if problem.tensors.causal else "literal form")


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    normalise: bool,
    scale: float,
    initial_state: Tensor | None,
    triton: bool,
) -> LinearAttention:
    """Bring every case to the recurrence: left-out keys are zeros, the sum of the weights is one more value column."""
    if mask is not None:
        key = key.masked_fill(~mask.expand(key.shape[0], 1, 1, key.shape[2]).transpose(-1, -2), 0.0)
    if normalise:
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    wide = reference.wide(query)
    if initial_state is None:
        initial_state = query.new_zeros(*query.shape[:2], query.shape[3], value.shape[3], dtype=wide)
    if causal or triton:
        rates = query.new_zeros(query.shape[1], dtype=wide) if log_decay is None else log_decay.detach().to(wide)
        out, state = linear_recurrence(query, key, value, rates, initial_state, causal, scale, normalise, triton)
    else:
        products = key.to(wide).transpose(-1, -2) @ value.to(wide)  # (B, Hkv, D, Dv)
        state = initial_state + products.repeat_interleave(query.shape[1] // key.shape[1], 1)
        out = (scale * query.to(wide)) @ state
    if normalise:
        out = reference.divide_by_last(out)
    return LinearAttention(out.to(query.dtype), state)


@torch.library.custom_op("saccade::linear_recurrence", mutates_args=())
def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    causal: bool,
    scale: float,
    wide_out: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence; a registered operator, differentiable in query, key, value and state through both results.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        log_decay: ``(H,)``, dtype of the state; gets no gradient.
        state: ``(B, H, D, Dv)``, float32 or float64.
        causal: As in the public function; the form of torch operators is for ``True``.
        scale: Factor of the products.
        wide_out: Return the output in the dtype of the state, not of the query.
        triton: Run Triton's kernels, not torch's operators.

    Returns:
        Output ``(B, H, L, Dv)`` and last state.
    """
    dtype = state.dtype if wide_out else query.dtype
    if triton:
        from saccade.attention.kernels import linear

        return linear.forward(query, key, value, log_decay, state, causal, scale, dtype)
    keys, values = reference.per_query_head(key, query), reference.per_query_head(value, query)
    return scan(scale * query.to(state.dtype), keys, values, state, log_decay, False, dtype)


@linear_recurrence.register_fake
def linear_recurrence_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    causal: bool,
    scale: float,
    wide_out: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    out = query.new_empty(*query.shape[:3], value.shape[3], dtype=state.dtype if wide_out else query.dtype)
    return out, torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("saccade::linear_recurrence_backward", mutates_args=())
def linear_recurrence_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    causal: bool,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and state; states are computed again, none was kept.

    Each is a recurrence of the same form. That of the query runs forward with ``(dO, v, k)`` for ``(q, k, v)``. Those
    of key and value run from the end, ``(v, dO, q)`` and ``(k, q, dO)``, and start from the gradient of the last state.
    """
    if triton:
        from saccade.attention.kernels import linear

        grads = linear.backward(grad_out, grad_state, query, key, value, log_decay, state, causal, scale)
    else:
        wide = state.dtype
        q, do = scale * query.to(wide), grad_out.to(wide)
        k, v = reference.per_query_head(key, query), reference.per_query_head(value, query)
        grad_query, _ = scan(do, v, k, state.transpose(-1, -2), log_decay, False, wide)
        grad_key, _ = scan(v, do, q, grad_state.transpose(-1, -2), log_decay, True, wide)
        grad_value, grad_first = scan(k, q, do, grad_state, log_decay, True, wide)
        grads = (scale * grad_query).to(query.dtype), grad_key, grad_value, grad_first
    return grads[0], reference.sum_groups(grads[1], key), reference.sum_groups(grads[2], value), grads[3]


@linear_recurrence_backward.register_fake
def linear_recurrence_backward_fake(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    causal: bool,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    inputs = (query, key, value, state)
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    return grads[0], grads[1], grads[2], grads[3]


def scan(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor, reverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Walk over the chunks with a state, all ``(B, H, N, ...)`` and float32 or float64; return ``out`` in ``dtype``.

    ``reverse`` walks from the end and sums over ``j >= i``: then the state is the cotangent of the one that leaves a
    chunk, so it has decayed by ``count - 1 - i`` steps at token ``i`` where the forward state has by ``i + 1``.
    """
    batch, heads, length, _ = query.shape
    rate = log_decay.repeat(batch)[:, None, None]  # (B H, 1, 1)
    steps = torch.arange(CHUNK, device=query.device)
    triangle = torch.exp(rate * (steps[:, None] - steps).clamp(min=0)).tril()  # (B H, C, C)
    since_start = torch.exp(rate * (steps[:, None] + 1))  # (B H, C, 1)
    until_end = torch.exp(rate * (CHUNK - 1 - steps[:, None]))
    if reverse:
        triangle = triangle.transpose(-1, -2)
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    state = state.flatten(0, 1).clone(memory_format=torch.contiguous_format)
    out = query.new_empty(*query.shape[:2], value.shape[2], dtype=dtype)
    starts = range(0, length, CHUNK)
    for start in reversed(starts) if reverse else starts:
        part = slice(start, min(start + CHUNK, length))
        q, k, v = query[:, part], key[:, part], value[:, part]
        count = q.shape[1]
        passed, left = since_start[:, :count], until_end[:, CHUNK - count :]
        entering, leaving = (left, passed) if reverse else (passed, left)
        weights = torch.bmm(q, k.transpose(-1, -2)).mul_(triangle[:, :count, :count])
        out[:, part] = torch.bmm(q, state).mul_(entering).baddbmm_(weights, v)
        state.mul_(passed[:, -1:]).baddbmm_((k * leaving).transpose(-1, -2), v)
    return out.unflatten(0, (batch, heads)), state.unflatten(0, (batch, heads))


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep the inputs for the backward pass, and nothing else."""
    query, key, value, log_decay, state, ctx.causal, ctx.scale, _, ctx.triton = inputs
    ctx.save_for_backward(query, key, value, log_decay, state)


def linear_recurrence_grads(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Call the backward operator."""
    grads = linear_recurrence_backward(grad_out, grad_state, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.triton)
    return *grads[:3], None, grads[3], None, None, None, None


linear_recurrence.register_autograd(linear_recurrence_grads, setup_context=keep_inputs)


def scripted_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> LinearAttention:
    """Stand in for :func:`linear_attention` in TorchScript: its literal form, made of torch's own operators."""
    return reference.linear_attention(query, key, value, log_decay, mask, causal, normalise, scale, initial_state)


linear_attention.__prepare_scriptable__ = lambda: scripted_linear_attention  # type: ignore[attr-defined]

LINEAR = register(
    Operator(
        function=linear_attention,
        summary="q (sum of k^T v), with decay: a state instead of scores",
        backends=(
            Backend("triton", can_run_kernel, partial(run, triton=True)),
            Backend("torch", can_run_torch, partial(run, triton=False)),
            Backend("reference", can_run_reference, reference.linear_attention),
        ),
        describe=describe_linear,
        example=example,
    )
)
