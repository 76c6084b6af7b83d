"""BiFormer: routing by hand, options that no golden case has, official files, and what runs a model elsewhere."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import saccade.vision_backbones  # registers the models  # noqa: F401
from benchmarks.literal_biformer import literal
from saccade.checkpoints import load_weights, read_state_dict
from saccade.errors import CheckpointError, ConfigError, ShapeError
from saccade.vision_backbones.bi_level_routing import BiLevelRoutingAttention, RaggedRoutingAttention, block_scores
from saccade.vision_backbones.convert import convert_checkpoint
from tests.helpers import assert_close, randn

SMALL = {"depth": (1, 1, 2, 1), "embed_dim": (16, 32, 48, 64), "head_dim": 8, "num_classes": 10}
VARIANTS = ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"]
every_form = pytest.mark.parametrize("name", VARIANTS)


def small(name="biformer_tiny", **options):
    """Return a small model with weights and statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **options})
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * randn(*parameter.shape, seed=i))
        for i, buffer in enumerate(model.buffers()):
            if buffer.is_floating_point():
                buffer.add_(0.1 * randn(*buffer.shape, seed=i).abs())
    return model.eval()


@pytest.mark.parametrize(
    ("name", "parameters", "entries"),
    [
        ("biformer_tiny", 13_142_760, 264),
        ("biformer_small", 25_536_232, 518),
        ("biformer_base", 56_804_968, 518),
        ("biformer_stl", 28_372_552, 201),
        ("biformer_stl_nchw", 28_372_552, 201),
    ],
)
def test_size_of_the_published_models(name, parameters, entries):
    model = timm.create_model(name, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries


def attention_by_hand(block, x):
    """Compute bi-level routing attention region by region and head by head."""
    n, heads = block.n_win, block.num_heads
    x = F.pad(x, [0, 0, 0, -x.shape[2] % n, 0, -x.shape[1] % n])
    rows, columns = x.shape[1] // n, x.shape[2] // n
    query, key, value = block.project(x)

    def region(maps, r):
        return maps[0, r // n * rows : (r // n + 1) * rows, r % n * columns : (r % n + 1) * columns]

    def pooled(maps, r):
        return block.kv_down(region(maps, r).permute(2, 0, 1)[None])[0].flatten(1).t()

    out = torch.zeros_like(value)
    for r in range(n * n):
        mean = block.router(region(query, r).mean((0, 1)))
        scores = torch.stack([block.scale * mean @ block.router(region(key, s).mean((0, 1))) for s in range(n * n)])
        best, chosen = scores.topk(min(block.topk, n * n))
        weight = torch.softmax(best, 0) if block.soft_routing else torch.ones_like(best)
        keys = torch.cat([w * pooled(key, s) for w, s in zip(weight, chosen, strict=True)])
        values = torch.cat([w * pooled(value, s) for w, s in zip(weight, chosen, strict=True)])
        q = region(query, r).flatten(0, 1)
        parts = [
            torch.softmax(block.scale * a @ b.t(), -1) @ c
            for a, b, c in zip(q.chunk(heads, 1), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True)
        ]
        region(out, r).copy_(torch.cat(parts, 1).view(rows, columns, -1))
    if block.lepe is not None:
        out = out + block.lepe(value)
    return block.wo(out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 99},
        {"qk_dim": 8, "qk_scale": 0.4, "side_dwconv": 3},
        {"kv_downsample_mode": "ada_avgpool", "kv_per_win": 1},
        {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 2},
        {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2, "param_attention": "qkv"},
        {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 1},
        {"soft_routing": True},
        {"param_routing": True, "diff_routing": True, "soft_routing": True},
    ],
    ids=str,
)
def test_routing_attention_by_hand(options):
    torch.manual_seed(0)
    block, x = BiLevelRoutingAttention(16, 2, 3, **{"topk": 2, **options}), randn(1, 8, 12, 16)
    with torch.no_grad():
        expected = attention_by_hand(block, x)[:, :8, :12]
        assert_close(block(x), expected, atol=1e-5)


def test_maps_that_do_not_divide_are_padded_or_refused():
    block = BiLevelRoutingAttention(16, 2, 3, 2, auto_pad=False)
    assert block(randn(1, 6, 9, 16)).shape == (1, 6, 9, 16)
    with pytest.raises(ShapeError, match=r"multiples of 3; got .*7"):
        block(randn(1, 7, 9, 16))


@pytest.mark.parametrize("block", [BiLevelRoutingAttention(16, 2, 7, 16), RaggedRoutingAttention(16, 2, 7, 16)])
def test_maps_smaller_than_the_regions_a_side(block):
    assert block(randn(2, 3, 5, 16)).isfinite().all()
    assert block.routes(randn(2, 3, 5, 16)).shape[2] <= 16


