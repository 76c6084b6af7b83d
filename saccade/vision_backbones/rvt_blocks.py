"""Blocks of RVT: attention whose logits are scaled for each pair of places, and MLPs with or without convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_function
from torch import Tensor, nn

from saccade.attention import attention
from saccade.errors import ConfigError, ShapeError
from saccade.vision_backbones.diversity import DiversityPoint
from saccade.vision_backbones.reparam import fold_batch_norms
from saccade.vision_backbones.token_pooling import PoolingBlock

__all__ = ["Attention", "Block", "ConvMlp", "new_mask", "resize_mask"]

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention; with a mask, position-aware: products are multiplied by its sigmoid before softmax.

    Args:
        dim: Width C.
        num_heads: Heads.
        mask_grid: Rows and columns of tokens that the mask is made for; ``None`` means no mask.
        compat: On another grid use the mask's first rows and columns, as the official code does, instead of resizing.
    """

    def __init__(self, dim: int, num_heads: int, mask_grid: tuple[int, int] | None, compat: bool) -> None:
        super().__init__()
        self.num_heads, self.compat, self.scale = num_heads, compat, float(dim // num_heads) ** -0.5
        self.mask_grid = (0, 0) if mask_grid is None else mask_grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.att_mask = None if mask_grid is None else new_mask(num_heads, mask_grid)
        self.diversity = DiversityPoint()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attend within ``(B, H W, C)``; the shape stays.

        Raises:
            ShapeError: If there are more tokens than the mask has, with ``compat``.
        """
        query, key, value = self.qkv(x).unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        if self.att_mask is None:
            self.diversity(query, key)
            out = attention(query, key, value)
        else:
            mask = mask_on_grid(self.att_mask, self.mask_grid, (height, width), self.compat)
            multiplier = torch.sigmoid(mask)  # (H, N, N)
            self.diversity(query, key, None, multiplier)
            out = scaled_attention(query, key, value, self.scale * multiplier)
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed


def scaled_attention(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    """Compute attention whose products are multiplied by ``(H, N, N)``; holds them all, as fused kernels only add."""
    scores = (query @ key.transpose(-2, -1)) * factor.to(query.dtype)
    return torch.softmax(scores, -1).to(value.dtype) @ value


@register_notrace_function  # sizes decide what it does
def mask_on_grid(mask: Tensor, mask_grid: tuple[int, int], grid: tuple[int, int], compat: bool) -> Tensor:
    """Return a mask ``(H, n, n)`` for a grid of tokens: as it is, resized, or its first rows and columns (``compat``).

    Raises:
        ShapeError: If there are more tokens than the mask has, with ``compat``.
    """
    if compat:
        tokens = grid[0] * grid[1]
        if tokens > mask.shape[1]:
            raise ShapeError(f"{tokens} tokens, but masks for {mask.shape[1]}: build the model with compat=False.")
        return mask[:, :tokens, :tokens]
    return resize_mask(mask, mask_grid, grid)


def resize_mask(mask: Tensor, mask_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resize a mask between places to another grid, bilinear in the place of the key and in that of the query.

    Args:
        mask: ``(H, y x, y x)``, query before key.
        mask_grid: Its ``(y, x)``.
        grid: The new ``(Y, X)``.

    Returns:
        ``(H, Y X, Y X)``.
    """
    if mask_grid == grid:
        return mask
    for _ in range(2):  # keys, then queries, which have then changed places with them
        rows = mask.flatten(0, 1).unflatten(-1, [mask_grid[0], mask_grid[1]]).unsqueeze(1)
        rows = F.interpolate(rows, size=[grid[0], grid[1]], mode="bilinear", align_corners=False)
        mask = rows.flatten(1).unflatten(0, [mask.shape[0], -1]).transpose(1, 2)
    return mask


def new_mask(num_heads: int, grid: tuple[int, int]) -> nn.Parameter:
    """Return a fresh mask for ``(y, x)`` tokens, ``(H, y x, y x)``."""
    tokens = grid[0] * grid[1]
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, tokens, tokens), std=0.02))


class ConvMlp(nn.Module):
    """MLP of 1 x 1 convolutions with a 3 x 3 depthwise one between; a batch norm behind each, GELU between them.

    Args:
        dim: C.
        hidden: Width between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.bn3 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, H, W, C)``."""
        x = F.gelu(self.bn1(self.fc1(x.permute(0, 3, 1, 2))))
        x = F.gelu(self.bn2(self.dwconv(x)))
        out: Tensor = self.bn3(self.fc2(x))
        return out.permute(0, 2, 3, 1)

    def fold(self) -> None:
        """Fold the batch norms into the convolutions before them, in place."""
        for convolution, norm in (("fc1", "bn1"), ("dwconv", "bn2"), ("fc2", "bn3")):
            pair = nn.Sequential(self.get_submodule(convolution), self.get_submodule(norm))
            fold_batch_norms(pair)
            setattr(self, convolution, pair[0])
            setattr(self, norm, pair[1])


MLPS: dict[str, Callable[[int, int], nn.Module]] = {"conv": ConvMlp, "linear": Mlp}


class Block(PoolingBlock):
    """Attention, behind pooling if there is any, and MLP; each added to what came in.

    Args:
        dim: C.
        num_heads: Heads.
        mlp_ratio: Hidden width of the MLP, as a multiple.
        mlp_type: ``"conv"`` or ``"linear"``.
        num_scales: Branches of token-aware average pooling; ``None`` means no pooling.
        drop_path: Probability that a sample skips a branch.
        mask_grid: See :class:`Attention`.
        compat: See :class:`Attention`.

    Raises:
        ConfigError: If there is no such MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        mlp_type: str,
        num_scales: int | None,
        drop_path: float,
        mask_grid: tuple[int, int] | None,
        compat: bool,
    ) -> None:
        super().__init__(dim, num_scales)
        if mlp_type not in MLPS:
            raise ConfigError(f"mlp_type must be 'conv' or 'linear'; got {mlp_type!r}.")
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads, mask_grid, compat)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLPS[mlp_type](dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, C, H, W)``."""
        height, width = x.shape[2], x.shape[3]
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C), a view
        attended = self.attn(self.norm1(self.pool(tokens, (height, width))), height, width)
        x = (tokens + self.drop_path(attended)).unflatten(1, [height, width])
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)
