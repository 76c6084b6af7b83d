"""Models that make one map after another: the part of timm's contract that all of ours share."""

# Annotations are evaluated here, not kept as text: torch.fx hands those of the model's forward on to TorchScript.
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.recompute import Stage
from saccade.vision_backbones.reparam import fuse_for_inference

__all__ = ["FeatureMaps", "init_linear"]


class FeatureMaps(nn.Module):
    """A model whose intermediate results are the maps that ``feature_info`` describes, in that order.

    A subclass fills ``feature_info`` and defines ``forward_features``, ``forward_head``, ``reset_classifier``,
    :meth:`steps` and :meth:`keep`.

    Args:
        in_chans: Channels of the image.
        channels: Of the features.
    """

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, channels, channels
        self.feature_info: list[dict[str, Any]] = []

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and run the blocks again there."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier; an identity if there is none."""
        return cast(nn.Module, self.head)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge branches and fold batch norms into convolutions for inference, in place; logits stay up to rounding."""
        self.eval()
        fuse_for_inference(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes mean none, and ``None`` keeps the present pooling."""
        raise NotImplementedError

    def steps(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each map, the features of a model that ends there, and the map.

        Args:
            x: Images, ``(B, in_chans, H, W)``.
            norm: Normalise the maps that have a norm.
        """
        raise NotImplementedError

    def keep(self, last: int) -> None:
        """Drop every layer behind the map ``last``."""
        raise NotImplementedError

    @torch.jit.ignore
    def drop_norm(self) -> None:
        """Drop the last norm."""
        self.norm: nn.Module = nn.Identity()

    @torch.jit.ignore
    def drop_head(self) -> None:
        """Drop the classifier, and what pools for it."""
        self.reset_classifier(0, "")

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
            norm: Normalise the maps: each by its own norm in a model built with ``dense``, else the last one, as the
                classifier's input is. OverLoCK has no other norms.
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
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        maps: dict[int, Tensor] = {}
        for i, (features, y) in enumerate(self.steps(x, norm)):
            x = features
            if i in take:
                maps[i] = y
            if stop_early and i == deepest:
                break
        taken = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in take]
        return taken if intermediates_only else (x, taken)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices=indices)`` does not need; features then end at the last map left.

        Args:
            indices: As there.
            prune_norm: Drop the last norm. Norms of a model built with ``dense`` go with their maps.
            prune_head: Drop the classifiers, and what pools for them.

        Returns:
            The maps that remain, counted from 0.
        """
        take: list[int]
        take, last = feature_take_indices(len(self.feature_info), indices)
        behind = last < len(self.feature_info) - 1
        if behind:
            self.keep(last)
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_norm or behind:
            self.drop_norm()
        if prune_head:
            self.drop_head()
        return take


def init_linear(module: nn.Module) -> None:
    """Draw the weights of a linear layer from a normal distribution cut off at two."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
