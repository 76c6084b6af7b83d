import json

import h5py
import numpy as np
import pytest
import timm
import torch

from saccade.batch import BatchOptions
from saccade.datasets.images import read_image
from saccade.errors import ConfigError, MissingResourceError
from saccade.vision_backbones.features import feature_function
from saccade.vision_backbones.inference import Forward, classify, embed
from saccade.vision_backbones.loading import ModelSource, load_model
from tests.pictures import BROKEN, GOOD, write_pictures

RESNET = ModelSource("test_resnet", random_weights=True, img_size=64)
VIT = ModelSource("test_vit", random_weights=True)
QUIET = BatchOptions(num_workers=0, batch_size=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("inference") / "pictures")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_logits(source, path):
    """What a timm user would compute for this one file, with timm's own float transform."""
    loaded = load_model(source)
    transform = timm.data.create_transform(**loaded.data_config)
    with torch.inference_mode():
        return loaded.model(transform(read_image(path))[None])[0]


def test_every_row_is_right_and_failed_rows_say_why(pictures, tmp_path):
    summary = classify(pictures, model=RESNET, out=tmp_path / "p.jsonl", logits=tmp_path / "l.h5", options=QUIET)
    assert (summary.done, summary.failed, summary.exit_code) == (len(GOOD), len(BROKEN), 3)
    table = {row["path"]: row for row in rows(tmp_path / "p.jsonl")}
    assert set(table) == {*GOOD, *BROKEN}
    with h5py.File(tmp_path / "l.h5") as file:
        logits = dict(zip((name.decode() for name in file["paths"][:]), file["logits"][:], strict=True))
    assert set(logits) == set(GOOD)
    for name in GOOD:
        expected = expected_logits(RESNET, pictures / name)
        assert table[name]["status"] == "done"
        np.testing.assert_allclose(logits[name], expected, rtol=1e-4, atol=1e-4)
        probabilities, indices = expected.softmax(0).topk(5)
        assert [table[name][f"index_{rank}"] for rank in range(1, 6)] == indices.tolist()
        got = [table[name][f"prob_{rank}"] for rank in range(1, 6)]
        np.testing.assert_allclose(got, probabilities, atol=2e-6)
    for name in BROKEN:
        assert table[name]["status"] == "failed"
        assert table[name]["error"]
        assert table[name]["prob_1"] is None


def test_results_do_not_depend_on_batches_workers_or_neighbours(pictures, tmp_path):
    whole = tmp_path / "whole.csv"
    classify(pictures, model=RESNET, out=whole, options=QUIET)
    classify(pictures, model=RESNET, out=tmp_path / "w.csv", options=BatchOptions(num_workers=2, batch_size=4))
    assert (tmp_path / "w.csv").read_bytes() == whole.read_bytes()
    for size in (1, 7):
        out = tmp_path / f"b{size}.h5"
        embed(pictures, model=RESNET, out=out, options=BatchOptions(num_workers=0, batch_size=size))
    with h5py.File(tmp_path / "b1.h5") as one, h5py.File(tmp_path / "b7.h5") as seven:
        np.testing.assert_allclose(one["features"][:], seven["features"][:], rtol=1e-4, atol=1e-5)


def test_a_batch_of_failures_alone(pictures, tmp_path):
    summary = classify(pictures / "broken", model=RESNET, out=tmp_path / "p.csv", options=QUIET)
    assert summary.exit_code == 1


def test_topk_larger_than_the_number_of_classes(pictures, tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), weights)
    source = ModelSource("test_resnet", weights=weights)
    classify(pictures / "photo.jpg", model=source, out=tmp_path / "p.jsonl", topk=9, options=QUIET)
    row = rows(tmp_path / "p.jsonl")[0]
    assert sum(row[f"prob_{rank}"] for rank in (1, 2, 3)) == pytest.approx(1, abs=2e-6)
    assert "prob_4" not in row


