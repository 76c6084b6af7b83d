"""Averages over bags of instances, with the softmax of scores that are given."""

# No `from __future__ import annotations` here: TorchScript does not resolve quoted annotations of a NamedTuple.
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.recompute import register_backward
from saccade.errors import ShapeError

__all__ = ["AttentionPooling", "attention_pooling"]

BLOCK = 1 << 18  # elements of the value widened at a time: 1 MiB in float32, so that a chunk stays in the cache


class AttentionPooling(NamedTuple):
    """Pooled values and how much each instance counted.

    Args:
        out: ``(B, M, D)``, dtype of the values.
        weights: ``(B, M, N)``, float32 (float64 for float64 scores); a row sums to 1, or is 0 where nothing takes part.
        lse: ``(B, M)``, log-sum-exp of the scores, dtype of ``weights``; ``-inf`` where nothing takes part.
    """

    out: Tensor
    weights: Tensor
    lse: Tensor


def attention_pooling(
    scores: Tensor, value: Tensor, *, mask: Tensor | None = None, backend: str = "auto"
) -> AttentionPooling:
    """Average the instances of a bag with the softmax of given scores, for M branches or heads at once.

    ``weights[m] = softmax_n(scores[m, n])`` over the instances that take part, and
    ``out[m] = sum_n weights[m, n] value[n]``. Values in half precision are summed in float32, and never copied to it as
    a whole. Parts of a bag that is too large unite exactly, as ``merge_partials`` of their ``AttentionLSE(out, lse)``.

    Args:
        scores: ``(B, M, N)``, any floating dtype; the softmax is in float32.
        value: ``(B, N, D)``, any floating dtype and strides, shared by the branches.
        mask: Bool, broadcastable to ``(B, M, N)``, ``True`` = takes part; padded bags are ``(B, 1, N)``.
        backend: ``"auto"``, ``"triton"``, ``"chunks"`` or ``"reference"``; see :mod:`saccade.attention.dispatch`.

    Returns:
        Output, weights and log-sum-exp, all differentiable. Where no instance takes part, zeros and ``-inf``.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Ilse et al., "Attention-based Deep Multiple Instance Learning", ICML 2018, eq. 7 and 8 (arXiv:1802.04712).

    Example:
        >>> bags, real = torch.tensor([[[4.0], [8.0], [0.0]]]), torch.tensor([[True, True, False]])
        >>> attention_pooling(torch.zeros(1, 1, 3), bags, mask=real[:, None]).out
        tensor([[[6.]]])
    """
    result: AttentionPooling = ATTENTION_POOLING.call((scores, value), {"mask": mask}, backend)
    return result


@dataclass(frozen=True)
class BagProblem:
    """The facts about one call of :func:`attention_pooling` that decide which backends can run it.

    Args:
        device: Device type.
        dtype: Of the value.
        wide: Of the weights.
        batch: B.
        branches: M.
        instances: N.
        channels: D.
        mask: A mask was given.
        exporting: Under ``torch.export`` or ``torch.jit.trace``.
    """

    device: str
    dtype: torch.dtype
    wide: torch.dtype
    batch: int
    branches: int
    instances: int
    channels: int
    mask: bool
    exporting: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B {self.batch}, M {self.branches}, N {self.instances}, D {self.channels}"
        return f"{sizes}, {dtype} on {self.device}" + ", mask" * self.mask


