import json

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from saccade.batch import BatchOptions, merge_shards
from saccade.batch.items import Item
from saccade.datasets.images import read_image
from saccade.errors import ConfigError
from saccade.vision_backbones import ModelSource, attend, classify
from saccade.vision_backbones.attention_overlays import class_index, overlay_names
from saccade.vision_backbones.loading import LoadedModel, load_model
from saccade.vision_backbones.map_methods import choose_method
from saccade.vision_backbones.overlock import VARIANTS
from tests.pictures import BROKEN, GOOD, write_pictures

VIT = ModelSource("test_vit", random_weights=True, img_size=64)
RESNET = ModelSource("test_resnet", random_weights=True, img_size=64)
QUIET = BatchOptions(num_workers=0, batch_size=4)
PICTURES = sorted(name.rsplit(".", 1)[0] + ".png" for name in GOOD)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("attend") / "pictures")


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A complete run, with maps."""
    folder = tmp_path_factory.mktemp("finished")
    summary = attend(pictures, model=VIT, out=folder / "overlays", maps=folder / "maps.h5", options=QUIET)
    assert (summary.done, summary.failed, summary.exit_code) == (len(GOOD), len(BROKEN), 3)
    return folder


def entries(folder):
    return {entry["id"]: entry for entry in map(json.loads, (folder / "items.jsonl").read_text().splitlines())}


def drawn(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def maps_of(path):
    with h5py.File(path) as file:
        return dict(zip((name.decode() for name in file["paths"][:]), file["maps"][:], strict=True))


def test_the_public_name_stays_a_function():
    import saccade.vision_backbones as package

    assert callable(package.attend)
    assert package.attend is attend


def test_one_picture_per_readable_image(pictures, finished, tmp_path):
    overlays = finished / "overlays"
    assert sorted(drawn(overlays)) == PICTURES
    rows = entries(overlays)
    for name, reason in BROKEN.items():
        assert (rows[name]["status"], rows[name]["reason"]) == ("failed", reason)
    classify(pictures, model=VIT, out=tmp_path / "p.jsonl", topk=1, options=QUIET)
    table = {row["path"]: row for row in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())}
    for name in GOOD:
        row = rows[name]["row"]
        assert (row["method"], row["layer"]) == ("rollout", "6 layers")
        assert row["index"] == table[name]["index_1"]
        assert row["prob"] == pytest.approx(table[name]["prob_1"], abs=2e-6)
        with Image.open(overlays / row["overlay"]) as picture:
            assert picture.text["method"] == "rollout"
            assert picture.text["model"] == "test_vit"
            assert int(picture.text["index"]) == row["index"]
            assert picture.width >= 288


def test_maps_are_those_of_the_model_and_do_not_depend_on_batches(pictures, finished, tmp_path):
    maps = maps_of(finished / "maps.h5")
    assert set(maps) == set(GOOD)
    loaded = load_model(VIT)
    chosen = choose_method(loaded.model, input_size=(3, 64, 64))
    transform = timm.data.create_transform(**loaded.data_config)
    for name in ("a/same.png", "rotated.jpg"):
        with torch.inference_mode():
            expected = chosen.run(transform(read_image(pictures / name))[None])[1][0]
        np.testing.assert_allclose(maps[name], expected, rtol=1e-4, atol=1e-6)
    one = BatchOptions(num_workers=0, batch_size=1)
    attend(pictures, model=VIT, out=tmp_path / "o", maps=tmp_path / "maps.h5", options=one)
    for name, values in maps_of(tmp_path / "maps.h5").items():
        np.testing.assert_allclose(values, maps[name], rtol=1e-4, atol=1e-6)
    with h5py.File(finished / "maps.h5") as file:
        assert file["maps"].dtype == np.float32
        assert file.attrs["method"] == "rollout"


def test_a_picture_that_has_gone_is_drawn_again(pictures, finished, tmp_path):
    out = tmp_path / "overlays"
    first = attend(pictures, model=VIT, out=out, maps=tmp_path / "maps.h5", options=QUIET)
    whole = drawn(out)
    assert whole == drawn(finished / "overlays")
    (out / "b/same.png").unlink()
    times = {name: (out / name).stat().st_mtime_ns for name in drawn(out)}
    again = attend(pictures, model=VIT, out=out, maps=tmp_path / "maps.h5", options=QUIET)
    assert (first.resumed, again.resumed, again.done) == (0, len(GOOD) - 1, len(GOOD))
    assert drawn(out) == whole
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}
    assert maps_of(tmp_path / "maps.h5").keys() == maps_of(finished / "maps.h5").keys()


def test_shards_united(pictures, finished, tmp_path):
    for index in (1, 2):
        shard = BatchOptions(num_workers=0, batch_size=4, shard=f"{index}/2")
        attend(pictures, model=VIT, out=tmp_path / "o", maps=tmp_path / "maps.h5", options=shard)
    merged = merge_shards(f"{tmp_path}/o/")
    assert (merged.done, merged.failed) == (len(GOOD), len(BROKEN))
    assert drawn(tmp_path / "o") == drawn(finished / "overlays")
    assert {k: v["row"] for k, v in entries(tmp_path / "o").items() if "row" in v} == {
        k: v["row"] for k, v in entries(finished / "overlays").items() if "row" in v
    }


def test_class_activation_of_a_class(pictures, tmp_path):
    attend(pictures / "a", model=RESNET, out=tmp_path / "o", class_name="7", maps=tmp_path / "m.npy", options=QUIET)
    row = entries(tmp_path / "o")["same.png"]["row"]
    assert (row["method"], row["mapped_index"], row["mapped_label"]) == ("cam", 7, "class 7")
    loaded = load_model(RESNET)
    images = timm.data.create_transform(**loaded.data_config)(read_image(pictures / "a/same.png"))[None]
    with torch.inference_mode():
        assert np.load(tmp_path / "m.npy").mean() == pytest.approx(loaded.model(images)[0, 7].item(), abs=1e-4)


def test_other_settings_are_refused(pictures, finished):
    before = drawn(finished / "overlays")
    with pytest.raises(ConfigError, match=r"alpha: 0\.5 -> 0\.9"):
        attend(pictures, model=VIT, out=finished / "overlays", maps=finished / "maps.h5", alpha=0.9, options=QUIET)
    with pytest.raises(ConfigError, match="method: 'rollout' -> 'last-layer'"):
        attend(pictures, model=VIT, out=finished / "overlays", method="last-layer", options=QUIET)
    assert drawn(finished / "overlays") == before


def test_output_among_the_inputs(pictures, tmp_path):
    with pytest.raises(ConfigError, match="holds the inputs"):
        attend(pictures, model=RESNET, out=pictures, options=QUIET)
    with pytest.raises(ConfigError, match="holds the inputs"):
        attend([pictures / "a", pictures / "b"], model=RESNET, out=pictures, options=QUIET)
    with pytest.raises(ConfigError, match="is an input and would be replaced"):
        attend(pictures / "a/same.png", model=RESNET, out=pictures / "a", options=QUIET)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (70, 70)).save(folder / "x.jpg")
    for _ in range(2):
        assert attend(folder, model=RESNET, out=folder / "overlays", options=QUIET).total == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.png").write_text("mine")
    with pytest.raises(ConfigError, match=r"no run\.json says that saccade wrote it"):
        attend(folder / "x.jpg", model=RESNET, out=tmp_path / "other", options=QUIET)
    assert (tmp_path / "other/x.png").read_text() == "mine"
    with pytest.raises(ConfigError, match="out must be a folder"):
        attend(folder, model=RESNET, out=tmp_path / "overlay.png", options=QUIET)
    with pytest.raises(ConfigError, match=r"alpha must be between 0 and 1, got 1\.5"):
        attend(folder, model=RESNET, out=tmp_path / "o", alpha=1.5, options=QUIET)


def named(*ids):
    return list(overlay_names([Item(name, name) for name in ids]).values())


def test_names_of_pictures(tmp_path, monkeypatch):
    assert named("a/x.jpg", "b/x.jpg", "y.tar.jpeg") == ["a/x.png", "b/x.png", "y.tar.png"]
    assert named("a/x.jpg", "a/x.png", "b/x.jpg") == ["a/x.jpg.png", "a/x.png.png", "b/x.png"]
    assert named("/data/photos/a/x.jpg", "/data/photos/y.jpg") == ["a/x.png", "y.png"]
    assert named("/data/photos/x.jpg") == ["x.png"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert named("../photos/x.jpg", "z.jpg") == ["photos/x.png", "here/z.png"]
    with pytest.raises(ConfigError, match=r"x.gif and x.gif.png would both be drawn as x.gif.png"):
        named("x.gif", "x.gif.png", "x.jpg")


def test_classes_by_name_and_index():
    loaded = LoadedModel(timm.create_model("test_resnet", num_classes=3), "m", "random", {}, ["daisy", "rose", "2"])
    assert [class_index(loaded, name) for name in ("rose", 1, "1", "2")] == [1, 1, 1, 2]
    with pytest.raises(ConfigError, match=r"no class 'roses' among its 3\. Did you mean 'rose'"):
        class_index(loaded, "roses")
    for name in (3, "3", -1):
        with pytest.raises(ConfigError, match="no class"):
            class_index(loaded, name)


def test_a_map_that_is_not_finite_fails(pictures, tmp_path):
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    state["fc.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    source = ModelSource("test_resnet", weights=tmp_path / "w.pth", img_size=64)
    summary = attend(pictures / "a", model=source, out=tmp_path / "o", class_name=0, options=QUIET)
    assert summary.exit_code == 1
    assert entries(tmp_path / "o")["same.png"]["reason"] == "not_finite"
    assert drawn(tmp_path / "o") == {}


MIXER = {
    "depth": (1, 1, 1, 1),
    "sub_depth": (1, 1),
    "embed_dim": (16, 24, 32, 48),
    "sub_num_heads": (2, 3),
    "projection": 16,
}


@pytest.fixture
def small_overlock(monkeypatch):
    """overlock_xt with few blocks, random weights and an input of 64 pixels that keeps all of a photograph's height."""
    monkeypatch.setitem(VARIANTS, "overlock_xt", MIXER)
    return ModelSource("overlock_xt", random_weights=True, img_size=64, crop_pct=1.0)


