import pytest
import timm
import torch

from saccade.errors import ConfigError
from saccade.vision_backbones.class_activation import FeatureLayout, class_map, eigen_map, reads_positions_alike
from tests.helpers import assert_close, randn


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def features_of(model, side, batch=1):
    features = model.forward_features(randn(batch, 3, side, side))
    return features, FeatureLayout.of(features, model, (side, side))


def test_mean_of_an_exact_class_map_is_the_logit():
    model = build("test_resnet")
    features, layout = features_of(model, 96, batch=2)
    logits = model.forward_head(features)
    classes = torch.tensor([3, 7])
    maps = class_map(model, layout, features, classes)
    assert maps.shape == (2, 3, 3)
    assert_close(maps.mean((1, 2)), logits[[0, 1], classes])
    by_hand = torch.einsum("c,cyx->yx", model.fc.weight[7], features[1]) + model.fc.bias[7]
    assert_close(maps[1], by_hand)


@pytest.mark.parametrize(
    ("name", "options", "alike"),
    [
        ("test_resnet", {}, True),
        ("test_convnext", {}, True),  # norm after pooling
        ("test_mambaout", {}, True),  # channels last
        ("mobilenetv3_small_050", {}, True),  # convolution and activation after pooling
        ("test_vit", {"global_pool": "avg", "img_size": 96}, True),  # class token present, not read
        ("test_vit", {"img_size": 96}, False),  # class token
        ("resnet50_clip", {"num_classes": 8}, False),  # attention pooling with position embedding
    ],
)
def test_which_heads_can_judge_positions_on_their_own(name, options, alike):
    model = build(name, **options)
    features, layout = features_of(model, 224 if name == "resnet50_clip" else 96)
    assert reads_positions_alike(model, layout, features) is alike


def test_a_position_is_judged_as_an_image_full_of_it_would_be():
    model = build("test_convnext")
    features, layout = features_of(model, 96)
    maps = class_map(model, layout, features, torch.tensor([5]))
    full = features[:, :, 1:2, 2:3].expand_as(features)
    assert_close(maps[0, 1, 2], model.forward_head(full)[0, 5])


@pytest.mark.parametrize("axes", ["NCHW", "NHWC", "NLC"])
def test_positions_and_back(axes):
    layout = FeatureLayout(axes, (2, 3), 1 if axes == "NLC" else 0)
    features = {"NCHW": randn(2, 4, 2, 3), "NHWC": randn(2, 2, 3, 4), "NLC": randn(2, 7, 4)}[axes]
    positions = layout.positions(features)
    assert positions.shape == (2, 6, 4)
    back = layout.arrange(positions, (2, 3))
    assert torch.equal(back[:, layout.prefix :], features[:, layout.prefix :])


def test_features_without_positions():
    model = build("test_resnet")
    for features, told in ((randn(1, 8), r"\(1, 8\)"), (randn(1, 8, 1, 1), r"1, 1"), ({"a": 1}, "dict")):
        with pytest.raises(ConfigError, match=told):
            FeatureLayout.of(features, model, (96, 96))


def test_first_component_finds_what_is_planted():
    layout = FeatureLayout("NCHW", (4, 5))
    planted = torch.zeros(2, 4, 5)
    planted[0, 1, 2], planted[1, 3, 0] = 3.0, 2.0
    direction = randn(6)
    features = torch.einsum("byx,c->bcyx", planted, direction) + 0.01 * randn(2, 6, 4, 5)
    maps = eigen_map(layout, features)
    assert maps[0].argmax() == 1 * 5 + 2
    assert maps[1].argmax() == 3 * 5
    assert_close(maps, planted * direction.norm(), atol=0.05)
    assert_close(eigen_map(layout, -features), maps)
