import itertools
import math

import pytest
import timm
import torch
from torch.optim import SGD, AdamW

from saccade.vision_backbones.optimization import (
    balanced_weights,
    cosine_with_warmup,
    parameter_groups,
    scale_learning_rates,
)


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("test_vit", num_classes=3)


def names_of(model, group):
    return {name for name, value in model.named_parameters() if any(value is other for other in group["params"])}


def test_vectors_and_tokens_are_not_decayed(vit):
    optimizer = AdamW(parameter_groups(vit), lr=0.1, weight_decay=0.3)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in names_of(vit, group)}
    assert set(decay) == {name for name, _ in vit.named_parameters()}
    assert decay["blocks.0.attn.qkv.weight"] == 0.3
    assert {decay["blocks.0.norm1.weight"], decay["head.bias"], decay["pos_embed"], decay["cls_token"]} == {0.0}


def test_weight_decay_is_the_optimisers_own(vit):
    optimizer = SGD(parameter_groups(vit), lr=0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_layer_decay_falls_towards_the_input(vit):
    optimizer = AdamW(parameter_groups(vit, layer_decay=0.5), lr=1.0)
    scale_learning_rates(optimizer, 0.2)
    rate = {name: group["lr"] for group in optimizer.param_groups for name in names_of(vit, group)}
    assert rate["head.weight"] == pytest.approx(0.2)
    blocks = [rate[f"blocks.{index}.attn.qkv.weight"] for index in range(len(vit.blocks))]
    assert all(lower == pytest.approx(upper / 2) for lower, upper in itertools.pairwise(blocks))
    assert rate["patch_embed.proj.weight"] == pytest.approx(blocks[0] / 2)


def test_without_a_rate_the_optimisers_stays(vit):
    optimizer = AdamW(parameter_groups(vit), lr=0.7)
    scale_learning_rates(optimizer, None)
    assert {group["lr"] for group in optimizer.param_groups} == {0.7}


def test_frozen_parameters_are_left_out():
    model = timm.create_model("test_resnet", num_classes=3)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    groups = parameter_groups(model)
    assert sum(len(group["params"]) for group in groups) == 2


def test_schedule():
    factors = [cosine_with_warmup(step, total=12, warmup=4) for step in range(14)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx(0.5)
    assert factors[6] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[12] == factors[13] == pytest.approx(0.0)
    assert cosine_with_warmup(0, total=5, warmup=0) == 1.0
    assert cosine_with_warmup(3, total=5, warmup=5) < cosine_with_warmup(4, total=5, warmup=5) < 1


def test_balanced_weights_give_every_class_the_same_total():
    counts = [10, 40, 0, 50]
    weights = balanced_weights(counts)
    totals = torch.tensor(weights) * torch.tensor(counts)
    assert totals[[0, 1, 3]].tolist() == pytest.approx([100 / 3] * 3)
    assert weights[2] == 0.0
