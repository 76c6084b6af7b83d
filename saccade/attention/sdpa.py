"""Backend ``sdpa``: torch's fused kernels, held to the conventions of this package.

They differ in the causal alignment (torch's is top-left), in rows without a visible key, and in the widths and masks
that each kernel takes. Beneath ``scaled_dot_product_attention`` lies a CPU kernel that also returns the log-sum-exp;
its own derivative ignores that output, so it is registered here as an operator with the full derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.dispatch import Decision
from saccade.attention.merge import AttentionLSE, merge_partials
from saccade.attention.problem import Problem

__all__ = ["can_run_attention", "can_run_attention_lse", "cpu_attention_lse", "sdpa_attention", "sdpa_attention_lse"]

FLASH_CPU = "_scaled_dot_product_flash_attention_for_cpu"
HAS_FLASH_CPU = hasattr(torch.ops.aten, FLASH_CPU) and hasattr(torch.ops.aten, FLASH_CPU + "_backward")  # private names


def can_run_attention(problem: Problem) -> Decision:
    """Say yes, and whether a fused kernel serves or the one that holds the scores."""
    if problem.device == "cpu" and problem.dropout:
        return Decision(True, "torch SDPA; its CPU kernel with dropout holds the L x S scores")
    if problem.device == "cuda" and problem.dtype == torch.float64:
        return Decision(True, "torch SDPA; in float64 its CUDA kernel holds the L x S scores")
    if problem.bias_requires_grad:
        return Decision(True, "torch SDPA; the gradient of the bias has the size of the L x S scores")
    return Decision(True, "torch SDPA, fused")


def can_run_attention_lse(problem: Problem) -> Decision:
    """Say whether the CPU kernel beneath SDPA can serve."""
    if problem.device != "cpu":
        return Decision(False, f"the kernel that returns a log-sum-exp runs on cpu, not on {problem.device}")
    if not HAS_FLASH_CPU:
        return Decision(False, f"torch {torch.__version__} has no aten::{FLASH_CPU}")
    if problem.empty:
        return Decision(False, "the kernel needs at least one sample, query and key")
    if problem.bias_requires_grad:
        return Decision(False, "the kernel gives no gradient of the bias")
    if problem.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, "torch's fused CPU kernel, in blocks of the scores")


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Run ``scaled_dot_product_attention``; also the form that TorchScript compiles."""
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    value_dim = value.shape[-1]
    if query.is_cpu:  # the fused CPU kernel wants one width
        width = max(query.shape[-1], value_dim)
        query, key, value = widen(query, width), widen(key, width), widen(value, width)
    flash_cuda = mask is None and bias is None and query.dtype in (torch.float16, torch.bfloat16)
    group = query.shape[1] // key.shape[1]
    if query.is_cuda and group > 1 and not flash_cuda:  # the other CUDA kernels do not read grouped heads in place
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    early = early_queries(query, key, causal)
    query, mask, bias = query[:, :, early:], later_rows(mask, early), later_rows(bias, early)
    triangle = causal and query.shape[2] != 1
    if triangle and mask is None and bias is None:
        out = causal_sdpa(query, key, value, scale, dropout_p)
    else:
        out = masked_sdpa(query, key, value, combine(query, key, mask, bias, triangle), scale, dropout_p)
    out = out[..., :value_dim]
    return F.pad(out, [0, 0, early, 0]) if early > 0 else out


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Run SDPA with a bottom-right causal mask and L <= S; its own ``is_causal`` is aligned top-left."""
    if query.shape[2] == key.shape[2]:
        return sdpa(query, key, value, None, True, scale, dropout_p)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript knows this condition on its own only)
        if query.is_cuda and not torch.compiler.is_exporting():
            return lower_right_sdpa(query, key, value, scale, dropout_p)
    return masked_sdpa(query, key, value, lower_triangle(query, key), scale, dropout_p)


def lower_right_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Run SDPA with torch's own bottom-right causal bias, for which the CUDA kernels need no mask in memory."""
    from torch.nn.attention.bias import causal_lower_right  # imports torch.compile's machinery, and Triton with it

    return sdpa(query, key, value, causal_lower_right(query.shape[2], key.shape[2]), False, scale, dropout_p)


