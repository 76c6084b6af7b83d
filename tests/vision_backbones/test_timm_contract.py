"""What timm expects of a model, for every model that this package registers.

The same ground as timm's own tests/test_models.py, at small size. Families add their models to ``REDUCED``.
"""

import copy

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import saccade.vision_backbones  # registers the models  # noqa: F401
from tests.helpers import assert_close, randn

SHALLOW = {"depth": (1, 1, 1, 1)}
SHALLOW_OVERLOCK = {"depth": (1, 1, 1, 1), "sub_depth": (2, 1)}
SHALLOW_HYBRID = {"depth": 2, "convnext_depths": (1, 1)}
SHALLOW_FAN = {
    "fan_tiny_12_p16_224": {"depth": 3},
    "fan_small_12_p16_224": {"depth": 3},
    "fan_base_18_p16_224": {"depth": 3},
    "fan_large_24_p16_224": {"depth": 3},
    "fan_tiny_8_p4_hybrid": SHALLOW_HYBRID,
    "fan_small_12_p4_hybrid": SHALLOW_HYBRID,
    "fan_base_16_p4_hybrid": SHALLOW_HYBRID,
    "fan_large_16_p4_hybrid": SHALLOW_HYBRID,
    "fan_Xlarge_16_p4_hybrid": {
        "depth": 3,
        "convnext_depths": (1, 1),
        "embed_dim": (528, 528, 768),
        "num_heads": (11, 11, 16),
    },
}
SHALLOW_RVT = {
    "rvt_tiny": {"depth": (2, 1)},
    "rvt_tiny_plus": {"depth": (2, 1), "masked_blocks": 1},
    "rvt_small": {"depth": (3,)},
    "rvt_small_plus": {"depth": (3,), "masked_blocks": 2},
    "rvt_base": {"depth": (3,)},
    "rvt_base_plus": {"depth": (3,), "masked_blocks": 2},
}
SHALLOW_ROBUST = {**SHALLOW_FAN, **SHALLOW_RVT}
# Constructor arguments that leave few blocks; the widths are those of the variant.
REDUCED = {
    "biformer_tiny": SHALLOW,
    "biformer_small": SHALLOW,
    "biformer_base": SHALLOW,
    "biformer_stl": SHALLOW,
    "biformer_stl_nchw": SHALLOW,
    "overlock_xt": SHALLOW_OVERLOCK,
    "overlock_t": SHALLOW_OVERLOCK,
    "overlock_s": SHALLOW_OVERLOCK,
    "overlock_b": SHALLOW_OVERLOCK,
    **SHALLOW_ROBUST,
    **{f"tap_{name}": options for name, options in SHALLOW_ROBUST.items()},
}
SMALLEST = [  # of each family: for what takes seconds
    "biformer_tiny",
    "biformer_stl_nchw",
    "overlock_xt",
    "fan_tiny_12_p16_224",
    "tap_fan_tiny_8_p4_hybrid",
    "tap_rvt_tiny_plus",
]
# Of FAN and RVT one of each kind; their other sizes and combinations take minutes together.
KINDS = [name for name in REDUCED if "fan" not in name and "rvt" not in name]
KINDS += [*SMALLEST[3:], "tap_fan_Xlarge_16_p4_hybrid", "rvt_small_plus", "tap_rvt_tiny"]
SCRIPT_WARNING = "ignore:.*torch.jit.*"

every_model = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in REDUCED],
)
smallest_models = pytest.mark.parametrize("name", SMALLEST)
registered_models = pytest.mark.parametrize(
    ("name", "options"),
    [(name, REDUCED[name]) for name in SMALLEST]
    + [pytest.param(name, {}, marks=pytest.mark.slow, id=f"{name}-whole") for name in KINDS],
)


def make(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**REDUCED[name], **options}).eval()


def test_every_registered_model_is_tested():
    ours = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith("saccade.")]
    assert sorted(REDUCED) == sorted(ours)


def strides(name):
    """Strides of the maps that ``features_only`` gives by default."""
    if "fan" in name:
        return [4, 8, 16, 32] if "Xlarge" in name else [4, 8, 16] if "hybrid" in name else [16, 16, 16]
    return [16, 16, 32] if "rvt_tiny" in name else [16, 16, 16] if "rvt" in name else [4, 8, 16, 32]


@every_model
def test_forward_and_gradient_checkpointing(name):
    model, x = make(name), randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(x)
    assert expected.shape == (1, 1000)
    assert expected.isfinite().all()
    model.set_grad_checkpointing()
    assert_close(model(x), expected, rtol=1e-4)
    model.set_grad_checkpointing(False)
    assert_close(model(x), expected, rtol=1e-4)


