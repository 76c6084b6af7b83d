"""Heads side by side, each multiplied by its gate: the step between attention and the output projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.recompute import register_backward
from saccade.errors import ShapeError

__all__ = ["combine_heads"]


def combine_heads(out: Tensor, gates: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply the output of each head by its gate and lay the heads side by side.

    ``combined[l, h D + d] = out[h, l, d] * gates[l, h]``, or ``gates[l, h, d]`` with a gate for each channel. Works
    after any operator that returns one output for each head: gated attention passes ``sigmoid(x W)``, mixture of heads
    its routing weights.

    Args:
        out: ``(B, H, L, D)``, any floating dtype; may be a strided view.
        gates: ``(B, L, H)`` or ``(B, L, H, D)``, any floating dtype or bool.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``(B, L, H * D)``, dtype of ``out``, to which products are rounded once; what an output projection takes.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Qiu et al., "Gated Attention for Large Language Models" (arXiv:2505.06708); Jin et al., "MoH: Multi-Head
        Attention as Mixture-of-Head Attention" (arXiv:2410.11842).

    Example:
        >>> combine_heads(torch.ones(1, 2, 1, 2), torch.tensor([[[0.5, 2.0]]]))
        tensor([[[0.5000, 0.5000, 2.0000, 2.0000]]])
    """
    combined: Tensor = COMBINE.call((out, gates), {}, backend)
    return combined


@dataclass(frozen=True)
class GateProblem:
    """The facts about one call of :func:`combine_heads`.

    Args:
        device: Device type.
        dtype: Of the heads' output.
        shape: Of the heads' output, (B, H, L, D).
        gates: Shape of the gates.
        exporting: Under ``torch.export`` or ``torch.jit.trace``.
    """

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    gates: tuple[int, ...]
    exporting: bool

    def __str__(self) -> str:
        return f"out {self.shape}, gates {self.gates}, {str(self.dtype).removeprefix('torch.')} on {self.device}"


def describe(out: Tensor, gates: Tensor) -> GateProblem:
    """Check the arguments of :func:`combine_heads` and return the facts about them."""
    shapes = f"got out {tuple(out.shape)}, gates {tuple(gates.shape)}"
    if out.ndim != 4:
        raise ShapeError(f"out must be (B, H, L, D); {shapes}.")
    batch, heads, length, width = out.shape
    if tuple(gates.shape) not in ((batch, length, heads), (batch, length, heads, width)):
        raise ShapeError(f"gates must be {(batch, length, heads)} or {(batch, length, heads, width)}; {shapes}.")
    if not out.is_floating_point() or not (gates.is_floating_point() or gates.dtype == torch.bool):
        raise ShapeError(f"out and gates must be floating point, gates or bool; got {out.dtype} and {gates.dtype}.")
    if out.device != gates.device:
        raise ShapeError(f"out and gates must be on one device; got {out.device} and {gates.device}.")
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return GateProblem(out.device.type, out.dtype, tuple(out.shape), tuple(gates.shape), exporting)


def can_run_kernel(problem: GateProblem) -> Decision:
    """Say whether the Triton kernels can serve."""
    if problem.dtype == torch.float64:
        return Decision(False, "the kernel computes in float32")
    if 0 in problem.shape:
        return Decision(False, "the kernel needs at least one sample, head, token and column")
    return can_run_triton(problem.device, exporting=problem.exporting)


def combine_composite(out: Tensor, gates: Tensor) -> Tensor:
    """Multiply and lay side by side with torch's operators."""
    gates = gates.unsqueeze(-1) if gates.ndim == 3 else gates
    return (gates * out.transpose(1, 2)).flatten(2).to(out.dtype)  # in this order the product is contiguous


@torch.library.custom_op("saccade::combine_heads", mutates_args=())
def combine_kernel(out: Tensor, gates: Tensor) -> Tensor:
    """Multiply and lay side by side in one pass over ``out``; Triton only, differentiable in both arguments."""
    from saccade.attention.kernels import gates as kernels

    return kernels.forward(out, gates)


@combine_kernel.register_fake
def combine_kernel_fake(out: Tensor, gates: Tensor) -> Tensor:
    """Return a result of the right shape and dtype."""
    return out.new_empty(out.shape[0], out.shape[2], out.shape[1] * out.shape[3])


@torch.library.custom_op("saccade::combine_heads_backward", mutates_args=())
def combine_kernel_backward(grad: Tensor, out: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of out and gates in one pass over both."""
    from saccade.attention.kernels import gates as kernels

    return kernels.backward(grad, out, gates)


register_backward(combine_kernel, combine_kernel_backward)


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return normal outputs ``(B, H, N, D)`` and a gate for each head; drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    out, gates = torch.randn(shape, generator=generator), torch.rand(shape[0], shape[2], shape[1], generator=generator)
    return out.to(device, dtype), gates.to(device, dtype)


def scripted_combine_heads(out: Tensor, gates: Tensor, backend: str = "auto") -> Tensor:
    """Stand in for :func:`combine_heads` in TorchScript."""
    return combine_composite(out, gates)


combine_heads.__prepare_scriptable__ = lambda: scripted_combine_heads  # type: ignore[attr-defined]

COMBINE = register(
    Operator(
        function=combine_heads,
        summary="heads side by side, each multiplied by its gate",
        backends=(
            Backend("triton", can_run_kernel, combine_kernel),
            Backend("torch", lambda problem: Decision(True, "one product and one copy"), combine_composite),
            Backend(
                "reference", lambda problem: Decision(True, "literal form, float32 copies"), reference.combine_heads
            ),
        ),
        describe=describe,
        example=example,
    )
)