def masked_sdpa(
    query: Tensor, key: Tensor, value: Tensor, scores_mask: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """Run SDPA with a bool or additive mask, rows without a visible key included.

    The CPU kernels give zeros for such rows. Not all CUDA kernels do, so there the row is opened, and cleared after.
    """
    if scores_mask is None or query.is_cpu:
        return sdpa(query, key, value, scores_mask, False, scale, dropout_p)
    scores_mask, blind = open_blind_rows(scores_mask)
    return sdpa(query, key, value, scores_mask, False, scale, dropout_p).masked_fill(blind, 0.0)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores_mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Call torch's function, grouped heads included."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=scores_mask,
        dropout_p=dropout_p,
        is_causal=causal,
        scale=scale,
        enable_gqa=bool(query.shape[1] != key.shape[1]),  # sizes are tensors under torch.jit.trace
    )


def open_blind_rows(scores_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask with rows that see nothing made to see everything, and which rows those are, ``(..., L, 1)``."""
    if scores_mask.dtype == torch.bool:
        blind = ~scores_mask.any(-1, keepdim=True)
        return scores_mask | blind, blind
    blind = (scores_mask == -torch.inf).all(-1, keepdim=True)
    return scores_mask.masked_fill(blind, 0.0), blind


def early_queries(query: Tensor, key: Tensor, causal: bool) -> int:
    """Return how many leading queries come before every key under a bottom-right causal mask."""
    return max(query.shape[2] - key.shape[2], 0) if causal else 0


def later_rows(tensor: Tensor | None, first: int) -> Tensor | None:
    """Return a mask or bias as 4-D without its rows for the queries before ``first``."""
    if tensor is None:
        return None
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor if tensor.shape[2] == 1 else tensor[:, :, first:]


def lower_triangle(query: Tensor, key: Tensor) -> Tensor:
    """Return the bottom-right causal mask, bool ``(L, S)``."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)


def combine(query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, triangle: bool) -> Tensor | None:
    """Return one mask for SDPA: bool without a bias, additive in the query's dtype with one."""
    allowed = mask
    if triangle:
        allowed = lower_triangle(query, key) if mask is None else mask & lower_triangle(query, key)
    if bias is None:
        return allowed
    bias = bias.to(query.dtype)
    return bias if allowed is None else torch.where(allowed, bias, -torch.inf)


def widen(tensor: Tensor, width: int) -> Tensor:
    """Append zero columns up to ``width``."""
    return tensor if tensor.shape[-1] == width else F.pad(tensor, [0, width - tensor.shape[-1]])


def sdpa_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
) -> AttentionLSE:
    """Run the CPU kernel beneath SDPA, which also returns the log-sum-exp and never holds the L x S scores."""
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    value_dim = value.shape[-1]
    width = max(query.shape[-1], value_dim)
    query, key, value = kernel_view(query, width), kernel_view(key, width), kernel_view(value, width)
    early = early_queries(query, key, causal)
    query, mask, bias = query[:, :, early:], later_rows(mask, early), later_rows(bias, early)
    triangle = causal and query.shape[2] != 1
    plain = triangle and mask is None and bias is None
    first = key.shape[2] - query.shape[2]
    if plain and first > 0:  # every query sees the keys before ``first``; the others form a square triangle
        every = cpu_attention_lse(query, key[:, :, :first], value[:, :, :first], None, False, scale)
        later = cpu_attention_lse(query, key[:, :, first:], value[:, :, first:], None, True, scale)
        out, lse = merge_partials([AttentionLSE(*every), AttentionLSE(*later)])
    else:
        scores_mask = None if plain else combine(query, key, mask, bias, triangle)
        if scores_mask is not None and scores_mask.dtype == torch.bool:
            scores_mask = torch.zeros_like(scores_mask, dtype=query.dtype).masked_fill(~scores_mask, -torch.inf)
        out, lse = cpu_attention_lse(query, key, value, scores_mask, plain, scale)
    out = out[..., :value_dim]
    if early > 0:
        out, lse = F.pad(out, [0, 0, early, 0]), F.pad(lse, [early, 0], value=-torch.inf)
    return AttentionLSE(out, lse)


