"""Attention diversification: a loss that is high where the queries of a layer all attend to the same few keys.

It is a function of query and key alone, so it stands beside :func:`saccade.attention.attention` and leaves that call
as it is; the gradients of both add up. The attention maps that its definition speaks of exist one tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.diversification_tiles import tiled_attention_diversification
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.problem import Problem, describe
from saccade.errors import ShapeError

__all__ = ["attention_diversification", "attention_diversification_from_maps"]


def attention_diversification(
    query: Tensor,
    key: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    logit_multiplier: Tensor | None = None,
    lse: Tensor | None = None,
    threshold: float = 2.0,
    prefix_tokens: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute how alike the queries of a layer of spatial self-attention attend; to be minimised.

    Per sample, with ``M`` the attention map averaged over heads, ``s`` its mean row and ``tau = threshold / N``: zero
    what is not larger than ``tau`` in both, and average the cosine between each row of ``M`` and ``s`` over the
    queries. 0 if the attention is near uniform, 1 if every query attends to the same keys. Differentiable in query,
    key, bias and logit multiplier through the entries kept; the comparison with ``tau`` has no gradient.

    Each window of windowed attention is a sample. A query that sees no key counts as a row of zeros, with cosine 0;
    N counts all keys, hidden ones too.

    Args:
        query: ``(B, H, N, D)``, any floating dtype; computed in float32 (float64 for float64).
        key: ``(B, Hkv, N, D)``; H is a multiple of Hkv.
        bias: Floating point, broadcastable to ``(B, H, N, N)``, added to the scores; if it wants a gradient, the maps
            are held (backend ``reference``).
        mask: Bool, broadcastable to ``(B, H, N, N)``, ``True`` = takes part.
        logit_multiplier: ``(H, N, N)``, factor of the scaled products before bias and mask, as the sigmoid of RVT's
            position-aware mask.
        lse: ``(B, H, N)``, the log-sum-exp of the same scores, as :func:`saccade.attention.attention_lse` returns it.
            Saves the Triton kernels a pass; whole-row backends need none. Taken as a number: the gradient is that of
            the softmax with or without it. Not used with ``prefix_tokens``, as it counts their keys.
        threshold: Multiple of the uniform weight ``1 / N`` above which an entry is kept; not negative.
        prefix_tokens: Class and register tokens in front; their rows and columns are dropped and the rows renormalised,
            and N is what remains.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        Scalar in 0..1, float32 (float64 for float64 input); 0 if there is no sample or token.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device, there are more queries than keys or fewer, or
            ``threshold`` or ``prefix_tokens`` is out of range.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Guo et al., "Robustifying Token Attention for Vision Transformers", ICCV 2023 (arXiv:2303.11126); with its
        official code in all but one thing: that compares a batch of one with itself and is always 0 there.

    Example:
        >>> same_key = torch.zeros(1, 1, 4, 8).index_fill(2, torch.tensor(0), 9.0)
        >>> attention_diversification(torch.ones(1, 1, 4, 8), same_key).round(decimals=4)
        tensor(1.)
    """
    options = {
        "bias": bias,
        "mask": mask,
        "logit_multiplier": logit_multiplier,
        "lse": lse,
        "threshold": threshold,
        "prefix_tokens": prefix_tokens,
        "scale": scale,
    }
    loss: Tensor = DIVERSIFICATION.call((query, key), options, backend)
    return loss


def attention_diversification_from_maps(maps: Tensor, *, threshold: float = 2.0, prefix_tokens: int = 0) -> Tensor:
    """Compute :func:`attention_diversification` from attention maps that exist anyway.

    Args:
        maps: ``(B, H, N, N)``, floating point, each row a distribution over keys; computed in float32 (float64 for
            float64).
        threshold: As there.
        prefix_tokens: As there.

    Returns:
        Scalar in 0..1, differentiable.

    Raises:
        ShapeError: If the maps have another shape or dtype, or an argument is out of range.

    Example:
        >>> attention_diversification_from_maps(torch.full((1, 2, 9, 9), 1 / 9))
        tensor(0.)
    """
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or not maps.is_floating_point():
        raise ShapeError(f"maps must be floating point (B, H, N, N); got {maps.dtype} {tuple(maps.shape)}.")
    check_numbers(threshold, prefix_tokens, maps.shape[2])
    return reference.attention_diversification_from_maps(maps, threshold, prefix_tokens)


def check_numbers(threshold: float, prefix_tokens: int, tokens: int) -> None:
    """Raise unless the arguments that are no tensors make sense."""
    if not threshold >= 0:
        raise ShapeError(f"threshold must not be negative; got {threshold}.")
    if not 0 <= prefix_tokens <= tokens:
        raise ShapeError(f"prefix_tokens must be in 0..{tokens}, the number of tokens; got {prefix_tokens}.")


