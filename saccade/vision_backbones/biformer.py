"""BiFormer (CVPR 2023, arXiv:2303.08810): transformer stages with bi-level routing attention.

Official code rayleizhu/BiFormer (MIT), commit 1697bbb. Four stages at strides 4 to 32. In the first three, tokens
attend within a few regions of the map that are chosen for each region as a whole
(:mod:`saccade.vision_backbones.bi_level_routing`), in the last to all tokens. The STL models (the layout of Swin-T)
have plain patches and no convolutions for position.

Differs from it:

- Maps that do not divide into regions are padded by default (``auto_pad``).
- More selected regions than there are mean all of them, instead of an error.
- Options that have no effect there (``representation_size``, ``pe``) do not exist.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from saccade.checkpoints import unwrap_state_dict
from saccade.errors import ConfigError
from saccade.vision_backbones.bi_level_routing import (
    AttentionLePE,
    BiLevelRoutingAttention,
    PointwiseLinear,
    RaggedRoutingAttention,
)
from saccade.vision_backbones.biformer_blocks import (
    Block,
    PostNormBlock,
    convolutional_mixer,
    downsample,
    mlp,
    patch_downsample,
)
from saccade.vision_backbones.biformer_stages import FourStages
from saccade.vision_backbones.recompute import Stage
from saccade.vision_backbones.registration import build, published

__all__ = [
    "BiFormer",
    "BiFormerSTL",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_stl_nchw",
    "biformer_tiny",
    "checkpoint_filter_fn",
]


class BiFormer(FourStages):
    """BiFormer-T, -S and -B; a timm model.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 means none.
        global_pool: Pooling before the classifier.
        depth: Blocks of the stages.
        embed_dim: Channels of the stages.
        qk_dims: Width of queries and keys in the stages with routing; ``None`` means that of the channels.
        head_dim: Width of a head's queries in the stages with routing. Full attention has 8 heads.
        n_win: Regions a side. No weight depends on it: let it grow with the image.
        topks: For each stage, how many regions are selected; -2 for full attention with a local term, -1 for full
            attention without, 0 for convolutions instead of attention.
        qk_scale: See :class:`~saccade.vision_backbones.bi_level_routing.BiLevelRoutingAttention`; so the options up to
            ``soft_routing``.
        side_dwconv: Kernel size of the local term; 0 means none.
        auto_pad: Pad maps that do not divide into regions.
        kv_downsample_mode: Pooling of keys and values.
        kv_per_wins: For each stage.
        kv_downsample_ratios: For each stage.
        param_attention: Whether there is an output projection.
        param_routing: Whether routing has weights.
        diff_routing: Whether it has a gradient.
        soft_routing: Whether it weighs.
        before_attn_dwconv: 3, the kernel size of the convolution for position, or 0 for none.
        mlp_ratios: Hidden width of the MLPs, as multiples.
        mlp_dwconv: Filter the hidden maps.
        pre_norm: Normalise the inputs of branches; otherwise the sums.
        layer_scale_init_value: First value of the branches' factors; none if it is not positive.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that a sample skips a branch of the last block; rises linearly from 0.
        dense: For dense tasks; see :class:`FourStages`.

    Raises:
        ConfigError: If an option has no such value.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depth: Sequence[int] = (2, 2, 8, 2),
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        qk_dims: Sequence[int | None] = (None, None, None, None),
        head_dim: int = 32,
        n_win: int = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        auto_pad: bool = True,
        kv_downsample_mode: str = "identity",
        kv_per_wins: Sequence[int] = (-1, -1, -1, -1),
        kv_downsample_ratios: Sequence[int] = (1, 1, 1, 1),
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        before_attn_dwconv: int = 3,
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        mlp_dwconv: bool = False,
        pre_norm: bool = True,
        layer_scale_init_value: float = -1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dense: bool = False,
    ) -> None:
        if before_attn_dwconv not in (0, 3):
            raise ConfigError(f"before_attn_dwconv must be 3, or 0 for none; got {before_attn_dwconv}.")

        def attention(i: int) -> nn.Module:
            dim, topk = embed_dim[i], topks[i]
            if topk == 0:
                return convolutional_mixer(dim)
            if topk < 0:
                return AttentionLePE(dim, side_dwconv=side_dwconv if topk == -2 else 0)
            qk_dim = qk_dims[i] or dim
            return BiLevelRoutingAttention(
                dim,
                qk_dim // head_dim,
                n_win,
                topk,
                qk_dim=qk_dim,
                qk_scale=qk_scale,
                side_dwconv=side_dwconv,
                auto_pad=auto_pad,
                kv_downsample_mode=kv_downsample_mode,
                kv_per_win=kv_per_wins[i],
                kv_downsample_ratio=kv_downsample_ratios[i],
                param_attention=param_attention,
                param_routing=param_routing,
                diff_routing=diff_routing,
                soft_routing=soft_routing,
            )

        def block(i: int, drop_path: float) -> Block:
            return (Block if pre_norm else PostNormBlock)(
                embed_dim[i],
                attention(i),
                mlp(embed_dim[i], int(mlp_ratios[i] * embed_dim[i]), dwconv=mlp_dwconv),
                pos_conv=before_attn_dwconv > 0,
                drop_path=drop_path,
                layer_scale=layer_scale_init_value if layer_scale_init_value > 0 else None,
            )

        half = embed_dim[0] // 2
        stem = nn.Sequential(*downsample(in_chans, half), nn.GELU(), *downsample(half, embed_dim[0]))
        super().__init__(
            [stem, *[downsample(embed_dim[i], embed_dim[i + 1]) for i in range(3)]],
            [
                Stage(*[block(i, rate) for rate in rates], channels_last=True)
                for i, rates in enumerate(stage_rates(drop_path_rate, depth))
            ],
            embed_dim,
            nn.BatchNorm2d(embed_dim[3]),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            dense=dense,
        )


