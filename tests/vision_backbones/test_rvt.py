"""RVT beyond timm's contract: masks, official files, checkpointing, precision, compilers."""

import copy
import logging

import numpy as np
import pytest
import timm
import torch
from torch import nn

from saccade.attention import reference
from saccade.checkpoints import load_weights
from saccade.errors import CheckpointError, ConfigError, ShapeError
from saccade.vision_backbones import ModelSource, convert_checkpoint, load_model
from saccade.vision_backbones.diversity import DiversityCollector
from saccade.vision_backbones.rvt import RVT
from saccade.vision_backbones.rvt_blocks import Attention, resize_mask
from tests.helpers import assert_close, randn
from tests.vision_backbones.test_fan import check_compile, check_onnx, mirrored, moved, relative

SMALL = {"base_dims": (8, 8), "depth": (2, 1), "heads": (2, 4), "masked_blocks": 1, "num_classes": 5}
FLAT = {"base_dims": (8,), "depth": (3,), "heads": (3,), "num_classes": 5}


def small(name="tap_rvt_tiny", **options):
    torch.manual_seed(0)
    return moved(timm.create_model(name, **{**SMALL, **options}))


def weights_1d(before, after):
    """Matrix of bilinear interpolation along one axis, pixel centres at halves, edges repeated."""
    matrix = np.zeros((after, before))
    for i in range(after):
        place = min(max((i + 0.5) * before / after - 0.5, 0), before - 1)
        low = int(place)
        matrix[i, low] += 1 - (place - low)
        matrix[i, min(low + 1, before - 1)] += place - low
    return matrix


@pytest.mark.parametrize(("grid", "size"), [((3, 3), (5, 4)), ((4, 2), (2, 3)), ((3, 5), (3, 5))])
def test_masks_are_resized_in_the_places_of_both(grid, size):
    """Against the matrix of the interpolation, written out."""
    mask = randn(2, grid[0] * grid[1], grid[0] * grid[1], dtype=torch.float64)
    matrix = torch.from_numpy(np.kron(weights_1d(grid[0], size[0]), weights_1d(grid[1], size[1])))
    assert_close(resize_mask(mask, grid, size), matrix @ mask @ matrix.T)


@pytest.mark.parametrize("compat", [False, True])
def test_logits_are_multiplied(compat):
    torch.manual_seed(0)
    attn = Attention(12, 3, (4, 4), compat)
    x = randn(2, 6, 12)
    query, key, value = attn.qkv(x).unflatten(-1, [3, 3, 4]).permute(2, 0, 3, 1, 4)
    mask = attn.att_mask[:, :6, :6] if compat else resize_mask(attn.att_mask, (4, 4), (2, 3))
    maps, _ = reference.softmax_weights(query, key, None, None, False, None, mask.sigmoid())
    assert_close(attn(x, 2, 3), attn.proj((maps @ value).transpose(1, 2).flatten(2)))


def test_compat_needs_as_many_places_as_the_mask_has():
    model = timm.create_model("tap_rvt_tiny", compat=True, mask_grid=(3, 3), **SMALL).eval()
    with torch.no_grad():
        assert model(randn(1, 3, 48, 48)).shape == (1, 5)
        with pytest.raises(ShapeError, match="12 tokens, but masks for 9: build the model with compat=False"):
            model(randn(1, 3, 64, 48))


@pytest.mark.parametrize("compat", [False, True])
def test_a_file_with_masks_for_another_size(compat):
    source = small(mask_grid=(4, 4))
    model = timm.create_model("tap_rvt_tiny", mask_grid=(3, 2), compat=compat, **SMALL).eval()
    load_weights(model, source.state_dict(), source="file")
    key = "transformers.0.blocks.0.attn.att_mask"
    mask = source.state_dict()[key]
    assert_close(model.state_dict()[key], mask[:, :6, :6] if compat else resize_mask(mask, (4, 4), (3, 2)))
    if not compat:  # and where the image has that size, resizing before or while running is the same
        with torch.no_grad():
            x = randn(1, 3, 48, 32)
            assert_close(model(x), source(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tap_rvt_base", {"masked_blocks": 3, "mlp_type": "linear", "num_scales": 4}),  # as the released file seems
        ("rvt_base", {"mlp_type": "conv", "num_scales": 4}),
        ("rvt_small_plus", {}),
        ("tap_rvt_small", {"masked_blocks": 2}),
    ],
)
def test_the_model_follows_the_file(name, options, caplog):
    """Block by block: masks, kind of MLP, branches of the pooling."""
    torch.manual_seed(0)
    source, x = moved(RVT(**FLAT, **options)), randn(1, 3, 64, 96)
    model = timm.create_model(name, **FLAT).eval()
    with caplog.at_level(logging.WARNING):
        load_weights(model, source.state_dict(), source="file")
    followed = [record.getMessage() for record in caplog.records]
    assert 1 <= len(followed) <= 2
    masks, kind = options.get("masked_blocks", 0), options.get("mlp_type", "conv")
    expected = f"of 3 blocks {masks} have a mask and {3 if kind == 'conv' else 0} an MLP with convolutions."
    assert followed[-1].endswith(expected)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
    load_weights(model, source.state_dict(), source="file")  # again: nothing left to change


