import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

from saccade.errors import ConfigError
from saccade.vision_backbones.analysis import (
    HeadMeasurement,
    HeadPruning,
    find_layers,
    gate_gradients,
    mean_head_outputs,
)
from saccade.vision_backbones.fan import FAN
from saccade.vision_backbones.rvt import RVT
from tests.helpers import assert_close, randn

SIZE = (3, 64, 64)
LABELS = torch.tensor([1, 0, 3])


def vit():
    return timm.create_model("test_vit", img_size=64, num_classes=5)


def deit():
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=4, num_classes=5
    )


def eva():
    return timm.create_model(
        "eva02_tiny_patch14_224", img_size=56, patch_size=14, depth=2, embed_dim=48, num_heads=3, num_classes=5
    )


def fan():
    return FAN(num_classes=5, embed_dim=(16, 32, 32), depth=3, num_heads=(2, 4, 4), mlp_ratio=2.0)


def rvt():
    return RVT(num_classes=5, base_dims=(8, 8), depth=(1, 2), heads=(2, 4), mlp_ratio=2.0, masked_blocks=1)


def prepared(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    size = (3, 56, 56) if build is eva else SIZE
    return model, find_layers(model, size), size


@pytest.mark.parametrize("build", [vit, deit, eva, fan, rvt])
def test_pruning_is_zeroing_columns_of_the_output_projection(build):
    model, layers, size = prepared(build)
    images = randn(3, *size)
    effects, logits = HeadPruning(model, layers, size).measure(images, LABELS)
    before = logits.double().softmax(-1)
    row = 0
    with torch.no_grad():
        assert_close(model(images), logits)
        for layer in layers:
            for head in range(layer.num_heads):
                pruned = copy.deepcopy(model)
                weight = pruned.get_submodule(layer.gate).weight
                width = weight.shape[1] // layer.num_heads
                weight[:, head * width : (head + 1) * width] = 0
                after = pruned(images).double().softmax(-1)
                features = [m.forward_head(m.forward_features(images), pre_logits=True) for m in (model, pruned)]
                for i, label in enumerate(LABELS):
                    right = [float(p[i].argmax() == label) for p in (before, after)]
                    expected = [
                        float(before[i, label] - after[i, label]),
                        right[0] - right[1],
                        jensenshannon(before[i], after[i], base=2) ** 2,
                    ]
                    np.testing.assert_allclose(effects[i, row, :3], expected, atol=2e-5, rtol=1e-3)
                if build is not deit:  # with two classifiers, features are what goes into the first
                    distance = 1 - F.cosine_similarity(*(f.double() for f in features), dim=-1)
                    np.testing.assert_allclose(effects[:, row, 3], distance, atol=1e-5, rtol=1e-3)
                row += 1
    assert row == effects.shape[1]
    assert float(effects[..., 2].max()) > 1e-4  # there was something to compare


def test_the_prefix_is_shared():
    model, layers, size = prepared(vit)
    pruning = HeadPruning(model, layers, size)
    images = randn(5, *size)
    evaluations = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: evaluations.append(len(args[0])))
    forwards = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda module, args, output: forwards.append(len(output)))
    pruning.measure(images, torch.zeros(5, dtype=torch.int64))
    count, heads = len(layers), layers[0].num_heads
    whole = count  # once, with all heads
    assert sum(forwards) == 5 * (whole + heads * count * (count + 1) // 2)


def test_the_model_is_as_it_was():
    model, layers, size = prepared(fan)
    images = randn(2, *size)
    with torch.no_grad():
        before = model(images)
    HeadPruning(model, layers, size).measure(images)
    gate_gradients(model, layers, images)
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_default_to_predictions():
    model, layers, size = prepared(vit)
    images = randn(3, *size)
    pruning = HeadPruning(model, layers, size)
    effects, logits = pruning.measure(images)
    assert torch.equal(effects, pruning.measure(images, logits.argmax(-1))[0])
    assert effects[..., 1].min() >= 0  # what is right by definition can only become wrong


def test_a_head_replaced_by_its_own_output_changes_nothing():
    model, layers, size = prepared(vit)
    images = randn(1, *size)
    means = mean_head_outputs(model, layers, [(images, torch.tensor([True]))])
    effects, _ = HeadPruning(model, layers, size, means=means).measure(images, torch.tensor([2]))
    assert effects.abs().max() < 1e-5


def test_means_leave_out_slots_that_do_not_count():
    model, layers, size = prepared(vit)
    images = randn(3, *size)
    masks = [torch.tensor([True, False, True]), torch.tensor([False, True, False])]
    found = mean_head_outputs(model, layers, [(images, mask) for mask in masks])
    all_three = mean_head_outputs(model, layers, [(images, torch.ones(3, dtype=torch.bool))])
    for one, other, layer in zip(found, all_three, layers, strict=True):
        assert one.shape == (17, layer.num_heads, 32)
        assert_close(one, other)
    with pytest.raises(ConfigError, match="no image"):
        mean_head_outputs(model, layers, [(images, torch.zeros(3, dtype=torch.bool))])


@pytest.mark.parametrize("build", [vit, fan, rvt])
def test_gate_gradients_are_those_of_the_projection_times_its_weights(build):
    model, layers, size = prepared(build)
    images = randn(9, *size)  # more than one part
    labels = torch.arange(9) % 5
    found = gate_gradients(model, layers, images, labels)
    for i in (0, 8):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        expected = []
        for layer in layers:
            weight = model.get_submodule(layer.gate).weight
            expected.append((weight.grad * weight).sum(0).unflatten(0, (layer.num_heads, -1)).sum(-1))
        assert_close(found[i], torch.cat(expected), atol=1e-4, rtol=1e-3)


def test_a_model_without_classifier_has_features_alone():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, num_classes=0).eval()
    values, logits = HeadMeasurement(model, SIZE).measure(randn(2, *SIZE))
    assert logits.shape == (2, 0)
    assert values[..., -5:].isnan().any(0).any(0).tolist() == [True, True, True, False, True]
    with pytest.raises(ConfigError, match="no loss"):
        gate_gradients(model, find_layers(model, SIZE), randn(1, *SIZE))


def test_blocks_side_by_side_are_refused():
    model = timm.create_model("vit_small_patch16_18x2_224", img_size=64, depth=2, embed_dim=48, num_heads=2).eval()
    layers = find_layers(model, SIZE)
    with pytest.raises(ConfigError, match=r"side by side .* Leave importance out \(none\)"):
        HeadPruning(model, layers, SIZE)
    values, _ = HeadMeasurement(model, SIZE, importance="none").measure(randn(1, *SIZE))
    assert values.shape[:2] == (1, 8)


def test_unknown_importance():
    with pytest.raises(ConfigError, match="importance must be one of zero, mean, none; got 'half'"):
        HeadMeasurement(vit().eval(), SIZE, importance="half")