class BiFormerSTL(FourStages):
    """BiFormer-STL, in the layout of Swin-T; a timm model.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 means none.
        global_pool: Pooling before the classifier.
        depth: Blocks of the stages.
        embed_dim: Channels of the stages.
        head_dim: Width of a head in the stages with routing. Full attention has 8 heads.
        n_wins: Regions a side, for each stage.
        topks: For each stage, how many regions are selected; a negative number for full attention with a local term.
        side_dwconv: Kernel size of the local term; 0 means none.
        mlp_ratios: Hidden width of the MLPs, as multiples.
        ragged: Use :class:`~saccade.vision_backbones.bi_level_routing.RaggedRoutingAttention`, apply the local term of
            full attention to the values, and shape weights as 1 x 1 convolutions, as the official NCHW model.
        norm_layer: Norm between stages and at the end.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that a sample skips a branch of the last block; rises linearly from 0.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depth: Sequence[int] = (2, 2, 6, 2),
        embed_dim: Sequence[int] = (96, 192, 384, 768),
        head_dim: int = 32,
        n_wins: Sequence[int] = (7, 7, 7, 7),
        topks: Sequence[int] = (1, 4, 16, -2),
        side_dwconv: int = 5,
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        ragged: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        linear = PointwiseLinear if ragged else nn.Linear
        routing = RaggedRoutingAttention if ragged else BiLevelRoutingAttention

        def block(i: int, drop_path: float) -> Block:
            dim = embed_dim[i]
            hidden = int(mlp_ratios[i] * dim)
            attn: nn.Module
            if topks[i] > 0:
                attn = routing(dim, dim // head_dim, n_wins[i], topks[i], side_dwconv=side_dwconv)
            else:
                attn = AttentionLePE(dim, side_dwconv=side_dwconv, lepe_on_value=ragged, linear=linear)
            layers = nn.Sequential(linear(dim, hidden), nn.GELU(), linear(hidden, dim))
            return Block(dim, attn, layers, pos_conv=False, drop_path=drop_path)

        super().__init__(
            [
                patch_downsample(in_chans, embed_dim[0], 4, norm_layer),
                *[patch_downsample(embed_dim[i], embed_dim[i + 1], 2, norm_layer) for i in range(3)],
            ],
            [
                nn.Sequential(OrderedDict(blocks=Stage(*[block(i, rate) for rate in rates], channels_last=True)))
                for i, rates in enumerate(stage_rates(drop_path_rate, depth))
            ],
            embed_dim,
            norm_layer(embed_dim[3]),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            dense=False,
        )


def stage_rates(drop_path_rate: float, depth: Sequence[int]) -> list[list[float]]:
    """Return the drop path rates of the blocks of each stage."""
    rates = calculate_drop_path_rates(drop_path_rate, sum(depth))
    return [rates[end - count : end] for count, end in zip(depth, accumulate(depth), strict=True)]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Translate official weights, whatever they are wrapped in; key names are the official ones.

    Of a detector or segmentation network the backbone is taken. A model built with ``dense`` takes the weights of a
    classifier too: its norms then stay as they are.

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
    if getattr(model, "dense", False):
        state = {key: value for key, value in state.items() if not key.startswith(("head.", "norm."))}
        own = {key: value for key, value in model.state_dict().items() if key.startswith("extra_norms.")}
        state = own | state
    return state


VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_tiny": {"depth": (2, 2, 8, 2), "embed_dim": (64, 128, 256, 512)},
    "biformer_small": {"depth": (4, 4, 18, 4), "embed_dim": (64, 128, 256, 512)},
    "biformer_base": {"depth": (4, 4, 18, 4), "embed_dim": (96, 192, 384, 768)},
    "biformer_stl": {},
    "biformer_stl_nchw": {"ragged": True},
}


default_cfgs = generate_default_cfgs(
    {
        f"{variant}.in1k": published(
            crop_pct=0.875,
            first_conv="downsample_layers.0.0",
            classifier="head",
            license="mit",
            paper_ids="arXiv:2303.08810",
            origin_url="https://github.com/rayleizhu/BiFormer",
        )
        for variant in VARIANTS
    }
)


def build_biformer(variant: str, pretrained: bool, **kwargs: Any) -> FourStages:  # noqa: ANN401 - passed through to timm
    """Build a variant as timm does."""
    model_class = BiFormerSTL if "stl" in variant else BiFormer
    return build(model_class, variant, pretrained, checkpoint_filter_fn, **{**VARIANTS[variant], **kwargs})


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> FourStages:  # noqa: ANN401
    """BiFormer-T: 13.1 M parameters, 2.2 GMAC at 224 px."""
    return build_biformer("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> FourStages:  # noqa: ANN401
    """BiFormer-S: 25.5 M parameters, 4.5 GMAC at 224 px."""
    return build_biformer("biformer_small", pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> FourStages:  # noqa: ANN401
    """BiFormer-B: 56.8 M parameters, 9.8 GMAC at 224 px."""
    return build_biformer("biformer_base", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> FourStages:  # noqa: ANN401
    """BiFormer-STL: 28.4 M parameters, 4.6 GMAC at 224 px."""
    return build_biformer("biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> FourStages:  # noqa: ANN401
    """BiFormer-STL with the later attention: 28.4 M parameters, 4.6 GMAC at 224 px."""
    return build_biformer("biformer_stl_nchw", pretrained, **kwargs)
