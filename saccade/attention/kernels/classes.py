"""Merge attention over classes of keys: each result scaled by its share of the common normaliser, in one pass.

What it does is element-wise, so the bytes are the cost: results are read once and scaled ones written once, where
torch's operators would go over float32 copies of both. A program has a block of queries and goes over the parts, which
are the classes and, last, a weighted class that does not count in the normaliser. One program writes each element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import Build, padded

__all__ = ["BUILDS", "merge", "merge_backward"]

ELEMENTS = 2048  # of a block, so that no width spills


@triton.jit
def load_block(pointer, i, stride, stride_d, inside, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Load rows ``i`` of a matrix in float32, zeros outside."""
    columns = tl.arange(0, BLOCK_DV)
    pointers = pointer + i.to(tl.int64)[:, None] * stride + columns[None, :].to(tl.int64) * stride_d
    return tl.load(pointers, mask=inside[:, None] & (columns < DV)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_block(pointer, i, stride, inside, block, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Store rows ``i`` of a matrix with contiguous rows."""
    columns = tl.arange(0, BLOCK_DV)
    pointers = pointer + i.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, block.to(pointer.dtype.element_ty), mask=inside[:, None] & (columns < DV)[None, :])


@triton.jit
def merge_kernel(
    parts_out, parts_lse, out, lse, scaled, mass,
    parts_b, parts_h, parts_p, parts_l, out_b, out_h, out_l, scaled_b, scaled_h, scaled_p, scaled_l,
    heads, queries, parts, classes, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write the merged output and log-sum-exp, and output and mass of every part."""
    batch_head = tl.program_id(0) // tl.cdiv(queries, BLOCK_M)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    i = tl.program_id(0) % tl.cdiv(queries, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < queries
    line = batch_head.to(tl.int64) * parts * queries + i
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for part in range(classes):
        peak = tl.maximum(peak, tl.load(parts_lse + line + part * queries, mask=inside, other=-float("inf")))
    blind = peak == -float("inf")
    peak = tl.where(blind, 0.0, peak)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in range(classes):
        total += tl.exp(tl.load(parts_lse + line + part * queries, mask=inside, other=-float("inf")) - peak)
    normaliser = peak + tl.log(tl.where(blind, 1.0, total))
    tl.store(lse + batch_head.to(tl.int64) * queries + i, tl.where(blind, -float("inf"), normaliser), mask=inside)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    parts_out += batch * parts_b + head * parts_h
    scaled += batch * scaled_b + head * scaled_h
    for part in range(parts):
        share = tl.exp(tl.load(parts_lse + line + part * queries, mask=inside, other=-float("inf")) - normaliser)
        tl.store(mass + line + part * queries, share, mask=inside)
        place = tl.cast(part, tl.int64)
        block = load_block(parts_out + place * parts_p, i, parts_l, 1, inside, DV, BLOCK_DV) * share[:, None]
        store_block(scaled + place * scaled_p, i, scaled_l, inside, block, DV, BLOCK_DV)
        sums += tl.where(part < classes, block, 0.0)
    store_block(out + batch * out_b + head * out_h, i, out_l, inside, sums, DV, BLOCK_DV)


@triton.jit
def merge_backward_kernel(
    parts_out, mass, grad_out, grad_lse, grad_scaled, grad_mass, grad_parts_out, grad_parts_lse,
    parts_b, parts_h, parts_p, parts_l, out_b, out_h, out_l, out_d,
    scaled_b, scaled_h, scaled_p, scaled_l, scaled_d, grad_b, grad_h, grad_p, grad_l,
    heads, queries, parts, classes, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the parts.

    With G the cotangent of a scaled output (that of the merged output counted in), M that of its mass and
    ``slope = mass * (G . part + M)``: the output's is ``mass * G``, the log-sum-exp's ``slope - mass * delta``,
    ``delta = sum of all slopes - dL``; a weighted part has no delta.
    """
    batch_head = tl.program_id(0) // tl.cdiv(queries, BLOCK_M)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    i = tl.program_id(0) % tl.cdiv(queries, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < queries
    line = batch_head.to(tl.int64) * parts * queries + i
    parts_out += batch * parts_b + head * parts_h
    grad_scaled += batch * scaled_b + head * scaled_h
    grad_parts_out += batch * grad_b + head * grad_h
    merged = load_block(grad_out + batch * out_b + head * out_h, i, out_l, out_d, inside, DV, BLOCK_DV)
    delta = -tl.load(grad_lse + batch_head.to(tl.int64) * queries + i, mask=inside, other=0.0)
    for SECOND in tl.static_range(2):  # the second time from the cache
        for part in range(parts):
            share = tl.load(mass + line + part * queries, mask=inside, other=0.0)
            place = tl.cast(part, tl.int64)
            block = load_block(grad_scaled + place * scaled_p, i, scaled_l, scaled_d, inside, DV, BLOCK_DV)
            block += tl.where(part < classes, merged, 0.0)
            result = load_block(parts_out + place * parts_p, i, parts_l, 1, inside, DV, BLOCK_DV)
            slope = share * (
                tl.sum(block * result, 1) + tl.load(grad_mass + line + part * queries, mask=inside, other=0.0)
            )
            if SECOND:
                slope -= tl.where(part < classes, share * delta, 0.0)
                tl.store(grad_parts_lse + line + part * queries, slope, mask=inside)
                store_block(grad_parts_out + place * grad_p, i, grad_l, inside, block * share[:, None], DV, BLOCK_DV)
            else:
                delta += slope


def sizes(parts_out: Tensor, num_classes: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and what both kernels take beside tensors and strides."""
    batch, heads, parts, queries, value_dim = parts_out.shape
    arguments = {"heads": heads, "queries": queries, "parts": parts, "classes": num_classes, "DV": value_dim}
    arguments |= {"BLOCK_DV": padded(value_dim), "BLOCK_M": ELEMENTS // padded(value_dim)}
    return (triton.cdiv(queries, arguments["BLOCK_M"]) * batch * heads,), arguments


def strides(prefix: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """Return strides by argument name."""
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=False)}


def merge(
    parts_out: Tensor, parts_lse: Tensor, out: Tensor, lse: Tensor, scaled: Tensor, mass: Tensor, num_classes: int
) -> None:
    """Launch :func:`merge_kernel`, which fills the last four.

    Args:
        parts_out: ``(B, H, P, L, Dv)``, rows contiguous.
        parts_lse: ``(B, H, P, L)``, float32, contiguous.
        out: ``(B, H, L, Dv)``, rows contiguous.
        lse: ``(B, H, L)``, float32, contiguous.
        scaled: Like ``parts_out``.
        mass: Like ``parts_lse``.
        num_classes: How many parts count in the normaliser.
    """
    grid, arguments = sizes(parts_out, num_classes)
    arguments |= strides("parts", "bhpl", parts_out) | strides("out", "bhl", out) | strides("scaled", "bhpl", scaled)
    merge_kernel[grid](parts_out, parts_lse, out, lse, scaled, mass, **arguments)


def merge_backward(
    parts_out: Tensor,
    mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_scaled: Tensor,
    grad_mass: Tensor,
    grad_parts_out: Tensor,
    grad_parts_lse: Tensor,
    num_classes: int,
) -> None:
    """Launch :func:`merge_backward_kernel`, which fills the last two tensors.

    Args:
        parts_out: As for :func:`merge`.
        mass: Its result.
        grad_out: Cotangent of ``out``, any strides.
        grad_lse: Of ``lse``, contiguous.
        grad_scaled: Of ``scaled``, any strides.
        grad_mass: Of ``mass``, contiguous.
        grad_parts_out: Like ``parts_out``.
        grad_parts_lse: Like ``parts_lse``.
        num_classes: How many parts count in the normaliser.
    """
    grid, arguments = sizes(parts_out, num_classes)
    arguments |= strides("parts", "bhpl", parts_out) | strides("out", "bhld", grad_out)
    arguments |= strides("scaled", "bhpld", grad_scaled) | strides("grad", "bhpl", grad_parts_out)
    merge_backward_kernel[grid](
        parts_out, mass, grad_out, grad_lse, grad_scaled, grad_mass, grad_parts_out, grad_parts_lse, **arguments
    )


FLOAT32 = {"parts_lse", "lse", "mass", "grad_lse", "grad_mass", "grad_parts_lse"}
UNALIGNED = {"heads", "queries", "parts", "classes", "out_d", "scaled_d"}


def build(kernel: triton.JITFunction, width: int, element: str) -> Build:
    """Return a build for contiguous tensors of one width."""
    constants = {"DV": width, "BLOCK_DV": padded(width), "BLOCK_M": ELEMENTS // padded(width)}
    signature = {}
    for name in kernel.arg_names:
        if name in UNALIGNED:
            signature[name] = "i32"
        elif name.rpartition("_")[2] in tuple("bhpld"):
            signature[name] = "i32:16"
        elif name not in constants:
            signature[name] = "*fp32" if name in FLOAT32 else f"*{element}"
    return Build(kernel, signature, constants)


BUILDS = [
    build(kernel, width, element)
    for kernel in (merge_kernel, merge_backward_kernel)
    for width in (32, 64, 128)
    for element in ("bf16", "fp32")
]
