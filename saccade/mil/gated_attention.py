"""Scores of instances from a small gated network: the attention of ABMIL, ACMIL-GA and CLAM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GatedAttention", "gated_scores", "weights_and_biases"]

CHUNK = 4096  # instances whose gate activations exist at a time: 4 MiB at 128 units, which stays in the cache


class GatedAttention(nn.Module):
    r"""Scores ``w^T (tanh(V h) * sigmoid(U h))`` of every instance, for each of M branches.

    .. math:: s_m(h) = w_m^\top (\tanh(V h + b_V) \odot \sigma(U h + b_U)) + b_m

    The branches share V and U and are rows of the last layer.

    Args:
        hidden_dim: Width of the instances.
        attention_dim: Width A of the gate.
        branches: M.
        gated: Without it, ``w^T tanh(V h)``.
        dropout: On both factors, in training.

    Source:
        Ilse et al., ICML 2018, eq. 8 and 9 (arXiv:1802.04712). Keys as in ``dazhangyu123/ACMIL``.
    """

    def __init__(
        self, hidden_dim: int, attention_dim: int, branches: int = 1, *, gated: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(hidden_dim, attention_dim), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(hidden_dim, attention_dim), nn.Sigmoid()) if gated else None
        self.attention_weights = nn.Linear(attention_dim, branches)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(B, N, D)`` to scores ``(B, M, N)``, float32 (float64 for float64)."""
        if self.attention_U is None or (self.training and self.dropout.p > 0):
            gate = self.dropout(self.attention_V(hidden))
            if self.attention_U is not None:
                gate = gate * self.dropout(self.attention_U(hidden))
            scores = self.attention_weights(gate)
        else:
            layers = (self.attention_V[0], self.attention_U[0], self.attention_weights)
            scores = gated_scores(hidden, *weights_and_biases(*layers))
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        rows: Tensor = scores.to(dtype).transpose(1, 2)
        return rows


def weights_and_biases(*layers: nn.Module) -> list[Tensor]:
    """Return weight and bias of each linear layer, in order."""
    return [layer.get_parameter(name) for layer in layers for name in ("weight", "bias")]


def gated_scores(
    hidden: Tensor, weight_v: Tensor, bias_v: Tensor, weight_u: Tensor, bias_u: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Return gated scores ``(..., N, M)`` of instances ``(..., N, D)`` without keeping gate activations ``(N, A)``.

    The backward pass computes them again, a chunk of instances at a time.

    Args:
        hidden: Instances.
        weight_v: ``(A, D)``, of the tanh factor.
        bias_v: ``(A,)``.
        weight_u: ``(A, D)``, of the sigmoid factor.
        bias_u: ``(A,)``.
        weight: ``(M, A)``.
        bias: ``(M,)``.
    """
    both_weight, both_bias = torch.cat([weight_v, weight_u]), torch.cat([bias_v, bias_u])
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, both_weight, both_bias, weight, bias = (
            tensor.to(dtype) for tensor in (hidden, both_weight, both_bias, weight, bias)
        )
    arguments = (hidden, both_weight, both_bias, weight, bias)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not any(a.requires_grad for a in arguments):
        return gate_and_score(*arguments) if hidden.shape[-2] <= CHUNK else chunked_scores(*arguments)
    scores: Tensor = RecomputedScores.apply(*arguments)
    return scores


def gate_and_score(hidden: Tensor, both_weight: Tensor, both_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the scores of a few instances, both factors from one matrix product."""
    tanh, sigmoid = F.linear(hidden, both_weight, both_bias).chunk(2, dim=-1)
    return F.linear(tanh.tanh() * sigmoid.sigmoid(), weight, bias)


def chunked_scores(hidden: Tensor, both_weight: Tensor, both_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the scores of many instances."""
    parts = hidden.split(CHUNK, dim=-2)
    return torch.cat([gate_and_score(part, both_weight, both_bias, weight, bias) for part in parts], dim=-2)


def chunks(count: int) -> Iterator[slice]:
    """Yield slices of ``CHUNK`` rows."""
    return (slice(first, first + CHUNK) for first in range(0, count, CHUNK))


class RecomputedScores(torch.autograd.Function):
    """The gated scores with a backward pass that keeps only the arguments."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.save_for_backward(*arguments)
        with torch.no_grad():
            return chunked_scores(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        hidden, both_weight, both_bias, weight, _ = ctx.saved_tensors
        rows, upstream = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_hidden = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        # Sums over chunks in float32 at least, also where the arguments are in half precision.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_both, grad_weight, grad_both_bias = (
            torch.zeros_like(tensor, dtype=wide) for tensor in (both_weight, weight, both_bias)
        )
        half = both_weight.shape[0] // 2
        for part in chunks(rows.shape[0]):
            factors = F.linear(rows[part], both_weight, both_bias)
            tanh, sigmoid = factors[:, :half].tanh_(), factors[:, half:].sigmoid_()
            grad_weight += upstream[part].T @ (tanh * sigmoid)
            grad_gate = upstream[part] @ weight
            grad_tanh, grad_sigmoid = (
                grad_gate * sigmoid * (1 - tanh * tanh),
                grad_gate * tanh * sigmoid * (1 - sigmoid),
            )
            grad_factors = torch.cat([grad_tanh, grad_sigmoid], dim=1)
            grad_both += grad_factors.T @ rows[part]
            grad_both_bias += grad_factors.sum(0, dtype=wide)
            if grad_hidden is not None:
                torch.mm(grad_factors, both_weight, out=grad_hidden[part])
        grad_rows = None if grad_hidden is None else grad_hidden.view_as(hidden)
        dtype = hidden.dtype
        grad_bias = upstream.sum(0, dtype=wide)
        return grad_rows, *(grad.to(dtype) for grad in (grad_both, grad_both_bias, grad_weight, grad_bias))
