"""RVT (CVPR 2022, arXiv:2105.07926), with and without token-aware average pooling (TAP, ICCV 2023).

Official code vtddggg/Robust-Vision-Transformer, commit b72613f, and guoyongcs/TAPADL, commit 6e4dbff; written from a
description of both, no line is theirs. Robust vision transformer: a convolutional stem, blocks of self-attention and
MLPs with convolutions, no class token and no position embedding. In the ``plus`` models, the first blocks multiply
attention logits by a learnt factor for each pair of places. With TAP, each block attends to tokens averaged with their
neighbourhoods.

Differs from it:

- The grid of tokens is passed on, so maps need not be square.
- Masks for another grid are resized instead of cut off; ``compat=True`` cuts them off.
- Masks are not decayed.
"""

# Annotations are evaluated here, not kept as text: torch.fx hands those of the model's forward on to TorchScript.
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from saccade.checkpoints import unwrap_state_dict
from saccade.errors import ConfigError
from saccade.vision_backbones.block_maps import BlockMaps
from saccade.vision_backbones.feature_maps import init_linear
from saccade.vision_backbones.recompute import Stage
from saccade.vision_backbones.registration import build, published, register_variants
from saccade.vision_backbones.rvt_blocks import MLPS, Attention, Block, ConvMlp, new_mask, resize_mask
from saccade.vision_backbones.token_pooling import fit_token_pooling

__all__ = ["RVT", "checkpoint_filter_fn"]

logger = logging.getLogger(__name__)


