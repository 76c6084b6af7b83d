"""Context mixing: depthwise kernels that each position generates from its affinity to region centres.

The kernel of a position is ``softmax(P A)`` with ``A`` its products with the R region centres and ``P`` a projection
from R to the taps. ``P (K q) = (P K) q``: with the taps as "keys" of the query's own width the logits cost R / c times
less, and are cheap enough to be computed again in the backward pass instead of kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.recompute import register_backward
from saccade.attention.windows import TileRow, Windows
from saccade.errors import ShapeError

__all__ = ["ContextKernels", "context_kernels", "context_mixing"]


def context_mixing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Filter a map with kernels made at each position from its affinity to region centres.

    For position ``n`` of group ``g``: ``A_l = scale * query[g, :, n] . key[g, :, l]`` over the R centres,
    ``[s, t] = projection A + projection_bias`` with S * S and K * K entries, and the two kernels are ``softmax(s + r)``
    and ``softmax(t + r')``, ``r`` and ``r'`` taken from the tables by relative position. The first half of the value's
    channels is filtered with the small kernel, the second half with the large one. At the border the window is shifted
    until it lies inside the map; nothing is padded.

    Args:
        query: ``(B, G c, H, W)``, any floating dtype; H and W at least the kernel sizes.
        key: Region centres, ``(B, G c, h, w)`` with ``R = h w``.
        value: ``(B, 2 G d, H, W)``; each half has its own G groups of d channels.
        projection: ``(S S + K K, R)``, from affinities to taps, row-major, small kernel first; the same for all groups.
        projection_bias: ``(S S + K K,)``.
        small_table: ``(G, 2 S - 1, 2 S - 1)``, bias by relative position (0 offset in the middle); sets S, odd, and G.
        large_table: ``(G, 2 K - 1, 2 K - 1)``; sets K, odd.
        scale: Factor of the products; ``None`` means ``(2 d) ** -0.5``, the width of a group over both halves.
        backend: ``"auto"``, ``"triton"``, ``"tiles"`` or ``"reference"``; see :mod:`saccade.attention.dispatch`.

    Returns:
        ``(B, 2 G d, H, W)``, channels in the order of ``value``.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device, a kernel size is even, or a side of the map is
            shorter than a kernel (resize the map first).
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", CVPR
        2025 (arXiv:2502.20087); official code LMMMEng/OverLoCK (Apache-2.0), models/overlock.py at commit 2c8ab3b.

    Example:
        >>> query, key, value = torch.zeros(1, 8, 9, 12), torch.zeros(1, 8, 7, 7), torch.ones(1, 16, 9, 12)
        >>> tables = torch.zeros(2, 5, 5), torch.zeros(2, 13, 13)  # 2 groups, 3 x 3 and 7 x 7 taps
        >>> context_mixing(query, key, value, torch.zeros(58, 49), torch.zeros(58), *tables).shape
        torch.Size([1, 16, 9, 12])
    """
    tensors = (query, key, value, projection, projection_bias, small_table, large_table)
    out: Tensor = CONTEXT_MIXING.call(tensors, {"scale": scale}, backend)
    return out


class ContextKernels(NamedTuple):
    """The kernels of every position; float32, or float64 for float64 input.

    Args:
        small: ``(B, G, S, S, H, W)``; the weights of a position sum to 1.
        large: ``(B, G, K, K, H, W)``.
    """

    small: Tensor
    large: Tensor


def context_kernels(
    query: Tensor,
    key: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
    *,
    scale: float,
) -> ContextKernels:
    """Return the kernels that :func:`context_mixing` makes and does not keep, to look at.

    Tap ``(a, b)`` of position ``(y, x)`` weighs the value at ``(clamp(y - K // 2, 0, H - K) + a, ...)``, and likewise
    along x. Takes ``B G (S S + K K) H W`` numbers.

    Args:
        query: As there; so the other tensors.
        key: See there.
        projection: See there.
        projection_bias: See there.
        small_table: See there.
        large_table: See there.
        scale: Factor of the products; there is no value whose width could decide it.

    Raises:
        ShapeError: As there.
    """
    groups = small_table.shape[0]
    value = query.repeat(1, 2, 1, 1)  # any value: only its shape is looked at
    problem = describe(query, key, value, projection, projection_bias, small_table, large_table, scale=scale)
    taps = tap_kernels(query, key, projection, groups, query.shape[1], scale)
    logits = taps @ query.to(taps.dtype).flatten(2).unflatten(1, (groups, -1))  # (B, G, S S + K K, H W)
    kernels = []
    for size, table, part, bias in (
        (problem.small, small_table, logits[:, :, : problem.small**2], projection_bias[: problem.small**2]),
        (problem.large, large_table, logits[:, :, problem.small**2 :], projection_bias[problem.small**2 :]),
    ):
        rows, columns = (
            reference.neighbours(side, size, query.device)[:, 0] - torch.arange(side, device=query.device) + size - 1
            for side in (problem.height, problem.width)
        )
        biases = window_biases(table, bias)[:, rows][:, :, columns]  # (G, H, W, size, size)
        shifted = part + biases.flatten(3).permute(0, 3, 1, 2).flatten(2)
        shape = (size, size, problem.height, problem.width)
        kernels.append(torch.softmax(shifted, 2).reshape(query.shape[0], groups, *shape))
    return ContextKernels(*kernels)


