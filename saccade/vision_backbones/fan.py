"""FAN (ICML 2022, arXiv:2204.12451), with and without token-aware average pooling (TAP, ICCV 2023).

Official code NVlabs/FAN (Nvidia Source Code License-NC), commit ee1b7df, and guoyongcs/TAPADL, commit 6e4dbff; written
from a description of both, no line is theirs. Fully attentional network: blocks of self-attention over tokens and of
attention over channels at one resolution, behind convolutions (``vit``) or two stages of ConvNeXt (``hybrid``); class
attention collects the result. With TAP, each block attends to tokens averaged with their neighbourhoods.

Differs from it:

- Features are the map behind the last block; class attention is the pooling before the classifier, ``"token"``. It can
  be replaced by ``"avg"``, ``"max"`` or ``"avgmax"`` of the map, and is then not built.
- The grid of tokens is passed on, so maps need not be square.
- Norms over channels have the biased variance whatever the memory format.
- Gates' temperatures are not decayed, as the official code means to.
- Options that no published model turns on do not exist (attention at reduced resolution, TAP inside ConvNeXt).
"""

# Annotations are evaluated here, not kept as text: torch.fx hands those of the model's forward on to TorchScript.
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from timm.models.xcit import ClassAttentionBlock, PositionalEncodingFourier
from torch import Tensor, nn

from saccade.checkpoints import unwrap_state_dict
from saccade.errors import ConfigError
from saccade.vision_backbones.block_maps import BlockMaps
from saccade.vision_backbones.fan_blocks import (
    NORM_EPS,
    Block,
    HybridStem,
    LastClassAttention,
    conv_stem,
    init_lpi,
)
from saccade.vision_backbones.feature_maps import init_linear
from saccade.vision_backbones.recompute import Stage
from saccade.vision_backbones.registration import build, published, register_variants
from saccade.vision_backbones.token_pooling import fit_token_pooling

__all__ = ["FAN", "checkpoint_filter_fn"]


