"""TransMIL: two Nystrom attention layers over the tiles of a slide, with convolutions on a square grid between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.attention import attention, attention_lse
from saccade.errors import ConfigError, ShapeError
from saccade.mil.model import MILModel, MILOutput, check_bags, register

__all__ = ["NystromAttention", "TransMIL"]

KEYS = 8192  # keys whose attention is read out at a time


class NystromAttention(nn.Module):
    r"""Attention through landmarks, ``O(N m)`` in time and memory.

    .. math:: \mathrm{softmax}(Q \tilde K^\top)\; \mathrm{softmax}(\tilde Q \tilde K^\top)^{+}\;
        \mathrm{softmax}(\tilde Q K^\top) V

    Landmarks are means over consecutive groups of tokens; the pseudo-inverse takes six iterations, scaled for every
    bag by itself (the reference scales by the largest sums of the whole batch, which makes a bag depend on its
    neighbours). No map of N x m is kept: outer and inner factor are ordinary attention, the middle one is m x m.

    Args:
        dim: Width of tokens.
        num_heads: Heads.
        landmarks: m.
        iterations: Of the pseudo-inverse.
        kernel_size: Of the depthwise convolution on values along the sequence, added to the result.
        dropout: After the output projection, in training.

    Source:
        Xiong et al., AAAI 2021 (arXiv:2102.03902); keys as in ``nystrom-attention`` 0.0.14.
    """

    def __init__(
        self, dim: int, num_heads: int, landmarks: int, iterations: int = 6, kernel_size: int = 33, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.num_heads, self.landmarks, self.iterations = num_heads, landmarks, iterations
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        self.res_conv = nn.Conv2d(
            num_heads, num_heads, (kernel_size, 1), padding=(kernel_size // 2, 0), groups=num_heads, bias=False
        )

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value ``(B, H, N', D)``, zeros in front so that N' is a multiple of the landmarks."""
        padding = -tokens.shape[1] % self.landmarks
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.to_qkv(F.pad(tokens, (0, 0, padding, 0))).chunk(3, dim=-1)
        )
        return query, key, value

    def means(self, tokens: Tensor) -> Tensor:
        """Return landmarks ``(B, H, m, D)``."""
        groups: Tensor = tokens.unflatten(2, (self.landmarks, -1))
        return groups.mean(3)

    def inverse(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the pseudo-inverse of the landmarks' own attention map, ``(B, H, m, m)``, float32 at least."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * query.shape[-1] ** -0.5
            middle = scores.softmax(-1)
            columns, rows = middle.sum(-2).amax((1, 2)), middle.sum(-1).amax((1, 2))  # of each bag, over its heads
            z = middle.transpose(-1, -2) / (columns * rows)[:, None, None, None]
            eye = torch.eye(self.landmarks, dtype=dtype, device=query.device)
            for _ in range(self.iterations):
                product = middle @ z
                z = 0.25 * z @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
        inverse: Tensor = z
        return inverse

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(B, N, dim)`` to the same shape."""
        query, key, value = self.project(tokens)
        near_query, near_key = self.means(query), self.means(key)
        summary = attention(near_query, key, value)  # (B, H, m, D)
        summary = (
            self.inverse(near_query, near_key) @ summary.to(torch.promote_types(summary.dtype, torch.float32))
        ).to(value.dtype)
        out = attention(query, near_key, summary) + self.res_conv(value)
        mixed: Tensor = self.to_out(out.transpose(1, 2).flatten(2)[:, -tokens.shape[1] :])
        return mixed

    @torch.no_grad()
    def weights_of_first(self, tokens: Tensor) -> Tensor:
        """Return how much the first token reads of each token, ``(B, N)``, mean over heads; some may be below 0."""
        query, key, _ = self.project(tokens)
        first = -tokens.shape[1]
        near_query, near_key = self.means(query), self.means(key)
        scale = query.shape[-1] ** -0.5
        wide = torch.promote_types(query.dtype, torch.float32)
        row = (query[:, :, first, None].to(wide) @ near_key.to(wide).transpose(-1, -2) * scale).softmax(-1)
        row = row @ self.inverse(near_query, near_key)  # (B, H, 1, m)
        lse = attention_lse(near_query, key, key).lse[..., None].to(wide)
        parts = [
            row @ (near_query.to(wide) @ part.to(wide).transpose(-1, -2) * scale - lse).exp()
            for part in key.split(KEYS, dim=2)
        ]
        return torch.cat(parts, -1)[:, :, 0, first:].mean(1)


class Layer(nn.Module):
    """``x + attention(norm(x))``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = NystromAttention(dim, num_heads, landmarks=dim // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(B, N, dim)`` to the same shape."""
        mixed: Tensor = tokens + self.attn(self.norm(tokens))
        return mixed


class PPEG(nn.Module):
    """Depthwise convolutions of 7, 5 and 3 on the square of tokens, and the tokens themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.proj1 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """Map ``(B, 1 + side^2, dim)`` to the same shape; the first token passes by."""
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        grid = grid + self.proj(grid) + self.proj1(grid) + self.proj2(grid)
        return torch.cat([tokens[:, :1], grid.flatten(2).transpose(1, 2)], 1)


@register("transmil")
class TransMIL(MILModel):
    """Class token and tiles through two Nystrom layers with position from convolutions.

    The square is filled with the bag's own first tiles, in the order of the bag: keep tiles in row-major order and do
    not shuffle them. Bags of equal size are computed together; no bag's result depends on another. ``attention`` is
    what the class token reads of each tile in the second layer, clipped at 0 and divided by its sum, without gradient.

    Args:
        feature_dim: Width of the features.
        num_classes: Number of logits.
        hidden_dim: D, a multiple of twice the heads.
        num_heads: Heads; landmarks are D / 2.

    Source:
        Shao et al., NeurIPS 2021 (arXiv:2106.00908); keys as in ``szc19990412/TransMIL``.
    """

    def __init__(self, feature_dim: int, num_classes: int, hidden_dim: int = 512, num_heads: int = 8) -> None:
        super().__init__(feature_dim, num_classes)
        if hidden_dim % (2 * num_heads):
            raise ConfigError(f"hidden_dim must be a multiple of 2 x num_heads; got {hidden_dim} and {num_heads}.")
        self._fc1 = nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, hidden_dim))
        self.layer1 = Layer(hidden_dim, num_heads)
        self.pos_layer = PPEG(hidden_dim)
        self.layer2 = Layer(hidden_dim, num_heads)
        self.norm = nn.LayerNorm(hidden_dim)
        self._fc2 = nn.Linear(hidden_dim, num_classes)

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> MILOutput:
        """Classify bags.

        Args:
            bags: ``(B, N, feature_dim)``.
            mask: Bool ``(B, N)``, ``True`` = real instance.

        Raises:
            ShapeError: If shapes do not fit, or a bag has no instance.
        """
        check_bags(bags, mask, self.feature_dim)
        if mask is None:
            mask = torch.ones(bags.shape[:2], dtype=torch.bool, device=bags.device)
        sizes = mask.sum(1).tolist()
        if not all(sizes):
            raise ShapeError(f"TransMIL needs at least one instance a bag; bag {sizes.index(0)} of the batch has none.")
        embeddings: list[Tensor] = [bags.new_empty(0)] * len(sizes)
        weights = torch.zeros(mask.shape, dtype=torch.promote_types(bags.dtype, torch.float32), device=bags.device)
        for size in dict.fromkeys(sizes):
            rows = [row for row, count in enumerate(sizes) if count == size]
            tiles = torch.stack([bags[row, mask[row]] for row in rows])
            embedding, read = self.embed(tiles)
            for row, features, one in zip(rows, embedding, read, strict=True):
                embeddings[row] = features
                weights[row, mask[row]] = one.to(weights.dtype)
        features = torch.stack(embeddings)
        return MILOutput(self._fc2(features), weights, weights.log()[:, None], features)

    def embed(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings ``(B, D)`` and attention ``(B, N)`` of bags without padding, ``(B, N, feature_dim)``."""
        tokens = self._fc1(tiles)
        count = tokens.shape[1]
        side = math.isqrt(count - 1) + 1
        tokens = torch.cat(
            [self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens, tokens[:, : side**2 - count]], 1
        )
        tokens = self.pos_layer(self.layer1(tokens), side)
        features = self.norm(self.layer2(tokens))[:, 0]
        read = self.layer2.attn.weights_of_first(self.layer2.norm(tokens))[:, 1:].clamp(min=0)
        again = F.pad(read[:, count:], (0, 2 * count - side**2)) if side**2 > count else torch.zeros_like(read)
        read = read[:, :count] + again  # a tile that fills up the square is read twice
        return features, read / read.sum(1, keepdim=True).clamp(min=torch.finfo(read.dtype).tiny)
