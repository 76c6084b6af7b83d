"""Attention diversification of whole models: against the literal form on maps, under everything training does."""

import copy
import os
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from saccade.attention import attention_diversification_from_maps
from saccade.errors import ConfigError
from saccade.vision_backbones.attention_maps import attention_points, watch_attention
from saccade.vision_backbones.diversity import DiversityCollector, DiversityPoint
from tests.helpers import assert_close, randn

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64, "num_classes": 3}
# The padded, shifted windows of Swin: 16 x 16, 8 x 8, ... tokens in windows of 4.
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0}
MODELS = {
    "vit_small_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "vit_base_patch16_rope_reg1_gap_256": SMALL | {"qkv_bias": True},
    "vit_medium_patch16_gap_256": SMALL | {"qk_norm": True},
    "beit_base_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": SWIN | {"img_size": 64, "num_classes": 3},
}


def build(name="vit_small_patch16_224", **options):
    """Return a small model whose attention is far from uniform, so that the loss is not 0."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(MODELS.get(name, {}) | options))
    for key, parameter in model.named_parameters():
        if "qkv.weight" in key or "q_norm" in key or "relative_position_bias_table" in key:
            parameter.data.mul_(20)
    return model


def step(model, collector, images, weight=1.0):
    """Return the loss and the gradients of one training step."""
    model.zero_grad()
    with collector:
        logits = model(images)
    loss = F.cross_entropy(logits, torch.arange(len(images)) % 3) + weight * collector.loss()
    loss.backward()
    return loss.detach(), {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


def assert_same(got, want):
    assert got[1].keys() == want[1].keys()
    assert_close(got[0], want[0])
    for key, value in want[1].items():
        assert_close(got[1][key], value, atol=1e-5 * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_literal_form_on_the_maps_of_each_layer(name):
    model, images = build(name), randn(2, 3, 64, 64)
    expected, maps = {}, {}

    def receive(point, matrix):
        maps[point.rpartition(".")[0]] = matrix

    points = attention_points(model)
    with watch_attention(model, points, receive):
        plain = model(images)
    prefix = getattr(model, "num_prefix_tokens", 0)
    for layer, matrix in maps.items():
        expected[layer] = attention_diversification_from_maps(matrix, prefix_tokens=prefix)
    collector = DiversityCollector(model)
    with collector:
        logits = model(images)
    assert_close(logits, plain, atol=1e-4)
    assert collector.values.keys() == expected.keys()
    assert max(expected.values()) > 0.1
    for layer, value in expected.items():
        assert_close(collector.values[layer], value, atol=1e-4)
    want = sum(expected.values()) / (len(expected) + 1e-6)
    keys = [key for key, _ in model.named_parameters() if "qkv.weight" in key or "bias_table" in key]
    parameters = [model.get_parameter(key) for key in keys]
    got_gradients = torch.autograd.grad(collector.loss(), parameters)
    for got, wanted in zip(got_gradients, torch.autograd.grad(want, parameters), strict=True):
        assert_close(got, wanted, atol=2e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model, images = build(name), randn(2, 3, 64, 64)
    collector = DiversityCollector(model)
    plain = step(model, collector, images, weight=3.0)
    model.set_grad_checkpointing()
    assert_same(step(model, collector, images, weight=3.0), plain)
    assert len(collector.values) == len(collector.names)


def test_a_forward_that_is_not_collected_may_share_a_checkpointed_backward():
    model, images = build(), randn(2, 3, 64, 64)
    collector = DiversityCollector(model)

    def gradients():
        model.zero_grad()
        first = model(images.flip(3)).square().mean()
        with collector:
            second = model(images).square().mean()
        (first + second + collector.loss()).backward()
        return first.detach(), {key: value.grad.clone() for key, value in model.named_parameters()}

    plain = gradients()
    model.set_grad_checkpointing()
    assert_same(gradients(), plain)


def test_reentrant_checkpointing_is_refused():
    model = build()
    model.set_grad_checkpointing()
    collector = DiversityCollector(model)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(ConfigError, match="use_reentrant=False"), collector:
            model(randn(2, 3, 64, 64).requires_grad_())
    finally:
        set_reentrant_ckpt(False)


def test_a_batch_of_one_counts_as_the_same_image_twice():
    model, image = build(), randn(1, 3, 64, 64)
    collector = DiversityCollector(model)
    with collector:
        model(image)
    one = collector.loss()
    with collector:
        model(torch.cat([image, image]))
    assert one > 0.1
    assert_close(one, collector.loss())


def test_gradients_accumulate_over_batches():
    model, images = build(), randn(4, 3, 64, 64)
    collector = DiversityCollector(model)
    _, whole = step(model, collector, images)
    target = torch.arange(4) % 3
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        with collector:
            logits = model(images[half])
        (0.5 * (F.cross_entropy(logits, target[half]) + collector.loss())).backward()
    got = {key: value.grad for key, value in model.named_parameters()}
    assert_same((torch.zeros(()), got), (torch.zeros(()), whole))


def test_mixed_precision_computes_the_loss_in_float32():
    model, images = build(), randn(2, 3, 64, 64)
    collector = DiversityCollector(model)
    with collector:
        model(images)
    full = dict(collector.values)
    with torch.autocast("cpu", torch.bfloat16), collector:
        model(images)
    for layer, value in collector.values.items():
        assert value.dtype == torch.float32
        assert_close(value, full[layer], atol=0.05)  # of queries and keys in bfloat16
    model.zero_grad()
    collector.loss().backward()
    assert model.get_parameter("blocks.0.attn.qkv.weight").grad.abs().max() > 0


def test_layers_can_be_chosen_and_switched_off():
    model, images = build(), randn(2, 3, 64, 64)
    collector = DiversityCollector(model, layers=[0, -1])
    assert collector.names == ("blocks.0.attn", "blocks.2.attn")
    with collector:
        model(images)
    assert list(collector.values) == ["blocks.0.attn", "blocks.2.attn"]
    total = sum(collector.values.values())
    assert_close(collector.loss(), total / 2, rtol=1e-5)
    collector.enabled = False
    with collector:
        model(images)
    with pytest.raises(ConfigError, match="not enabled"):
        collector.loss()
    collector.remove()
    with pytest.raises(ConfigError, match="3 layers"):
        DiversityCollector(model, layers=[3])


def test_removing_and_copying():
    model, images = build("swin_tiny_patch4_window7_224"), randn(2, 3, 64, 64)
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    keys = list(model.state_dict())
    collector = DiversityCollector(model)
    assert list(model.state_dict()) == keys
    with pytest.raises(ConfigError, match="remove"):
        DiversityCollector(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with collector:
            twin(images)
        assert not collector.values, "a copy feeds its own collector"
    collector.remove()
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == fused
    with collector:
        model(images)
    assert not collector.values
    DiversityCollector(model)


def test_own_layers_take_part_by_their_point():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.diversity = DiversityPoint()
            self.scale = 3.0

        def forward(self, x):
            self.diversity(x, x, scale=self.scale, prefix_tokens=1)
            return F.scaled_dot_product_attention(x, x, x, scale=self.scale)

    layer, x = Layer(), randn(2, 2, 9, 4)
    collector = DiversityCollector(layer)
    with collector:
        layer(x)
    maps = torch.softmax(3.0 * x @ x.transpose(2, 3), -1)
    assert_close(collector.values["diversity"], attention_diversification_from_maps(maps, prefix_tokens=1))
    with pytest.raises(ConfigError, match="twice"), collector:
        nn.Sequential(layer, layer)(x)
    scripted = torch.jit.script(Layer())
    assert_close(scripted(x), F.scaled_dot_product_attention(x, x, x, scale=3.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swinv2_tiny_window8_256", "swin_transformer_v2.WindowAttention"),
        ("xcit_nano_12_p16_224", "Xcit has no attention over places"),
        ("resnet18", "ResNet has no attention over places"),
    ],
)
def test_models_without_such_layers_are_refused(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ConfigError, match=message):
        DiversityCollector(model)


def test_layers_of_another_form_are_named():
    model = timm.create_model("twins_svt_small", num_classes=0, img_size=64)
    collector = DiversityCollector(model)
    message = r"blocks.0.0.attn .*LocallyGroupedAttn.* query of shape"
    with torch.no_grad(), pytest.raises(ConfigError, match=message), collector:
        model(randn(1, 3, 64, 64))
    collector.remove()
    with pytest.raises(ConfigError, match="No layer"):
        DiversityCollector(model).loss()


def train_in_parallel(rank, port, results):
    """Take one step on half of the batch in each of two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = build()
    collector = DiversityCollector(model)
    parallel = DistributedDataParallel(model)  # kept: it hears of the backward pass
    with collector:
        logits = parallel(randn(6, 3, 64, 64)[rank * 3 : rank * 3 + 3])
    loss = F.cross_entropy(logits, torch.arange(3)) + collector.loss()
    loss.backward()
    if rank == 0:
        torch.save({key: value.grad for key, value in model.named_parameters()}, results)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    mp.spawn(train_in_parallel, args=(29511, tmp_path / "gradients.pt"), nprocs=2)
    model = build()
    _, want = step(model, DiversityCollector(model), randn(6, 3, 64, 64))
    assert_same((torch.zeros(()), torch.load(tmp_path / "gradients.pt")), (torch.zeros(()), want))


@pytest.mark.slow
def test_compiled_as_one_graph():
    model, images = build(depth=1), randn(2, 3, 64, 64)
    collector = DiversityCollector(model)
    plain = step(model, collector, images)
    compiled = torch.compile(model, fullgraph=True)
    loss, gradients = step(compiled, collector, images)
    assert_same((loss, {key.removeprefix("_orig_mod."): value for key, value in gradients.items()}), plain)
