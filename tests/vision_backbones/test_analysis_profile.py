import math

import pytest
import timm
import torch
from torch import nn

from saccade.attention import attention_statistics_from_maps, reference
from saccade.errors import ConfigError, ShapeError
from saccade.vision_backbones.analysis import (
    HeadMeasurement,
    attention_profile,
    find_layers,
    pattern_label,
    watch_layers,
)
from saccade.vision_backbones.analysis import profile as profile_module
from saccade.vision_backbones.diversity import DiversityCollector
from saccade.vision_backbones.rvt import RVT
from tests.helpers import assert_close, randn

GRID = (2, 5)


def by_loops(maps, grid, prefix):
    """Return the figures of one head's map, from their definition."""
    places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    hops = max(grid)
    mass, mean = [0.0] * hops, [0.0] * hops
    distance = entropy = outside = 0.0
    for i, (row, column) in enumerate(places):
        weights = maps[prefix + i]
        outside += float(weights[:prefix].sum()) / len(places)
        weights = weights[prefix:] / weights[prefix:].sum()
        ring = [[] for _ in range(hops)]
        for j, (r, c) in enumerate(places):
            ring[max(abs(r - row), abs(c - column))].append(float(weights[j]))
            distance += float(weights[j]) * math.hypot(r - row, c - column) / len(places)
            entropy -= float(weights[j]) * math.log(float(weights[j])) / len(places)
        for k, values in enumerate(ring):
            mass[k] += sum(values) / len(places)
            mean[k] += sum(values) / max(len(values), 1) / len(places)
    return outside, mass, mean, distance, entropy


@pytest.mark.parametrize("elements", [2**22, 60])  # in one block, and row by row
def test_profile_is_its_definition(elements, monkeypatch):
    monkeypatch.setattr(profile_module, "ELEMENTS", elements)
    maps = randn(2, 3, 12, 12, dtype=torch.float64).softmax(-1)
    found = attention_profile(maps, GRID, prefix_tokens=2)
    for b in range(2):
        for h in range(3):
            outside, mass, mean, distance, entropy = by_loops(maps[b, h], GRID, 2)
            assert_close(found.prefix_mass[b, h], torch.tensor(outside, dtype=torch.float64))
            assert_close(found.mass_by_hop[b, h], torch.tensor(mass, dtype=torch.float64))
            assert_close(found.mean_per_neighbour_by_hop[b, h], torch.tensor(mean, dtype=torch.float64))
            assert_close(found.mean_distance[b, h], torch.tensor(distance, dtype=torch.float64))
            assert_close(found.entropy[b, h], torch.tensor(entropy, dtype=torch.float64))


def test_maps_with_known_answers():
    own, column, uniform = torch.eye(10), torch.zeros(10, 10), torch.full((10, 10), 0.1)
    column[:, 7] = 1
    found = attention_profile(torch.stack([own, column, uniform])[None], GRID)
    assert_close(found.mass_by_hop[0, 0], torch.tensor([1.0, 0, 0, 0, 0]))
    assert_close(found.mean_distance[0, 0], torch.tensor(0.0))
    assert_close(found.largest_column[0], torch.tensor([0.1, 1.0, 0.1]))
    assert_close(found.entropy_share[0], torch.tensor([0.0, 0, 1]), atol=1e-5)
    assert_close(found.mass_by_hop.sum(-1), torch.ones(1, 3))


def test_queries_that_see_prefix_tokens_alone_count_in_prefix_mass_alone():
    maps = torch.zeros(1, 2, 5, 5)
    maps[..., 0] = 1
    maps[0, 1, 2:] = torch.eye(5)[2:]  # of the second head, three of four patches see themselves
    found = attention_profile(maps, (2, 2), prefix_tokens=1)
    assert_close(found.prefix_mass, torch.tensor([[1.0, 0.25]]))
    assert_close(found.mass_by_hop, torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]))
    assert_close(found.largest_column, torch.tensor([[0.0, 1 / 3]]))
    assert_close(found.mean_distance, torch.zeros(1, 2))
    assert_close(found.entropy, torch.zeros(1, 2))


def test_maps_that_do_not_fit_the_grid():
    with pytest.raises(ShapeError, match=r"must be floating point \(B, H, 11, 11\) for 1 prefix tokens and a grid of"):
        attention_profile(torch.ones(1, 1, 10, 10), GRID, prefix_tokens=1)


@pytest.mark.parametrize(
    ("label", "figures"),
    [
        ("self", (0.6, 0.9, 0.4, 0.5)),
        ("local", (0.5, 0.7, 0.4, 0.5)),
        ("column", (0.1, 0.6, 0.31, 0.96)),
        ("uniform", (0.1, 0.6, 0.3, 0.96)),
        ("mixed", (0.1, 0.6, 0.3, 0.95)),
    ],
)
def test_labels_go_to_the_first_rule_that_fits(label, figures):
    names = ("hop0", "within2", "largest_column", "entropy_share")
    assert pattern_label(**dict(zip(names, figures, strict=True))) == label


