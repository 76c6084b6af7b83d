import pytest
import timm
import torch
from torch import nn

from saccade.errors import ConfigError
from saccade.vision_backbones.attention_maps import Rollout, attention_points, watch_attention
from saccade.vision_backbones.map_methods import choose_method
from tests.helpers import assert_close, randn

# model, input side, method that "auto" finds, grid; the slow ones below are the rest of a walk through timm's families
QUICK = [
    ("test_vit", 64, {"img_size": 64}, "rollout", (4, 4)),
    ("test_vit_relpos", 160, {}, "rollout", (10, 10)),  # no class token
    ("vit_tiny_r_s16_p8_224", 128, {"img_size": 128}, "rollout", (4, 4)),  # convolutional stem
    ("swin_tiny_patch4_window7_224", 96, {"img_size": 96, "depths": (1, 1, 1, 2)}, "last-layer", (3, 3)),
    ("pvt_v2_b0", 96, {}, "last-layer", (3, 3)),
    ("cait_xxs24_224", 64, {"img_size": 64, "depth": 2}, "last-layer", (4, 4)),
    ("xcit_nano_12_p16_224", 96, {"depth": 2}, "last-layer", (6, 6)),
    ("test_resnet", 96, {}, "cam", (3, 3)),
    ("test_convnext", 96, {}, "cam", (3, 3)),
    ("test_efficientnet", 96, {}, "cam", (3, 3)),
    ("mixer_s32_224", 96, {"img_size": 96}, "cam", (3, 3)),
]
FAMILIES = [
    ("deit_tiny_distilled_patch16_224", 224, {}, "rollout", (14, 14)),
    ("eva02_tiny_patch14_224", 224, {}, "rollout", (16, 16)),
    ("beit_base_patch16_224", 224, {"depth": 2}, "rollout", (14, 14)),
    ("vit_little_patch16_reg4_gap_256", 256, {}, "rollout", (16, 16)),  # registers
    ("vit_base_patch16_siglip_224", 224, {"depth": 2}, "rollout", (14, 14)),  # attention pooling
    ("vit_tiny_patch16_dinov3_qkvb", 256, {}, "rollout", (16, 16)),
    ("samvit_base_patch16_224", 224, {"depth": 2}, "rollout", (14, 14)),  # heads folded into the batch
    ("naflexvit_base_patch16_gap", 384, {"depth": 2}, "rollout", (24, 24)),
    ("vit_dpwee_patch16_reg1_gap_256", 256, {}, "cam", (16, 16)),  # differential attention has no weights of places
    ("swinv2_tiny_window8_256", 256, {}, "last-layer", (8, 8)),
    ("maxvit_nano_rw_256", 256, {}, "last-layer", (8, 8)),
    ("gcvit_xxtiny", 224, {}, "last-layer", (7, 7)),
    ("pit_ti_distilled_224", 224, {}, "last-layer", (7, 7)),
    ("crossvit_tiny_240", 240, {}, "last-layer", (20, 20)),
    ("volo_d1_224", 224, {}, "last-layer", (14, 14)),
    ("convit_tiny", 224, {}, "last-layer", (14, 14)),
    ("tnt_s_legacy_patch16_224", 224, {}, "last-layer", (14, 14)),
    ("twins_svt_small", 224, {}, "last-layer", (7, 7)),
    ("mobilenetv4_hybrid_medium", 256, {}, "last-layer", (8, 8)),
    ("caformer_s18", 224, {}, "last-layer", (7, 7)),
    ("iformer_t", 224, {}, "last-layer", (7, 7)),
    ("nest_tiny", 224, {}, "cam", (14, 14)),
    ("mobilevit_xxs", 256, {}, "cam", (8, 8)),
    ("edgenext_xx_small", 256, {}, "cam", (8, 8)),
    ("hiera_tiny_224", 224, {}, "cam", (7, 7)),
    ("regnetx_002", 224, {}, "cam", (7, 7)),
    ("mobilenetv4_conv_small_050", 224, {}, "cam", (7, 7)),
    ("efficientvit_b0", 224, {}, "cam", (7, 7)),
    ("levit_128s", 224, {}, "cam", (4, 4)),
    ("resmlp_12_224", 224, {}, "cam", (14, 14)),
    ("coat_lite_tiny", 224, {}, "eigencam", (7, 7)),
    ("resnet50_clip", 224, {}, "eigencam", (7, 7)),
]


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def check(name, side, options, method, grid):
    model = build(name, **options)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):  # some weights start at zero and would hide mistakes
            parameter.add_(0.02 * randn(*parameter.shape, seed=index))
    flags = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    chosen = choose_method(model, input_size=(3, side, side))
    assert (chosen.name, chosen.grid) == (method, grid)
    images = randn(2, 3, side, side)
    with torch.inference_mode():
        logits, maps = chosen.run(images)
        expected = model(images)
        alone = chosen.run(images[1:])
    assert maps.shape == (2, *grid)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert (maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).all()
    if model.num_classes:
        assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert_close(alone[1][0], maps[1], rtol=1e-3, atol=1e-3 * float(maps.abs().max()))
    assert flags == [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "side", "options", "method", "grid"), QUICK)
