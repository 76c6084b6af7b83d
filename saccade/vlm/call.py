"""One call of one layer's attention, as transformers makes it, and attention by class over some of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.attention import PartitionedAttention, partitioned_attention
from saccade.errors import ConfigError

__all__ = ["AttentionCall", "TokenTable"]


@dataclass(frozen=True)
class AttentionCall:
    """Queries of consecutive tokens of a prompt or of its continuation, with all keys they may see.

    Args:
        layer: Index of the layer.
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        mask: Bool ``(B, 1, L, S)`` or ``(B, 1, 1, S)``, ``True`` = takes part; with ``causal``, in addition to it.
        causal: A query sees the keys of its own and of earlier columns.
        scale: Factor of the products.
        position: Place of the first query in the sequence, padding counted; ``None`` inside a compiled step, where it
            is known that the query is a generated token.
        first_key: Place of the first key: 0, or where a sliding window begins. A tensor in a compiled step.
        own_columns: Column of each query's own key, ``(L,)``; ``None`` if queries are consecutive from ``position``.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    position: int | None
    first_key: int | Tensor
    own_columns: Tensor | None = None

    @property
    def queries(self) -> int:
        """L."""
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        """S."""
        return self.key.shape[2]

    def rows(self, start: int, stop: int) -> AttentionCall:
        """Return the call of the queries ``start`` to ``stop``."""
        if start == 0 and stop == self.queries:
            return self
        position = self.position
        return replace(
            self,
            query=self.query[:, :, start:stop],
            mask=None if self.mask is None else self.mask[:, :, start:stop] if self.mask.shape[2] > 1 else self.mask,
            position=None if position is None else position + start,
            own_columns=None if self.own_columns is None else self.own_columns[start:stop],
        )

    def pick(self, rows: Tensor) -> AttentionCall:
        """Return the call of some of the queries, by index ``(R,)``."""
        return replace(
            self,
            query=self.query[:, :, rows],
            mask=None if self.mask is None else self.mask[:, :, rows] if self.mask.shape[2] > 1 else self.mask,
            own_columns=self.query_columns()[rows],
        )

    def with_key(self, key: Tensor) -> AttentionCall:
        """Return the call with other keys."""
        return replace(self, key=key, value=self.value_for(key))

    def value_for(self, key: Tensor) -> Tensor:
        """Return the values, repeated if ``key`` has a head for every query head."""
        return self.value.repeat_interleave(key.shape[1] // self.value.shape[1], 1)

    def partitioned(
        self,
        key_class: Tensor,
        num_classes: int,
        *,
        key_log_weight: Tensor | None = None,
        weighted_class: int | None = None,
    ) -> PartitionedAttention:
        """Return attention by class of key; see :func:`saccade.attention.partitioned_attention`.

        Args:
            key_class: Labels of the columns, ``(B, S)`` or ``(B, H, S)``.
            num_classes: C.
            key_log_weight: ``(B, S)``.
            weighted_class: The class it weighs.
        """
        positions = self.query_columns() if self.causal else None
        return partitioned_attention(
            self.query,
            self.key,
            self.value,
            key_class,
            num_classes,
            mask=self.mask,
            causal=self.causal,
            query_positions=positions,
            scale=self.scale,
            key_log_weight=key_log_weight,
            weighted_class=weighted_class,
        )

    def query_columns(self) -> Tensor:
        """Return the column of each query's own key, ``(L,)``."""
        if self.own_columns is not None:
            return self.own_columns
        if self.position is None or not isinstance(self.first_key, int):
            raise ConfigError("A compiled prefill cannot be edited; compile the decoding steps only.")
        start = self.position - self.first_key
        return torch.arange(start, start + self.queries, device=self.query.device)


class TokenTable:
    """One number for each place in a sequence, from which the part that belongs to the keys of a call is taken.

    Args:
        values: Those of the prompt, ``(..., N)``.
        generated: That of every later token.
    """

    def __init__(self, values: Tensor, generated: float) -> None:
        self.generated = generated
        self.values = torch.nn.functional.pad(values, (0, 64), value=generated)

    def columns(self, call: AttentionCall) -> Tensor:
        """Return the numbers of the keys of a call, ``(..., S)``."""
        capacity = self.values.shape[-1]
        if torch.compiler.is_compiling() or not isinstance(call.first_key, int):
            places = torch.arange(call.keys, device=self.values.device) + call.first_key
            return self.values.index_select(-1, places.clamp(max=capacity - 1))  # the last one is of a generated token
        stop = call.first_key + call.keys
        if stop > capacity:
            self.values = torch.nn.functional.pad(self.values, (0, stop), value=self.generated)
        return self.values[..., call.first_key : stop]
