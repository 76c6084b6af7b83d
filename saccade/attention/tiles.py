"""Attention maps one tile at a time: whole rows of a few samples, for operators that read maps without keeping them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.attention.reference import wide

__all__ = ["TiledMaps"]

ELEMENTS = (
    1 << 20
)  # scores in a tile, 4 MiB in float32: whole small maps, and enough rows of a large one for fast products


class TiledMaps:
    """The scores and weights of softmax attention, computed for one tile when asked, in at least float32.

    A tile is ``(b, H, R, S)``: all keys, so that each row's softmax is complete. Nothing here is differentiable.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        mask: As in :func:`saccade.attention.attention`.
        bias: As there.
        causal: As there.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.
        logit_multiplier: ``(H, L, S)``, factor of the scaled products before bias and mask.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        causal: bool,
        scale: float | None,
        logit_multiplier: Tensor | None = None,
    ) -> None:
        self.scale = float(query.shape[-1]) ** -0.5 if scale is None else scale
        self.query = (query.detach().to(wide(query)) * self.scale).contiguous()
        self.key = key.detach().to(wide(key)).contiguous()
        self.mask = None if mask is None else as_4d(mask)
        self.bias = None if bias is None else as_4d(bias.detach())
        self.causal = causal
        self.logit_multiplier = None if logit_multiplier is None else logit_multiplier.detach().to(wide(query))

    def tiles(self) -> Iterator[tuple[slice, list[slice]]]:
        """Yield samples and the blocks of their rows; there are several blocks only for one sample at a time."""
        batch, heads, queries, _ = self.query.shape
        limit = ELEMENTS if self.query.is_cpu else 16 * ELEMENTS  # a GPU has no cache to stay in, and launches to save
        row = max(heads * self.key.shape[2], 1)
        together = limit // 2 if self.query.is_cpu else limit  # small samples: a tile and its gradient stay cached
        samples = max(together // max(row * queries, 1), 1)
        rows = max(min(limit // row, queries), 1)
        blocks = [slice(first, min(first + rows, queries)) for first in range(0, queries, rows)]
        for first in range(0, batch, samples):
            yield slice(first, min(first + samples, batch)), blocks

    def products(self, samples: slice, rows: slice) -> Tensor:
        """Return ``scale * q k^T``; the query heads of one key head are rows of one product, so no key is repeated."""
        query, key = self.query[samples, :, rows], self.key[samples]
        return (self.grouped(query) @ key.flatten(0, 1).transpose(1, 2)).view(*query.shape[:3], key.shape[2])

    def grouped(self, rows: Tensor) -> Tensor:
        """Return ``(b, H, R, width)`` as ``(b Hkv, H / Hkv R, width)``: all that belongs to one key head."""
        return rows.reshape(rows.shape[0] * self.key.shape[1], -1, rows.shape[3])

    def visible(self, samples: slice, rows: slice) -> Tensor | None:
        """Return which keys the mask and the causal order leave, broadcastable to the tile; ``None`` means all."""
        mask = None if self.mask is None else part(self.mask, samples, rows)
        if not self.causal:
            return mask
        queries, keys = self.query.shape[2], self.key.shape[2]
        last = torch.arange(queries, device=self.key.device)[rows, None] + keys - queries
        seen = torch.arange(keys, device=self.key.device) <= last
        return seen if mask is None else seen & mask

    def scores(self, samples: slice, rows: slice) -> Tensor:
        """Return the scores, ``-inf`` where a key is not visible."""
        scores = self.products(samples, rows)
        if self.logit_multiplier is not None:
            scores *= self.logit_multiplier[:, rows]
        if self.bias is not None:
            scores += part(self.bias, samples, rows)
        visible = self.visible(samples, rows)
        return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)

    def weights(self, samples: slice, rows: slice) -> Tensor:
        """Return the softmax of the scores; zeros where nothing is visible."""
        scores = self.scores(samples, rows)
        if self.mask is None and self.bias is None and not self.causal:
            return scores.softmax(-1)
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.softmax(-1).masked_fill_(blind, 0.0)

    def input_gradients(self, grad_products: Tensor, samples: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Return what a cotangent of :meth:`products` gives ``query[samples, :, rows]`` and ``key[samples]``."""
        query, key = self.query[samples, :, rows], self.key[samples]
        grouped = self.grouped(grad_products)
        grad_query = (grouped @ key.flatten(0, 1)).view(query.shape) * self.scale
        return grad_query, (grouped.transpose(1, 2) @ self.grouped(query)).view(key.shape)


def as_4d(tensor: Tensor) -> Tensor:
    """Put axes of size 1 in front."""
    return tensor[(None,) * (4 - tensor.ndim)]


def part(tensor: Tensor, samples: slice, rows: slice) -> Tensor:
    """Return what a 4-D tensor broadcastable to ``(B, H, L, S)`` says about a tile."""
    return tensor[slice(None) if tensor.shape[0] == 1 else samples, :, slice(None) if tensor.shape[2] == 1 else rows]
