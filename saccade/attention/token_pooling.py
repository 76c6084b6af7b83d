"""Token-aware average pooling: tokens averaged over dilated boxes, with weights given for each token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.recompute import register_backward
from saccade.errors import ShapeError

__all__ = ["token_average_pooling"]

BLOCK = 1 << 17  # elements of tokens worked on at a time: 512 KiB in float32, so that a few passes stay in the cache


def token_average_pooling(tokens: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Average each token with its neighbourhoods at several dilations, weighted for each token (TAP).

    ``out[n] = weights[0, n] tokens[n] + sum_k weights[k, n] / 9 * (sum of the 3 x 3 tokens around n, k apart)`` for
    ``k = 1 .. K - 1``. What lies outside the map counts as zero; the divisor stays 9.

    Args:
        tokens: ``(B, H W, C)``, row-major, without class token, any floating dtype and strides; a map ``(B, C, H, W)``
            is passed as ``map.flatten(2).transpose(1, 2)``.
        weights: ``(B, K, H, W)``, dtype of ``tokens``; as a rule a softmax over K of what a small network predicts.
        backend: ``"auto"``, ``"triton"``, ``"boxes"`` or ``"reference"``; see :mod:`saccade.attention.dispatch`.

    Returns:
        ``(B, H W, C)``.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Guo, Stutz and Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023;
        official code guoyongcs/TAPADL at commit 6e4dbff.

    Example:
        >>> weights = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
        >>> token_average_pooling(torch.ones(1, 9, 1), weights).view(3, 3)[:2]  # 4, 6 or 9 of 9 tokens lie inside
        tensor([[0.7222, 0.8333, 0.7222],
                [0.8333, 1.0000, 0.8333]])
    """
    out: Tensor = TOKEN_AVERAGE_POOLING.call((tokens, weights), {}, backend)
    return out


@dataclass(frozen=True)
class StencilProblem:
    """The facts about one call of :func:`token_average_pooling` that decide which backends can run it.

    Args:
        device: Device type.
        dtype: Of both tensors.
        batch: B.
        branches: K.
        height: H.
        width: W.
        channels: C.
        exporting: Under ``torch.export`` or ``torch.jit.trace``.
    """

    device: str
    dtype: torch.dtype
    batch: int
    branches: int
    height: int
    width: int
    channels: int
    exporting: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"B {self.batch}, {self.branches} branches, map {self.height} x {self.width}, C {self.channels}, "
            f"{dtype} on {self.device}"
        )


def describe(tokens: Tensor, weights: Tensor) -> StencilProblem:
    """Check the arguments of :func:`token_average_pooling` and return the facts about them.

    Raises:
        ShapeError: See there.
    """
    shapes = f"got tokens {tuple(tokens.shape)}, weights {tuple(weights.shape)}"
    if tokens.ndim != 3 or weights.ndim != 4 or weights.shape[1] == 0:
        raise ShapeError(f"tokens must be (B, H W, C) and weights (B, K, H, W) with K of at least 1; {shapes}.")
    batch, branches, height, width = weights.shape
    if tokens.shape[:2] != (batch, height * width):
        raise ShapeError(
            f"tokens (B, H W, C) must have B and H W of weights (B, K, H, W); {shapes}. Is a class token left?"
        )
    if not tokens.is_floating_point() or weights.dtype != tokens.dtype:
        raise ShapeError(f"tokens and weights must have one floating-point dtype; got {tokens.dtype}, {weights.dtype}.")
    if weights.device != tokens.device:
        raise ShapeError(f"tokens and weights must be on one device; got {tokens.device}, {weights.device}.")
    return StencilProblem(
        device=tokens.device.type,
        dtype=tokens.dtype,
        batch=batch,
        branches=branches,
        height=height,
        width=width,
        channels=tokens.shape[2],
        exporting=torch.compiler.is_exporting() or torch.jit.is_tracing(),
    )


class Margin:
    """Maps of tokens with a margin of zeros, from which sums over dilated boxes are slices added up.

    Args:
        blocks: What :meth:`hold` will be given, as :func:`chunks` says.
        like: Tokens that they are parts of.
        height: Of the maps.
        width: Of the maps.
        margin: Zeros on each side.
    """

    def __init__(self, blocks: list[tuple[slice, slice]], like: Tensor, height: int, width: int, margin: int) -> None:
        self.height, self.width, self.margin = height, width, margin
        samples = max((block.stop - block.start for block, _ in blocks), default=0)
        channels = max((block.stop - block.start for _, block in blocks), default=0)
        shape = (samples, height + 2 * margin, width + 2 * margin, channels)
        self.buffer = torch.zeros(shape, dtype=reference.wide(like), device=like.device)

    def hold(self, samples: int, channels: int) -> Tensor:
        """Take so many maps next; return the place inside the margin that they are to be written to."""
        self.padded = self.buffer[:samples, ..., :channels]
        rows, columns = (slice(self.margin, self.margin + length) for length in (self.height, self.width))
        self.inside = self.padded[:, rows, columns]
        return self.inside

    def box(self, dilation: int) -> Tensor:
        """Return the sum of the 3 x 3 tokens ``dilation`` apart around each: of rows, then of columns."""
        before, here, after = self.margin - dilation, self.margin, self.margin + dilation
        padded, height, width = self.padded, self.height, self.width
        rows = padded[:, :, before : before + width] + padded[:, :, here : here + width]
        rows += padded[:, :, after : after + width]
        box = rows[:, before : before + height] + rows[:, here : here + height]
        box += rows[:, after : after + height]
        return box


