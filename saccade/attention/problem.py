"""What the operators agree on about their tensors: one check, and the facts that a backend decides by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import ShapeError

__all__ = ["Problem", "describe"]


@dataclass(frozen=True)
class Problem:
    """The facts about one call that decide which backends can run it; no tensor is kept.

    Args:
        device: Device type, e.g. ``"cpu"``.
        dtype: Of query, key and value.
        batch: B.
        heads: H, query heads.
        kv_heads: Hkv, key and value heads; divides H.
        queries: L.
        keys: S.
        head_dim: D, width of query and key.
        value_dim: Dv, width of value.
        mask: A mask was given.
        bias: A bias was given.
        bias_requires_grad: The bias wants a gradient.
        causal: Query i sees keys ``j <= i + S - L`` only.
        dropout: Attention weights are dropped.
        exporting: Under ``torch.export`` or ``torch.jit.trace``, where only torch's own operators may appear.
    """

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    mask: bool
    bias: bool
    bias_requires_grad: bool
    causal: bool
    dropout: bool
    exporting: bool

    @property
    def empty(self) -> bool:
        """There is no query, no key or no sample."""
        return self.batch == 0 or self.heads == 0 or self.queries == 0 or self.keys == 0

    def __str__(self) -> str:
        options = [name for name in ("mask", "bias", "causal", "dropout") if getattr(self, name)]
        query = (self.batch, self.heads, self.queries, self.head_dim)
        key = (self.batch, self.kv_heads, self.keys, self.head_dim)
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join(
            [f"query {query}", f"key {key}", f"Dv {self.value_dim}", f"{dtype} on {self.device}", *options]
        )


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Problem:
    """Check the arguments that softmax operators share and return the facts about them.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)`` with H a multiple of Hkv.
        value: ``(B, Hkv, S, Dv)``.
        mask: Bool, broadcastable to ``(B, H, L, S)``.
        bias: Floating point, broadcastable to ``(B, H, L, S)``.
        causal: See :class:`Problem`.
        scale: Accepted so that a call can be described as it stands; decides nothing.
        dropout_p: Probability.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device; the message names what arrived.
    """
    shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ShapeError(f"query (B, H, L, D), key (B, Hkv, S, D) and value (B, Hkv, S, Dv) must be 4-D; {shapes}.")
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys, value_dim = value.shape[1:]
    if key.shape[0] != batch or value.shape[0] != batch:
        raise ShapeError(f"query, key and value must have the same batch size; {shapes}.")
    if key.shape[1] != kv_heads or key.shape[2] != keys:
        raise ShapeError(f"key (B, Hkv, S, D) and value (B, Hkv, S, Dv) must agree in Hkv and S; {shapes}.")
    if key.shape[3] != head_dim or head_dim == 0:
        raise ShapeError(f"query and key must have the same head width of at least 1; {shapes}.")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ShapeError(f"the number of query heads must be a multiple of that of key and value heads; {shapes}.")
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise ShapeError(f"query, key and value must have one floating-point dtype; got {dtypes}.")
    if not query.device == key.device == value.device:
        raise ShapeError(
            f"query, key and value must be on one device; got {query.device}, {key.device}, {value.device}."
        )
    scores = (batch, heads, queries, keys)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ShapeError(
                f"mask must be bool (True = takes part); got {mask.dtype}. Pass additive values as bias, "
                "or compare first, e.g. mask != 0."
            )
        check_broadcast("mask", mask, scores, query)
    if bias is not None:
        if not bias.is_floating_point():
            raise ShapeError(f"bias must be floating point; got {bias.dtype}. A bool tensor goes to mask.")
        check_broadcast("bias", bias, scores, query)
    return Problem(
        device=query.device.type,
        dtype=query.dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=value_dim,
        mask=mask is not None,
        bias=bias is not None,
        bias_requires_grad=bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        causal=causal,
        dropout=dropout_p > 0,
        exporting=torch.compiler.is_exporting() or torch.jit.is_tracing(),
    )


def check_broadcast(name: str, tensor: Tensor, scores: tuple[int, int, int, int], query: Tensor) -> None:
    """Raise unless ``tensor`` can be broadcast to ``(B, H, L, S)`` and lies beside ``query``."""
    sizes = scores[4 - min(tensor.ndim, 4) :]
    if tensor.ndim > 4 or any(got not in (1, size) for got, size in zip(tensor.shape, sizes, strict=True)):
        raise ShapeError(
            f"{name} must be broadcastable to (B, H, L, S) = {scores}; got {tuple(tensor.shape)}. "
            "A key padding mask (B, S) is passed as mask[:, None, None, :]."
        )
    if tensor.device != query.device:
        raise ShapeError(f"{name} must be on the device of query, {query.device}; got {tensor.device}.")