def kernel_view(tensor: Tensor, width: int) -> Tensor:
    """Return the tensor as the CPU kernel reads it: of one width, the last axis contiguous, any other strides."""
    tensor = widen(tensor, width)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("saccade::cpu_attention_lse", mutates_args=(), device_types="cpu")
def cpu_attention_lse(
    query: Tensor, key: Tensor, value: Tensor, scores_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the kernel; a registered operator, differentiable in query, key and value through both results.

    Args:
        query: ``(B, H, L, D)``, no axis empty.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, D)``, as wide as the key.
        scores_mask: Additive, dtype of the query, 2-D or 4-D, broadcastable to ``(B, H, L, S)``; gets no gradient.
        causal: Aligned top-left; L = S, and no mask.
        scale: Factor of the products.

    Returns:
        Output ``(B, H, L, D)`` and log-sum-exp ``(B, H, L)``.
    """
    out, lse = flash_cpu(query, key, value, scores_mask, causal, scale)
    return out, lse.contiguous()


def flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, scores_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the bare forward kernel; arguments and results as for :func:`cpu_attention_lse`."""
    out, lse = getattr(torch.ops.aten, FLASH_CPU)(query, key, value, 0.0, causal, attn_mask=scores_mask, scale=scale)
    if scores_mask is not None:  # the kernel writes 0 for a row that sees nothing
        lse = lse.masked_fill((scores_mask == -torch.inf).all(-1), -torch.inf)
    return out, lse


def flash_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scores_mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the bare backward kernel: gradients for ``p = exp(s - lse)`` and ``ds = p * (dO v^T - rowsum(dO * O))``."""
    grad_query, grad_key, grad_value = getattr(torch.ops.aten, FLASH_CPU + "_backward")(
        grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=scores_mask, scale=scale
    )
    return grad_query, grad_key, grad_value


@cpu_attention_lse.register_fake
def cpu_attention_lse_fake(
    query: Tensor, key: Tensor, value: Tensor, scores_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return results of the right shapes, dtypes and strides."""
    out, lse = getattr(torch.ops.aten, FLASH_CPU)(query, key, value, 0.0, causal, attn_mask=scores_mask, scale=scale)
    return out, lse.contiguous()


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    """Keep what the backward kernel reads."""
    query, key, value, scores_mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, scores_mask, *output)
    ctx.set_materialize_grads(False)


def cpu_attention_lse_backward(
    ctx: Any,  # noqa: ANN401
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Run the backward kernel on what the forward kept."""
    query, key, value, scores_mask, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = flash_cpu_backward_lse(
        grad_out, grad_lse, query, key, value, scores_mask, out, lse, causal=ctx.causal, scale=ctx.scale
    )
    return *grads, None, None, None


def flash_cpu_backward_lse(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel of SDPA so that it also takes the cotangent of the log-sum-exp.

    With ``p = exp(s - lse)`` the derivative is ``ds = p * (dO v^T - delta)``, ``delta = rowsum(dO * O) - dL``. The
    kernel computes ``rowsum(dO * O)`` itself, so ``dL`` enters as one more column: 1 in dO, -dL in O, 0 in v.
    """
    head_dim = query.shape[-1]
    blind = lse == -torch.inf
    if grad_lse is not None:
        width = (head_dim + 16) // 16 * 16  # at least one more column; the kernel is fastest at multiples of 16
        column = -grad_lse.masked_fill(blind, 0.0).unsqueeze(-1).to(out.dtype)
        out = widen(torch.cat([out, column], -1), width)
        grad_out = widen(torch.cat([grad_out, torch.ones_like(column)], -1), width)
        query, key, value = widen(query, width), widen(key, width), widen(value, width)
    grads = flash_cpu_backward(
        kernel_view(grad_out, grad_out.shape[-1]),
        query,
        key,
        value,
        out,
        lse.masked_fill(blind, 0.0),  # p = exp(-inf - 0) = 0 in a row that sees nothing
        scores_mask,
        causal,
        scale,
    )
    grad_query, grad_key, grad_value = (grad[..., :head_dim] for grad in grads)
    return grad_query, grad_key, grad_value


cpu_attention_lse.register_autograd(cpu_attention_lse_backward, setup_context=save_for_backward)
