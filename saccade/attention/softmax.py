"""Softmax over keys: attention, and attention with its log-sum-exp.

Everything that weighs values by a softmax comes down to these. A class of keys, a sink logit, a key bias, a cached
prefix or another worker's share of the keys is a partial result with its log-sum-exp, and partial results merge exactly
(:func:`saccade.attention.merge_partials`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.flash import can_run_flash, flash_attention_lse
from saccade.attention.merge import AttentionLSE
from saccade.attention.problem import Problem, describe
from saccade.attention.sdpa import can_run_attention, can_run_attention_lse, sdpa_attention, sdpa_attention_lse

__all__ = ["attention", "attention_lse"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Weigh values by the softmax of query-key products.

    Computes ``out[i] = sum_j p_ij value[j]``, ``p_i = softmax_j(scale * query[i] . key[j] + bias_ij)``, over the keys
    that query ``i`` may see. ``mask``, ``bias`` and ``causal`` combine. A query that sees no key gets zeros and no
    gradient. Query head ``h`` reads key and value head ``h // (H / Hkv)``.

    Args:
        query: ``(B, H, L, D)``, any floating dtype; may be a strided view.
        key: ``(B, Hkv, S, D)``; H is a multiple of Hkv.
        value: ``(B, Hkv, S, Dv)``.
        mask: Bool, broadcastable to ``(B, H, L, S)``, ``True`` = takes part; key padding is ``(B, 1, 1, S)``.
        bias: Floating point, broadcastable to ``(B, H, L, S)``, added to the scores; may require a gradient.
        causal: Query ``i`` sees keys ``j <= i + S - L`` (aligned bottom-right).
        scale: Factor of the products; ``None`` means ``D ** -0.5``.
        dropout_p: Probability of dropping a weight, whenever it is not zero; pass 0 in evaluation.
        backend: ``"auto"``, ``"sdpa"`` or ``"reference"``; see :mod:`saccade.attention.dispatch`.

    Returns:
        ``(B, H, L, Dv)``, dtype and device of ``query``.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, eq. 1 (arXiv:1706.03762).

    Example:
        >>> attention(torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 5, 8), torch.ones(1, 1, 5, 4)).shape
        torch.Size([1, 2, 3, 4])
    """
    options = {"mask": mask, "bias": bias, "causal": causal, "scale": scale, "dropout_p": dropout_p}
    out: Tensor = ATTENTION.call((query, key, value), options, backend)
    return out


def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionLSE:
    """Compute :func:`attention` and the log-sum-exp of its scores, both differentiable.

    ``lse[i] = log sum_j exp(scale * query[i] . key[j] + bias_ij)`` over the keys that query ``i`` may see. It is what
    :func:`merge_partials` needs, and makes a sink logit one line: ``out * sigmoid(lse - sink)[..., None]``.

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
        Output and log-sum-exp; a query that sees no key gets zeros and ``-inf``, and no gradient.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Example:
        >>> attention_lse(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 4, 8)).lse.exp().round()
        tensor([[[4.]]])
    """
    options = {"mask": mask, "bias": bias, "causal": causal, "scale": scale}
    result: AttentionLSE = ATTENTION_LSE.call((query, key, value), options, backend)
    return result


def always(problem: Problem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, holds the L x S scores")


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    """Return normal query, key and value of one shape ``(B, H, N, D)``; drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))


def scripted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Stand in for :func:`attention` in TorchScript, which has no keyword-only arguments and no table of backends."""
    return sdpa_attention(query, key, value, mask, bias, causal, scale, dropout_p)


def scripted_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionLSE:
    """Stand in for :func:`attention_lse` in TorchScript: its literal form, made of torch's own operators."""
    return reference.attention_lse(query, key, value, mask, bias, causal, scale)


# The hook by which torch.jit.script asks an object for the form to compile.
attention.__prepare_scriptable__ = lambda: scripted_attention  # type: ignore[attr-defined]
attention_lse.__prepare_scriptable__ = lambda: scripted_attention_lse  # type: ignore[attr-defined]

ATTENTION = register(
    Operator(
        function=attention,
        summary="softmax(scale q k^T + bias) v",
        backends=(
            Backend("sdpa", can_run_attention, sdpa_attention),
            Backend("reference", always, reference.attention),
        ),
        describe=describe,
        example=example,
    )
)
ATTENTION_LSE = register(
    Operator(
        function=attention_lse,
        summary="attention and the log-sum-exp of its scores, for exact merging of partial results",
        backends=(
            Backend("triton", can_run_flash, flash_attention_lse),
            Backend("sdpa", can_run_attention_lse, sdpa_attention_lse),
            Backend("reference", always, reference.attention_lse),
        ),
        describe=describe,
        example=example,
    )
)