def test_convert(tmp_path):
    """A file with twelve masks, where the name stands for none."""
    source = timm.create_model("tap_rvt_small", num_classes=3, masked_blocks=12, mask_grid=(7, 7))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "official.pth")
    done = convert_checkpoint(tmp_path / "official.pth", model="tap_rvt_small", out=tmp_path / "w.safetensors")
    assert (done.num_classes, len(done.report.matched)) == (3, len(source.state_dict()))
    assert load_model(ModelSource("tap_rvt_small", weights=tmp_path / "w.safetensors")).model.num_classes == 3


def test_convert_refuses_the_file_of_another_size(tmp_path):
    torch.save(small().state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"transformers\.0\.blocks\.9\.attn\.qkv\.weight"):
        convert_checkpoint(tmp_path / "other.pth", model="tap_rvt_tiny", out=tmp_path / "o.safetensors")


def test_checkpointing_has_the_gradients_of_logits_and_diversity():
    plain, checkpointed = small().train(), small().train()
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        collector = DiversityCollector(model)
        with collector:
            logits = model(randn(2, 3, 96, 64))
        assert len(collector.values) == 3
        (logits.square().mean() + 3 * collector.loss()).backward()
    for (key, expected), (_, got) in zip(plain.named_buffers(), checkpointed.named_buffers(), strict=True):
        assert torch.equal(got, expected), key
    for (key, expected), (_, got) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert_close(got.grad, expected.grad, atol=1e-5 * float(expected.grad.abs().max()) + 1e-9, msg=key)


@torch.no_grad()
def test_reparameterize():
    model, x = small(), randn(2, 3, 64, 96)
    expected = model(x)
    for _ in range(2):  # the second time nothing is left to do
        model.reparameterize()
        assert relative(model(x), expected) < 1e-5
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_published_size_of_the_released_weights():
    """92.1 M, which no name stands for: masks in all blocks, MLPs without convolutions."""
    with torch.device("meta"):
        model = timm.create_model("tap_rvt_base", masked_blocks=12, mlp_type="linear")
    assert sum(p.numel() for p in model.parameters()) == 92_089_288


@pytest.mark.parametrize("grid", [(4, 10), (3, 5)])
def test_rows_and_columns_are_told_apart(grid):
    """An image and its mirror give the same logits if the kernels are mirrored, and the masks."""
    model, x = small(mask_grid=grid), randn(2, 3, 64, 160)
    mirror = mirrored(model)
    attn = mirror.transformers[0].blocks[0].attn
    with torch.no_grad():
        attn.mask_grid = grid[::-1]
        mask = attn.att_mask.unflatten(2, grid).unflatten(1, grid).transpose(1, 2).transpose(3, 4)
        attn.att_mask.copy_(mask.flatten(3).flatten(1, 2))
        assert relative(mirror(x.transpose(2, 3)), model(x)) < 1e-4
        assert relative(model(x.transpose(2, 3)), model(x)) > 1e-2


def test_stochastic_depth_rises_and_stays_below_the_rate():
    model = timm.create_model("tap_rvt_tiny", drop_path_rate=0.3, **SMALL)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.transformers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_reduced_precision(dtype, limit):
    torch.manual_seed(0)
    model, x = timm.create_model("tap_rvt_tiny", **SMALL).eval(), randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            assert relative(model(x).float(), expected) < limit
        assert relative(copy.deepcopy(model).to(dtype)(x.to(dtype)).float(), expected) < limit
    model.train()
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 8}, "patch_size must be 16 or 4; got 8"),
        ({"heads": (2, 3)}, r"must be a multiple of the last; got \[16, 24\]"),
        ({"heads": (2,)}, "one entry per stage"),
        ({"mlp_type": "dense"}, "mlp_type must be 'conv' or 'linear'"),
        ({"global_pool": "token"}, "global_pool must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        RVT(**{**SMALL, **options})


def test_small_patches():
    model = RVT(patch_size=4, **FLAT).eval()
    with torch.no_grad():
        assert model.forward_features(randn(1, 3, 40, 24)).shape == (1, 24, 10, 6)
    assert model.feature_info[-1]["reduction"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("masked", [0, 1])
def test_export(masked):
    """For any batch; without masks, for any size too."""
    model = small(masked_blocks=masked)
    x, other = randn(2, 3, 96, 128), randn(3, 3, 96, 128) if masked else randn(3, 3, 160, 64)
    axes = {0: torch.export.Dim("batch", min=2)}
    if not masked:
        axes |= {axis: 32 * torch.export.Dim(f"blocks{axis}", min=2, max=32) for axis in (2, 3)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(axes,))
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    with torch.no_grad():
        assert relative(exported.module()(other), model(other)) < 1e-5


@pytest.mark.slow
def test_onnx(tmp_path):
    check_onnx(small(), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_compile_without_graph_breaks(train):
    check_compile(small(), train)
