"""FAN beyond timm's contract: sizes, official files, class attention, checkpointing, precision, compilers."""

import argparse
import copy
import logging

import pytest
import timm
import torch
from timm.models.xcit import ClassAttentionBlock
from torch import nn

from saccade.apps.catalogue import MODELS
from saccade.checkpoints import filter_state_dict, load_weights, match_keys, read_state_dict
from saccade.errors import CheckpointError, ConfigError
from saccade.vision_backbones import convert_checkpoint
from saccade.vision_backbones.diversity import DiversityCollector
from saccade.vision_backbones.fan import FAN
from saccade.vision_backbones.fan_blocks import LastClassAttention
from tests.helpers import assert_close, randn

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
HYBRID = {**SMALL, "embed_dim": (24, 32), "convnext_depths": (1, 1), "convnext_dims": (8, 16), "num_heads": (3, 4)}
VARIANTS = {
    "tap_fan_tiny_12_p16_224": SMALL,
    "tap_fan_tiny_8_p4_hybrid": HYBRID,
}
BOTH = pytest.mark.parametrize("name", VARIANTS)


def moved(model):
    """Give every parameter and statistic of a model a value that matters; attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            if name.endswith(("attn.q.weight", "attn.qkv.weight")):
                parameter *= 6
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def small(name="tap_fan_tiny_12_p16_224", **options):
    torch.manual_seed(0)
    return moved(timm.create_model(name, **{**VARIANTS[name], **options}))


def relative(got, expected):
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("model", [m for m in MODELS if "fan_" in m.name or "rvt_" in m.name], ids=lambda m: m.name)
def test_sizes(model):
    """Counted parameters are those of the paper's table; full widths run, without memory, at 224 pixels."""
    with torch.device("meta"):
        whole = timm.create_model(model.name)
        assert whole(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert sum(p.numel() for p in whole.parameters()) == model.params


def old_keys(state):
    """Name the weights as early files do: another word for the position, one projection in class attention."""
    old = {key.replace("pos_embed.", "pos_embeder."): value for key, value in state.items()}
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [old.pop(f"cls_attn_blocks.{i}.attn.{n}.{kind}") for n in "qkv"]
            old[f"cls_attn_blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return old


@pytest.mark.parametrize("kind", ["bare", "raw and averaged", "parallel", "old"])
def test_official_files(kind, tmp_path):
    source, other, x = small(), small(), randn(1, 3, 64, 96)
    other.load_state_dict({key: torch.zeros_like(value) for key, value in other.state_dict().items()})
    state = source.state_dict()
    content = {
        "bare": state,
        "raw and averaged": {
            "state_dict": other.state_dict(),
            "state_dict_ema": state,
            "arch": "fan",
            "epoch": 3,
            "args": argparse.Namespace(lr=4e-3),  # in the published files
        },
        "parallel": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "old": {"model": old_keys(state)},
    }[kind]
    torch.save(content, tmp_path / "official.pth.tar")
    model = timm.create_model("tap_fan_tiny_12_p16_224", **SMALL).eval()
    load_weights(model, read_state_dict(tmp_path / "official.pth.tar"), source="official.pth.tar")
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(
    ("name", "branches"),
    [("tap_fan_tiny_12_p16_224", 2), ("tap_fan_tiny_12_p16_224", None), ("fan_tiny_12_p16_224", 3)],
)
def test_pooling_follows_the_file(name, branches, caplog):
    torch.manual_seed(0)
    source, x = moved(FAN(num_scales=branches, **SMALL)), randn(1, 3, 64, 96)
    model = timm.create_model(name, dtype=torch.float64, **SMALL).eval()
    with caplog.at_level(logging.WARNING):
        load_weights(model, source.state_dict(), source="file")
    assert "The model follows the weights" in caplog.text
    assert len(caplog.records) == 1
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.no_grad():
        assert relative(model(x.double()), source.double()(x.double())) < 1e-12


def test_a_file_of_something_else_changes_nothing():
    model = small()
    state = filter_state_dict({"layer1.weight": torch.zeros(1)}, model)
    assert len(match_keys(state, model).missing) == len(model.state_dict())
    assert all(block.dilation_predictor is not None for block in model.blocks)


def test_convert(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("tap_fan_tiny_8_p4_hybrid", num_classes=3, num_scales=3)
    torch.save({"state_dict": source.state_dict(), "epoch": 1}, tmp_path / "official.pth")
    done = convert_checkpoint(
        tmp_path / "official.pth", model="tap_fan_tiny_8_p4_hybrid", out=tmp_path / "w.safetensors"
    )
    assert (done.num_classes, done.report.complete) == (3, True)
    assert len(done.report.matched) == len(source.state_dict())
    torch.save({**source.state_dict(), "blocks.0.attn.sr.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.sr\.weight"):
        convert_checkpoint(tmp_path / "other.pth", model="tap_fan_tiny_8_p4_hybrid", out=tmp_path / "o.safetensors")


def test_class_attention_is_a_pooling():
    source, x = small(), randn(1, 3, 64, 96)
    model = timm.create_model("tap_fan_tiny_12_p16_224", global_pool="avg", **SMALL).eval()
    assert not [key for key in model.state_dict() if key.startswith("cls_")]
    load_weights(model, source.state_dict(), source="file")
    with torch.no_grad():
        pooled = model.forward_features(x).mean((2, 3))
        assert_close(model(x), model.head(model.norm(pooled)))
    source.reset_classifier(4)
    assert source.cls_attn_blocks is not None
    source.reset_classifier(4, "max")
    with pytest.raises(ConfigError, match="no class attention"):
        source.reset_classifier(4, "token")
    with pytest.raises(ConfigError, match="global_pool must be one of"):
        source.reset_classifier(4, "median")


@pytest.mark.parametrize("tokens_norm", [False, True])
def test_the_last_class_attention_leaves_the_patches_out(tokens_norm):
    torch.manual_seed(0)
    options = {"dim": 12, "num_heads": 3, "qkv_bias": True, "eta": 0.7, "tokens_norm": tokens_norm}
    short, whole = LastClassAttention(**options), ClassAttentionBlock(**options)
    whole.load_state_dict(short.state_dict())
    x = randn(2, 7, 12)
    assert_close(short(x), whole(x)[:, :1])


@BOTH
def test_checkpointing_has_the_gradients_of_logits_and_diversity(name):
    """Also the statistics of batch norms, which are updated once."""
    plain, checkpointed = small(name).train(), small(name).train()
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        collector = DiversityCollector(model)
        with collector:
            logits = model(randn(2, 3, 96, 64))
        assert len(collector.values) == 2
        (logits.square().mean() + 3 * collector.loss()).backward()
    only_logits = small(name).train()
    only_logits(randn(2, 3, 96, 64)).square().mean().backward()
    query = "blocks.0.attn.q.weight"
    assert not torch.allclose(plain.get_parameter(query).grad, only_logits.get_parameter(query).grad)
    for (key, expected), (_, got) in zip(plain.named_buffers(), checkpointed.named_buffers(), strict=True):
        assert torch.equal(got, expected), key
    for (key, expected), (_, got) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert_close(got.grad, expected.grad, atol=1e-5 * float(expected.grad.abs().max()) + 1e-9, msg=key)


def test_batch_norms_of_the_pooling_are_synchronised():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    assert all(isinstance(block.dilation_predictor.proj[1], nn.SyncBatchNorm) for block in model.blocks)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@BOTH
def test_stochastic_depth_is_the_same_in_every_block(name):
    model = timm.create_model(name, drop_path_rate=0.2, **VARIANTS[name])
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.2, 0.2]
    assert not [block for block in model.cls_attn_blocks if not isinstance(block.drop_path1, nn.Identity)]


@torch.no_grad()
@BOTH
def test_reparameterize(name):
    """Batch norms go, but for those before a depthwise convolution, whose padding they do not reach."""
    model, x = small(name), randn(2, 3, 64, 96)
    expected = model(x)
    for _ in range(2):  # the second time nothing is left to do
        model.reparameterize()
        assert relative(model(x), expected) < 1e-5
    left = [key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == [f"blocks.{i}.mlp.mlp_v.dwconv.bn" for i in range(2)]


@BOTH
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_reduced_precision(name, dtype, limit):
    torch.manual_seed(0)
    model, x = timm.create_model(name, **VARIANTS[name]).eval(), randn(2, 3, 64, 96)
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


@BOTH
def test_channels_last(name):
    model, x = small(name), randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)
        assert relative(last(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


def mirrored(model):
    """Return a model whose kernels are mirrored at the diagonal: what it sees of an image, ours sees of its mirror."""
    mirror = copy.deepcopy(model)
    with torch.no_grad():
        for module in mirror.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.transpose(2, 3).clone())
    return mirror


@BOTH
def test_rows_and_columns_are_told_apart(name):
    """An image and its mirror give the same logits if the kernels are mirrored, and the words for rows and columns."""
    model, x = small(name), randn(2, 3, 64, 160)
    mirror = mirrored(model)
    with torch.no_grad():
        rows, columns = model.pos_embed.token_projection.weight.chunk(2, 1)
        mirror.pos_embed.token_projection.weight.copy_(torch.cat([columns, rows], 1))
        assert relative(mirror(x.transpose(2, 3)), model(x)) < 1e-4
        assert relative(model(x.transpose(2, 3)), model(x)) > 1e-2


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("free", ["batch", "size"])
def test_export(name, free):
    model = small(name)
    x, other = (
        (randn(2, 3, 64, 96), randn(3, 3, 64, 96)) if free == "batch" else (randn(2, 3, 96, 128), randn(2, 3, 160, 64))
    )
    axes = {0: torch.export.Dim("batch", min=2)}
    if free == "size":
        axes = {axis: 32 * torch.export.Dim(f"blocks{axis}", min=2, max=32) for axis in (2, 3)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(axes,))
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    with torch.no_grad():
        assert relative(exported.module()(other), model(other)) < 1e-5


@pytest.mark.slow
@BOTH
def test_onnx(name, tmp_path):
    check_onnx(small(name), tmp_path / "model.onnx")


def check_onnx(model, path):
    """Export a model and run it outside torch."""
    runtime = pytest.importorskip("onnxruntime", reason="extra dev")
    x = randn(1, 3, 96, 64)
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert relative(torch.from_numpy(got), model(x)) < 1e-4


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("train", [False, True])
def test_compile_without_graph_breaks(name, train):
    check_compile(small(name), train)


def check_compile(model, train):
    """Compile a model as one graph; outputs and gradients stay."""
    torch._dynamo.reset()
    x = randn(2, 3, 64, 96)
    model.train(train)
    twin = copy.deepcopy(model)
    out, expected = torch.compile(model, fullgraph=True)(x), twin(x)
    assert relative(out, expected) < 1e-4
    if train:
        out.square().mean().backward()
        expected.square().mean().backward()
        for (key, got), (_, parameter) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            limit = 1e-3 * float(parameter.grad.abs().max()) + 1e-5
            assert float((got.grad - parameter.grad).abs().max()) < limit, key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "must divide the channels; got 5 heads, 24 channels"),
        ({"patch_size": 32}, "patch_size must be 16, 8 or 4; got 32"),
        ({"num_heads": (3, 3, 3)}, r"num_heads must be a number or have depth = 2 >= 1 entries"),
        ({"depth": 0}, "depth = 0"),
        ({"num_scales": 0}, "num_scales must be at least 1"),
        ({"global_pool": "median"}, "global_pool must be one of"),
        ({"convnext_depths": (1, 1, 3)}, "two stages"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        FAN(**{**SMALL, **options})


@pytest.mark.parametrize("patch_size", [4, 8])
def test_smaller_patches(patch_size):
    model = FAN(patch_size=patch_size, num_scales=4, **SMALL).eval()
    with torch.no_grad():
        assert model.forward_features(randn(1, 3, 40, 24)).shape == (1, 24, 40 // patch_size, 24 // patch_size)
    assert model.feature_info[0]["reduction"] == patch_size