def test_kernels_at_a_place_of_each_photograph(pictures, small_overlock, tmp_path):
    inputs = [pictures / name for name in ("photo.jpg", "rotated.jpg", "a/same.png")]
    settings = {"model": small_overlock, "method": "kernels", "options": QUIET}
    summary = attend(inputs, out=tmp_path / "o", at=(150, 20), maps=tmp_path / "m.h5", **settings)
    assert (summary.done, summary.failed) == (3, 0)
    maps = maps_of(tmp_path / "m.h5")
    for values in maps.values():
        assert values.shape == (2, 7, 7)  # small and large kernel on the map that was enlarged for 7 x 7 taps
        np.testing.assert_allclose(values.sum((1, 2)), 1, atol=1e-5)
        assert [int((kernel > 0).sum()) for kernel in values] == [25, 49]
    row = next(iter(entries(tmp_path / "o").values()))["row"]
    assert (row["method"], row["layer"], row["query"]) == ("kernels", "sub_blocks4.0", [3, 0])
    with Image.open(tmp_path / "o" / row["overlay"]) as picture:
        assert picture.width > 2 * 288
        assert picture.text["query"] == "[3, 0]"
    with pytest.raises(ConfigError, match=r"at: \[150, 20\] -> \[150, 21\]"):
        attend(inputs, out=tmp_path / "o", at=(150, 21), maps=tmp_path / "m.h5", **settings)


def test_an_image_without_the_place_fails_and_the_others_are_drawn(pictures, small_overlock, tmp_path):
    inputs = [pictures / "photo.jpg", pictures / "b/same.png"]  # 300 x 200 and 200 x 240
    summary = attend(inputs, model=small_overlock, method="kernels", at=(100, 205), out=tmp_path / "o", options=QUIET)
    assert (summary.done, summary.failed, summary.exit_code) == (1, 1, 3)
    failed = [entry for entry in entries(tmp_path / "o").values() if entry["status"] == "failed"]
    assert failed[0]["reason"] == "place_outside"
    assert "has 300 x 200 pixels and none at (100, 205)" in failed[0]["error"]
    with pytest.raises(ConfigError, match="is for the methods routes and kernels; got method 'auto'"):
        attend(inputs, model=small_overlock, at=(1, 2), out=tmp_path / "p", options=QUIET)
