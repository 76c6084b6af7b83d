"""Gradient checkpointing of stages, which leaves the statistics of batch norms alone the second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["Stage", "recompute"]


class Stage(nn.Sequential):
    """Blocks on one map.

    Args:
        blocks: Called one after another.
        channels_last: Lay the map out with channels last in memory before.
    """

    def __init__(self, *blocks: nn.Module, channels_last: bool = False) -> None:
        super().__init__(*blocks)
        self.channels_last = channels_last
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, C, H, W)``."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 - scripted only like this
                x = recompute(block, x)
            else:
                x = block(x)
        return x

    @torch.jit.unused
    def steps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the map after each block."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self:
            x = recompute(block, x) if self.grad_checkpointing else block(x)
            yield x


def recompute(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a module, keep nothing but its inputs, and run it again in the backward pass.

    Running statistics of batch norms are updated once, as without checkpointing.

    Args:
        module: Returns one tensor.
        inputs: Its arguments.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), fixed_statistics(module)

    # Compiled code updates them once by itself.
    options: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    out: Tensor = checkpoint(module, *inputs, use_reentrant=False, **options)
    return out


@contextmanager
def fixed_statistics(module: nn.Module) -> Iterator[None]:
    """Let no batch norm of a module change its running statistics inside the block."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