@dataclass(frozen=True)
class MixingProblem:
    """The facts about one call that decide which backends can run it.

    Args:
        device: Device type.
        dtype: Of all tensors.
        batch: B.
        groups: G.
        query_width: c, channels of a group of the query.
        value_width: d, channels of a group of either half of the value.
        height: H.
        width: W.
        small: S.
        large: K.
        exporting: Under ``torch.export`` or ``torch.jit.trace``.
    """

    device: str
    dtype: torch.dtype
    batch: int
    groups: int
    query_width: int
    value_width: int
    height: int
    width: int
    small: int
    large: int
    exporting: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"B {self.batch}, map {self.height} x {self.width}, G {self.groups}, c {self.query_width}, "
            f"d {self.value_width}, kernels {self.small} and {self.large}, {dtype} on {self.device}"
        )


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
    *,
    scale: float | None = None,
) -> MixingProblem:
    """Check the arguments of :func:`context_mixing` and return the facts about them.

    Raises:
        ShapeError: See there.
    """
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ShapeError(f"query (B, G c, H, W), key (B, G c, h, w) and value (B, 2 G d, H, W) must be 4-D; {shapes}.")
    small, large = kernel_size("small_table", small_table), kernel_size("large_table", large_table)
    groups = small_table.shape[0]
    batch, query_channels, height, width = query.shape
    value_channels = value.shape[1]
    expected = {
        "key": (key, (batch, query_channels, *key.shape[2:])),
        "value": (value, (batch, value_channels, height, width)),
        "projection": (projection, (small**2 + large**2, key.shape[2] * key.shape[3])),
        "projection_bias": (projection_bias, (small**2 + large**2,)),
        "large_table": (large_table, (groups, 2 * large - 1, 2 * large - 1)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} must be {shape} beside query {tuple(query.shape)}, key {tuple(key.shape)} and kernels of "
                f"{small} and {large} taps a side in {groups} groups; got {tuple(tensor.shape)}."
            )
    if query_channels == 0 or query_channels % groups != 0:
        raise ShapeError(
            f"query must have a multiple of G = {groups} channels (see small_table); got {query_channels}."
        )
    if value_channels == 0 or value_channels % (2 * groups) != 0:
        raise ShapeError(f"value must have a multiple of 2 G = {2 * groups} channels; got {value_channels}.")
    if min(height, width) < max(small, large):
        raise ShapeError(
            f"the map must be no smaller than the kernels of {small} and {large} taps a side; got {height} x {width}. "
            "Resize query and value first, and pool the result back."
        )
    tensors = (query, key, value, projection, projection_bias, small_table, large_table)
    if not query.is_floating_point() or any(tensor.dtype != query.dtype for tensor in tensors):
        raise ShapeError(f"all tensors must have one floating-point dtype; got {[tensor.dtype for tensor in tensors]}.")
    if any(tensor.device != query.device for tensor in tensors):
        raise ShapeError(f"all tensors must be on one device; got {[str(tensor.device) for tensor in tensors]}.")
    return MixingProblem(
        device=query.device.type,
        dtype=query.dtype,
        batch=batch,
        groups=groups,
        query_width=query_channels // groups,
        value_width=value_channels // (2 * groups),
        height=height,
        width=width,
        small=small,
        large=large,
        exporting=torch.compiler.is_exporting() or torch.jit.is_tracing(),
    )


def kernel_size(name: str, table: Tensor) -> int:
    """Return K of a ``(G, 2 K - 1, 2 K - 1)`` table."""
    if table.ndim != 3 or table.shape[0] == 0 or table.shape[1] != table.shape[2] or table.shape[1] % 4 != 1:
        raise ShapeError(f"{name} must be (G, 2 K - 1, 2 K - 1) with an odd kernel size K; got {tuple(table.shape)}.")
    return (table.shape[1] + 1) // 2


