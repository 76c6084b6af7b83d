import copy

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.utils import AttentionExtract
from torch import nn

from saccade.vision_backbones.attention_maps import (
    Rollout,
    attention_points,
    merge_heads,
    query_rows,
    stitch_windows,
    token_grid,
    watch_attention,
)
from tests.helpers import assert_close, randn


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64).eval()


def fused(model):
    return [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_matrices_are_those_of_timms_own_extractor(vit):
    images = randn(2, 3, 64, 64)
    oracle = copy.deepcopy(vit)
    for module in oracle.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    expected = AttentionExtract(oracle, method="hook")(images)
    seen = {}
    with torch.inference_mode(), watch_attention(vit, attention_points(vit), seen.__setitem__):
        vit(images)
    assert list(seen) == list(expected)
    for name, attention in seen.items():
        assert_close(attention, expected[name])


def test_the_model_is_put_back(vit):
    before = fused(vit)
    images = randn(1, 3, 64, 64)
    expected = vit(images)
    with watch_attention(vit, attention_points(vit), lambda name, attention: None):
        assert not any(fused(vit)[:3])
        assert_close(vit(images), expected)
    assert fused(vit) == before
    assert hooks(vit) == 0

    def fail(name, attention):
        raise ValueError("stop here")

    with pytest.raises(ValueError, match="stop here"), watch_attention(vit, attention_points(vit), fail):
        vit(images)
    assert fused(vit) == before
    assert hooks(vit) == 0


def test_only_the_points_asked_for_lose_fused_attention(vit):
    with watch_attention(vit, ["blocks.1.attn.attn_drop"], lambda name, attention: None):
        assert [name for name, module in vit.named_modules() if getattr(module, "fused_attn", None) is False] == [
            "blocks.1.attn"
        ]


def test_weights_of_torch_multihead_attention():
    torch.manual_seed(0)

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    tower, tokens, seen = Tower().eval(), randn(3, 5, 8), {}
    with torch.inference_mode():
        expected = tower.attn(tokens, tokens, tokens, average_attn_weights=False)[1]
        plain = tower(tokens)
        with watch_attention(tower, attention_points(tower), seen.__setitem__):
            assert_close(tower(tokens), plain)
    assert_close(seen["attn"], expected)
    assert hooks(tower) == 0


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "edgenext_xx_small"])
def test_cross_covariance_attention_is_no_map_of_places(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert not [point for point in attention_points(model) if "xca" in point or point.startswith("blocks.")]


def test_rollout_by_hand():
    layers = [randn(2, 3, 5, 5, seed=seed).softmax(-1) for seed in range(4)]
    rollout = Rollout()
    expected = torch.eye(5).expand(2, 5, 5)
    for layer in layers:
        rollout("", layer)
        expected = (layer.mean(1) / 2 + torch.eye(5) / 2) @ expected
    assert_close(rollout.product, expected)
    assert_close(rollout.product.sum(-1), torch.ones(2, 5))


def test_rollout_of_uniform_attention_is_uniform_and_of_none_is_the_token_itself():
    uniform, itself = Rollout(), Rollout()
    for _ in range(3):
        uniform("", torch.full((1, 2, 5, 5), 1 / 5))
        itself("", torch.eye(5).expand(1, 2, 5, 5))
    class_row = uniform.product[0, 0, 1:]
    assert_close(class_row, class_row.mean().expand(4))
    assert torch.equal(itself.product[0], torch.eye(5))


def test_largest_weight_of_any_head_keeps_rows_normalised():
    attention = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])[None]  # (1, 2 heads, 1 query, 2 keys)
    assert_close(merge_heads(attention, "max"), torch.tensor([[[2 / 3, 1 / 3]]]))
    assert_close(merge_heads(attention, "mean"), torch.tensor([[[0.75, 0.25]]]))


@pytest.mark.parametrize(
    ("tokens", "image_size", "declared", "expected"),
    [
        (197, (224, 224), 1, (1, (14, 14))),
        (196, (224, 224), 1, (0, (14, 14))),
        (198, (224, 224), 2, (2, (14, 14))),
        (51, (224, 224), 0, (2, (7, 7))),
        (261, (256, 256), 5, (5, (16, 16))),
        (61, (96, 160), 1, (1, (6, 10))),
        (60, (160, 96), 0, (0, (10, 6))),
        (12, (100, 37), 0, (0, (6, 2))),
        (48, (224, 224), 0, None),
        (1, (224, 224), 0, None),
    ],
)
def test_grid_of_tokens(tokens, image_size, declared, expected):
    assert token_grid(tokens, image_size, declared) == expected


def test_rows_that_the_classifier_reads():
    def rows(name, **options):
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        return list(range(6))[query_rows(model, model.num_prefix_tokens)]

    assert rows("test_vit") == [0]
    assert rows("deit_tiny_distilled_patch16_224") == [0, 1]
    assert rows("test_vit", global_pool="avg") == [1, 2, 3, 4, 5]
    assert rows("vit_base_patch16_siglip_224", depth=1) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", [SwinTransformerBlock, SwinTransformerV2Block])
@pytest.mark.parametrize(("grid", "window", "shift"), [((8, 8), 4, 0), ((8, 12), 4, 2), ((10, 7), 4, 2)])
def test_swin_windows_return_to_their_places(kind, grid, window, shift):
    block = kind(8, grid, num_heads=2, window_size=window, shift_size=shift)
    places = torch.arange(2.0 * grid[0] * grid[1]).reshape(2, *grid, 1)
    taken = []
    block.attn.register_forward_pre_hook(lambda module, args: taken.append(args[0][..., 0]))
    block._attn(places.expand(-1, -1, -1, 8))
    assert torch.equal(stitch_windows(taken[0], block), places[..., 0])