@dataclass(frozen=True)
class DiversificationProblem:
    """What decides which backends can run a call.

    Args:
        scores: The facts about query, key, bias and mask.
        logit_multiplier: One was given.
        prefix_tokens: Tokens dropped in front.
    """

    scores: Problem
    logit_multiplier: bool
    prefix_tokens: int

    def __str__(self) -> str:
        s = self.scores
        query, key = (s.batch, s.heads, s.queries, s.head_dim), (s.batch, s.kv_heads, s.keys, s.head_dim)
        options = [name for name in ("mask", "bias") if getattr(s, name)] + ["logit_multiplier"] * self.logit_multiplier
        options += [f"prefix_tokens {self.prefix_tokens}"] * (self.prefix_tokens > 0)
        dtype = str(s.dtype).removeprefix("torch.")
        return ", ".join([f"query {query}", f"key {key}", f"{dtype} on {s.device}", *options])


def describe_diversification(
    query: Tensor,
    key: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    logit_multiplier: Tensor | None = None,
    lse: Tensor | None = None,
    threshold: float = 2.0,
    prefix_tokens: int = 0,
    scale: float | None = None,
) -> DiversificationProblem:
    """Check the arguments and return the facts about them; raises as the public function says."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[2] != key.shape[2]:
        raise ShapeError(
            "attention diversification is about self-attention: query (B, H, N, D) and key (B, Hkv, N, D) must be 4-D "
            f"with as many queries as keys; got query {tuple(query.shape)}, key {tuple(key.shape)}."
        )
    scores = describe(query, key, key, mask=mask, bias=bias, scale=scale)
    check_numbers(threshold, prefix_tokens, scores.keys)
    for name, tensor, shape in (
        ("logit_multiplier", logit_multiplier, (scores.heads, scores.queries, scores.keys)),
        ("lse", lse, (scores.batch, scores.heads, scores.queries)),
    ):
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise ShapeError(f"{name} must be floating point {shape}; got {tensor.dtype} {tuple(tensor.shape)}.")
        if tensor is not None and tensor.device != query.device:
            raise ShapeError(f"{name} must be on the device of query, {query.device}; got {tensor.device}.")
    return DiversificationProblem(scores, logit_multiplier is not None, prefix_tokens)


def can_run_kernels(problem: DiversificationProblem) -> Decision:
    """Say whether the Triton kernels can serve."""
    scores = problem.scores
    if scores.bias or scores.mask or problem.logit_multiplier:
        return Decision(False, "the kernels take no bias, mask or logit multiplier")
    if scores.empty or scores.keys == problem.prefix_tokens:
        return Decision(False, "the kernels need at least one sample and token")
    if scores.dtype == torch.float64 or scores.head_dim > 256:
        return Decision(False, "the kernels take widths up to 256 and no float64")
    return can_run_triton(scores.device, exporting=scores.exporting)


def can_run_tiles(problem: DiversificationProblem) -> Decision:
    """Say whether the form in tiles can serve."""
    if problem.scores.bias_requires_grad:
        return Decision(False, "a gradient of the bias has the size of the maps, which the reference holds anyway")
    if problem.scores.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, "tiles of whole rows, recomputed in the backward pass; no map is kept")


def always(problem: DiversificationProblem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, holds the maps")


def triton_attention_diversification(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    logit_multiplier: Tensor | None,
    lse: Tensor | None,
    threshold: float,
    prefix_tokens: int,
    scale: float | None,
) -> Tensor:
    """Run the Triton kernels; there is no bias, mask or multiplier."""
    from saccade.attention.kernels.diversification import diversification_kernels, row_lse

    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    if prefix_tokens > 0:
        query, key, lse = query[:, :, prefix_tokens:], key[:, :, prefix_tokens:], None
    lse = row_lse(query.detach(), key.detach(), scale) if lse is None else lse.detach().float().contiguous()
    loss: Tensor = diversification_kernels(query, key, lse, threshold, scale)[0]
    return loss


def scripted_attention_diversification(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    logit_multiplier: Tensor | None = None,
    lse: Tensor | None = None,
    threshold: float = 2.0,
    prefix_tokens: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stand in for :func:`attention_diversification` in TorchScript: its literal form."""
    return reference.attention_diversification(
        query, key, bias, mask, logit_multiplier, lse, threshold, prefix_tokens, scale
    )


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    """Return query and key of one shape ``(B, H, N, D)``; the queries share a direction, so that the loss is not 0."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    return (query + 0.5).to(device, dtype), key.to(device, dtype)


attention_diversification.__prepare_scriptable__ = lambda: scripted_attention_diversification  # type: ignore[attr-defined]

DIVERSIFICATION = register(
    Operator(
        function=attention_diversification,
        summary="loss of queries that attend alike (ADL), beside untouched attention",
        backends=(
            Backend("triton", can_run_kernels, triton_attention_diversification),
            Backend("torch", can_run_tiles, tiled_attention_diversification),
            Backend("reference", always, reference.attention_diversification),
        ),
        describe=describe_diversification,
        example=example,
    )
)
