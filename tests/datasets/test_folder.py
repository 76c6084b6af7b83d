import logging
from collections import Counter

import pytest

from saccade.datasets import ImageFolderData
from saccade.errors import ConfigError, DataError
from tests.class_folders import COLOURS, write_folder, write_picture


def ids(data, split):
    return [sample.id for sample in data.samples(split)]


def test_split_folders(tmp_path):
    data = ImageFolderData(str(write_folder(tmp_path, {"train": 4, "val": 2, "test": 3})))
    assert data.class_names == ["blue", "green", "red"]
    assert [len(data.samples(split)) for split in ("train", "val", "test", "predict")] == [12, 6, 9, 27]
    assert ids(data, "val")[:2] == ["val/blue/000.png", "val/blue/001.png"]
    assert [sample.target for sample in data.samples("val")] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("names", [("validation", "t10k"), ("val", "test")])
def test_other_names_of_the_splits(tmp_path, names):
    data = ImageFolderData(str(write_folder(tmp_path, {"train": 2, names[0]: 1, names[1]: 2})))
    assert ids(data, "val") == [f"{names[0]}/{label}/000.png" for label in COLOURS]
    assert len(ids(data, "test")) == 6


def test_without_test_images_validation_images_are_tested(tmp_path):
    data = ImageFolderData(str(write_folder(tmp_path, {"train": 4, "val": 2})))
    assert ids(data, "test") == ids(data, "val")


@pytest.mark.parametrize("split", ["", "train"])
def test_held_out_part_is_stratified_disjoint_and_repeatable(tmp_path, split):
    root = str(write_folder(tmp_path, {split: 10}))
    data = ImageFolderData(root, val_fraction=0.3)
    train, val = ids(data, "train"), ids(data, "val")
    assert not set(train) & set(val)
    assert len(train) + len(val) == 30
    assert Counter(sample.target for sample in data.samples("val")) == {0: 3, 1: 3, 2: 3}
    assert ids(ImageFolderData(root, val_fraction=0.3), "val") == val
    assert ids(ImageFolderData(root, val_fraction=0.3, split_seed=1), "val") != val


def test_whole_folder_can_be_held_out(tmp_path):
    data = ImageFolderData(str(write_folder(tmp_path, {"": 3})), val_fraction=1.0)
    assert len(data.samples("test")) == 9
    with pytest.raises(ConfigError, match="no images for train"):
        data.samples("train")


def test_equal_names_and_sub_folders_keep_apart(tmp_path):
    for place in ("a/x.png", "a/deep/x.png", "b/x.png"):
        write_picture(tmp_path / place, (1, 2, 3), 0)
    data = ImageFolderData(str(tmp_path), val_fraction=1.0)
    assert [(sample.id, sample.target) for sample in data.samples("val")] == [
        ("a/deep/x.png", 0),
        ("a/x.png", 0),
        ("b/x.png", 1),
    ]
    assert ids(data, "predict") == ["a/deep/x.png", "a/x.png", "b/x.png"]


def test_given_classes_keep_their_index(tmp_path):
    root = write_folder(tmp_path, {"test": 1}, classes=("green", "red"))
    data = ImageFolderData(str(root), class_names=["blue", "green", "red"])
    assert [sample.target for sample in data.samples("test")] == [1, 2]


def test_unknown_class_folder_is_named_with_a_suggestion(tmp_path):
    root = write_folder(tmp_path, {"test": 1}, classes=("red",))
    data = ImageFolderData(str(root), class_names=["blue", "rde"])
    with pytest.raises(ConfigError, match=r"test/red' is no known class. Did you mean 'rde'"):
        data.samples("test")


@pytest.mark.parametrize(
    ("root", "message"),
    [(None, "Pass --data.root FOLDER"), ("nowhere", "'nowhere' does not exist"), (".", "has no class folders")],
)
def test_unusable_root(tmp_path, monkeypatch, root, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        _ = ImageFolderData(root).num_classes


def test_image_outside_the_class_folders_is_refused(tmp_path):
    write_folder(tmp_path, {"": 2})
    write_picture(tmp_path / "stray.png", (1, 2, 3), 0)
    with pytest.raises(ConfigError, match=r"stray\.png' lies in no class folder"):
        ImageFolderData(str(tmp_path)).samples("train")


def test_missing_split_is_named(tmp_path):
    data = ImageFolderData(str(write_folder(tmp_path, {"test": 1})))
    with pytest.raises(ConfigError, match="no train split"):
        data.samples("train")


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_val_fraction_is_checked(fraction):
    with pytest.raises(ConfigError, match="val_fraction must be in"):
        ImageFolderData("x", val_fraction=fraction)


@pytest.fixture
def damaged(tmp_path):
    root = write_folder(tmp_path, {"train": 3, "val": 2})
    (root / "train" / "green" / "001.png").write_bytes(b"\x89PNG but not really")
    return root


def test_unreadable_image_stops_training_and_is_named(damaged):
    data = ImageFolderData(str(damaged), img_size=16, num_workers=0, batch_size=9)
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(DataError, match=r"'train/green/001.png' cannot be used.*--data.skip_unreadable true"):
        data.on_before_batch_transfer(batch, 0)


def test_unreadable_image_can_be_left_out(damaged, caplog):
    data = ImageFolderData(str(damaged), img_size=16, num_workers=0, skip_unreadable=True)
    with caplog.at_level(logging.WARNING):
        assert len(data.samples("train")) == 8
    assert "train/green/001.png is left out" in caplog.text
    assert data.class_counts == [3, 2, 3]


def test_unreadable_image_is_reported_in_predictions(damaged):
    data = ImageFolderData(str(damaged), img_size=16, num_workers=0, batch_size=99)
    batch = next(iter(data.predict_dataloader()))
    failed = [index for index, error in enumerate(batch["error"]) if error]
    assert [batch["id"][index] for index in failed] == ["train/green/001.png"]
    assert batch["reason"][failed[0]] == "unreadable_image"
    assert not batch["image"][failed[0]].any()