def tap_kernels(
    query: Tensor, key: Tensor, projection: Tensor, groups: int, value_channels: int, scale: float | None
) -> Tensor:
    """Return what the query is multiplied with for the logits of taps: ``(B, G, S S + K K, c)``, at least float32."""
    if scale is None:
        scale = (value_channels // groups) ** -0.5
    wide = reference.wide(query)
    centers = key.to(wide).flatten(2).unflatten(1, (groups, -1))  # (B, G, c, R)
    kernels: Tensor = scale * (projection.to(wide) @ centers.transpose(2, 3))
    return kernels


def window_biases(table: Tensor, projection_bias: Tensor) -> Tensor:
    """Return the bias of each tap in each kind of window, ``(G, K, K, K, K)``, at least float32.

    A window is of kind ``(d, e)`` if its position lies ``K - 1 - d`` rows and ``K - 1 - e`` columns inside it:
    ``K // 2`` in the middle of the map, more or less where the border shifts it.
    """
    kernel, wide = (table.shape[1] + 1) // 2, reference.wide(table)
    windows = table.to(wide).unfold(1, kernel, 1).unfold(2, kernel, 1)
    return windows + projection_bias.to(wide).view(kernel, kernel)


def tiled_context_mixing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
    scale: float | None,
) -> Tensor:
    """Run over tiles of positions, as attention to the values that the windows of a tile cover."""
    groups, taps = small_table.shape[0], ((small_table.shape[1] + 1) // 2) ** 2
    kernels = tap_kernels(query, key, projection, groups, value.shape[1], scale)
    out: Tensor = mix_tiles(
        query.unflatten(1, (groups, -1)),
        kernels[:, :, :taps],
        kernels[:, :, taps:],
        window_biases(small_table, projection_bias[:taps]),
        window_biases(large_table, projection_bias[taps:]),
        value.unflatten(1, (2, groups, -1)),
    )
    return out.flatten(1, 3)


def triton_context_mixing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
    scale: float | None,
) -> Tensor:
    """Run the Triton kernels."""
    from saccade.attention.kernels.context_mixing import forward

    groups, small, large = small_table.shape[0], (small_table.shape[1] + 1) // 2, (large_table.shape[1] + 1) // 2
    kernels = tap_kernels(query, key, projection, groups, value.shape[1], scale)
    biases = [
        window_biases(small_table, projection_bias[: small**2]).flatten(),
        window_biases(large_table, projection_bias[small**2 :]).flatten(),
    ]
    out: Tensor = forward(query, kernels.contiguous(), torch.cat(biases), value, small, large)[0]
    return out


def blocks(query: Tensor, biases: Tensor) -> Iterator[tuple[TileRow, int, slice]]:
    """Yield row of tiles, sample and groups of each block of work on query ``(B, G, c, H, W)``."""
    for tiles in Windows(biases.shape[-1], query.shape[3], query.shape[4], query.device).tile_rows():
        for sample in range(query.shape[0]):
            for groups in tiles.chunks(query.shape[1]):
                yield tiles, sample, groups


@torch.library.custom_op("saccade::mix_tiles", mutates_args=())
def mix_tiles(
    query: Tensor,
    small_kernels: Tensor,
    large_kernels: Tensor,
    small_biases: Tensor,
    large_biases: Tensor,
    value: Tensor,
) -> Tensor:
    """Filter both halves of the value; a registered operator that keeps its arguments for the backward pass alone.

    Args:
        query: ``(B, G, c, H, W)``.
        small_kernels: ``(B, G, S S, c)``, see :func:`tap_kernels`.
        large_kernels: ``(B, G, K K, c)``.
        small_biases: ``(G, S, S, S, S)``, see :func:`window_biases`.
        large_biases: ``(G, K, K, K, K)``.
        value: ``(B, 2, G, d, H, W)``.

    Returns:
        ``(B, 2, G, d, H, W)``, channels last in memory.
    """
    out = new_mixed(value)
    queries, values, mixed = (positions_first(image) for image in (query, value, out))
    for half, (kernels, biases) in enumerate(((small_kernels, small_biases), (large_kernels, large_biases))):
        for tiles, sample, groups in blocks(query, biases):
            part = kernels[sample, groups]
            weights = tiles.weights(tiles.cut(queries[sample, groups]).to(part.dtype), part, biases[groups])
            covered = tiles.cover(values[sample, half, groups]).to(part.dtype)
            tiles.paste(tiles.unite(torch.bmm(tiles.spread(weights), covered)), mixed[sample, half, groups])
    return out


def positions_first(image: Tensor) -> Tensor:
    """Return ``(..., c, H, W)`` as ``(..., H, W, c)``, a view."""
    return image.movedim(-3, -1)


def new_mixed(value: Tensor) -> Tensor:
    """Return an unfilled result like ``value``, ``(B, 2, G, d, H, W)``, whose memory is ``(B, H, W, 2, G, d)``."""
    batch, halves, groups, width, height, columns = value.shape
    return value.new_empty((batch, height, columns, halves, groups, width)).permute(0, 3, 4, 5, 1, 2)


