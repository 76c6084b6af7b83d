"""What the kernel files share: whether Triton can run, padded widths, and the list of builds checked ahead of time.

Imports no Triton, so that a backend can be asked whether it can run without loading it. House rules of the kernels:
plain pointers with int64 offsets and masked loads, float32 accumulation, every output element written, lengths and
strides as runtime arguments, head widths that are no power of two through masked tiles, and no atomics.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from saccade.attention.dispatch import Decision

__all__ = ["INTERPRETING", "Build", "can_run_triton", "dot_precision", "padded"]

HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: it looks through the file system
# Triton reads the variable when a kernel is defined; the same reading here keeps both of one opinion.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looking takes longer than a small operator


def can_run_triton(device: str, *, exporting: bool = False) -> Decision:
    """Say whether Triton kernels can run on a device; an operator adds what its own kernel cannot do.

    Args:
        device: Device type of the tensors.
        exporting: Under ``torch.export`` or ``torch.jit.trace``.
    """
    if not HAS_TRITON:
        return Decision(False, "triton is not installed")
    if exporting:
        return Decision(False, "a custom operator cannot be exported")
    if device == "cuda" and not INTERPRETING:
        return Decision(True, "Triton kernel")
    if device == "cpu" and INTERPRETING:
        return Decision(True, "Triton's interpreter, slow: only on request", automatic=False)
    return Decision(False, f"Triton kernels run on cuda, not on {device} (TRITON_INTERPRET=1 runs them on cpu, slowly)")


def padded(width: int) -> int:
    """Return the tile width that holds ``width`` columns: a power of two, at least the 16 that tensor cores need."""
    return max(16, 1 << (width - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` for ``tl.dot``: TF32 for float32 only where the user allows it for matmuls."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@dataclass(frozen=True)
class Build:
    """One kernel with one choice of constants that is shipped; each kernel file lists its own in ``BUILDS``.

    ``tests/attention/aot.py`` compiles them for sm_80 and sm_90 without a GPU and checks registers and shared memory.

    Args:
        kernel: The ``@triton.jit`` function.
        signature: Type of each runtime argument by name, e.g. ``{"query": "*bf16", "L": "i32"}``.
        constants: Value of each ``tl.constexpr`` argument by name; also ``None`` for an optional pointer left out.
        num_warps: Launch option.
        num_stages: Launch option.
        spill_bytes: Largest stack per thread that is accepted, in bytes, with the reason beside it in the list.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    spill_bytes: int = 0