class FAN(BlockMaps):
    """Fully attentional network; a timm model.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 means none.
        global_pool: ``"token"`` for class attention, ``"avg"``, ``"max"``, ``"avgmax"``, or ``""`` for none: a map of
            logits.
        patch_size: Stride of the convolutional stem: 16, 8 or 4.
        embed_dim: Channels, of all blocks or of each; where they change, the map is halved.
        depth: Blocks.
        num_heads: Heads of token mixing, of all blocks or of each. Class attention has as many as the last block.
        channel_heads: Heads of channel attention, of all blocks or of each; ``None`` means ``num_heads``.
        mlp_ratio: Hidden width of the MLPs, as a multiple.
        num_scales: Branches of token-aware average pooling; ``None`` means no pooling.
        cls_attn_layers: Blocks of class attention.
        tokens_norm: Normalise the patches too in class attention.
        eta: First value of layer scales.
        convnext_depths: Blocks of two stages of ConvNeXt, which then are the stem; ``None`` means convolutions.
        convnext_dims: Channels of these stages, at strides 4 and 8.
        hybrid_patch_size: Stride of the patches behind these stages.
        head_init_scale: Factor of the classifier's first weights.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that a sample skips a branch, the same in all blocks.

    Raises:
        ConfigError: If heads do not divide channels, a list has not one entry per block, or an option has no such
            value.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        patch_size: int = 16,
        embed_dim: int | Sequence[int] = 192,
        depth: int = 12,
        num_heads: int | Sequence[int] = 4,
        channel_heads: int | Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        num_scales: int | None = None,
        cls_attn_layers: int = 2,
        tokens_norm: bool = True,
        eta: float = 1.0,
        convnext_depths: Sequence[int] | None = None,
        convnext_dims: Sequence[int] = (128, 256),
        hybrid_patch_size: int = 2,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = per_block("embed_dim", embed_dim, depth)
        heads = per_block("num_heads", num_heads, depth)
        gates = heads if channel_heads is None else per_block("channel_heads", channel_heads, depth)
        if convnext_depths is not None and not len(convnext_depths) == len(convnext_dims) == 2:
            raise ConfigError(f"ConvNeXt has two stages here; got depths {convnext_depths}, dims {convnext_dims}.")
        super().__init__(in_chans, dims[-1], drop_rate)
        self.patch_embed: nn.Sequential | HybridStem
        if convnext_depths is None:
            self.patch_embed = conv_stem(in_chans, dims[0], patch_size)
        else:
            self.patch_embed = HybridStem(in_chans, dims[0], convnext_depths, convnext_dims, hybrid_patch_size)
            patch_size = 8 * hybrid_patch_size
            for i, channels in enumerate(convnext_dims):
                module = f"patch_embed.backbone.stages.{i}"
                self.feature_info.append({"num_chs": channels, "reduction": 4 * 2**i, "module": module})
        self.stem_maps = len(self.feature_info)
        self.pos_embed: PositionalEncodingFourier | None = PositionalEncodingFourier(dim=dims[0])
        out_dims = [*dims[1:], dims[-1]]
        self.blocks = Stage(
            *[
                Block(
                    dims[i],
                    heads[i],
                    channel_heads=gates[i],
                    mlp_ratio=mlp_ratio,
                    num_scales=num_scales,
                    eta=eta,
                    drop_path=drop_path_rate,
                    out_dim=out_dims[i],
                )
                for i in range(depth)
            ],
            channels_last=True,
        )
        stride = patch_size
        for i in range(depth):
            stride *= 1 if out_dims[i] == dims[i] else 2
            self.feature_info.append({"num_chs": out_dims[i], "reduction": stride, "module": f"blocks.{i}"})
        self.cls_token: nn.Parameter | None = None
        self.cls_attn_blocks: nn.ModuleList | None = None
        if global_pool == "token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.cls_attn_blocks = nn.ModuleList(
                (ClassAttentionBlock if i < cls_attn_layers - 1 else LastClassAttention)(
                    dims[-1],
                    heads[-1],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=True,
                    norm_layer=layer_norm,
                    eta=eta,
                    tokens_norm=tokens_norm,
                )
                for i in range(cls_attn_layers)
            )
        self.apply(init_linear)
        self.apply(init_lpi)
        self.reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            with torch.no_grad():
                for parameter in self.head.parameters():
                    parameter.mul_(head_init_scale)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the order of layers, for layer decay; class attention counts as two layers."""
        layers: dict[str, Any] = {"stem": r"^(?:patch_embed|pos_embed|cls_token)"}
        if self.stem_maps > 0:
            stages = r"^patch_embed\.backbone\.stages\.(\d+)\."
            layers = {
                "stem": r"^(?:patch_embed\.backbone\.stem|cls_token)",
                "stages": stages
                if coarse
                else [(stages + r"downsample\.", (-1,)), (stages + r"blocks\.(\d+)\.", None)],
                "embedding": r"^(?:patch_embed\.proj|pos_embed)\.",
            }
        return {**layers, "blocks": r"^blocks\.(\d+)\.", "class_attention": r"^cls_attn_blocks\.(\d+)\."}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return patterns of parameters with two axes or more that are scales or offsets."""
        return {"cls_token", "*.temperature"}

    @torch.jit.ignore
    def set_pool(self, global_pool: str) -> None:
        """Set the pooling before the classifier; another than ``"token"`` removes class attention.

        Raises:
            ConfigError: If it has no such name, or class attention is asked for that was not built or is gone.
        """
        if global_pool != "token":
            super().set_pool(global_pool)
            self.cls_token, self.cls_attn_blocks = None, None
        elif self.cls_attn_blocks is None:
            raise ConfigError("this FAN has no class attention to pool with: build it with global_pool='token'.")
        else:
            super().set_pool("avg")

    def placed(self, x: Tensor) -> Tensor:
        """Add to a map of tokens where each lies."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(1, x.shape[2], x.shape[3])
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features ``(B, num_features, H / 16, W / 16)`` of images ``(B, in_chans, H, W)``."""
        features: Tensor = self.blocks(self.placed(self.patch_embed(x)))
        return features

    def pooled(self, x: Tensor) -> Tensor:
        """Return normalised features ``(B, C)``; without pooling ``(B, H, W, C)``."""
        if self.cls_attn_blocks is not None and self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
            for block in self.cls_attn_blocks:
                x = block(x)
            normalised: Tensor = self.norm(x[:, 0])
            return normalised
        return self.pool_map(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def steps(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and maps."""
        yield from self.with_norm(self.maps(x), norm)

    @torch.jit.ignore
    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the maps that ``feature_info`` describes: of ConvNeXt's stages, and behind each block."""
        if isinstance(self.patch_embed, HybridStem):
            x = self.patch_embed.backbone.stem(x)
            for stage in self.patch_embed.backbone.stages:
                x = stage(x)
                yield x
            x = self.patch_embed.proj(x)
        else:
            x = self.patch_embed(x)
        yield from self.blocks.steps(self.placed(x))

    @torch.jit.ignore
    def keep(self, last: int) -> None:
        """Drop every layer behind the map ``last``."""
        blocks = max(0, last + 1 - self.stem_maps)
        self.blocks = Stage(*self.blocks[:blocks], channels_last=True)
        if blocks == 0 and isinstance(self.patch_embed, HybridStem):
            backbone = self.patch_embed.backbone
            backbone.stages = backbone.stages[: last + 1]
            self.patch_embed.proj, self.pos_embed = nn.Identity(), None


