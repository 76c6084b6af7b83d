"""What one place reads or makes: against literal attention and against the gradient of the mixing itself."""

import numpy as np
import pytest
import timm
import torch

from saccade.attention import grid_to_regions
from saccade.errors import ConfigError
from saccade.vision_backbones.bi_level_routing import BiLevelRoutingAttention, RaggedRoutingAttention
from saccade.vision_backbones.map_methods import choose_method
from saccade.vision_backbones.overlock_blocks import FocusBlock
from saccade.vision_backbones.routed_regions import region_reads
from tests.helpers import assert_close, randn

BIFORMER = {"depth": (1, 1, 2, 1), "embed_dim": (16, 32, 48, 64), "head_dim": 8, "num_classes": 4}
OVERLOCK = {
    "depth": (1, 1, 1, 1),
    "sub_depth": (2, 1),
    "embed_dim": (16, 24, 32, 48),
    "sub_num_heads": (2, 3),
    "projection": 40,
    "kernel_size": (5, 5, 7, 5),
    "smk_size": 3,
    "num_classes": 4,
}


def build(name, **options):
    """Return a small model with weights under which places differ."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * randn(*parameter.shape, seed=i))
    return model.eval()


def shares_by_hand(module, query, key, weight=None):
    """Compute the reads of regions from all products of queries and keys, with those of other regions cut out."""
    selected = torch.zeros(query.shape[0], *module.routed.shape[1:2] * 2, dtype=torch.bool)
    selected.scatter_(2, module.routed.long(), torch.ones_like(module.routed, dtype=torch.bool))
    regions = selected.shape[1]

    def heads(tokens):
        return tokens.unflatten(2, (module.num_heads, -1)).transpose(1, 2).double()

    logits = module.scale * heads(query) @ heads(key).transpose(2, 3)
    logits = logits.unflatten(3, (regions, -1)).unflatten(2, (regions, -1))  # (B, H, R, n, R, m)
    if weight is not None:
        logits = logits * weight[:, None, :, None, :, None]
    logits = logits.masked_fill(~selected[:, None, :, None, :, None], -torch.inf)
    return torch.softmax(logits.flatten(4), -1).unflatten(4, (regions, -1)).sum(5).mean(3), selected


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_dim": 8}, {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, {"soft_routing": True}],
    ids=["plain", "narrow", "pooled", "soft"],
)
def test_reads_of_regions(options):
    module, x = (
        BiLevelRoutingAttention(16, 2, 3, 2, **{"diff_routing": "soft_routing" in options, **options}),
        randn(2, 12, 10, 16),
    )
    with torch.no_grad():
        module.qkv.qkv.weight.mul_(6)
        reads = region_reads(module, x)
        module.routed = module.routes(x)
        query, key, _ = module.project(module.cut(x)[0])
        selection, soft = module.route(query, key)
        weight = None
        if soft is not None:
            weight = torch.zeros(2, 9, 9).scatter_(2, selection.indices[:, 0].long(), soft[:, 0])
        if module.pools:
            key = module.pool(key, (4, 4))
        shares, selected = shares_by_hand(module, query, key, weight)
    assert reads.region == (4, 4)
    assert_close(reads.shares, shares.float(), atol=1e-5)
    assert torch.equal(reads.selected, selected)
    assert bool((reads.shares[~selected[:, None].expand_as(reads.shares)] == 0).all())


def test_reads_of_ragged_regions():
    module, x = RaggedRoutingAttention(16, 2, 3, 4), randn(2, 10, 7, 16)
    with torch.no_grad():
        module.qkv_linear.weight.mul_(6)
        reads = region_reads(module, x)
        module.routed = module.routes(x)
        query, key, _ = grid_to_regions(module.qkv_linear(x), (3, 2)).chunk(3, -1)
        shares, selected = shares_by_hand(module, query, key)
    assert reads.region == (3, 2)
    assert reads.shares.shape == (2, 2, 16, 16)
    assert_close(reads.shares, shares.float(), atol=1e-5)
    assert torch.equal(reads.selected, selected)


def read(model, size, place, method, **options):
    """Return the method, what it gives for one image, and its panels for a place."""
    chosen = choose_method(model, input_size=(3, *size), method=method, **options)
    images = randn(2, 3, *size, seed=3)
    with torch.inference_mode():
        logits, values = chosen.run(images)
        assert_close(logits, model(images), rtol=0, atol=0)
    assert values.shape == (2, *chosen.shape)
    return chosen, values[1], chosen.reader.panels(values[1], place)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_routes_are_those_of_the_attention(name):
    options = BIFORMER if name == "biformer_tiny" else {k: v for k, v in BIFORMER.items() if k != "n_win"}
    model = build(name, **options)
    seen = []
    stage = model.stages[1]
    attention = (stage[0] if name == "biformer_tiny" else stage.blocks[0]).attn
    chosen, _, (panel,) = read(model, (64, 112), (0.99, 0.4), "routes", layer="stages.1")
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(module.routes(inputs[0])))
    with torch.no_grad():
        model(randn(2, 3, 64, 112, seed=3))
    handle.remove()
    row, column = panel.query
    assert panel.rows[row] <= 0.4 < panel.rows[row + 1]
    assert panel.columns[column] <= 0.99 < panel.columns[column + 1] == 1.0
    routed = seen[0][1, row * chosen.grid[1] + column]
    assert sorted(np.flatnonzero(panel.used).tolist()) == routed.tolist()
    assert panel.values.sum() == pytest.approx(1, abs=1e-5)
    assert bool((panel.values[~panel.used] == 0).all())


def test_regions_lie_where_their_tokens_are_and_padding_has_no_place():
    model = build("biformer_tiny", **BIFORMER)
    _, _, (panel,) = read(model, (64, 112), (0.5, 0.999), "routes", layer="stages.0")
    # 16 x 28 tokens in 7 x 7 regions of 3 x 4; the sixth row of regions holds one row of tokens, the last none
    np.testing.assert_allclose(panel.rows, [0, 3 / 16, 6 / 16, 9 / 16, 12 / 16, 15 / 16, 1, 1])
    np.testing.assert_allclose(panel.columns, np.arange(8) / 7)
    assert panel.query == (5, 3)


def test_heads_of_routes():
    model = build("biformer_tiny", **BIFORMER)
    each = [read(model, (64, 64), (0.2, 0.7), "routes", layer="stages.1", heads=str(h))[2][0].values for h in range(4)]
    mean, top = (
        read(model, (64, 64), (0.2, 0.7), "routes", layer="stages.1", heads=h)[2][0].values for h in ("mean", "max")
    )
    np.testing.assert_allclose(mean, np.mean(each, 0), atol=1e-6)
    np.testing.assert_allclose(top, np.max(each, 0) / np.max(each, 0).sum(), atol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    with pytest.raises(ConfigError, match="heads 0 to 3; there is no head 4"):
        read(model, (64, 64), (0.2, 0.7), "routes", layer="stages.1", heads="4")


def test_kernels_of_a_block_are_how_its_mixing_depends_on_the_values():
    torch.manual_seed(0)
    block = FocusBlock(16, 4, kernel_size=7, smk_size=3, num_heads=2).eval()
    with torch.no_grad():
        block.rpb2.add_(randn(*block.rpb2.shape))
        block.weight_proj.weight.mul_(50)
    z, value = randn(1, 20, 9, 8), randn(1, 16, 9, 8).requires_grad_()
    kernels = block.kernels(z)
    y, x = 1, 5
    (weights,) = torch.autograd.grad(
        block.mix(z, value)[0, 8 + 2 * 2, y, x], value
    )  # a channel of the third large group
    expected = torch.zeros(9, 8)
    expected[0:7, 1:8] = kernels.large[0, 2, :, :, y, x]
    assert_close(weights[0, 12], expected, atol=1e-6)
    assert weights[0].abs().sum((1, 2)).count_nonzero() == 1


@pytest.mark.parametrize(("side", "grid"), [((128, 160), (8, 10)), ((64, 96), (7, 10))], ids=["as it is", "enlarged"])
def test_kernels_lie_where_their_taps_are(side, grid):
    model = build("overlock_xt", **OVERLOCK)
    chosen, values, panels = read(model, side, (0.999, 0.0), "kernels", layer="sub_blocks3.0")
    assert chosen.layer == "sub_blocks3.0"
    assert chosen.grid == grid
    for panel, size in zip(panels, (3, 7), strict=True):
        assert panel.query == (0, grid[1] - 1)
        assert panel.used.sum() == size**2
        assert panel.used[:size, -size:].all()  # moved inside at the border
        assert panel.values.sum() == pytest.approx(1, abs=1e-5)
        assert panel.low == panel.values[panel.used].min() > 0
        np.testing.assert_allclose(panel.columns, np.arange(grid[1] + 1) / grid[1])
        taps = values[grid[1] - 1]
        part = taps[:9] if size == 3 else taps[9:]
        np.testing.assert_array_equal(panel.values[panel.used], part.numpy())


def test_kernels_after_fusion_are_the_same():
    model = build("overlock_xt", **OVERLOCK)
    before = read(model, (96, 96), (0.3, 0.6), "kernels")[2]
    model.reparameterize()
    after = read(model, (96, 96), (0.3, 0.6), "kernels")[2]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "method", "asked", "message"),
    [
        ("biformer_tiny", BIFORMER, "kernels", {}, "has no context mixing.*Methods that fit: .*cam, routes"),
        ("overlock_xt", OVERLOCK, "routes", {}, "has no bi-level routing.*Methods that fit: cam, kernels"),
        ("test_resnet", {}, "routes", {}, "has no bi-level routing"),
        ("biformer_tiny", BIFORMER, "routes", {"layer": "stages.3"}, r"'stages.3' has no.*stages.0.0.attn, stages.1.0"),
        ("overlock_xt", OVERLOCK, "kernels", {"layer": "blocks1"}, "'blocks1' has no.*these have: sub_blocks3.0, "),
        ("overlock_xt", OVERLOCK, "kernels", {"heads": "6"}, "heads 0 to 5; there is no head 6"),
        ("overlock_xt", OVERLOCK, "kernels", {"class_index": 1}, "does not depend on the class"),
        ("overlock_xt", OVERLOCK, "kernels", {"heads": "all"}, "mean, max or the number of a head, got 'all'"),
    ],
)
def test_what_does_not_fit(name, options, method, asked, message):
    with pytest.raises(ConfigError, match=message):
        choose_method(build(name, **options), input_size=(3, 64, 64), method=method, **asked)
