"""Token-aware average pooling as a layer: a small network weighs how far each token looks around itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from saccade.attention import token_average_pooling
from saccade.errors import ConfigError

__all__ = ["PoolingBlock", "TokenAveragePooling", "fit_token_pooling"]

logger = logging.getLogger(__name__)


class TokenAveragePooling(nn.Module):
    """Average each token with dilated 3 x 3 neighbourhoods, by weights predicted from the tokens (TAP).

    The predictor is two convolutions without bias and a batch norm between them, no activation; a softmax over its
    ``num_scales`` channels weighs the token itself and its neighbourhoods at dilations ``1 .. num_scales - 1``.

    Args:
        channels: Width C of the tokens.
        num_scales: Number K of branches; with 1 the layer changes nothing, but keeps its parameters.
        temperature: Divides what the softmax is taken of.

    Source:
        Guo, Stutz and Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023; state-dict keys of
        the official code (guoyongcs/TAPADL at commit 6e4dbff).
    """

    def __init__(self, channels: int, num_scales: int = 4, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.norm_frozen = False
        self.proj = nn.Sequential(
            nn.Conv2d(channels, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen norm stays in evaluation mode."""
        super().train(mode)
        if self.norm_frozen:
            self.proj[1].eval()
        return self

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pool ``(B, Y X, C)``, row-major and without class token, on its grid ``(Y, X)``."""
        image = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], grid[0], grid[1])
        weights = torch.softmax(self.proj(image) / self.temperature, dim=1)
        return token_average_pooling(tokens, weights.to(tokens.dtype))


class PoolingBlock(nn.Module):
    """A transformer block whose attention may read pooled tokens.

    Args:
        dim: Width of the tokens.
        num_scales: Branches of token-aware average pooling; ``None`` means no pooling.

    Raises:
        ConfigError: If there is no branch.
    """

    def __init__(self, dim: int, num_scales: int | None) -> None:
        super().__init__()
        if num_scales is not None and num_scales < 1:
            raise ConfigError(f"num_scales must be at least 1, or None for no pooling; got {num_scales}.")
        self.dim = dim
        self.dilation_predictor = None if num_scales is None else TokenAveragePooling(dim, num_scales)

    def pool(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what attention reads, of tokens ``(B, Y X, C)`` on a grid ``(Y, X)``."""
        if self.dilation_predictor is None:
            return tokens
        pooled: Tensor = self.dilation_predictor(tokens, grid)
        return pooled


def fit_token_pooling(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Give the blocks of a model the pooling that a state dict has weights for: its branches, or none.

    Args:
        state: Weights by key.
        model: Its blocks are :class:`PoolingBlock`; those that the state dict does not know stay as they are.
    """
    changed = ""
    for name, block in model.named_modules():
        if not isinstance(block, PoolingBlock) or f"{name}.norm1.weight" not in state:
            continue
        weight = state.get(f"{name}.dilation_predictor.proj.0.weight")
        present = block.dilation_predictor
        if weight is None:
            if present is not None:
                block.dilation_predictor, changed = None, "no token-aware average pooling"
        elif present is None or present.proj[0].out_channels != weight.shape[0]:
            like = next(block.parameters())
            pooling = TokenAveragePooling(block.dim, weight.shape[0]).to(like)
            block.dilation_predictor = pooling.train(block.training)
            changed = f"token-aware average pooling of {weight.shape[0]} scales"
    if changed:
        logger.warning("The model follows the weights, which have %s.", changed)
