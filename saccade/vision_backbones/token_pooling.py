"""Token-aware average pooling as a layer: a small network weighs how far each token looks around itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.attention import token_average_pooling

__all__ = ["TokenAveragePooling"]


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
        self.proj = nn.Sequential(
            nn.Conv2d(channels, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pool ``(B, Y X, C)``, row-major and without class token, on its grid ``(Y, X)``."""
        image = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], grid[0], grid[1])
        weights = torch.softmax(self.proj(image) / self.temperature, dim=1)
        return token_average_pooling(tokens, weights.to(tokens.dtype))