@mix_tiles.register_fake
def mix_tiles_fake(
    query: Tensor,
    small_kernels: Tensor,
    large_kernels: Tensor,
    small_biases: Tensor,
    large_biases: Tensor,
    value: Tensor,
) -> Tensor:
    """Return a result of the right shape, dtype and strides."""
    return new_mixed(value)


@torch.library.custom_op("saccade::mix_tiles_backward", mutates_args=())
def mix_tiles_backward(
    grad_out: Tensor,
    query: Tensor,
    small_kernels: Tensor,
    large_kernels: Tensor,
    small_biases: Tensor,
    large_biases: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the weights again, block by block, and return the gradients of the arguments of :func:`mix_tiles`.

    With the spread weights ``P`` of a tile and the covered values ``V``: ``dP = dO^T V``, ``dV = dO P``, and for the
    logits ``dS = p * (dp - sum p dp)``, from which ``dq`` and the gradients of kernels and biases follow.
    """
    grad_query = torch.zeros(query.shape, dtype=small_kernels.dtype, device=query.device)
    grad_value = torch.zeros(value.shape, dtype=small_kernels.dtype, device=value.device)
    images = (query, value, grad_out, grad_query, grad_value)
    queries, values, grads_out, grad_queries, grad_values = (positions_first(image) for image in images)
    grads = []
    for half, (kernels, biases) in enumerate(((small_kernels, small_biases), (large_kernels, large_biases))):
        grad_kernels = torch.zeros_like(kernels, memory_format=torch.contiguous_format)
        grad_biases = torch.zeros_like(biases, memory_format=torch.contiguous_format)
        for tiles, sample, groups in blocks(query, biases):
            part = kernels[sample, groups]
            cut = tiles.cut(queries[sample, groups]).to(part.dtype)
            weights = tiles.weights(cut, part, biases[groups])
            covered = tiles.cover(values[sample, half, groups]).to(part.dtype)
            grad = tiles.separate(tiles.cut(grads_out[sample, half, groups]).to(part.dtype))
            tiles.add_cover(torch.bmm(tiles.spread(weights).transpose(1, 2), grad), grad_values[sample, half, groups])
            grad_weights = tiles.collect(torch.bmm(grad, covered.transpose(1, 2)))
            grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
            tiles.paste(torch.bmm(grad_logits, part), grad_queries[sample, groups], add=True)
            grad_kernels[sample, groups].baddbmm_(grad_logits.transpose(1, 2), cut)
            tiles.add_biases(grad_logits, grad_biases[groups])
        grads += [grad_kernels, grad_biases]
    return grad_query.to(query.dtype), grads[0], grads[2], grads[1], grads[3], grad_value.to(value.dtype)


register_backward(mix_tiles, mix_tiles_backward)


def always(problem: MixingProblem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, holds the kernel of every position and every window's values")


def can_run_kernels(problem: MixingProblem) -> Decision:
    """Say whether Triton can run here; its kernels compute in float32."""
    if problem.dtype == torch.float64:
        return Decision(False, "the Triton kernels compute in float32")
    return can_run_triton(problem.device, exporting=problem.exporting)


def can_run_tiles(problem: MixingProblem) -> Decision:
    """Say yes unless only torch's own operators may appear."""
    if problem.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, "matrix products over tiles of positions, nothing kept for the backward pass")


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    """Return normal arguments with H groups of width D on a square map of N positions or more, 5 x 5 and 7 x 7 taps."""
    batch, groups, positions, width = shape
    side = max(7, math.isqrt(positions - 1) + 1)
    shapes = [
        (batch, groups * width, side, side),
        (batch, groups * width, 7, 7),
        (batch, 2 * groups * width, side, side),
        (74, 49),
        (74,),
        (groups, 9, 9),
        (groups, 13, 13),
    ]
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, generator=generator).to(device, dtype) for size in shapes)


def scripted_context_mixing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stand in for :func:`context_mixing` in TorchScript: its literal form, made of torch's own operators."""
    return reference.context_mixing(query, key, value, projection, projection_bias, small_table, large_table, scale)


# The hook by which torch.jit.script asks an object for the form to compile.
context_mixing.__prepare_scriptable__ = lambda: scripted_context_mixing  # type: ignore[attr-defined]

CONTEXT_MIXING = register(
    Operator(
        function=context_mixing,
        summary="depthwise kernels made from affinity to region centres",
        backends=(
            Backend("triton", can_run_kernels, triton_context_mixing),
            Backend("tiles", can_run_tiles, tiled_context_mixing),
            Backend("reference", always, reference.context_mixing),
        ),
        describe=describe,
        example=example,
    )
)