def test_layers_of_a_vit_and_its_maps():
    model = timm.create_model("test_vit", img_size=(32, 64)).eval()
    layers = find_layers(model, (3, 32, 64))
    assert [layer.block for layer in layers] == [f"blocks.{i}" for i in range(6)]
    assert (layers[0].gate, layers[0].num_heads) == ("blocks.0.attn.proj", 2)
    assert (layers[0].prefix_tokens, layers[0].grid) == (1, (2, 4))
    seen = []
    with watch_layers(model, layers, lambda index, maps: seen.append((index, maps))), torch.no_grad():
        model(randn(3, 3, 32, 64))
    assert [index for index, _ in seen] == list(range(6))
    assert_close(seen[2][1].sum(-1), torch.ones(3, 2, 9))


def test_maps_of_our_own_layers_beside_a_collector():
    torch.manual_seed(0)
    model = RVT(base_dims=(8, 8), depth=(1, 1), heads=(2, 4), mlp_ratio=2.0, patch_size=4, masked_blocks=1).eval()
    layers = find_layers(model, (3, 64, 64))
    assert [(layer.num_heads, layer.grid) for layer in layers] == [(2, (16, 16)), (4, (8, 8))]
    seen = []
    collector = DiversityCollector(model)
    with watch_layers(model, layers, lambda index, maps: seen.append(maps)), torch.no_grad():
        model(randn(2, 3, 64, 64))
    with torch.no_grad(), collector:
        model(randn(2, 3, 64, 64))  # the collector is back
    for maps, value in zip(seen, collector.values.values(), strict=True):
        assert_close(reference.attention_diversification_from_maps(maps, 2.0, 0), value)


def sink_of(maps):
    return (attention_statistics_from_maps(maps).importance.amax(-1) > 0.3).float()


@pytest.mark.parametrize("importance", ["zero", "none"])
def test_figures_are_summed_in_float32_under_autocast(importance):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64).eval()
    measurement = HeadMeasurement(model, (3, 64, 64), importance=importance)
    images = randn(2, 3, 64, 64)
    exact, _ = measurement.measure(images)
    with torch.autocast("cpu", torch.bfloat16):
        values, logits = measurement.measure(images)
    assert logits.dtype == torch.float32
    mass = [i for i, name in enumerate(measurement.columns) if name.startswith("mass_by_hop")]
    assert_close(values[..., mass].sum(-1), torch.ones(2, 12))
    spread = mass[-1] + 1
    assert_close(values[..., :spread], exact[..., :spread], atol=0.02)


def test_figures_of_a_model_head_by_head():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64).eval()
    with torch.no_grad():
        for block in model.blocks[::2]:
            block.attn.qkv.weight.mul_(20)  # some layers with sinks
    measurement = HeadMeasurement(model, (3, 64, 64), importance="none")
    images = randn(3, 3, 64, 64)
    values, logits = measurement.measure(images)
    assert values.shape == (3, 12, len(measurement.columns))
    with torch.no_grad():
        assert_close(logits, model(images))
    alone, _ = measurement.measure(images[1:2])
    assert_close(values[1:2], alone, atol=1e-4)
    column = {name: values[..., i] for i, name in enumerate(measurement.columns)}
    assert_close(sum(column[f"mass_by_hop_{k}"] for k in range(4)), torch.ones(3, 12))
    sinks = []
    with watch_layers(model, measurement.layers, lambda index, maps: sinks.append(sink_of(maps))), torch.no_grad():
        model(images)
    assert_close(column["sink_rate"], torch.cat(sinks, 1))
    assert 0 < float(column["sink_rate"].mean()) < 1
    collector = DiversityCollector(model)
    for image in range(3):
        with torch.no_grad(), collector:
            model(images[image : image + 1])
        expected = torch.stack(list(collector.values.values())).repeat_interleave(2)
        assert_close(column["diversification"][image], expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "swin_tiny_patch4_window7_224",
            r"layers.0.blocks.0.attn .*WindowAttention.* does not attend from all patches",
        ),
        ("pvt_v2_b0", r"stages.0.blocks.0.attn .*matrices for two images are 2 x 1 x 3136 x 49"),
        ("xcit_nano_12_p16_224", "Xcit shows no attention from patches to patches"),
        ("test_resnet", "ResNet shows no attention over places"),
    ],
)
def test_models_without_global_attention_are_refused(name, message):
    model = timm.create_model(name).eval()
    with pytest.raises(ConfigError, match=message):
        find_layers(model, (3, 224, 224))


def test_layers_used_twice_are_refused():
    model = timm.create_model("test_vit", img_size=32).eval()
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[0])
    with pytest.raises(ConfigError, match="runs twice in one pass"):
        find_layers(model, (3, 32, 32))
