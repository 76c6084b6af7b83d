"""OverLoCK (CVPR 2025, arXiv:2502.20087): look at the whole first, then closely, with kernels made from context.

Official code LMMMEng/OverLoCK (Apache-2.0), commit 2c8ab3b. A Base-Net extracts features at strides 4, 8 and 16; a
small Overview-Net takes them to stride 32 and thereby forms a first idea of the image. This context is brought back to
stride 16 and guides the Focus-Net, whose blocks make a depthwise kernel for each position from its affinity to regions
of the context (:func:`saccade.attention.context_mixing`).

Differs from it:

- The auxiliary classifier on the Overview-Net is off by default; with it, training returns ``(logits, auxiliary)``.
- Features and context travel as one map, features first.
- Gradient checkpointing does not update the statistics of batch norms twice.
- ``reparameterize`` folds batch norms too.
"""

# Annotations are evaluated here, not kept as text: torch.fx hands those of the model's forward on to TorchScript.
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from saccade.checkpoints import unwrap_state_dict
from saccade.errors import ConfigError
from saccade.vision_backbones.feature_maps import FeatureMaps
from saccade.vision_backbones.overlock_blocks import FocusBlock, LayerScale, RepConvBlock
from saccade.vision_backbones.overlock_stages import (
    FocusDownsample,
    FocusStage,
    Head,
    auxiliary_head,
    downsample,
    init_weights,
)
from saccade.vision_backbones.recompute import Stage
from saccade.vision_backbones.registration import build, published
from saccade.vision_backbones.reparam import translate_branches

__all__ = ["OverLoCK", "checkpoint_filter_fn", "overlock_b", "overlock_s", "overlock_t", "overlock_xt"]

DENSE = ("segmentation", "detection")


