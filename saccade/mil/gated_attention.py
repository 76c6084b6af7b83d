"""Scores of instances from a small gated network: the attention of ABMIL, ACMIL-GA and CLAM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GatedAttention", "gated_scores", "projected_gated_scores", "weights_and_biases"]

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
        return score_rows(scores)

    def project(self, bags: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, N, D_feat)`` to hidden instances ``relu(x W^T)`` ``(B, N, D)`` and scores as :meth:`forward`'s.

        Without dropout, and gated only.
        """
        if self.attention_U is None or self.dropout.p > 0:
            raise ValueError("project is for gated attention without dropout")
        layers = (self.attention_V[0], self.attention_U[0], self.attention_weights)
        hidden, scores = projected_gated_scores(bags, projection, *weights_and_biases(*layers))
        return hidden, score_rows(scores)


def score_rows(scores: Tensor) -> Tensor:
    """Return scores ``(B, N, M)`` as ``(B, M, N)``, float32 (float64 for float64)."""
    return scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32).transpose(1, 2)


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
    arguments = autocast_to(hidden, both_weight, both_bias, weight, bias)
    if is_plain_forward(arguments):
        return gate_and_score(*arguments) if hidden.shape[-2] <= CHUNK else chunked_scores(*arguments)
    scores: Tensor = RecomputedScores.apply(*arguments)
    return scores


def projected_gated_scores(
    bags: Tensor,
    projection: Tensor,
    weight_v: Tensor,
    bias_v: Tensor,
    weight_u: Tensor,
    bias_u: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return hidden instances ``relu(x W^T)`` ``(..., N, D)`` and their gated scores ``(..., N, M)``.

    What the gates add to the gradient of the hidden instances exists for one chunk at a time: training holds those
    instances, and the gradient that comes from elsewhere (pooling), and nothing else of their size.

    Args:
        bags: ``(..., N, D_feat)``.
        projection: ``(D, D_feat)``.
        weight_v: As in :func:`gated_scores`, and so the others.
        bias_v: ``(A,)``.
        weight_u: ``(A, D)``.
        bias_u: ``(A,)``.
        weight: ``(M, A)``.
        bias: ``(M,)``.
    """
    both_weight, both_bias = torch.cat([weight_v, weight_u]), torch.cat([bias_v, bias_u])
    arguments = autocast_to(bags, projection, both_weight, both_bias, weight, bias)
    if is_plain_forward(arguments):
        hidden = F.linear(*arguments[:2]).relu_()
        few = hidden.shape[-2] <= CHUNK
        return hidden, gate_and_score(hidden, *arguments[2:]) if few else chunked_scores(hidden, *arguments[2:])
    hidden, scores = ProjectedScores.apply(*arguments)
    return hidden, scores


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype of autocast, where that is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def is_plain_forward(arguments: tuple[Tensor, ...]) -> bool:
    """Whether torch's own operators shall run: nothing is differentiated, or the graph is being recorded."""
    is_recording = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_recording or not torch.is_grad_enabled() or not any(a.requires_grad for a in arguments)


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


class GateGradients:
    """Gradients of the gates' weights, summed over chunks in float32 at least, also for arguments in half precision.

    Args:
        both_weight: ``(2 A, D)``.
        both_bias: ``(2 A,)``.
        weight: ``(M, A)``.
    """

    def __init__(self, both_weight: Tensor, both_bias: Tensor, weight: Tensor) -> None:
        self.both_weight, self.both_bias, self.weight = both_weight, both_bias, weight
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.grad_both, self.grad_both_bias, self.grad_weight = (
            torch.zeros_like(tensor, dtype=self.wide) for tensor in (both_weight, both_bias, weight)
        )

    def add(self, rows: Tensor, upstream: Tensor) -> Tensor:
        """Count a chunk ``(n, D)`` with the gradient of its scores ``(n, M)``; return that of its factors."""
        half = self.both_weight.shape[0] // 2
        factors = F.linear(rows, self.both_weight, self.both_bias)
        tanh, sigmoid = factors[:, :half].tanh_(), factors[:, half:].sigmoid_()
        product = tanh * sigmoid
        self.grad_weight += upstream.T @ product
        grad_gate = upstream @ self.weight
        grad_factors = torch.empty_like(factors)
        # With p = t s: dt = s (1 - t^2) = s - p t, and ds = t s (1 - s) = p - p s.
        torch.addcmul(sigmoid, product, tanh, value=-1, out=grad_factors[:, :half]).mul_(grad_gate)
        torch.addcmul(product, product, sigmoid, value=-1, out=grad_factors[:, half:]).mul_(grad_gate)
        self.grad_both += grad_factors.T @ rows
        self.grad_both_bias += grad_factors.sum(0, dtype=self.wide)
        return grad_factors

    def results(self, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of both_weight, both_bias, weight and bias."""
        grads = (self.grad_both, self.grad_both_bias, self.grad_weight, upstream.sum(0, dtype=self.wide))
        dtype = self.weight.dtype
        return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype), grads[3].to(dtype)


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
        gates = GateGradients(both_weight, both_bias, weight)
        for part in chunks(rows.shape[0]):
            grad_factors = gates.add(rows[part], upstream[part])
            if grad_hidden is not None:
                torch.mm(grad_factors, both_weight, out=grad_hidden[part])
        grad_rows = None if grad_hidden is None else grad_hidden.view_as(hidden)
        return grad_rows, *gates.results(upstream)


class ProjectedScores(torch.autograd.Function):
    """Projection, relu and gated scores in one, with a backward pass in chunks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's context
        bags, projection, *gates = arguments
        rows = bags.reshape(-1, bags.shape[-1])
        with torch.no_grad():
            hidden = rows.new_empty(rows.shape[0], projection.shape[0])
            scores = rows.new_empty(rows.shape[0], gates[2].shape[0])
            for part in chunks(rows.shape[0]):  # a chunk is scored while it is in the cache
                torch.mm(rows[part], projection.T, out=hidden[part]).relu_()
                scores[part] = gate_and_score(hidden[part], *gates)
        hidden, scores = (tensor.view(*bags.shape[:-1], -1) for tensor in (hidden, scores))
        ctx.save_for_backward(bags, projection, hidden, *gates[:3])
        return hidden, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        bags, projection, hidden, both_weight, both_bias, weight = ctx.saved_tensors
        rows, hidden_rows, elsewhere, upstream = (
            tensor.reshape(-1, tensor.shape[-1]) for tensor in (bags, hidden, grad_hidden, grad_scores)
        )
        grad_bags = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        gates = GateGradients(both_weight, both_bias, weight)
        grad_projection = torch.zeros_like(projection, dtype=gates.wide)
        for part in chunks(rows.shape[0]):
            grad_factors = gates.add(hidden_rows[part], upstream[part])
            grad_part = torch.addmm(elsewhere[part], grad_factors, both_weight).mul_(hidden_rows[part] > 0)
            if gates.wide == grad_part.dtype:
                grad_projection.addmm_(grad_part.T, rows[part])
            else:
                grad_projection += grad_part.T @ rows[part]
            if grad_bags is not None:
                torch.mm(grad_part, projection, out=grad_bags[part])
        grad_rows = None if grad_bags is None else grad_bags.view_as(bags)
        return grad_rows, grad_projection.to(projection.dtype), *gates.results(upstream)
