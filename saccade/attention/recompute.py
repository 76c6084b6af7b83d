"""Custom operators that keep their arguments alone, and compute everything else again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["register_backward"]


def register_backward(operator: Any, backward: Any) -> None:  # noqa: ANN401
    """Make an operator of tensors alone differentiable.

    Args:
        operator: What ``torch.library.custom_op`` made of a function that takes tensors and returns one.
        backward: Likewise; takes the gradient of the result and the arguments, returns the gradient of each, contiguous
            and in the dtype of the argument. Needs no ``register_fake`` of its own.
    """

    def keep_arguments(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        grads: tuple[Tensor, ...] = backward(grad_out, *ctx.saved_tensors)
        return grads

    def fake(grad_out: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in arguments)

    backward.register_fake(fake)
    operator.register_autograd(differentiate, setup_context=keep_arguments)
