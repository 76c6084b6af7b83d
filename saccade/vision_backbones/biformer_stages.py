"""Four stages in a row: what timm asks of a model, for both forms of BiFormer."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.biformer_blocks import NORM_EPS
from saccade.vision_backbones.recompute import Stage
from saccade.vision_backbones.reparam import fuse_for_inference

__all__ = ["FourStages"]


class FourStages(nn.Module):
    """Four stages, each after a layer that lowers the resolution; the part of timm's contract that both forms share.

    Args:
        downsample_layers: To strides 4, 8, 16 and 32.
        stages: What follows each.
        embed_dim: Channels of the stages.
        norm: Applied to the last map.
        in_chans: Channels of the image.
        num_classes: Classes; 0 means none.
        global_pool: Pooling before the classifier; ``""`` for none: a map of logits.
        drop_rate: Dropout before the classifier.
        dense: No classifier and no last norm, but a norm for each of the four maps, as in the official networks for
            segmentation and detection; ``forward_intermediates(norm=True)`` and ``features_only`` apply them.
    """

    def __init__(
        self,
        downsample_layers: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        embed_dim: Sequence[int],
        norm: nn.Module,
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        dense: bool,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, embed_dim[3], embed_dim[3]
        self.dense = dense
        self.downsample_layers, self.stages = nn.ModuleList(downsample_layers), nn.ModuleList(stages)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, channels in enumerate(embed_dim)
        ]
        if dense:
            self.extra_norms = nn.ModuleList(LayerNorm2d(channels, eps=NORM_EPS) for channels in embed_dim)
        self.norm = nn.Identity() if dense else norm
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(0 if dense else num_classes, "" if dense else global_pool)
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the order of layers, for layer decay."""
        if coarse:
            return {"stem": r"^downsample_layers\.0\.", "blocks": r"^(?:downsample_layers|stages)\.(\d+)\."}
        blocks = [
            (r"^downsample_layers\.(\d+)\.", (0,)),
            (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.", None),
            (r"^extra_norms\.", (99999,)),
        ]
        return {"stem": r"^downsample_layers\.0\.", "blocks": blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return no name: every scale and bias has one axis, and timm leaves those out by itself."""
        return set()

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
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: 0 means none.
            global_pool: ``None`` keeps the present pooling.

        Raises:
            ConfigError: If classes are asked for of a model for dense tasks.
        """
        if num_classes > 0 and self.dense:
            raise ConfigError("a BiFormer for dense tasks (dense=True) has no classifier.")
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=global_pool != "")
            self.pools = global_pool != ""
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        like = next(self.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            init_weights(self.head)
        self.train(self.training)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold batch norms and identities into convolutions for inference, in place; logits stay up to rounding."""
        self.eval()
        fuse_for_inference(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features ``(B, num_features, H / 32, W / 32)`` of images ``(B, in_chans, H, W)``."""
        for shrink, stage in zip(self.downsample_layers, self.stages):  # noqa: B905 - TorchScript's zip has no option
            x = stage(shrink(x))
        features: Tensor = self.norm(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify features; ``pre_logits`` leaves the classifier out."""
        x = self.head_drop(self.global_pool(x))
        if pre_logits:
            return x
        logits: Tensor = self.head(x if self.pools else x.permute(0, 2, 3, 1))
        return logits if self.pools else logits.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

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
        """Return the maps at strides 4, 8, 16 and 32.

        Args:
            x: Images, ``(B, in_chans, H, W)``.
            indices: Which maps: all (``None``), the last n, or a list, negative numbers counted from the end.
            norm: Apply the norms that a model built with ``dense`` has; other models normalise the last map alone.
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
        take, deepest = feature_take_indices(4, indices)
        last = min(len(self.stages) - 1, deepest if stop_early else 3)
        maps = []
        for shrink, stage in zip(self.downsample_layers[: last + 1], self.stages[: last + 1], strict=True):
            x = stage(shrink(x))
            maps.append(x)
        if last == 3:
            x = self.norm(x)
            if norm:
                maps[3] = x
        if norm and self.dense:
            maps = [normalise(y) for normalise, y in zip(self.extra_norms, maps, strict=False)]
        maps = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in take]
        return maps if intermediates_only else (x, maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices=indices)`` does not need; features then end at the last map left.

        Args:
            indices: As there.
            prune_norm: Drop the last norm; the norms of a model built with ``dense`` go with their maps.
            prune_head: Drop the classifier.

        Returns:
            The maps that remain, counted from 0.
        """
        take: list[int]
        take, last = feature_take_indices(4, indices)
        self.downsample_layers, self.stages = self.downsample_layers[: last + 1], self.stages[: last + 1]
        if self.dense:
            self.extra_norms = self.extra_norms[: last + 1]
        if prune_norm or last < 3:
            self.norm = nn.Identity()
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return take


def init_weights(module: nn.Module) -> None:
    """Draw the weights of a linear layer from a normal distribution cut off at two."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
