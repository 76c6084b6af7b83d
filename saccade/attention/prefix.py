"""Softmax weights that do not depend on the query: a mean over the tokens so far, for every token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.merge import AttentionLSE
from saccade.errors import ShapeError

__all__ = ["prefix_softmax_mean"]

CHUNK = 64  # tokens that the CPU path takes at once


def prefix_softmax_mean(scores: Tensor, value: Tensor, *, backend: str = "auto") -> AttentionLSE:
    """Average the values so far, weighed by the softmax of one score each, in time linear in the length.

    ``out[i] = sum_{j<=i} exp(scores[j] - lse[i]) value[j]``, ``lse[i] = log sum_{j<=i} exp(scores[j])``. Nothing
    overflows, whatever the scores. The last row is all there is to remember: unite it with the tokens that follow by
    :func:`merge_partials`.

    Args:
        scores: ``(B, H, S)``, any floating dtype; ``-inf`` leaves a token out.
        value: ``(B, H, S, Dv)``, any floating dtype; may be a strided view. Sums are float32 (float64 for float64).
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        Output ``(B, H, S, Dv)`` in the dtype of ``value`` and log-sum-exp ``(B, H, S)``, both differentiable; zeros and
        ``-inf`` where no token takes part yet.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        "Deconstructing Attention" (arXiv:2510.11602), the "non-approximate" variant, with scores
        ``silu(q[j]) . k[j] / sqrt(D)``.

    Example:
        >>> prefix_softmax_mean(torch.zeros(1, 1, 3), torch.tensor([[[[1.0], [3.0], [8.0]]]])).out.flatten()
        tensor([1., 2., 4.])
    """
    result: AttentionLSE = PREFIX.call((scores, value), {}, backend)
    return result


@dataclass(frozen=True)
class PrefixProblem:
    """The facts about one call of :func:`prefix_softmax_mean`.

    Args:
        device: Device type.
        dtype: Of the value.
        shape: Of the value, (B, H, S, Dv).
        exporting: Under ``torch.export`` or ``torch.jit.trace``.
    """

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    exporting: bool

    def __str__(self) -> str:
        return f"value {self.shape}, {str(self.dtype).removeprefix('torch.')} on {self.device}"


def describe(scores: Tensor, value: Tensor) -> PrefixProblem:
    """Check the arguments of :func:`prefix_softmax_mean` and return the facts about them."""
    if value.ndim != 4 or scores.shape != value.shape[:3]:
        raise ShapeError(
            "scores (B, H, S) and value (B, H, S, Dv) must agree in B, H and S; "
            f"got {tuple(scores.shape)} and {tuple(value.shape)}."
        )
    if not scores.is_floating_point() or not value.is_floating_point():
        raise ShapeError(f"scores and value must be floating point; got {scores.dtype} and {value.dtype}.")
    if scores.device != value.device:
        raise ShapeError(f"scores and value must be on one device; got {scores.device} and {value.device}.")
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return PrefixProblem(value.device.type, value.dtype, tuple(value.shape), exporting)


def can_run_kernel(problem: PrefixProblem) -> Decision:
    """Say whether the Triton kernels can serve."""
    if problem.dtype == torch.float64:
        return Decision(False, "the kernel computes in float32")
    if 0 in problem.shape:
        return Decision(False, "the kernel needs at least one sample, head, token and column")
    return can_run_triton(problem.device, exporting=problem.exporting)


def can_run_torch(problem: PrefixProblem) -> Decision:
    """Say whether the chunked form of torch operators can serve."""
    if problem.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, f"chunks of {CHUNK} tokens")


def run(scores: Tensor, value: Tensor, triton: bool) -> AttentionLSE:
    """Call the registered operator."""
    return AttentionLSE(*prefix_mean(scores, value, triton))


@torch.library.custom_op("saccade::prefix_mean", mutates_args=())
def prefix_mean(scores: Tensor, value: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """Compute the prefix means; a registered operator, differentiable in both arguments through both results.

    A chunk sees what came before it as one more token, whose score is the log-sum-exp and whose value is the mean.
    """
    if triton:
        from saccade.attention.kernels import prefix

        return prefix.forward(scores, value)
    wide = reference.wide(value)
    length = scores.shape[2]
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    lse = scores.new_empty(scores.shape, dtype=wide)
    last_out = value.new_zeros(*value.shape[:2], 1, value.shape[3], dtype=wide)
    last_lse = scores.new_full((*scores.shape[:2], 1), -torch.inf, dtype=wide)
    for start in range(0, length, CHUNK):
        part = slice(start, min(start + CHUNK, length))
        row = scores[:, :, part].to(wide)
        peak = torch.maximum(row.cummax(-1).values, last_lse)
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = causal_exp(row, peak)
        before = torch.exp(last_lse - peak)
        total = weights.sum(-1) + before  # 0 where no token takes part yet
        sums = weights @ value[:, :, part].to(wide) + before.unsqueeze(-1) * last_out
        means = sums / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        out[:, :, part], lse[:, :, part] = means, peak + total.log()
        last_out, last_lse = means[:, :, -1:], lse[:, :, part][:, :, -1:]
    return out, lse


@prefix_mean.register_fake
def prefix_mean_fake(scores: Tensor, value: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    return out, scores.new_empty(scores.shape, dtype=reference.wide(value))


@torch.library.custom_op("saccade::prefix_mean_backward", mutates_args=())
def prefix_mean_backward(
    grad_out: Tensor, grad_lse: Tensor, scores: Tensor, value: Tensor, out: Tensor, lse: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of scores and value, from the end to the start.

    With ``p_ij = exp(scores[j] - lse[i])`` and ``delta = rowsum(dO * O) - dL`` they are ``dv_j = sum_{i>=j} p_ij dO_i``
    and ``ds_j = v_j . dv_j - sum_{i>=j} p_ij delta_i``. What later chunks add is kept relative to the log-sum-exp of
    the last token before them, so that no exponent is positive.
    """
    wide = lse.dtype
    delta = (grad_out.to(wide) * out).sum(-1) - grad_lse
    delta = delta.masked_fill(lse == -torch.inf, 0.0)
    if triton:
        from saccade.attention.kernels import prefix

        return prefix.backward(grad_out, delta, scores, value, lse)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    length = scores.shape[2]
    grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    later = value.new_zeros(*value.shape[:2], 1, value.shape[3] + 1, dtype=wide)  # columns of dO, and delta
    for start in reversed(range(0, length, CHUNK)):
        part = slice(start, min(start + CHUNK, length))
        row, normaliser = scores[:, :, part].to(wide), finite[:, :, part]
        cotangents = torch.cat([grad_out[:, :, part].to(wide), delta[:, :, part, None]], -1)
        weights = causal_exp(row, normaliser)  # (B, H, i, j)
        sums = weights.transpose(-1, -2) @ cotangents + torch.exp(row - normaliser[..., -1:]).unsqueeze(-1) * later
        grad_value[:, :, part] = sums[..., :-1]
        grad_scores[:, :, part] = (value[:, :, part].to(wide) * sums[..., :-1]).sum(-1) - sums[..., -1]
        if start > 0:
            before = torch.exp(lse[:, :, start - 1, None] - normaliser).unsqueeze(-2)  # (B, H, 1, i)
            later = before @ cotangents + before[..., -1:] * later
    return grad_scores, grad_value