def chunks(tokens: Tensor) -> list[tuple[slice, slice]]:
    """Return samples and channels of each block of work on ``(B, N, C)``: some samples, or channels of one."""
    batch, length, width = tokens.shape
    channels = min(max(64, BLOCK // max(length, 1)), width)
    samples = max(1, BLOCK // max(length * width, 1))
    return [
        (slice(sample, min(sample + samples, batch)), slice(channel, min(channel + channels, width)))
        for sample in range(0, batch, samples)
        for channel in range(0, width, max(channels, 1))
    ]


def scaled(weights: Tensor) -> Tensor:
    """Return the weight of each token of a box, ``(B, K, H, W, 1)`` in at least float32: the divisor 9 is in it."""
    weights = weights.to(reference.wide(weights), copy=True).unsqueeze(-1)
    weights[:, 1:] /= 9
    return weights


@torch.library.custom_op("saccade::pool_tokens", mutates_args=())
def pool_tokens(tokens: Tensor, weights: Tensor) -> Tensor:
    """Compute :func:`token_average_pooling`; a registered operator that keeps its arguments alone for backward."""
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    factor = scaled(weights)
    height, width = weights.shape[2:]
    blocks = chunks(tokens)
    margin = Margin(blocks, tokens, height, width, weights.shape[1] - 1)
    for samples, channels in blocks:
        image = tokens[samples, :, channels].unflatten(1, (height, width))
        inside = margin.hold(image.shape[0], image.shape[3]).copy_(image)
        pooled = inside * factor[samples, 0]
        for dilation in range(1, weights.shape[1]):
            pooled.addcmul_(margin.box(dilation), factor[samples, dilation])
        out[samples, :, channels] = pooled.flatten(1, 2)
    return out


@pool_tokens.register_fake
def pool_tokens_fake(tokens: Tensor, weights: Tensor) -> Tensor:
    """Return a result of the right shape, dtype and strides."""
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


@torch.library.custom_op("saccade::pool_tokens_backward", mutates_args=())
def pool_tokens_backward(grad_out: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and weights.

    Sums over boxes are self-adjoint: ``d tokens = sum_k box_k(weights_k d out)``, and ``d weights_k`` is the product of
    ``d out`` with ``box_k(tokens)``, summed over channels.
    """
    grad_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    factor = scaled(weights)
    grad_factor = torch.zeros_like(factor)
    height, width = weights.shape[2:]
    blocks = chunks(tokens)
    values, grads = (Margin(blocks, tokens, height, width, weights.shape[1] - 1) for _ in range(2))
    for samples, channels in blocks:
        image = tokens[samples, :, channels].unflatten(1, (height, width))
        inside = values.hold(image.shape[0], image.shape[3]).copy_(image)
        spread = grads.hold(image.shape[0], image.shape[3])
        grad = grad_out[samples, :, channels].unflatten(1, (height, width)).to(factor.dtype)
        grad_image = grad * factor[samples, 0]
        grad_factor[samples, 0] += (grad * inside).sum(-1, keepdim=True)
        for dilation in range(1, weights.shape[1]):
            grad_factor[samples, dilation] += (grad * values.box(dilation)).sum(-1, keepdim=True)
            torch.mul(grad, factor[samples, dilation], out=spread)
            grad_image += grads.box(dilation)
        grad_tokens[samples, :, channels] = grad_image.flatten(1, 2)
    grad_factor[:, 1:] /= 9
    return grad_tokens, grad_factor.squeeze(-1).to(weights.dtype)


register_backward(pool_tokens, pool_tokens_backward)


def triton_token_average_pooling(tokens: Tensor, weights: Tensor) -> Tensor:
    """Run the Triton kernels, which read the tokens where they lie."""
    from saccade.attention.kernels import token_pooling

    out: Tensor = token_pooling.pool_tokens(tokens, weights.contiguous())
    return out


def scripted_token_average_pooling(tokens: Tensor, weights: Tensor, backend: str = "auto") -> Tensor:
    """Stand in for :func:`token_average_pooling` in TorchScript: its literal form, made of torch's own operators."""
    return reference.token_average_pooling(tokens, weights)


def always(problem: StencilProblem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, every step kept for the backward pass")


def can_run_kernels(problem: StencilProblem) -> Decision:
    """Say whether Triton can run here; its kernels compute in float32."""
    if problem.dtype == torch.float64:
        return Decision(False, "the Triton kernels compute in float32")
    return can_run_triton(problem.device, exporting=problem.exporting)


def can_run_boxes(problem: StencilProblem) -> Decision:
    """Say yes unless only torch's own operators may appear."""
    if problem.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, "separable sums, tokens and weights alone are kept for the backward pass")


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    """Return H D channels on a square map of at least N tokens, and weights of 4 branches."""
    batch, heads, tokens, width = shape
    side = math.isqrt(max(tokens, 1) - 1) + 1
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, side * side, heads * width, generator=generator)
    weights = torch.softmax(torch.randn(batch, 4, side, side, generator=generator), 1)
    return values.to(device, dtype), weights.to(device, dtype)


# The hook by which torch.jit.script asks an object for the form to compile.
token_average_pooling.__prepare_scriptable__ = lambda: scripted_token_average_pooling  # type: ignore[attr-defined]

TOKEN_AVERAGE_POOLING = register(
    Operator(
        function=token_average_pooling,
        summary="tokens averaged with dilated 3 x 3 neighbourhoods, weighted for each token",
        backends=(
            Backend("triton", can_run_kernels, triton_token_average_pooling),
            Backend("boxes", can_run_boxes, pool_tokens),
            Backend("reference", always, reference.token_average_pooling),
        ),
        describe=describe,
        example=example,
    )
)