@every_model
def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=42).train()
    out = model(randn(2, 3, 96, 96))
    out.mean().backward()
    assert out.shape[-1] == 42
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@every_model
def test_head(name):
    model, x = make(name), randn(1, 3, 96, 96)
    grid = (96 // strides(name)[-1],) * 2
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in keys
    assert f"{cfg['first_conv']}.weight" in keys
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *grid)
        assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(7, "max")
        assert model(x).shape == (1, 7)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(x).shape == (1, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert model(x).shape == (1, model.head_hidden_size, *grid)
        assert make(name, num_classes=0)(x).shape == (1, model.head_hidden_size)
        assert make(name, num_classes=0, global_pool="")(x).shape == (1, model.head_hidden_size, *grid)


@smallest_models
def test_input_of_224_pixels_fills_the_pool_of_the_config(name):
    model = make(name)
    cfg = model.default_cfg
    assert (cfg["input_size"], cfg["num_classes"]) == ((3, 224, 224), 1000)
    assert cfg["pool_size"] == (224 // strides(name)[-1],) * 2
    assert not cfg["fixed_input_size"]
    with torch.no_grad():
        assert model.forward_features(randn(1, *cfg["input_size"])).shape[2:] == cfg["pool_size"]


@smallest_models
@pytest.mark.parametrize("size", [(64, 64), (64, 150), (97, 224), (255, 65)])
def test_any_size(name, size):
    with torch.no_grad():
        assert make(name)(randn(1, 3, *size)).isfinite().all()


@every_model
@pytest.mark.parametrize("feature_cls", ["default", "hook", "fx"])
def test_features_only(name, feature_cls):
    if feature_cls != "default" and name not in SMALLEST:
        return
    options = {} if feature_cls == "default" else {"feature_cls": feature_cls}
    model = make(name, features_only=True, **options)
    with torch.no_grad():
        maps = model(randn(1, 3, 96, 96))
    assert model.feature_info.reduction() == strides(name)
    assert [y.shape[1] for y in maps] == model.feature_info.channels()
    assert [tuple(y.shape[2:]) for y in maps] == [(96 // stride,) * 2 for stride in strides(name)]


@every_model
def test_forward_intermediates(name):
    model, x = make(name), randn(1, 3, 96, 64)
    n = len(model.feature_info)
    with torch.no_grad():
        expected = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        assert_close(final, expected)
        assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info]
        for indices, chosen in ((2, [n - 2, n - 1]), ([-n, 1], [0, 1]), ([n - 1], [n - 1])):
            got = model.forward_intermediates(x, indices, intermediates_only=True)
            assert all(torch.equal(y, maps[i]) for y, i in zip(got, chosen, strict=True))
        early, got = model.forward_intermediates(x, [0], stop_early=True)
        assert torch.equal(early, maps[0])
        assert torch.equal(got[0], maps[0])
        last = model.forward_intermediates(x, 1, output_fmt="NHWC", intermediates_only=True)[0]
        assert torch.equal(last.permute(0, 3, 1, 2), maps[-1])
        with pytest.raises((ValueError, AssertionError), match=r"output_fmt|NCHW"):
            model.forward_intermediates(x, output_fmt="NLC")


@smallest_models
@pytest.mark.parametrize("last", range(4))
def test_pruning_keeps_what_is_left(name, last):
    """Features then end at the last map left, and no parameter is left that they do not need."""
    model, x = make(name), randn(2, 3, 96, 64)
    if last == len(model.feature_info):
        return  # this model has fewer maps
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)[last]
        before = sum(p.numel() for p in model.parameters())
        assert model.prune_intermediate_layers([last], prune_norm=True) == [last]
        assert sum(p.numel() for p in model.parameters()) < before
        assert torch.equal(model.forward_intermediates(x, [last], intermediates_only=True)[0], expected)
        assert torch.equal(model.forward_features(x), expected)
        assert torch.equal(model(x), expected)
    model.train().forward_features(x).sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@smallest_models
@pytest.mark.parametrize("last", [1, -1])
def test_a_pruned_model_gets_a_classifier_of_its_last_map(name, last):
    model, x = make(name), randn(2, 3, 96, 64)
    last %= len(model.feature_info)
    width = model.feature_info[last]["num_chs"]
    model.prune_intermediate_layers([last], prune_norm=True)
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (width, width, 0)
    model.reset_classifier(0)
    assert model(x).shape[:2] == (2, width)
    model.reset_classifier(5, "avg")
    assert not [key for key, module in model.named_modules() if module.training]
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features == width
        assert model(x).shape == (2, model.num_classes) == (2, 5)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, "avg")
        assert model(x).shape == (2, model.head_hidden_size)


@smallest_models
def test_pruning_behind_the_last_map_keeps_the_logits(name):
    model, x = make(name), randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(x)
        model.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(model(x), expected)


@smallest_models
def test_device_and_dtype(name):
    model = make(name, device="meta", dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}
    assert not [key for key, module in model.named_modules() if module.training]
    assert model(torch.zeros(1, 3, 96, 64, device="meta", dtype=torch.float64)).shape == (1, 2)


@smallest_models
def test_resetting_a_frozen_model_leaves_it_frozen(name):
    model = make(name).requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    assert not [key for key, parameter in model.named_parameters() if parameter.requires_grad]


@every_model
def test_unknown_options_and_weights_that_are_not_there_are_refused(name):
    with pytest.raises(TypeError, match="not_a_model_arg"):
        make(name, not_a_model_arg=1)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        make(name, pretrained=True)


@pytest.mark.slow
@smallest_models
def test_compiled_gradient_checkpointing(name):
    """One graph; statistics of batch norms are updated once."""
    torch._dynamo.reset()
    model, x = make(name).train(), randn(2, 3, 64, 64)
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    twin(x).square().mean().backward()
    for (key, got), (_, expected) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert_close(got.float(), expected.float(), msg=key)
    for (key, got), (_, expected) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert_close(got.grad, expected.grad, rtol=0, atol=1e-4 * float(expected.grad.abs().max()) + 1e-7, msg=key)


@registered_models
@pytest.mark.filterwarnings(SCRIPT_WARNING)
def test_torchscript(name, options):
    with timm.layers.set_scriptable(True):
        model = timm.create_model(name, **options).eval()
    x = randn(1, 3, 128, 128)
    with torch.no_grad():
        assert_close(torch.jit.script(model)(x), model(x))


def traced(model):
    """Trace a model as timm's tests do, for training and evaluation."""
    kept = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    train, evaluate = get_graph_node_names(model, tracer_kwargs=kept)
    return create_feature_extractor(
        model, train_return_nodes=[train[-1]], eval_return_nodes=[evaluate[-1]], tracer_kwargs=kept
    )


@registered_models
@pytest.mark.filterwarnings(SCRIPT_WARNING)
def test_fx(name, options):
    model, x = timm.create_model(name, num_classes=42, **options).eval(), randn(2, 3, 128, 128)
    graph = traced(model)
    with torch.no_grad():
        (out,) = graph(x).values()
        assert torch.equal(out, model(x))
        (scripted,) = torch.jit.script(graph)(x).values()
        assert_close(scripted, out)
    graph.train()
    (out,) = graph(x).values()
    out.mean().backward()
    assert not [key for key, parameter in graph.named_parameters() if parameter.grad is None]


@smallest_models
def test_weights_from_a_file(name, tmp_path):
    """timm adapts the first convolution and leaves the classifier out, by the names in the config."""
    source = make(name)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict()}, path)
    model = make(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, in_chans=1, num_classes=5)
    first = model.get_submodule(model.default_cfg["first_conv"]).weight
    expected = source.get_submodule(model.default_cfg["first_conv"]).weight.sum(1, keepdim=True)
    assert_close(first, expected)
    with torch.no_grad():
        assert model(randn(1, 1, 64, 64)).shape == (1, 5)
    whole = make(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    with torch.no_grad():
        assert torch.equal(whole(randn(1, 3, 64, 64)), source(randn(1, 3, 64, 64)))


@every_model
def test_groups_for_layer_decay(name):
    model = make(name)
    for coarse in (False, True):
        layers = list(group_parameters(model, model.group_matcher(coarse=coarse)).values())
        assert len(layers) > 4
    depth = {key: i for i, keys in enumerate(layers) for key in keys}
    first, last = model.default_cfg["first_conv"], model.default_cfg["classifier"]
    assert depth[f"{first}.weight"] == 0
    assert depth[f"{last}.weight"] == len(layers) - 1
    tail = layers[-1]
    assert all(key.startswith(("head", "norm")) for key in tail), tail
    modules = [info["module"] for info in model.feature_info]
    order = [max(depth[key] for key in depth if key.startswith(f"{module}.")) for module in modules]
    assert order == sorted(order)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 4


@every_model
def test_weight_decay_spares_what_does_not_multiply_channels(name):
    model = make(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    weights = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}
    assert decayed == weights


@smallest_models
def test_drop_rates(name):
    model, x = make(name, drop_path_rate=0.9, drop_rate=0.5), randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        model.train()
        assert not torch.equal(model.forward_head(features), model.forward_head(features))
        assert not torch.equal(model.forward_features(x), model.forward_features(x))
    assert pooled.shape == (4, model.head_hidden_size)
