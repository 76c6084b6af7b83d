"""Attention with the entropy of its weights, without the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.flash import can_run_flash, flash_attention_entropy
from saccade.attention.merge import AttentionEntropy
from saccade.attention.problem import Problem, describe
from saccade.attention.sdpa import can_run_attention_lse, sdpa_attention_lse
from saccade.attention.softmax import always, example

__all__ = ["attention_entropy"]


def attention_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionEntropy:
    """Compute :func:`attention_lse` and the entropy of each query's weights, all three differentiable.

    ``entropy[i] = -sum_j p_ij log p_ij`` in nats, between 0 (one key has all the weight) and the logarithm of the
    number of keys that the query sees. ``exp(entropy)`` is the effective number of keys.

    Args:
        query: ``(B, H, L, D)``, any floating dtype; may be a strided view.
        key: ``(B, Hkv, S, D)``; H is a multiple of Hkv.
        value: ``(B, Hkv, S, Dv)``.
        mask: Bool, broadcastable to ``(B, H, L, S)``, ``True`` = takes part.
        bias: Floating point, broadcastable to ``(B, H, L, S)``; may require a gradient.
        causal: Query ``i`` sees keys ``j <= i + S - L``.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"``, ``"sdpa"`` or ``"reference"``.

    Returns:
        Output, log-sum-exp and entropy; a query that sees no key gets 0, ``-inf`` and 0, and no gradient.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Nandan Kumar Jha and Brandon Reagen, "Entropy-Guided Attention for Private LLMs", 2025 (arXiv:2501.03489).

    Example:
        >>> attention_entropy(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 4, 8)).entropy.exp()
        tensor([[[4.]]])
    """
    options = {"mask": mask, "bias": bias, "causal": causal, "scale": scale}
    result: AttentionEntropy = ATTENTION_ENTROPY.call((query, key, value), options, backend)
    return result


@dataclass(frozen=True)
class EntropyProblem(Problem):
    """The facts about one call.

    Args:
        bias_of_keys: The bias is the same for all queries that read a key.
    """

    bias_of_keys: bool


def describe_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> EntropyProblem:
    """Check the arguments as for :func:`attention_lse` and return the facts about them."""
    problem = describe(query, key, value, mask=mask, bias=bias, causal=causal, scale=scale)
    heads = 1 if bias is None or bias.ndim < 3 else bias.shape[-3]
    one_row = bias is None or bias.ndim < 2 or bias.shape[-2] == 1
    return EntropyProblem(**vars(problem), bias_of_keys=one_row and (heads == 1 or heads == problem.kv_heads))


def can_run_sdpa(problem: EntropyProblem) -> Decision:
    """Say whether the CPU kernel beneath SDPA can serve."""
    if problem.bias and not problem.bias_of_keys:
        return Decision(False, "the mean of a bias that differs between queries needs the scores in full")
    return can_run_attention_lse(problem)


def sdpa_attention_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
) -> AttentionEntropy:
    """Run one call of the CPU kernel whose values also hold the keys.

    The entropy is ``lse - sum_j p_ij score_ij``, and the mean score is that of the keys, ``q . sum_j p_ij k_j``, and of
    the bias. It is a difference of large numbers, so half precision is computed in float32.
    """
    dtype = query.dtype
    query, key, value = (tensor.to(reference.wide(tensor)) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    columns = [value, key]
    if bias is not None:
        bias = bias.to(query.dtype)
        rows = bias.masked_fill(bias == -torch.inf, 0.0)  # such a key has no weight
        columns.append(rows.expand(*key.shape[:2], 1, key.shape[2]).transpose(-1, -2))
    out, lse = sdpa_attention_lse(query, key, torch.cat(columns, -1), mask, bias, causal, scale)
    out, mean_key, mean_bias = out.split([value.shape[-1], key.shape[-1], int(bias is not None)], -1)
    mean_score = scale * (query * mean_key).sum(-1) + mean_bias.sum(-1)
    entropy = (lse - mean_score).masked_fill(lse == -torch.inf, 0.0).clamp(min=0.0)
    return AttentionEntropy(out.to(dtype), lse, entropy)


def scripted_attention_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionEntropy:
    """Stand in for :func:`attention_entropy` in TorchScript: its literal form."""
    return reference.attention_entropy(query, key, value, mask, bias, causal, scale)


attention_entropy.__prepare_scriptable__ = lambda: scripted_attention_entropy  # type: ignore[attr-defined]

ATTENTION_ENTROPY = register(
    Operator(
        function=attention_entropy,
        summary="attention, log-sum-exp and the entropy of the weights, without the weights",
        backends=(
            Backend("triton", can_run_flash, flash_attention_entropy),
            Backend("sdpa", can_run_sdpa, sdpa_attention_entropy),
            Backend("reference", always, reference.attention_entropy),
        ),
        describe=describe_entropy,
        example=example,
    )
)
