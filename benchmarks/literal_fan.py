"""FAN as its equations read: attention matrices in full and kept for the loss, pooling by copies of the map."""

import copy

import torch
from torch import Tensor, nn

from benchmarks.peers import diversification_of_kept_maps, unfolded_token_average_pooling
from saccade.vision_backbones.fan_blocks import TokenMixing
from saccade.vision_backbones.token_pooling import TokenAveragePooling

__all__ = ["LiteralFAN"]


class LiteralMixing(nn.Module):
    """Self-attention with its matrix, which stays in ``kept``."""

    def __init__(self, ours: TokenMixing) -> None:
        super().__init__()
        self.ours = ours
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``(B, N, C)``."""
        ours = self.ours
        query, key, value = (
            t.unflatten(-1, [ours.num_heads, -1]).transpose(1, 2) for t in (ours.q(x), *halves(ours, x))
        )
        maps = torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, -1)
        self.kept = maps.clone()
        return ours.proj((maps @ value).transpose(1, 2).flatten(2))


class LiteralPooling(nn.Module):
    """Pooling from nine copies of the map for each branch."""

    def __init__(self, ours: TokenAveragePooling) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pool ``(B, Y X, C)``."""
        image = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)
        return unfolded_token_average_pooling(tokens, torch.softmax(self.ours.proj(image), 1))


class LiteralFAN(nn.Module):
    """A FAN with the same weights; its forward pass returns logits and the diversity loss.

    Args:
        model: With or without pooling.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for block in self.model.blocks:
            block.attn = LiteralMixing(block.attn)
            if block.dilation_predictor is not None:
                block.dilation_predictor = LiteralPooling(block.dilation_predictor)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify ``(B, 3, Y, X)``."""
        logits = self.model(images)
        losses = [diversification_of_kept_maps(block.attn.kept) for block in self.model.blocks]
        for block in self.model.blocks:
            block.attn.kept = None
        return logits, torch.stack(losses).sum() / (len(losses) + 1e-6)


def halves(ours: TokenMixing, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return key and value before heads."""
    key, value = ours.kv(x).chunk(2, -1)
    return key, value