def per_block(name: str, value: int | Sequence[int], depth: int) -> list[int]:
    """Return a value for each block.

    Raises:
        ConfigError: If a list has not one entry per block, or there is no block.
    """
    values = [value] * depth if isinstance(value, int) else list(value)
    if len(values) != depth or depth < 1:
        raise ConfigError(f"{name} must be a number or have depth = {depth} >= 1 entries; got {value}.")
    return values


def layer_norm(dim: int, **options: Any) -> nn.LayerNorm:  # noqa: ANN401 - device and dtype, from timm
    """Return the norm of class attention."""
    return nn.LayerNorm(dim, eps=NORM_EPS, **options)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Translate official weights, whatever they are wrapped in, and give the model the pooling that they have.

    Key names are the official ones; of older files the position's name is changed, and class attention's joint
    projection split. TAP follows the file: its number of branches, or none. Class attention is left out if the model
    has none.

    Args:
        state_dict: Content of the file.
        model: Receives the weights; its TAP layers are replaced if the file has others.

    Returns:
        Weights by key; unknown keys as they are.
    """
    state: dict[str, Tensor] = {}
    for key, value in unwrap_state_dict(state_dict).items():
        key = key.replace("pos_embeder.", "pos_embed.")
        before, joint, kind = key.partition(".attn.qkv.")
        if key.startswith("cls_attn_blocks.") and joint:
            state |= {f"{before}.attn.{n}.{kind}": part for n, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            state[key] = value
    if isinstance(model, FAN):
        fit_token_pooling(state, model)
        if model.cls_attn_blocks is None:
            state = {key: value for key, value in state.items() if not key.startswith("cls_")}
    return state


VIT = {
    "fan_tiny_12_p16_224": {"embed_dim": 192, "depth": 12, "num_heads": 4},
    "fan_small_12_p16_224": {"embed_dim": 384, "depth": 12, "num_heads": 8},
    "fan_base_18_p16_224": {"embed_dim": 448, "depth": 18, "num_heads": 8},
    "fan_large_24_p16_224": {"embed_dim": 480, "depth": 24, "num_heads": 10},
}
HYBRID: dict[str, dict[str, Any]] = {
    "fan_tiny_8_p4_hybrid": {"embed_dim": 192, "depth": 8, "num_heads": 8, "convnext_depths": (3, 3)},
    "fan_small_12_p4_hybrid": {"embed_dim": 384, "depth": 10, "num_heads": 8, "convnext_depths": (3, 3)},
    "fan_base_16_p4_hybrid": {"embed_dim": 448, "depth": 16, "num_heads": 8, "convnext_depths": (3, 3)},
    "fan_large_16_p4_hybrid": {
        "embed_dim": 480,
        "depth": 22,
        "num_heads": 10,
        "convnext_depths": (3, 5),
        "head_init_scale": 0.001,
    },
    "fan_Xlarge_16_p4_hybrid": {
        "embed_dim": (528,) * 20 + (768,) * 3,
        "depth": 23,
        "num_heads": (11,) * 20 + (16,) * 3,
        "convnext_depths": (3, 7),
    },
}
PLAIN: dict[str, dict[str, Any]] = {**VIT, **HYBRID}
VARIANTS = PLAIN | {f"tap_{name}": {**sizes, "num_scales": 4} for name, sizes in PLAIN.items()}


default_cfgs = generate_default_cfgs(
    {
        f"{variant}.in1k": published(
            pool_size=(7, 7) if "Xlarge" in variant else (14, 14),
            crop_pct=1.0,
            first_conv="patch_embed.backbone.stem.0" if "hybrid" in variant else "patch_embed.proj.0.0",
            classifier="head",
            license="non-commercial",  # of the code; that of the weights is not stated
            paper_ids="arXiv:2204.12451",
            origin_url="https://github.com/guoyongcs/TAPADL" if "tap" in variant else "https://github.com/NVlabs/FAN",
        )
        for variant in VARIANTS
    }
)


def build_fan(variant: str, pretrained: bool, **kwargs: Any) -> FAN:  # noqa: ANN401 - passed through to timm
    """Build a variant as timm does; ``features_only`` gives a hybrid's last map at each stride, or the last three."""
    options = {**VARIANTS[variant], **kwargs}
    indices: tuple[int, ...] | int = 3
    if "hybrid" in variant:
        dims = per_block("embed_dim", options["embed_dim"], options["depth"])
        last = {width: i for i, width in enumerate([*dims[1:], dims[-1]])}  # of the blocks of each width
        indices = (0, 1, *[2 + i for i in last.values()])
    return build(FAN, variant, pretrained, checkpoint_filter_fn, default_indices=indices, **options)


register_variants(__name__, VARIANTS, build_fan)
