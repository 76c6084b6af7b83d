"""Token-aware average pooling added to plain ViTs: where it acts, on which grid, and its norms."""

import copy

import pytest
import timm
import torch
from torch import nn

from saccade.attention import token_average_pooling
from saccade.errors import ConfigError
from saccade.vision_backbones import create_model
from saccade.vision_backbones.token_pooling import TokenAveragePooling
from saccade.vision_backbones.token_pooling_hooks import add_token_average_pooling, set_pooling_norm
from tests.helpers import assert_close, randn

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "img_size": (96, 64)}


def build(name="vit_small_patch16_224", scales=4, **options):
    torch.manual_seed(0)
    return create_model(name, token_pooling_scales=scales, **(SMALL | options)).eval()


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_small_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("beit_base_patch16_224", 1),
        ("vit_base_patch16_rope_reg1_gap_256", 1),
    ],
)
def test_attention_alone_sees_pooled_patches(name, prefix):
    model = build(name)
    block, seen = model.blocks[1], {}
    block.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0]))
    block.norm1.register_forward_hook(lambda module, inputs, output: seen.update(normed=output))
    block.norm2.register_forward_hook(lambda module, inputs, output: seen.update(second=inputs[0]))
    block.attn.register_forward_hook(lambda module, inputs, output: seen.update(attended=output))
    model(randn(2, 3, 96, 64))
    tokens, pooling = seen["tokens"], block.dilation_predictor
    image = tokens[:, prefix:].transpose(1, 2).reshape(2, 32, 6, 4)
    pooled = token_average_pooling(tokens[:, prefix:], pooling.proj(image).softmax(1))
    expected = torch.cat([tokens[:, :prefix], pooled], 1)
    norm = nn.LayerNorm(32, eps=block.norm1.eps)
    norm.load_state_dict(block.norm1.state_dict())
    assert_close(seen["normed"], norm(expected))
    scale = getattr(block, "gamma_1", None)
    assert_close(seen["second"], tokens + (seen["attended"] if scale is None else scale * seen["attended"]))


def test_keys_are_the_official_ones_and_others_stay():
    plain = timm.create_model("vit_small_patch16_224", **SMALL).state_dict()
    added = set(build().state_dict()) - set(plain)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["0.weight", *(f"1.{name}" for name in norm), "2.weight"]
    assert added == {f"blocks.{index}.dilation_predictor.proj.{name}" for index in (0, 1) for name in names}
    extra = sum(p.numel() for p in build().parameters()) - sum(p.numel() for p in build(scales=None).parameters())
    assert extra == 2 * (9 * 32 * 4 + 9 * 16 + 2 * 4)


def test_the_grid_is_that_of_the_image():
    model = build(dynamic_img_size=True)
    wide, high = randn(1, 3, 32, 128), randn(1, 3, 64, 64)
    first = model(wide)
    model(high)  # as many patches
    assert torch.equal(model(wide), first)
    twin = copy.deepcopy(model)
    twin.load_state_dict({key: 0.5 * value for key, value in twin.state_dict().items()})
    model(high)
    assert torch.equal(model(wide), first), "a copy has its own layers"


def test_checkpointing_and_mixed_precision():
    model, images = build().train(), randn(2, 3, 96, 64)

    def gradient():
        model.zero_grad()
        model(images).sum().backward()
        return model.blocks[0].dilation_predictor.proj[0].weight.grad

    plain = gradient()
    model.set_grad_checkpointing()
    assert plain.abs().max() > 0
    assert_close(gradient(), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(images).float(), model(images).float(), atol=0.05)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin_tiny_patch4_window7_224", {}, "got SwinTransformer"),
        ("vit_small_patch16_224", {"patch_drop_rate": 0.1}, "patch_drop_rate"),
        ("vit_relpos_medium_patch16_cls_224", {}, "got VisionTransformerRelPos"),
        ("vit_base_patch16_xp_224", {}, "ParallelScalingBlock"),
    ],
)
def test_models_that_cannot_pool_are_refused(name, options, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        create_model(name, token_pooling_scales=4, **options)


def test_it_is_added_once():
    with pytest.raises(ConfigError, match="already"):
        add_token_average_pooling(build())


def test_norms_of_the_predictors():
    model, images = build().train(), randn(2, 3, 96, 64)
    before = copy.deepcopy(model.state_dict())
    set_pooling_norm(model, "frozen")
    model.eval().train()(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    set_pooling_norm(model, "batch")
    model(images)
    assert not torch.equal(model.state_dict()["blocks.0.dilation_predictor.proj.1.running_mean"], torch.zeros(4))
    set_pooling_norm(model, "sync")
    layers = [module for module in model.modules() if isinstance(module, TokenAveragePooling)]
    assert all(isinstance(layer.proj[1], nn.SyncBatchNorm) for layer in layers)
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(ConfigError, match="no token-aware average pooling"):
        set_pooling_norm(build(scales=None), "sync")


def test_scripted_layer():
    layer = TokenAveragePooling(6, 3).eval()
    tokens = randn(2, 35, 6)
    assert_close(torch.jit.script(layer)(tokens, (7, 5)), layer(tokens, (7, 5)))
