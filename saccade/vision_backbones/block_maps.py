"""Models whose features are the maps after each of their blocks: what timm asks of them, for FAN and RVT."""

# Annotations are evaluated here, not kept as text: torch.fx hands those of the model's forward on to TorchScript.
from collections.abc import Iterator, Sequence

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.recompute import Stage
from saccade.vision_backbones.reparam import fuse_for_inference

__all__ = ["BlockMaps", "init_linear"]

POOLS = ("avg", "max", "avgmax", "")


class BlockMaps(nn.Module):
    """The part of timm's contract that models with a map after each block share.

    A subclass makes its layers, ``feature_info`` and ``norm``, calls :meth:`reset_classifier`, and defines
    ``forward_features``, :meth:`steps` and :meth:`keep`. Features are the last map, before ``norm``.

    Args:
        in_chans: Channels of the image.
        channels: Of the features.
        drop_rate: Dropout before the classifier.
    """

    def __init__(self, in_chans: int, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, channels, channels
        self.feature_info: list[dict[str, int | str]] = []
        self.head_drop = nn.Dropout(drop_rate)
        self.norm: nn.Module = nn.LayerNorm(channels, eps=1e-6)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and run the blocks again there."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier; an identity if there is none."""
        return self.head

    @torch.jit.ignore
    def set_pool(self, global_pool: str) -> None:
        """Set the pooling before the classifier.

        Raises:
            ConfigError: If it has no such name.
        """
        if global_pool not in POOLS:
            raise ConfigError(f"global_pool must be one of {', '.join(map(repr, POOLS))}; got {global_pool!r}.")
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=global_pool != "")
        self.flat = global_pool != ""

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: 0 means none.
            global_pool: ``None`` keeps the present pooling.

        Raises:
            ConfigError: If the model cannot pool like this.
        """
        if global_pool is not None:
            self.set_pool(global_pool)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features
        like = next(self.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            init_linear(self.head)
        self.train(self.training)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold batch norms into the convolutions before them for inference, in place; logits stay up to rounding."""
        self.eval()
        fuse_for_inference(self)

    def pooled(self, x: Tensor) -> Tensor:
        """Return normalised features ``(B, C)``; without pooling ``(B, H, W, C)``."""
        return self.pool_map(x)

    def pool_map(self, x: Tensor) -> Tensor:
        """Pool a map ``(B, C, H, W)`` over its places and normalise."""
        x = self.global_pool(x)
        normalised: Tensor = self.norm(x if self.flat else x.permute(0, 2, 3, 1))
        return normalised

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify features; ``pre_logits`` leaves the classifier out."""
        x = self.head_drop(self.pooled(x))
        if not pre_logits:
            x = self.head(x)
        return x if self.flat else x.permute(0, 3, 1, 2)

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the maps that ``feature_info`` describes, of images ``(B, in_chans, H, W)``."""
        raise NotImplementedError

    def keep(self, last: int) -> None:
        """Drop every layer behind the map ``last``."""
        raise NotImplementedError

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps that ``feature_info`` describes.

        Args:
            x: Images, ``(B, in_chans, H, W)``.
            indices: Which maps: all (``None``), the last n, or a list, negative numbers counted from the end.
            norm: Normalise the last map, as the classifier's input is.
            stop_early: Do not compute what lies behind the last map asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``, of the maps.
            intermediates_only: Leave the features out.

        Returns:
            Features, as of ``forward_features`` unless stopped early or pruned, and the list of maps; or the list.

        Raises:
            ConfigError: If ``output_fmt`` is another word.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ConfigError(f"output_fmt must be 'NCHW' or 'NHWC'; got {output_fmt!r}.")
        last = len(self.feature_info) - 1
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        maps: dict[int, Tensor] = {}
        for i, y in enumerate(self.steps(x)):
            x = y
            if i in take:
                maps[i] = y
            if stop_early and i == deepest:
                break
        if norm and last in maps:
            maps[last] = self.norm(maps[last].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        taken = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in take]
        return taken if intermediates_only else (x, taken)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices=indices)`` does not need; features then end at the last map left.

        Args:
            indices: As there.
            prune_norm: Drop the last norm.
            prune_head: Drop the classifier, and what pools for it.

        Returns:
            The maps that remain, counted from 0.
        """
        take: list[int]
        take, last = feature_take_indices(len(self.feature_info), indices)
        behind = last < len(self.feature_info) - 1
        if behind:
            self.keep(last)
            self.num_features = int(self.feature_info[last]["num_chs"])
        if prune_norm or behind:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def init_linear(module: nn.Module) -> None:
    """Draw the weights of a linear layer from a normal distribution cut off at two."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
