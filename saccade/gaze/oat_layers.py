"""Transformer layers of OAT, with keys that can be cached and shared by the paths of a scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention import attention

__all__ = ["Decoder", "DecoderLayer", "Encoder", "EncoderLayer", "KeyCache", "MultiheadAttention"]


@dataclass
class KeyCache:
    """Keys and values of the tokens so far, ``(P, H, T, D)`` each, room for T tokens of P paths."""

    key: Tensor
    value: Tensor

    def extend(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store those of tokens ``start`` onward and return all up to there."""
        stop = start + key.shape[2]
        self.key[:, :, start:stop] = key
        self.value[:, :, start:stop] = value
        return self.key[:, :, :stop], self.value[:, :, :stop]

    def take(self, rows: Tensor) -> KeyCache:
        """Return the cache of other paths, by number."""
        return KeyCache(self.key.index_select(0, rows), self.value.index_select(0, rows))


class MultiheadAttention(nn.Module):
    """Attention with the parameters of ``torch.nn.MultiheadAttention``, its projections apart.

    Args:
        width: Numbers per token E.
        heads: Heads, a divisor of E.
        dropout: Share of weights dropped in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x: Tensor, first: int, count: int) -> list[Tensor]:
        """Return query, key, value, ``count`` from the ``first`` on, ``(B, H, L, D)`` each, of tokens ``(B, L, E)``."""
        rows = slice(first * x.shape[-1], (first + count) * x.shape[-1])
        parts = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return list(parts.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend and project, ``(B, L, E)``."""
        dropout = self.dropout if self.training else 0.0
        out = attention(query, key, value, mask=mask, causal=causal, dropout_p=dropout)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each added and normalised after.

    Args:
        width: Numbers per token.
        heads: Attention heads.
        hidden: Width of the feed-forward network.
        dropout: Of attention weights, hidden units and both branches.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(width, heads, dropout)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map tokens ``(B, S, E)``; ``mask`` ``(B, 1, 1, S)`` says which are there."""
        query, key, value = self.self_attn.project(x, 0, 3)
        attended = self.self_attn.attend(query, key, value, mask=mask)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        out: Tensor = self.norm2(x + self.dropout(self.linear2(hidden)))
        return out


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the scene and a feed-forward network, each added and normalised after.

    Args:
        width: Numbers per token.
        heads: Attention heads.
        hidden: Width of the feed-forward network.
        dropout: Of attention weights, hidden units and all branches.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(width, heads, dropout)
        self.multihead_attn = MultiheadAttention(width, heads, dropout)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        scene: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeyCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Map the tokens of K paths in each of B scenes.

        Args:
            x: ``(B, K, T, E)``.
            scene: Key and value of the scene, ``(B, H, S, D)`` each; all paths of a scene read the same.
            mask: ``(B, 1, 1, S)``, which of them are there; ``None`` means all.
            cache: Keys of the tokens before, of ``B * K`` paths; these tokens are added.
            start: Number of tokens before.
        """
        batch, paths, length, _ = x.shape
        query, key, value = self.self_attn.project(x.flatten(0, 1), 0, 3)
        if cache is not None:
            key, value = cache.extend(key, value, start)
        attended = self.self_attn.attend(query, key, value, causal=length > 1).view_as(x)
        x = self.norm1(x + self.dropout(attended))
        (query,) = self.multihead_attn.project(x.flatten(1, 2), 0, 1)  # the paths are queries side by side
        attended = self.multihead_attn.attend(query, *scene, mask=mask).view(batch, paths, length, -1)
        x = self.norm2(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        out: Tensor = self.norm3(x + self.dropout(self.linear2(hidden)))
        return out


class Encoder(nn.Module):
    """Encoder layers in turn.

    Args:
        depth: Number of them.
        sizes: Width, heads, hidden units, dropout.
    """

    def __init__(self, depth: int, sizes: tuple[int, int, int, float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*sizes) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map tokens ``(B, S, E)``."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Decoder(nn.Module):
    """Decoder layers in turn.

    Args:
        depth: Number of them.
        sizes: Width, heads, hidden units, dropout.
    """

    def __init__(self, depth: int, sizes: tuple[int, int, int, float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(depth))

    def keys(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return key and value of a scene ``(B, S, E)`` for each layer."""
        pairs = []
        for layer in self.layers:
            key, value = cast(DecoderLayer, layer).multihead_attn.project(memory, 1, 2)
            pairs.append((key, value))
        return pairs

    def forward(
        self,
        x: Tensor,
        keys: list[tuple[Tensor, Tensor]],
        mask: Tensor | None,
        caches: list[KeyCache] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Map tokens ``(B, K, T, E)``; see ``DecoderLayer``."""
        for number, layer in enumerate(self.layers):
            x = layer(x, keys[number], mask, None if caches is None else caches[number], start)
        return x
