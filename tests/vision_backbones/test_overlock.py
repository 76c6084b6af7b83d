"""OverLoCK beyond timm's contract: sizes, official files, inference form, dense tasks, precision, compilers."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import reparameterize_model
from torch import nn

from saccade.checkpoints import filter_state_dict, match_keys
from saccade.errors import CheckpointError, ConfigError
from saccade.vision_backbones import convert_checkpoint
from saccade.vision_backbones.overlock_blocks import ContMixBlock, FocusBlock
from saccade.vision_backbones.reparam import DilatedReparamConv, ResidualDepthwise
from tests.helpers import assert_close, randn

SMALL = {
    "depth": (1, 1, 1, 1),
    "sub_depth": (2, 2),
    "embed_dim": (16, 24, 32, 48),
    "sub_num_heads": (2, 3),
    "projection": 40,
    "num_classes": 10,
}


def small(**options):
    """A narrow OverLoCK in which every parameter and statistic matters."""
    torch.manual_seed(0)
    model = timm.create_model("overlock_xt", **{**SMALL, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "branched", "merged", "auxiliary", "keys"),
    [
        ("overlock_xt", 17_307_272, 16_791_384, 337_672, (1564, 932)),
        ("overlock_t", 34_990_472, 33_981_064, 514_024, (2737, 1585)),
        ("overlock_s", 58_309_772, 56_670_476, 514_024, (3765, 2157)),
        ("overlock_b", 98_012_968, 95_520_680, 578_152, (4793, 2729)),
    ],
)
def test_sizes(name, branched, merged, auxiliary, keys):
    for deploy, parameters, entries in ((False, branched, keys[0]), (True, merged, keys[1])):
        with torch.device("meta"):
            whole = timm.create_model(name, aux_head=True, deploy=deploy)
            plain = timm.create_model(name, deploy=deploy)
        assert sum(p.numel() for p in whole.parameters()) == parameters
        assert sum(p.numel() for p in plain.parameters()) == parameters - auxiliary
        assert len(whole.state_dict()) == entries


def relative(got, expected):
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (160, 224)])
def test_reparameterize(size):
    model, x = small(), randn(2, 3, *size)
    expected = model(x)
    merged = reparameterize_model(model)
    assert relative(merged(x), expected) < 1e-5
    timm.create_model("overlock_xt", deploy=True, **SMALL).load_state_dict(merged.state_dict())
    assert {key.rpartition(".")[2] for key in merged.state_dict() if "lk_origin" in key} == {"weight", "bias"}
    for candidate in (model, merged):
        candidate.reparameterize()
        assert relative(candidate(x), expected) < 1e-5
        assert not [m for m in candidate.modules() if isinstance(m, nn.BatchNorm2d | ResidualDepthwise)]
    model.reparameterize()  # again: nothing left to do
    assert relative(model(x), expected) < 1e-5


def official(model, wrap):
    state = model.state_dict()
    return {"bare": state, "state_dict": {"state_dict": {f"module.{k}": v for k, v in state.items()}}}.get(
        wrap, {"model": {"weights": 0}, "model_ema": state, "epoch": 3}
    )


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "ema"])
@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_official_files(wrap, auxiliary, merged):
    """Any wrapping, with or without auxiliary head, merged or not, into models of either form."""
    source, x = small(aux_head=auxiliary), randn(1, 3, 64, 96)
    file = reparameterize_model(source) if merged else source
    for deploy in (False, True):
        model = timm.create_model("overlock_xt", deploy=deploy, **SMALL).eval()
        state = filter_state_dict(official(file, wrap), model)
        assert match_keys(state, model).complete
        model.load_state_dict(state)
        with torch.no_grad():
            assert relative(model(x), source(x)) < 1e-5


def test_merged_weights_can_be_trained_further():
    model = timm.create_model("overlock_xt", **SMALL)
    model.load_state_dict(filter_state_dict(reparameterize_model(small()).state_dict(), model))
    model.train()(randn(2, 3, 64, 64)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "dil_" in name}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if name.endswith("bn_k3_1.weight"))


def test_convert(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("overlock_xt", aux_head=True, num_classes=3)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "official.pth")
    done = convert_checkpoint(tmp_path / "official.pth", model="overlock_xt", out=tmp_path / "w.safetensors")
    assert (done.num_classes, done.report.complete) == (3, True)
    written = load_file(tmp_path / "w.safetensors")
    assert set(source.state_dict()) - set(written) == {
        key for key in source.state_dict() if key.startswith("aux_head.")
    }

    torch.save({**source.state_dict(), "sub_blocks3.0.gate.9.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"sub_blocks3\.0\.gate\.9\.weight"):
        convert_checkpoint(tmp_path / "other.pth", model="overlock_xt", out=tmp_path / "o.safetensors")


def test_auxiliary_head():
    model, x = small(aux_head=True), randn(2, 3, 64, 64)
    assert model.default_cfg["classifier"] == ("head.4", "aux_head.2")
    assert model(x).shape == (2, 10)
    main, auxiliary = model.train()(x)
    assert main.shape == auxiliary.shape == (2, 10)
    (main.mean() + 0.4 * auxiliary.mean()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.reset_classifier(4)
    assert [logits.shape for logits in model(x)] == [(2, 4), (2, 4)]


@pytest.mark.parametrize("dense", ["segmentation", "detection"])
def test_dense_features(dense):
    backbone = timm.create_model("overlock_xt", features_only=True, dense=dense, **SMALL).eval()
    model = timm.create_model("overlock_xt", dense=dense, **SMALL).eval()
    model.load_state_dict(backbone.model.state_dict())
    x = randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = backbone(x)
        assert [y.shape[1] for y in maps] == backbone.feature_info.channels() == [16, 24, 44, 60]
        expected = model.forward_intermediates(x, norm=True, intermediates_only=True)
        raw = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(y, e) for y, e in zip(maps, expected, strict=True))
    assert not torch.equal(raw[0], maps[0])
    assert_close(maps[0].mean(1), torch.zeros_like(maps[0][:, 0]), atol=1e-5)  # normalised
    detector = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    state = filter_state_dict({"state_dict": detector | {"decode_head.conv.weight": torch.zeros(1)}}, model)
    assert match_keys(state, model).complete
    with pytest.raises(ConfigError, match="has no classifier"):
        model.reset_classifier(3)


def test_checkpointing_updates_statistics_once():
    plain, checkpointed = small(drop_path_rate=0.3).train(), small(drop_path_rate=0.3).train()
    checkpointed.set_grad_checkpointing()
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        model(randn(2, 3, 64, 64)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for (name, expected), (_, got) in zip(plain.named_buffers(), checkpointed.named_buffers(), strict=True):
        assert torch.equal(got, expected), name
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, atol=1e-6 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_reduced_precision(dtype, limit):
    model, x = timm.create_model("overlock_xt", **SMALL).eval(), randn(2, 3, 64, 64)
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


def test_channels_last():
    model, x = small(), randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)
        assert relative(last(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("free", ["batch", "size"])
def test_export(free):
    """For any batch, or any size that needs no map enlarged."""
    model = small(depth=(1, 1, 1, 1), sub_depth=(1, 1))
    if free == "batch":
        x, other = randn(2, 3, 64, 96), randn(3, 3, 64, 96)
        shapes = {0: torch.export.Dim("batch", min=2)}
    else:
        x, other = randn(2, 3, 288, 320), randn(2, 3, 352, 256)
        shapes = {axis: 32 * torch.export.Dim(f"blocks{axis}", min=8, max=32) for axis in (2, 3)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(shapes,))
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    with torch.no_grad():
        assert relative(exported.module()(other), model(other)) < 1e-5


@pytest.mark.slow
def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="extra dev")
    model, x = small(), randn(2, 3, 224, 224)
    model.reparameterize()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert relative(torch.from_numpy(got), model(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_compile_without_graph_breaks(train):
    torch._dynamo.reset()
    model, x = small(sub_depth=(2, 1)).train(train), randn(2, 3, 64, 96)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    out, expected = compiled(x), twin(x)
    assert relative(out, expected) < 1e-4
    if train:
        out.square().mean().backward()
        expected.square().mean().backward()
        for (name, got), (_, parameter) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            limit = 1e-3 * float(parameter.grad.abs().max()) + 1e-5
            assert float((got.grad - parameter.grad).abs().max()) < limit, name


def test_refusals():
    with pytest.raises(ConfigError, match=r"kernel_size must be one of 5, 7.*got 6"):
        DilatedReparamConv(4, 6)
    with pytest.raises(ConfigError, match=r"multiple of 4 \* num_heads = 12.*got 16"):
        FocusBlock(16, 4, num_heads=3)
    with pytest.raises(ConfigError, match="dense must be"):
        timm.create_model("overlock_xt", dense="depth", **SMALL)


def test_block_on_its_own():
    block = ContMixBlock(32, drop_path=0.2)
    assert block(randn(2, 32, 9, 5)).shape == (2, 32, 9, 5)
    assert block.rpb2.std() > 0