@prefix_mean_backward.register_fake
def prefix_mean_backward_fake(
    grad_out: Tensor, grad_lse: Tensor, scores: Tensor, value: Tensor, out: Tensor, lse: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes and dtypes."""
    like = partial(torch.empty_like, memory_format=torch.contiguous_format)
    return like(scores), like(value)


def causal_exp(row: Tensor, subtract: Tensor) -> Tensor:
    """Return ``exp(row[j] - subtract[i])`` for ``j <= i``, else 0; masked before ``exp``, which might overflow."""
    exponents = row.unsqueeze(-2) - subtract.unsqueeze(-1)
    future = torch.ones(exponents.shape[-2:], dtype=torch.bool, device=row.device).triu(1)
    return exponents.masked_fill_(future, -torch.inf).exp_()


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep inputs and results."""
    scores, value, ctx.triton = inputs
    ctx.save_for_backward(scores, value, *output)


def prefix_mean_grads(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Call the backward operator."""
    return *prefix_mean_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.triton), None


prefix_mean.register_autograd(prefix_mean_grads, setup_context=save_for_backward)


def scripted_prefix_softmax_mean(scores: Tensor, value: Tensor, backend: str = "auto") -> AttentionLSE:
    """Stand in for :func:`prefix_softmax_mean` in TorchScript: its literal form."""
    return reference.prefix_softmax_mean(scores, value)


prefix_softmax_mean.__prepare_scriptable__ = lambda: scripted_prefix_softmax_mean  # type: ignore[attr-defined]


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return normal scores ``(B, H, N)`` and values ``(B, H, N, D)``; drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    scores, value = torch.randn(shape[:3], generator=generator), torch.randn(shape, generator=generator)
    return scores.to(device, dtype), value.to(device, dtype)


PREFIX = register(
    Operator(
        function=prefix_softmax_mean,
        summary="mean of the values so far, weighed by the softmax of one score each",
        backends=(
            Backend("triton", can_run_kernel, partial(run, triton=True)),
            Backend("torch", can_run_torch, partial(run, triton=False)),
            Backend(
                "reference",
                lambda problem: Decision(True, "literal form, holds the S x S weights"),
                reference.prefix_softmax_mean,
            ),
        ),
        describe=describe,
        example=example,
    )
)