def test_routes_are_those_of_the_region_means():
    block, x = BiLevelRoutingAttention(16, 2, 2, 1), torch.zeros(1, 4, 4, 16)
    with torch.no_grad():
        block.qkv[0].weight.copy_(torch.eye(16).repeat(3, 1))
        block.qkv[0].bias.zero_()
    x[0, :2, 2:, 0], x[0, 2:, :2, 0] = 1, -1  # regions 1 and 2 are opposites, 0 and 3 have no direction
    assert block.routes(x)[0, 1:3, 0].tolist() == [1, 2]
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_downsample_mode": "fracpool"}, "kv_downsample_mode must be one of identity"),
        ({"param_attention": "q"}, "param_attention must be"),
        ({"diff_routing": True}, "diff_routing needs soft_routing"),
        ({"param_routing": True}, "param_routing needs diff_routing"),
        ({"num_heads": 3}, "num_heads must divide"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BiLevelRoutingAttention(16, **options)


def test_no_gradient_flows_through_hard_routing():
    block, x = BiLevelRoutingAttention(16, 2, 2, 1, side_dwconv=0), randn(1, 4, 4, 16).requires_grad_()
    query, key, _ = block.project(block.cut(x)[0])
    selection, weight = block.route(query, key)
    assert weight is None
    assert not selection.indices.requires_grad


def test_routing_keeps_its_precision_under_autocast():
    query, key = randn(1, 4, 32), randn(1, 4, 32, seed=1)
    expected = query @ key.transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_scores(query, key), expected)


@every_form
def test_half_precision(name):
    model, x = small(name, topks=(99, 99, 99, -2)), randn(2, 3, 96, 64)  # no choice that rounding could change
    expected = model(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out = model(x)
        out.float().sum().backward()
        assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_form
def test_memory_format_does_not_matter(name):
    model, x = small(name), randn(2, 3, 96, 64)
    with torch.no_grad():
        assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))


@every_form
def test_statistics_are_updated_once_with_gradient_checkpointing(name):
    model, x = small(name).train(), randn(2, 3, 64, 64)
    model.set_grad_checkpointing()
    model(x).sum().backward()
    counts = [tensor for key, tensor in model.named_buffers() if key.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) == 1 for count in counts)


@every_form
def test_regions_grow_without_new_weights(name):
    option = {"n_win": 4} if name == "biformer_tiny" else {"n_wins": (4, 4, 4, 4)}
    other = small(name, **option)
    other.load_state_dict(small(name).state_dict())
    with torch.no_grad():
        assert not torch.equal(other(randn(1, 3, 224, 224)), small(name)(randn(1, 3, 224, 224)))


@every_form
def test_folded_for_inference(name):
    model, x = small(name), randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = model(x)
        model.reparameterize()
        assert_close(model(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    norms = [key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == (1 if name == "biformer_tiny" else 4)  # before a padded or strided convolution none is folded


@pytest.mark.parametrize("size", [(64, 64), (96, 150), (224, 224)])
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
def test_literal_form_agrees(name, size):
    model, x = small(name), randn(1, 3, *size)
    with torch.no_grad():
        expected = literal(model)(x)
        assert_close(model(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_map_of_logits_without_pooling():
    model, x = small(), randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(x)
        model.reset_classifier(10, "")
        model.head.load_state_dict(small().head.state_dict())
        assert_close(model(x).mean((2, 3)), expected)


def test_dense_models_have_no_classifier():
    model = small(dense=True)
    assert (model.num_classes, model.get_classifier().__class__) == (0, nn.Identity)
    with pytest.raises(ConfigError, match="dense=True"):
        model.reset_classifier(5)
    assert model(randn(1, 3, 64, 64)).shape == (1, 64, 2, 2)


class TestOfficialFiles:
    @every_form
    def test_convert(self, name, tmp_path):
        official = timm.create_model(name, num_classes=7).state_dict()
        torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}, tmp_path / "a.pth")
        conversion = convert_checkpoint(tmp_path / "a.pth", model=name, out=tmp_path / "b.safetensors")
        assert conversion.report.complete
        assert conversion.num_classes == 7
        converted = read_state_dict(tmp_path / "b.safetensors")
        assert converted.keys() == official.keys()
        assert all(torch.equal(value, official[key]) for key, value in converted.items())

    def test_backbone_of_a_detector(self):
        model, state = timm.create_model("biformer_tiny", **SMALL, dense=True), small(dense=True).state_dict()
        content = {f"backbone.{key}": value for key, value in state.items()} | {"rpn_head.weight": torch.ones(1)}
        load_weights(model, {"state_dict": content}, source="detector.pth")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_classifier_into_a_dense_model(self):
        model = small(dense=True)
        load_weights(model, small().state_dict(), source="classifier.pth")
        assert torch.equal(model.stages[0][0].norm1.weight, small().stages[0][0].norm1.weight)

    def test_other_weights_are_refused(self):
        with pytest.raises(CheckpointError, match=r"do not fit|not those"):
            load_weights(small(), small("biformer_stl").state_dict(), source="stl.pth")


def test_export_for_any_batch(tmp_path):
    model, x = small(), randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    torch.export.save(exported, tmp_path / "model.pt2")
    other = randn(3, 3, 64, 64, seed=1)
    with torch.no_grad():
        assert_close(torch.export.load(tmp_path / "model.pt2").module()(other), model(other))


@pytest.mark.slow
@every_form
def test_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    model, x = small(name), randn(2, 3, 96, 64)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4)
    trained = copy.deepcopy(model).train()
    torch.compile(trained, fullgraph=True)(x).sum().backward()
    model.train()(x).sum().backward()
    for got, expected in zip(trained.parameters(), model.parameters(), strict=True):
        assert_close(got.grad, expected.grad, rtol=0, atol=2e-4 * expected.grad.abs().max().item() + 1e-5)


@pytest.mark.slow
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = small(), randn(2, 3, 96, 64)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(out), model(x), atol=1e-4)