class OverLoCK(FeatureMaps):
    """Overview-first-look-closely-next network; a timm model.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 means none.
        global_pool: Pooling before the classifier, ``""`` for none.
        depth: Blocks of the Base-Net (first three) and the Overview-Net.
        sub_depth: Blocks of the Focus-Net at strides 16 and 32.
        embed_dim: Channels at strides 4, 8, 16 and 32. A quarter of the last is the number of context channels.
        kernel_size: Large kernels at strides 4, 8, 16 and 32.
        mlp_ratio: Hidden channels of convolutional blocks, as multiples.
        sub_mlp_ratio: Hidden channels in the Focus-Net, as multiples.
        sub_num_heads: Half the number of groups of dynamic kernels at strides 16 and 32.
        ls_init_value: First value of layer scales at strides 4, 8, 16 and 32; ``None`` means none.
        res_scale: Layer scales act on the skip connections instead of the branches.
        smk_size: Small dynamic kernel.
        deploy: Build large convolutions in merged form, as in the official ``*_reparam`` files.
        projection: Channels before the classifier.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that a sample skips a branch of the last block; rises linearly from 0.
        aux_head: Classify the Overview-Net's output too; then training returns ``(logits, auxiliary logits)``. The
            official loss is ``main + 0.4 auxiliary``.
        dense: ``"segmentation"`` or ``"detection"``: no classifier, but the official norms (and, for detection, a
            shortcut from the Overview-Net) on the four maps that ``forward_intermediates(norm=True)`` and
            ``features_only`` return.

    Raises:
        ConfigError: If a kernel size has no branches, groups do not divide channels, or ``dense`` is another word.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depth: Sequence[int] = (2, 2, 3, 2),
        sub_depth: Sequence[int] = (6, 2),
        embed_dim: Sequence[int] = (56, 112, 256, 336),
        kernel_size: Sequence[int] = (17, 15, 13, 7),
        mlp_ratio: Sequence[float] = (4, 4, 4, 4),
        sub_mlp_ratio: Sequence[float] = (3, 3),
        sub_num_heads: Sequence[int] = (4, 6),
        ls_init_value: Sequence[float | None] = (None, None, 1.0, 1.0),
        res_scale: bool = True,
        smk_size: int = 5,
        deploy: bool = False,
        projection: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        aux_head: bool = False,
        dense: str | None = None,
    ) -> None:
        context = embed_dim[3] // 4
        super().__init__(in_chans, embed_dim[3] + context)
        if dense is not None and dense not in DENSE:
            raise ConfigError(f"dense must be None, {' or '.join(map(repr, DENSE))}; got {dense!r}.")
        fused = (*embed_dim[:2], embed_dim[2] + context, embed_dim[3] + context)
        self.num_classes = num_classes
        self.projection, self.drop_rate = projection, drop_rate
        self.dense = dense
        self.last_stage = 3
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**i, "module": module}
            for i, (channels, module) in enumerate(
                zip(fused, ("blocks1", "blocks2", "sub_blocks3", "sub_blocks4"), strict=True)
            )
        ]
        depths = (*depth, *sub_depth)
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        rates_of = [rates[end - count : end] for count, end in zip(depths, accumulate(depths), strict=True)]

        def stage(i: int) -> Stage:
            return Stage(
                *[
                    RepConvBlock(
                        embed_dim[i],
                        kernel_size[i],
                        mlp_ratio=mlp_ratio[i],
                        ls_init_value=ls_init_value[i],
                        res_scale=res_scale,
                        drop_path=rate,
                        deploy=deploy,
                    )
                    for rate in rates_of[i]
                ]
            )

        def focus_stage(i: int) -> FocusStage:
            return FocusStage(
                *[
                    FocusBlock(
                        embed_dim[i],
                        context,
                        is_first=i == 2 and j == 0,
                        kernel_size=kernel_size[i],
                        smk_size=smk_size,
                        num_heads=sub_num_heads[i - 2],
                        mlp_ratio=sub_mlp_ratio[i - 2],
                        ls_init_value=ls_init_value[i],
                        res_scale=res_scale,
                        drop_path=rate,
                        deploy=deploy,
                    )
                    for j, rate in enumerate(rates_of[i + 2])
                ]
            )

        half = embed_dim[0] // 2
        self.patch_embed1 = nn.Sequential(
            *downsample(in_chans, half),
            nn.GELU(),
            *downsample(half, half, stride=1),
            nn.GELU(),
            *downsample(half, embed_dim[0]),
            nn.GELU(),
            *downsample(embed_dim[0], embed_dim[0], stride=1),
        )
        self.patch_embed2 = downsample(embed_dim[0], embed_dim[1])
        self.patch_embed3 = downsample(embed_dim[1], embed_dim[2])
        self.patch_embed4 = downsample(embed_dim[2], embed_dim[3])
        self.high_level_proj = nn.Conv2d(embed_dim[3], context, 1)
        self.patch_embedx = FocusDownsample(embed_dim[2], embed_dim[3], context)
        self.blocks1, self.blocks2, self.blocks3, self.blocks4 = stage(0), stage(1), stage(2), stage(3)
        self.sub_blocks3, self.sub_blocks4 = focus_stage(2), focus_stage(3)
        self.head, self.aux_head = None, None
        if dense is None:
            self.head = Head(fused[3], projection, num_classes, global_pool, drop_rate)
            self.head_hidden_size = self.head.num_features
            if aux_head:
                self.aux_head = auxiliary_head(embed_dim[3], num_classes)
        else:
            self.num_classes, self.head_hidden_size = 0, fused[3]
            widths = (*fused, embed_dim[3]) if dense == "detection" else fused
            self.extra_norm = nn.ModuleList(LayerNorm2d(channels) for channels in widths)
        if dense == "detection":
            self.h_proj = nn.Sequential(nn.Conv2d(embed_dim[3], fused[3], 1), LayerScale(fused[3], 1e-5))
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the order of layers, for layer decay: from the stem to the last Focus block."""
        stages = {
            "blocks1": "blocks1",
            "blocks2": "patch_embed2",
            "blocks3": "patch_embed3",
            "blocks4": "patch_embed4",
            "sub_blocks3": "high_level_proj",
            "sub_blocks4": "patch_embedx",
        }
        blocks: list[tuple[str, tuple[int, ...]]] = []
        for i, (stage, before) in enumerate(stages.items()):
            if coarse:
                blocks.append((rf"^(?:{before}|{stage})\.", (i,)))
            else:
                count = len(list(self.get_submodule(stage).children()))
                blocks += [(rf"^{stage}\.{j}\.", (i, j)) for j in range(count)]
                blocks.append((rf"^{before}\.", (i, 0)))
        return {"stem": r"^patch_embed1\.", "blocks": blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return patterns of parameters with two axes or more that are scales, shifts or biases."""
        scales = ("ls", "ls1", "ls2", "x_scale", "h_scale", "h_proj.1")
        return {"*.rpb1", "*.rpb2", "*.gamma", "*.beta", *(f"*{name}.weight" for name in scales)}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier; an identity if there is none."""
        return nn.Identity() if self.head is None else self.head[4]

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and that of the auxiliary head.

        A model whose head was pruned gets a new one, for its last map, unless neither classes nor pooling are asked
        for; it has no auxiliary head then.

        Args:
            num_classes: 0 means none.
            global_pool: ``None`` keeps the present pooling; a pruned model has none.

        Raises:
            ConfigError: If the model was built for dense tasks.
        """
        if self.dense is not None:
            raise ConfigError(f"an OverLoCK for dense tasks (dense={self.dense!r}) has no classifier.")
        self.num_classes = num_classes
        if self.head is None:
            if num_classes == 0 and not global_pool:
                return
            head = Head(self.num_features, self.projection, num_classes, global_pool or "", self.drop_rate)
            self.head = head.apply(init_weights).to(next(self.parameters()))
        else:
            self.head.reset(num_classes, self.head.pool_type if global_pool is None else global_pool)
        self.head_hidden_size = self.head.num_features
        if self.aux_head is not None:
            projection = self.high_level_proj
            self.aux_head = auxiliary_head(projection.in_channels, num_classes).to(projection.weight)
            self.aux_head.apply(init_weights)
        self.train(self.training)

    def focus(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run everything at stride 16 and the Overview-Net.

        Args:
            x: Features at stride 8, ``(B, C, H, W)``.

        Returns:
            Features with context at stride 16, context at stride 32, output of the Overview-Net.
        """
        if self.dense is not None:
            x = self.extra_norm[1](x)  # the official dense networks go on from the normalised map here, and only here
        x = self.blocks3(self.patch_embed3(x))
        overview = self.blocks4(self.patch_embed4(x))
        context = self.high_level_proj(overview)
        guide = F.interpolate(context, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.sub_blocks3(torch.cat([x, guide], 1), guide), context, overview

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last map, ``(B, num_features, H / 32, W / 32)`` unless pruned, and the Overview-Net's output."""
        x = self.blocks1(self.patch_embed1(x))
        overview = x  # what a pruned model returns for it: TorchScript wants a tensor
        if self.last_stage >= 1:
            x = self.blocks2(self.patch_embed2(x))
        if self.last_stage >= 2:
            x, context, overview = self.focus(x)
            if self.last_stage == 3:
                x = self.sub_blocks4(self.patch_embedx(x), context)
        return x, overview

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features ``(B, num_features, H / 32, W / 32)`` of images ``(B, in_chans, H, W)``."""
        return self.encode(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify features; ``pre_logits`` leaves the classifier out."""
        if self.head is None:
            return x
        logits: Tensor = self.head(x, pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits ``(B, num_classes)``; with an auxiliary head in training, ``(logits, auxiliary logits)``."""
        features, overview = self.encode(x)
        logits = self.forward_head(features)
        if self.aux_head is not None and self.training:
            return logits, self.aux_head(overview)
        return logits

    @torch.jit.ignore
    def steps(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and maps at strides 4, 8, 16 and 32; only a model built with ``dense`` has norms for maps."""
        norm = norm and self.dense is not None
        x = self.blocks1(self.patch_embed1(x))
        yield x, self.extra_norm[0](x) if norm else x
        if self.last_stage >= 1:
            x = self.blocks2(self.patch_embed2(x))
            yield x, self.extra_norm[1](x) if norm else x
        if self.last_stage >= 2:
            x, context, overview = self.focus(x)
            yield x, self.extra_norm[2](x) if norm else x
        if self.last_stage == 3:
            x = self.sub_blocks4(self.patch_embedx(x), context)
            y = self.extra_norm[3](x) if norm else x
            if norm and self.dense == "detection":
                y = y + self.h_proj(self.extra_norm[4](overview))
            yield x, y

    @torch.jit.ignore
    def keep(self, last: int) -> None:
        """Drop every layer behind the map ``last``."""
        self.last_stage = last
        behind = [
            ["patch_embed2", "blocks2"],
            ["patch_embed3", "blocks3", "patch_embed4", "blocks4", "high_level_proj", "sub_blocks3"],
            ["patch_embedx", "sub_blocks4", "h_proj"],
        ]
        for name in [name for names in behind[last:] for name in names]:
            if hasattr(self, name):
                delattr(self, name)
        if self.dense is not None:
            self.extra_norm = self.extra_norm[: last + 1]

    @torch.jit.ignore
    def drop_norm(self) -> None:
        """Do nothing: the network itself runs through a norm of a model built with ``dense``."""

    @torch.jit.ignore
    def drop_head(self) -> None:
        """Drop the classifiers."""
        self.head, self.aux_head = None, None
        self.num_classes, self.head_hidden_size = 0, self.num_features


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Translate official weights, whatever they are wrapped in.

    Key names are the official ones. Merged files (``*_reparam.pth``) are spread over the branches of a model that has
    them, and branched files merged for a model built with ``deploy=True``. The auxiliary head is left out if the model
    has none. Of a detector or segmentation network the backbone is taken.

    Args:
        state_dict: Content of the file.
        model: Receives the weights.

    Returns:
        Weights by key; unknown keys as they are.
    """
    state = unwrap_state_dict(state_dict)
    prefix = "backbone."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if getattr(model, "aux_head", None) is None:
        state = {key: value for key, value in state.items() if not key.startswith("aux_head.")}
    return translate_branches(state, model)


VARIANTS: dict[str, dict[str, Any]] = {
    "overlock_xt": {
        "depth": (2, 2, 3, 2),
        "sub_depth": (6, 2),
        "embed_dim": (56, 112, 256, 336),
        "sub_num_heads": (4, 6),
    },
    "overlock_t": {
        "depth": (4, 4, 6, 2),
        "sub_depth": (12, 2),
        "embed_dim": (64, 128, 256, 512),
        "sub_num_heads": (4, 8),
    },
    "overlock_s": {
        "depth": (6, 6, 8, 3),
        "sub_depth": (16, 3),
        "embed_dim": (64, 128, 320, 512),
        "sub_num_heads": (8, 16),
    },
    "overlock_b": {
        "depth": (8, 8, 10, 4),
        "sub_depth": (20, 4),
        "embed_dim": (80, 160, 384, 576),
        "sub_num_heads": (6, 9),
    },
}


default_cfgs = generate_default_cfgs(
    {
        f"{variant}.in1k": published(
            crop_pct=crop_pct,
            first_conv="patch_embed1.0",
            classifier="head.4",
            license="apache-2.0",
            paper_ids="arXiv:2502.20087",
            origin_url="https://github.com/LMMMEng/OverLoCK",
        )
        for variant, crop_pct in zip(VARIANTS, (0.925, 0.95, 0.95, 0.975), strict=True)
    }
)


def build_overlock(variant: str, pretrained: bool, **kwargs: Any) -> OverLoCK:  # noqa: ANN401 - passed through to timm
    """Build a variant as timm does."""
    if kwargs.get("aux_head"):
        overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
        kwargs["pretrained_cfg_overlay"] = {"classifier": ("head.4", "aux_head.2"), **overlay}
    return build(OverLoCK, variant, pretrained, checkpoint_filter_fn, **{**VARIANTS[variant], **kwargs})


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> OverLoCK:  # noqa: ANN401
    """OverLoCK-XT: 16 M parameters merged, 2.6 GMAC at 224 px."""
    return build_overlock("overlock_xt", pretrained, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> OverLoCK:  # noqa: ANN401
    """OverLoCK-T: 33 M parameters merged, 5.5 GMAC at 224 px."""
    return build_overlock("overlock_t", pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> OverLoCK:  # noqa: ANN401
    """OverLoCK-S: 56 M parameters merged, 9.7 GMAC at 224 px."""
    return build_overlock("overlock_s", pretrained, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> OverLoCK:  # noqa: ANN401
    """OverLoCK-B: 95 M parameters merged, 16.7 GMAC at 224 px."""
    return build_overlock("overlock_b", pretrained, **kwargs)
