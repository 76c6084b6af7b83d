"""Softmax attention as one flash pass, forward and backward, over all keys or over parts of them.

The parts of the keys are one more axis of the launch. Keys of a part are read through a permutation, tile by tile, so
that nothing is gathered in memory, and each part is normalised by itself. Plain attention is one part that holds all
keys in their own order. Three kernels: results; gradient of the query; gradients of key, value and key bias. Each
element of a gradient is summed by one program in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.attention.kernels.runtime import INTERPRETING, Build, dot_precision, padded

__all__ = ["BUILDS", "softmax_attention", "softmax_parts"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def softmax_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    bounds: Tensor,
    *,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_bias: Tensor | None = None,
    weighted_part: int = 0,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to each part of the keys by itself; differentiable in query, key, value and key bias through both results.

    Part ``p`` holds the keys ``order[..., bounds[..., p] : bounds[..., p + 1]]``. For it the results are those of
    :func:`saccade.attention.attention_lse` over these keys alone. Keys outside of all bounds take no part. With a key
    bias there is one more part, the last: the keys of part ``weighted_part`` again, ``key_bias`` added to their scores.

    Args:
        query: ``(B, H, L, D)``, float32, float16 or bfloat16; B, H, L and S at least 1. Any strides, as all below.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        order: int32 ``(B, Hs, S)``, Hs = 1 or H, contiguous; each row a permutation of ``0 .. S - 1``. Where ``causal``,
            key positions must not descend within a part (a stable sort of ascending positions by part does that).
        bounds: int32 ``(B, Hs, P + 1)``, contiguous, ascending, within ``0 .. S``. Equal bounds make an empty part.
        mask: Bool, broadcastable to ``(B, H, L, S)``, by original key index, ``True`` = takes part.
        query_positions: int32 or int64 ``(B or 1, L)``; ``None`` means ``i + S - L``.
        key_positions: int32 or int64 ``(B or 1, S)``, by original key index; ``None`` means ``j``.
        key_bias: float32 ``(B, Hs, S)``, by original key index; ``-inf`` leaves a key out. Read for the extra part only.
        weighted_part: Which part the extra one repeats, ``0 .. P - 1``.
        causal: A query sees keys with ``key position <= query position``.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.

    Returns:
        Output ``(B, H, Pr, L, Dv)`` in the dtype of the query, log-sum-exp ``(B, H, Pr, L)`` float32, Pr = P, or P + 1
        with a key bias. A query that sees nothing of a part has output 0 and ``-inf`` there, and no gradient.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    places = (order, bounds, query_positions, key_positions, key_bias, weighted_part)
    out, lse, _ = softmax_attention(query, key, value, as_bytes(mask), None, *places, causal, scale, False)
    return out, lse


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """Return a bool mask as bytes over the same memory, the type that kernels read."""
    return None if mask is None else mask.view(torch.uint8)
