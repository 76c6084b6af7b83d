"""Four stages in a row: what timm asks of a model, for both forms of BiFormer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, SelectAdaptivePool2d
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.biformer_blocks import NORM_EPS
from saccade.vision_backbones.feature_maps import FeatureMaps, init_linear

__all__ = ["FourStages"]


class FourStages(FeatureMaps):
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
        super().__init__(in_chans, embed_dim[3])
        self.dense = dense
        self.downsample_layers, self.stages = nn.ModuleList(downsample_layers), nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, channels in enumerate(embed_dim)
        ]
        if dense:
            self.extra_norms = nn.ModuleList(LayerNorm2d(channels, eps=NORM_EPS) for channels in embed_dim)
        self.norm = nn.Identity() if dense else norm
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(0 if dense else num_classes, "" if dense else global_pool)
        self.apply(init_linear)

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
            init_linear(self.head)
        self.train(self.training)

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
    def steps(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and maps at strides 4, 8, 16 and 32."""
        for i, (shrink, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = y = stage(shrink(x))
            if i == 3:
                x = self.norm(x)
            if norm and self.dense:
                y = self.extra_norms[i](y)
            elif norm:
                y = x
            yield x, y

    @torch.jit.ignore
    def keep(self, last: int) -> None:
        """Drop every layer behind the map ``last``."""
        self.downsample_layers, self.stages = self.downsample_layers[: last + 1], self.stages[: last + 1]
        if self.dense:
            self.extra_norms = self.extra_norms[: last + 1]