def test_what_auto_finds(name, side, options, method, grid):
    check(name, side, options, method, grid)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "options", "method", "grid"), FAMILIES)
def test_what_auto_finds_in_timms_families(name, side, options, method, grid):
    check(name, side, options, method, grid)


def test_a_model_without_any_map_says_why():
    with pytest.raises(ConfigError, match="have no image positions; name another layer with --layer"):
        choose_method(build("efficientvim_m1"), input_size=(3, 224, 224))


def test_rollout_reads_the_class_token_and_leaves_registers_out():
    model = build("test_vit", img_size=64, reg_tokens=2)
    images = randn(2, 3, 64, 64)
    rollout = Rollout()
    with torch.inference_mode():
        maps = choose_method(model, input_size=(3, 64, 64)).run(images)[1]
        with watch_attention(model, attention_points(model), rollout):
            model(images)
    assert_close(maps.flatten(1), rollout.product[:, 0, 3:])


def bright_patch_reader(img_size):
    """A transformer of one layer whose class token attends to bright patches and to nothing else."""
    model = timm.models.VisionTransformer(
        img_size,
        patch_size=8,
        embed_dim=4,
        depth=1,
        num_heads=1,
        num_classes=2,
        norm_layer=nn.Identity,
        pos_embed="none",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[0] = 1 / (3 * 64)  # channel 0: brightness of the patch
        attention = model.blocks[0].attn.qkv
        attention.bias[0] = 50  # every query asks for the same
        attention.weight[4, 0] = 1  # keys: brightness
    return model.eval()


@pytest.mark.parametrize("method", ["rollout", "last-layer"])
def test_the_map_is_brightest_where_the_model_looks(method):
    model = bright_patch_reader((32, 48))
    images = torch.zeros(2, 3, 32, 48)
    images[0, :, 8:16, 32:40] = 1
    images[1, :, 24:32, 0:8] = 1
    chosen = choose_method(model, input_size=(3, 32, 48), method=method)
    assert chosen.grid == (4, 6)
    maps = chosen.run(images)[1]
    assert divmod(int(maps[0].argmax()), 6) == (1, 4)
    assert divmod(int(maps[1].argmax()), 6) == (3, 0)
    assert maps[0].max() > 0.95 * maps[0].sum()


def test_last_layer_and_layers_by_name():
    model = build("test_vit", img_size=64)
    images = randn(1, 3, 64, 64)
    seen = {}
    with torch.inference_mode(), watch_attention(model, attention_points(model), seen.__setitem__):
        model(images)
    for layer, block in ((None, 5), ("blocks.2", 2), ("blocks.3.attn", 3)):
        for heads, expected in (("mean", "mean"), ("max", "amax")):
            chosen = choose_method(model, input_size=(3, 64, 64), method="last-layer", layer=layer, heads=heads)
            assert chosen.layer == f"blocks.{block}.attn"
            attention = seen[f"blocks.{block}.attn.attn_drop"]
            merged = getattr(attention, expected)(1)
            row = (merged / merged.sum(-1, keepdim=True))[:, 0, 1:]
            with torch.inference_mode():
                assert_close(chosen.run(images)[1].flatten(1), row)
        one = choose_method(model, input_size=(3, 64, 64), method="last-layer", layer=layer, heads="1")
        with torch.inference_mode():
            assert_close(one.run(images)[1].flatten(1), attention[:, 1, 0, 1:])
    for method in ("rollout", "last-layer"):
        with pytest.raises(ConfigError, match="attn has heads 0 to 1; there is no head 2"):
            choose_method(model, input_size=(3, 64, 64), method=method, heads="2")
    assert choose_method(model, input_size=(3, 64, 64), layer="blocks.2").name == "last-layer"


def test_swin_layer_of_several_windows():
    model = build("swin_tiny_patch4_window7_224", img_size=112, depths=(2, 2, 2, 2))
    chosen = choose_method(model, input_size=(3, 112, 112), layer="layers.1.blocks.1")
    assert (chosen.name, chosen.grid) == ("last-layer", (14, 14))
    with torch.inference_mode():
        assert_close(chosen.run(randn(2, 3, 112, 112))[1].sum((1, 2)), torch.full((2,), 4.0))  # 1 per window


def test_cam_of_a_class_and_of_a_layer():
    model = build("test_resnet")
    images = randn(2, 3, 96, 96)
    with torch.inference_mode():
        logits = model(images)
        maps = choose_method(model, input_size=(3, 96, 96), class_index=4).run(images)[1]
        top = choose_method(model, input_size=(3, 96, 96)).run(images)[1]
    assert_close(maps.mean((1, 2)), logits[:, 4])
    assert_close(top.mean((1, 2)), logits.amax(1))
    chosen = choose_method(model, input_size=(3, 96, 96), layer="layer2")
    assert (chosen.name, chosen.layer, chosen.grid) == ("eigencam", "layer2", (12, 12))


def test_class_maps_are_float32_under_autocast():
    model = build("test_resnet")
    chosen = choose_method(model, input_size=(3, 96, 96))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits, maps = chosen.run(randn(1, 3, 96, 96))
    assert maps.dtype == logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_resnet", {"method": "rollout"}, "shows no attention matrices. Methods that fit: cam"),
        ("test_resnet", {"method": "last-layer"}, "shows no attention matrices. Methods that fit: cam"),
        ("pvt_v2_b0", {"method": "rollout"}, "matrices of 9 x 9 and 36 x 9 .* Methods that fit: last-layer, cam"),
        ("test_vit", {"method": "rollout", "class_index": 3}, "does not depend on the class"),
        ("test_vit", {"class_index": 3}, "class activation needs a classifier on the average"),
        ("test_resnet", {"class_index": 3, "layer": "layer2"}, "leave --class or --layer out"),
        ("test_vit", {"method": "rollout", "layer": "blocks.1"}, "takes all layers together"),
        ("test_vit", {"method": "last-layer", "layer": "patch_embed"}, "'patch_embed' shows no attention"),
        ("test_resnet", {"layer": "layer9"}, "no layer 'layer9'. Did you mean 'layer"),
        ("test_resnet", {"layer": "global_pool"}, "have no image positions"),
        ("test_resnet", {"method": "gradcam"}, "one of auto, rollout, last-layer, cam, routes, kernels, got 'gradcam'"),
        ("test_resnet", {"heads": "sum"}, "heads must be mean, max or the number of a head"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(name, options, message):
    model = build(name, **({"img_size": 96} if name == "test_vit" else {}))
    with pytest.raises(ConfigError, match=message):
        choose_method(model, input_size=(3, 96, 96), **options)


def test_open_clip_towers():
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=64, patch_size=16, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    ).eval()
    tower.num_classes = 0
    chosen = choose_method(tower, input_size=(3, 64, 64))
    assert (chosen.name, chosen.grid) == ("rollout", (4, 4))
    with torch.inference_mode():
        logits, maps = chosen.run(randn(2, 3, 64, 64))
    assert logits.shape == (2, 0)
    assert (maps > 0).all()