class RVT(BlockMaps):
    """Robust vision transformer; a timm model.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 means none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, or ``""`` for none: a map of logits.
        patch_size: Stride of the stem: 16 or 4.
        base_dims: Width of a head, for each stage.
        depth: Blocks, for each stage.
        heads: Heads, for each stage.
        mlp_ratio: Hidden width of the MLPs, as a multiple.
        mlp_type: ``"conv"``, or ``"linear"`` for MLPs without convolutions and batch norms.
        masked_blocks: How many of the first stage's blocks, from the first, scale their logits by a mask.
        mask_grid: Rows and columns of tokens that masks are made for.
        compat: On another grid use a mask's first rows and columns, as the official code does, instead of resizing it.
        num_scales: Branches of token-aware average pooling; ``None`` means no pooling.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability that a sample skips a branch; rises linearly from 0, and the block behind the last
            one would have it.

    Raises:
        ConfigError: If an option has no such value, or a stage's width is no multiple of the one before.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        base_dims: Sequence[int] = (32, 32),
        depth: Sequence[int] = (10, 2),
        heads: Sequence[int] = (6, 12),
        mlp_ratio: float = 4.0,
        mlp_type: str = "conv",
        masked_blocks: int = 0,
        mask_grid: tuple[int, int] = (14, 14),
        compat: bool = False,
        num_scales: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if not len(base_dims) == len(depth) == len(heads) > 0:
            raise ConfigError(
                "base_dims, depth and heads must have one entry per stage; "
                f"got {tuple(base_dims)}, {tuple(depth)}, {tuple(heads)}."
            )
        if patch_size not in (16, 4):
            raise ConfigError(f"patch_size must be 16 or 4; got {patch_size}.")
        dims = [width * count for width, count in zip(base_dims, heads, strict=True)]
        if any(after % before for before, after in pairwise(dims)):
            raise ConfigError(f"each stage's width (base_dims x heads) must be a multiple of the last; got {dims}.")
        super().__init__(in_chans, dims[-1], drop_rate)
        self.mask_grid = mask_grid
        patch = patch_size // 4
        self.patch_embed = nn.Sequential(
            OrderedDict(
                proj=nn.Sequential(
                    nn.Conv2d(in_chans, 32, 7, stride=2, padding=2),
                    nn.BatchNorm2d(32),
                    nn.MaxPool2d(3, stride=2, padding=1),
                    nn.Conv2d(32, dims[0], patch, stride=patch),
                )
            )
        )
        ends = list(accumulate(depth))
        stages = []
        for s, (dim, count, end) in enumerate(zip(dims, depth, ends, strict=True)):
            blocks = [
                Block(
                    dim,
                    heads[s],
                    mlp_ratio=mlp_ratio,
                    mlp_type=mlp_type,
                    num_scales=num_scales,
                    drop_path=drop_path_rate * (end - count + i) / ends[-1],
                    mask_grid=mask_grid if s == 0 and i < masked_blocks else None,
                    compat=compat,
                )
                for i in range(count)
            ]
            stages.append(nn.Sequential(OrderedDict(blocks=Stage(*blocks, channels_last=True))))
            for i in range(count):
                module = f"transformers.{s}.blocks.{i}"
                self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**s, "module": module})
        self.transformers = nn.ModuleList(stages)
        # As many as there are stages: TorchScript walks through both lists side by side.
        self.pools = nn.ModuleList([*[shrink(before, after) for before, after in pairwise(dims)], nn.Identity()])
        self.apply(init_linear)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the order of layers, for layer decay: each block is a layer."""
        blocks = [(r"^transformers\.(\d+)\.blocks\.(\d+)\.", None), (r"^pools\.(\d+)\.", (99999,))]
        return {"stem": r"^patch_embed\.", "blocks": blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return a pattern of the masks, which are factors of logits."""
        return {"*.att_mask"}

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold batch norms into the convolutions before them for inference, in place; logits stay up to rounding."""
        super().reparameterize()
        for module in self.modules():
            if isinstance(module, ConvMlp):
                module.fold()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map behind the last block, ``(B, num_features, H / 16, W / 16)`` if there is one stage."""
        x = self.patch_embed(x)
        for stage, pool in zip(self.transformers, self.pools):  # noqa: B905 - TorchScript's zip has no option
            x = pool(stage(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def steps(self, x: Tensor, norm: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and maps."""
        yield from self.with_norm(self.maps(x), norm)

    @torch.jit.ignore
    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the maps behind each block."""
        x = self.patch_embed(x)
        for stage, pool in zip(self.transformers, self.pools, strict=True):
            for y in cast(Stage, stage.blocks).steps(x):
                x = y
                yield x
            x = pool(x)

    @torch.jit.ignore
    def keep(self, last: int) -> None:
        """Drop every layer behind the map ``last``."""
        stages, kept = [], last + 1
        for stage in self.transformers:
            blocks = cast(Stage, stage.blocks)
            stages.append(nn.Sequential(OrderedDict(blocks=Stage(*blocks[:kept], channels_last=True))))
            kept -= len(blocks)
            if kept <= 0:
                break
        self.transformers = nn.ModuleList(stages)
        self.pools = nn.ModuleList([*self.pools[: len(stages) - 1], nn.Identity()])


def shrink(dim: int, out_dim: int) -> nn.Sequential:
    """Return what halves a map between stages: a 3 x 3 convolution, each channel by itself."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Take official weights, whatever they are wrapped in, and give the model the parts that they have.

    Key names are the official ones. Block by block the model follows the file: whether logits have a mask, whether the
    MLP has convolutions, and the number of branches of TAP, or none. Masks for another square grid are resized, or cut
    off if the model was built with ``compat``.

    Args:
        state_dict: Content of the file.
        model: Receives the weights; its blocks are changed where the file has others.

    Returns:
        Weights by key; unknown keys as they are.
    """
    state = unwrap_state_dict(state_dict)
    if not isinstance(model, RVT):
        return state
    fit_token_pooling(state, model)
    changed = False
    for name, block in model.named_modules():
        if isinstance(block, Block) and f"{name}.norm1.weight" in state:
            changed |= fit_mlp(state[f"{name}.mlp.fc1.weight"], block)
            changed |= fit_mask(state, f"{name}.attn.att_mask", block.attn, model.mask_grid)
    if changed:
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        logger.warning(
            "The model follows the weights: of %d blocks %d have a mask and %d an MLP with convolutions.",
            len(blocks),
            sum(block.attn.att_mask is not None for block in blocks),
            sum(isinstance(block.mlp, ConvMlp) for block in blocks),
        )
    return state


def fit_mlp(weight: Tensor, block: Block) -> bool:
    """Give a block the MLP that the weight of a first layer, ``(hidden, C)`` or ``(hidden, C, 1, 1)``, belongs to.

    Returns:
        Whether it had another.
    """
    mlp_type = "linear" if weight.ndim == 2 else "conv"
    if isinstance(block.mlp, ConvMlp) == (mlp_type == "conv"):
        return False
    block.mlp = MLPS[mlp_type](block.dim, weight.shape[0]).to(block.norm1.weight).train(block.training)
    return True


def fit_mask(state: dict[str, Tensor], key: str, attn: Attention, grid: tuple[int, int]) -> bool:
    """Give attention a mask if a state dict has one for it, and the state dict one of the right size.

    Returns:
        Whether a mask has come or gone.
    """
    changed = (key in state) != (attn.att_mask is not None)
    if key not in state:
        attn.att_mask = None
        return changed
    mask = state[key]
    if changed:
        attn.mask_grid = grid
        attn.att_mask = nn.Parameter(new_mask(attn.num_heads, grid).to(attn.qkv.weight))
    side, tokens = math.isqrt(mask.shape[-1]), attn.mask_grid[0] * attn.mask_grid[1]
    if side**2 == mask.shape[-1] != tokens:
        if attn.compat:
            state[key] = mask[:, :tokens, :tokens]
        else:
            state[key] = resize_mask(mask, (side, side), attn.mask_grid)
    return changed


TINY: dict[str, Any] = {"base_dims": (32, 32), "depth": (10, 2), "heads": (6, 12)}
SMALL: dict[str, Any] = {"base_dims": (64,), "depth": (12,), "heads": (6,)}
BASE: dict[str, Any] = {"base_dims": (64,), "depth": (12,), "heads": (12,)}
PLAIN: dict[str, dict[str, Any]] = {
    "rvt_tiny": TINY,
    "rvt_tiny_plus": {**TINY, "masked_blocks": 10},
    "rvt_small": SMALL,
    "rvt_small_plus": {**SMALL, "masked_blocks": 5},
    "rvt_base": BASE,
    "rvt_base_plus": {**BASE, "masked_blocks": 5},
}
# The first code chose MLPs without convolutions for the width of RVT-B, the code with TAP does not.
VARIANTS = {
    **{name: sizes | ({"mlp_type": "linear"} if "base" in name else {}) for name, sizes in PLAIN.items()},
    **{f"tap_{name}": {**sizes, "num_scales": 4} for name, sizes in PLAIN.items()},
}


default_cfgs = generate_default_cfgs(
    {
        f"{variant}.in1k": published(
            pool_size=(7, 7) if "tiny" in variant else (14, 14),
            crop_pct=0.875,
            first_conv="patch_embed.proj.0",
            classifier="head",
            license="unknown",  # neither repository states one for the weights
            paper_ids="arXiv:2105.07926",
            origin_url="https://github.com/guoyongcs/TAPADL"
            if "tap" in variant
            else "https://github.com/vtddggg/Robust-Vision-Transformer",
        )
        for variant in VARIANTS
    }
)


def build_rvt(variant: str, pretrained: bool, **kwargs: Any) -> RVT:  # noqa: ANN401 - passed through to timm
    """Build a variant as timm does; ``features_only`` gives the last three maps."""
    return build(RVT, variant, pretrained, checkpoint_filter_fn, default_indices=3, **{**VARIANTS[variant], **kwargs})


register_variants(__name__, VARIANTS, build_rvt)