def test_embed_gives_what_the_classifier_sees(pictures, tmp_path):
    embed(pictures / "photo.jpg", model=VIT, out=tmp_path / "f.h5", options=QUIET)
    loaded = load_model(VIT)
    image = timm.data.create_transform(**loaded.data_config)(read_image(pictures / "photo.jpg"))[None]
    with torch.inference_mode():
        expected = loaded.model.forward_head(loaded.model.forward_features(image), pre_logits=True)
    with h5py.File(tmp_path / "f.h5") as file:
        np.testing.assert_allclose(file["features"][:], expected, rtol=1e-4, atol=1e-5)
        assert json.loads(file.attrs["preprocess"])["input_size"] == [3, 160, 160]
        assert {"saccade_version", "model", "dtype"} <= set(file.attrs)


@pytest.mark.parametrize(
    ("name", "layer", "pool", "shape"),
    [
        ("test_vit", None, None, (64,)),
        ("test_vit", None, "avg", (64,)),
        ("test_vit", None, "token", (64,)),
        ("test_vit", None, "none", (101, 64)),
        ("test_vit", "blocks.1", "token", (64,)),
        ("test_vit", "blocks.1.mlp.fc1", "avg", (192,)),
        ("test_resnet", "layer3", "avg", (192,)),
        ("test_resnet", None, "none", (96, 5, 5)),
    ],
)
def test_layers_and_pools(name, layer, pool, shape):
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = feature_function(model, layer=layer, pool=pool)(images)
        alone = feature_function(model, layer=layer, pool=pool)(images[1:])
    assert features.shape == (2, *shape)
    torch.testing.assert_close(features[1:], alone, rtol=1e-4, atol=1e-5)


def test_average_leaves_the_class_token_out():
    model = timm.create_model("test_vit").eval()
    images = torch.zeros(1, 3, 160, 160)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        torch.testing.assert_close(feature_function(model, layer=None, pool="avg")(images), tokens[:, 1:].mean(1))


def test_channels_last_maps_are_pooled_over_space():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1), embed_dim=16
    ).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert feature_function(model, layer=None, pool="avg")(images).shape == (1, model.num_features)


@pytest.mark.parametrize(
    ("name", "layer", "pool", "message"),
    [
        ("test_vit", "block.1", None, "Did you mean 'blocks.1'"),
        ("test_resnet", None, "token", "no class token"),
        ("test_vit", None, "max", "pool must be"),
    ],
)
def test_wrong_layers_and_pools(pictures, tmp_path, name, layer, pool, message):
    source = ModelSource(name, random_weights=True)
    with pytest.raises(ConfigError, match=message):
        embed(pictures / "photo.jpg", model=source, out=tmp_path / "f.h5", layer=layer, pool=pool, options=QUIET)


def test_a_model_without_weights_is_refused(pictures, tmp_path):
    with pytest.raises(ConfigError, match="random weights"):
        classify(pictures, model="test_resnet", out=tmp_path / "p.csv", options=QUIET)


def test_inputs_are_checked_before_the_model(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        classify(tmp_path / "nowhere", model="no such model", out=tmp_path / "p.csv", options=QUIET)


def test_an_absent_device_is_no_silent_fallback(pictures, tmp_path):
    absent = BatchOptions(device=f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(MissingResourceError, match="not on this machine"):
        classify(pictures, model=RESNET, out=tmp_path / "p.csv", options=absent)


def test_bf16_is_close_to_fp32(pictures, tmp_path):
    for precision in ("fp32", "bf16"):
        options = BatchOptions(num_workers=0, precision=precision)
        embed(pictures / "photo.jpg", model=VIT, out=tmp_path / f"{precision}.h5", options=options)
    with h5py.File(tmp_path / "fp32.h5") as full, h5py.File(tmp_path / "bf16.h5") as half:
        difference = np.abs(full["features"][:] - half["features"][:]).max()
        assert 0 < difference < 0.1 * np.abs(full["features"][:]).max()


def test_out_of_memory_halves_the_batch_and_says_so_once():
    seen, said = [], []

    def hungry(images):
        seen.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return images * 2

    forward = Forward(hungry, torch.device("cpu"), torch.float32)
    forward.say = said.append
    images = torch.arange(9.0).view(9, 1)
    for _ in range(2):
        assert torch.equal(forward(images), images * 2)
    assert seen == [9, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1]
    assert said == [
        "out of memory with 9 images at a time; going on with 4",
        "out of memory with 4 images at a time; going on with 2",
    ]