def describe(scores: Tensor, value: Tensor, *, mask: Tensor | None = None) -> BagProblem:
    """Check the arguments of :func:`attention_pooling` and return the facts about them.

    Raises:
        ShapeError: See there.
    """
    shapes = f"got scores {tuple(scores.shape)}, value {tuple(value.shape)}"
    if scores.ndim != 3 or value.ndim != 3:
        raise ShapeError(f"scores must be (B, M, N) and value (B, N, D); {shapes}.")
    batch, branches, instances = scores.shape
    if value.shape[:2] != (batch, instances):
        raise ShapeError(f"scores (B, M, N) and value (B, N, D) must agree in B and N; {shapes}.")
    if not scores.is_floating_point() or not value.is_floating_point():
        raise ShapeError(f"scores and value must be floating point; got {scores.dtype}, {value.dtype}.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ShapeError(f"mask must be bool (True = takes part); got {mask.dtype}. Compare first, e.g. mask != 0.")
        sizes = scores.shape[3 - min(mask.ndim, 3) :]
        if mask.ndim > 3 or any(got not in (1, size) for got, size in zip(mask.shape, sizes, strict=True)):
            raise ShapeError(
                f"mask must be broadcastable to (B, M, N) = {tuple(scores.shape)}; got {tuple(mask.shape)}. "
                "A padding mask (B, N) is passed as mask[:, None]."
            )
    devices = [str(tensor.device) for tensor in (scores, value, mask) if tensor is not None]
    if len(set(devices)) > 1:
        raise ShapeError(f"scores, value and mask must be on one device; got {', '.join(devices)}.")
    return BagProblem(
        device=value.device.type,
        dtype=value.dtype,
        wide=reference.wide(scores),
        batch=batch,
        branches=branches,
        instances=instances,
        channels=value.shape[2],
        mask=mask is not None,
        exporting=torch.compiler.is_exporting() or torch.jit.is_tracing(),
    )


def chunked_attention_pooling(scores: Tensor, value: Tensor, mask: Tensor | None) -> AttentionPooling:
    """Run torch's matrix product; values narrower than the weights are widened a chunk of instances at a time."""
    weights, lse = reference.pooling_weights(scores, mask)
    if torch.promote_types(weights.dtype, value.dtype) == value.dtype:
        return AttentionPooling(torch.bmm(weights.to(value.dtype), value), weights, lse)
    return AttentionPooling(pool_values(weights, value), weights, lse)


def instance_chunks(value: Tensor) -> Iterator[slice]:
    """Yield slices of the instances of ``(B, N, D)``."""
    step = max(1, BLOCK // max(value.shape[0] * value.shape[2], 1))
    return (slice(first, first + step) for first in range(0, value.shape[1], step))


@torch.library.custom_op("saccade::pool_values", mutates_args=())
def pool_values(weights: Tensor, value: Tensor) -> Tensor:
    """Return ``weights value``, ``(B, M, N)`` times ``(B, N, D)``, summed in the dtype of the weights."""
    out = torch.zeros(weights.shape[0], weights.shape[1], value.shape[2], dtype=weights.dtype, device=value.device)
    for part in instance_chunks(value):
        out.baddbmm_(weights[:, :, part], value[:, part].to(weights.dtype))
    return out.to(value.dtype)


@pool_values.register_fake
def pool_values_fake(weights: Tensor, value: Tensor) -> Tensor:
    """Return a result of the right shape, dtype and strides."""
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2])


@torch.library.custom_op("saccade::pool_values_backward", mutates_args=())
def pool_values_backward(grad_out: Tensor, weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weights, ``dO V^T``, and value, ``W^T dO``."""
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    grad = grad_out.to(weights.dtype)
    for part in instance_chunks(value):
        grad_weights[:, :, part] = torch.bmm(grad, value[:, part].to(weights.dtype).transpose(1, 2))
        grad_value[:, part] = torch.bmm(weights[:, :, part].transpose(1, 2), grad)
    return grad_weights, grad_value


register_backward(pool_values, pool_values_backward)


def triton_attention_pooling(scores: Tensor, value: Tensor, mask: Tensor | None) -> AttentionPooling:
    """Run the Triton kernels of the weighted sum; the scores are small beside the values and left to torch."""
    from saccade.attention.kernels import pooling as kernels

    weights, lse = reference.pooling_weights(scores, mask)
    return AttentionPooling(kernels.pool_values(weights.contiguous(), value), weights, lse)


def literal_attention_pooling(scores: Tensor, value: Tensor, mask: Tensor | None) -> AttentionPooling:
    """Run the literal form."""
    return AttentionPooling(*reference.attention_pooling(scores, value, mask))


def scripted_attention_pooling(
    scores: Tensor, value: Tensor, mask: Tensor | None = None, backend: str = "auto"
) -> AttentionPooling:
    """Stand in for :func:`attention_pooling` in TorchScript: its literal form, made of torch's own operators."""
    out, weights, lse = reference.attention_pooling(scores, value, mask)
    return AttentionPooling(out, weights, lse)


def always(problem: BagProblem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, widens all values")


def can_run_kernels(problem: BagProblem) -> Decision:
    """Say whether Triton can run here; its kernels compute in float32."""
    if torch.float64 in (problem.dtype, problem.wide):
        return Decision(False, "the Triton kernels compute in float32")
    return can_run_triton(problem.device, exporting=problem.exporting)


def can_run_chunks(problem: BagProblem) -> Decision:
    """Say yes, unless values would be widened by a custom operator where only torch's own may appear."""
    if problem.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, "matrix product" + ", widened in chunks" * (problem.dtype != problem.wide))


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    """Return normal scores for H branches and N instances, and values of width D."""
    batch, branches, instances, width = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, branches, instances), (batch, instances, width)]
    return tuple(torch.randn(size, generator=generator).to(device, dtype) for size in shapes)


# The hook by which torch.jit.script asks an object for the form to compile.
attention_pooling.__prepare_scriptable__ = lambda: scripted_attention_pooling  # type: ignore[attr-defined]

ATTENTION_POOLING = register(
    Operator(
        function=attention_pooling,
        summary="bags of instances averaged with the softmax of given scores",
        backends=(
            Backend("triton", can_run_kernels, triton_attention_pooling),
            Backend("chunks", can_run_chunks, chunked_attention_pooling),
            Backend("reference", always, literal_attention_pooling),
        ),
        describe=describe,
        example=example,
    )
)
