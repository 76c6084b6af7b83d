"""Token-aware average pooling for the plain ViTs of timm, whose blocks have no place for it: by hooks."""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices, PatchEmbed
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.token_pooling import TokenAveragePooling

__all__ = ["add_token_average_pooling", "set_pooling_norm"]

MODELS = (VisionTransformer, Beit, Eva)
BLOCKS = (Block, BeitBlock, EvaBlock)  # norm1 in front of attention, and of nothing else


class TokenGrid:
    """The grid of patches of the image that a model works on; a forward hook of its patch embedding."""

    def __init__(self) -> None:
        self.size = (0, 0)

    def __call__(self, embed: PatchEmbed, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Note the grid."""
        image = inputs[0]
        self.size = embed.dynamic_feat_size((image.shape[-2], image.shape[-1]))


class PoolBefore:
    """Pools the patches among the tokens that enter a module; a forward pre-hook.

    Args:
        pooling: The layer.
        grid: Where to read the grid.
        prefix_tokens: Class and register tokens in front, which pass by.
    """

    def __init__(self, pooling: TokenAveragePooling, grid: TokenGrid, prefix_tokens: int) -> None:
        self.pooling, self.grid, self.prefix_tokens = pooling, grid, prefix_tokens

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the tokens that the module gets instead."""
        (tokens,) = inputs
        pooled = self.pooling(tokens[:, self.prefix_tokens :], self.grid.size)
        return torch.cat([tokens[:, : self.prefix_tokens], pooled], dim=1) if self.prefix_tokens else pooled


def add_token_average_pooling(model: nn.Module, num_scales: int = 4) -> None:
    """Give every block of a timm ViT token-aware average pooling, in front of the norm of its attention.

    The residual stream and the second half of a block see the tokens as they are. Each block gets a
    :class:`TokenAveragePooling` named ``dilation_predictor``; no other key changes. The grid is that of the image
    given, class and register tokens pass by. Models of saccade that have the layer are registered under their own names
    (``tap_...``).

    Args:
        model: Of timm's ``VisionTransformer`` (ViT, DeiT, ...), ``Beit`` or ``Eva``, whose blocks normalise before
            attention; changed in place. It can no longer be scripted.
        num_scales: Branches K of each layer.

    Raises:
        ConfigError: If the model or a block is of another class, drops patches at random, or has the layer already.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
        >>> add_token_average_pooling(model)
        >>> model(torch.randn(2, 3, 96, 64)).shape
        torch.Size([2, 1000])
    """
    if not isinstance(model, MODELS) or not isinstance(model.patch_embed, PatchEmbed):
        known = ", ".join(kind.__name__ for kind in MODELS)
        raise ConfigError(
            f"Token-aware average pooling can be added to timm's {known} with a PatchEmbed; got {type(model).__name__}."
        )
    for index, block in enumerate(model.blocks):
        if not isinstance(block, BLOCKS):
            kind = type(block).__name__
            raise ConfigError(f"Block {index} is a {kind}, which has no norm in front of its attention alone.")
        if hasattr(block, "dilation_predictor"):
            raise ConfigError(f"Block {index} has token-aware average pooling already.")
    if any(isinstance(module, PatchDropout | PatchDropoutWithIndices) for module in model.modules()):
        raise ConfigError(
            "The model drops patches at random (patch_drop_rate), so its tokens form no grid; set it to 0."
        )
    grid = TokenGrid()
    model.patch_embed.register_forward_hook(grid)
    for block in model.blocks:
        weight = next(block.parameters())
        pooling = TokenAveragePooling(model.embed_dim, num_scales).to(weight.device, weight.dtype)
        block.dilation_predictor = pooling.train(block.training)
        block.norm1.register_forward_pre_hook(PoolBefore(pooling, grid, model.num_prefix_tokens))


def set_pooling_norm(model: nn.Module, norm: Literal["batch", "sync", "frozen"]) -> None:
    """Choose how the predictors of token-aware average pooling normalise while training.

    Args:
        model: Has :class:`TokenAveragePooling` layers; changed in place.
        norm: ``"batch"``: statistics of the batch of each process. ``"sync"``: of all processes together (GPUs only).
            ``"frozen"``: the running statistics, which stay as they are, as for fine-tuning with small batches.

    Raises:
        ConfigError: If the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, TokenAveragePooling)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no token-aware average pooling whose norm could be {norm!r}.")
    for layer in layers:
        if norm == "sync":
            nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        layer.norm_frozen = norm == "frozen"
        layer.train(layer.training)
