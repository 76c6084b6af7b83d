import math

import pytest
import timm
import torch

from saccade.errors import ConfigError
from saccade.vision_backbones.analysis import (
    AttentionLayer,
    PatternMaps,
    attention_profile,
    collect_patterns,
    find_layers,
    summarise_patterns,
)
from saccade.vision_backbones.analysis.tables import correlations, head_rows, hop_rows, layer_rows, trends
from tests.helpers import assert_close, randn

FAMILIES = ("self", "local", "column", "uniform")
SIDE = 8


def family(name, index):
    """Return an 8 x 8 grid's map of a known pattern, with a little noise."""
    number = SIDE * SIDE
    place = torch.arange(number)
    distance = torch.maximum((place[:, None] // SIDE - place // SIDE).abs(), (place[:, None] - place).abs() % SIDE)
    logits = {
        "self": 8 * torch.eye(number),
        "local": 4.0 * (distance <= 1) * ((place[:, None] % SIDE - place % SIDE).abs() <= 1),
        "column": 6.0 * (place == 27).expand(number, number),
        "uniform": torch.zeros(number, number),
    }[name]
    return (logits + 0.05 * randn(number, number, seed=index)).softmax(-1)


def generated(count=6):
    """Return maps of ``count`` images by a model whose four heads each have one pattern."""
    maps, statistics = [], []
    for index in range(count):
        for head, name in enumerate(FAMILIES):
            attention = family(name, 10 * index + head)[None, None]
            profile = attention_profile(attention, (SIDE, SIDE))
            maps.append((64 * attention[0, 0] + 0.01).log().half())
            figures = [profile.mass_by_hop[..., 0], profile.near_mass, profile.largest_column]
            figures += [64 * profile.largest_column, profile.entropy, profile.entropy_share]
            statistics.append(torch.cat([figure.flatten() for figure in figures]))
    image = torch.arange(count).repeat_interleave(4)
    return PatternMaps(torch.stack(maps), torch.stack(statistics), image, torch.arange(4).repeat(count))


def test_patterns_that_are_there_are_found():
    patterns = generated(6)
    summary = summarise_patterns(patterns, steps=40)
    assert sorted({cluster.label for cluster in summary.clusters}) == sorted(FAMILIES)
    for index, cluster in enumerate(summary.clusters):
        members = patterns.head[torch.from_numpy(summary.assignment) == index]
        assert set(members.tolist()) == {FAMILIES.index(cluster.label)}  # no pattern is mixed with another
        assert len(members) == cluster.size
        assert all(summary.assignment[position] == index for position in cluster.nearest)
        assert cluster.centroid.shape == (64, 64)
    sizes = [cluster.size for cluster in summary.clusters]
    assert sizes == sorted(sizes, reverse=True)
    assert_close(torch.from_numpy(summary.head_shares.sum(1)), torch.ones(4))
    assert len(summary.clusters) == max(summary.silhouette, key=summary.silhouette.get)
    own = next(cluster for cluster in summary.clusters if cluster.label == "self")
    assert own.statistics["hop0"] > 0.9
    again = summarise_patterns(patterns, steps=40)
    assert (again.assignment == summary.assignment).all()
    assert again.error == summary.error


def test_too_few_or_equal_maps():
    few = generated(1)
    with pytest.raises(ConfigError, match="4 maps are too few"):
        summarise_patterns(few)
    equal = PatternMaps(torch.ones(8, 64, 64).half(), torch.ones(8, 6), torch.arange(8), torch.zeros(8).long())
    with pytest.raises(ConfigError, match="the same"):
        summarise_patterns(equal)


def test_maps_are_resized_and_measured_before():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64).eval()
    layers = find_layers(model, (3, 64, 64))
    found = collect_patterns(model, layers, randn(2, 3, 64, 64))
    assert found.maps.shape == (24, 64, 64)
    assert found.image.tolist() == [0] * 12 + [1] * 12
    uniform = math.log(1.01)
    assert float((found.maps.float() - uniform).abs().max()) < 0.5  # fresh weights: nearly uniform
    assert_close(found.statistics[:, 5], torch.ones(24), atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        lower = collect_patterns(model, layers, randn(2, 3, 64, 64))
    assert_close(lower.maps, found.maps, atol=0.05)
    joined = PatternMaps.join([found, found])
    assert joined.image.tolist()[::12] == [0, 1, 2, 3]


LAYERS = [AttentionLayer(f"b.{i}.attn", f"b.{i}.p", f"b.{i}", None, 2, 0, (2, 2)) for i in range(2)]
NAMES = ("prefix_mass", "entropy", "entropy_share", "mean_distance", "largest_column", "sink_rate", "diversification")
COLUMNS = [
    *NAMES,
    *(f"{name}_{k}" for name in ("mass_by_hop", "mean_per_neighbour_by_hop") for k in (0, 1)),
    *("probability_drop", "accuracy_drop", "js_divergence", "cosine_distance", "gate_gradient"),
]


def test_tables():
    means = torch.zeros(4, len(COLUMNS), dtype=torch.float64)
    place = {name: i for i, name in enumerate(COLUMNS)}
    means[:, place["mean_distance"]] = torch.tensor([1.0, 3, 4, 8])
    means[:, place["mass_by_hop_0"]] = torch.tensor([0.75, 0.125, 0.125, 0.25])
    means[:, place["mass_by_hop_1"]] = 0.25
    means[:, place["probability_drop"]] = torch.tensor([0.125, 0.5, 0.5, -0.25])
    means[:, place["gate_gradient"]] = torch.tensor([-0.25, -0.5, 0.75, 0.0])
    rows = head_rows(LAYERS, COLUMNS, means.numpy())
    assert [row["pattern"] for row in rows] == ["self", "mixed", "mixed", "mixed"]
    assert [row["probability_drop_rank"] for row in rows] == [3, 1, 1, 4]
    assert [row["probability_drop_rank_in_layer"] for row in rows] == [2, 1, 1, 2]
    assert [row["first_order"] for row in rows] == [0.25, 0.5, 0.75, 0.0]
    layers = layer_rows(LAYERS, rows)
    assert [row["mean_distance_mean"] for row in layers] == [2, 6]
    assert [row["mean_distance_std"] for row in layers] == [1, 2]
    assert abs(trends(layers)["mean_distance"] - 4) < 1e-9
    assert trends(layers[:1]) == {}
    agreement = {(row["first"], row["second"]): row["spearman"] for row in correlations(rows)}
    assert len(agreement) == 10
    assert abs(agreement["probability_drop", "first_order"] - 0.9486833) < 1e-6
    assert math.isnan(agreement["probability_drop", "accuracy_drop"])  # the same for all heads
    assert hop_rows(LAYERS, COLUMNS, means.numpy())[5] == {
        **{"layer": 1, "head": 0, "hop": 1},
        **{"mass": 0.25, "mean_per_neighbour": 0.0},
    }
