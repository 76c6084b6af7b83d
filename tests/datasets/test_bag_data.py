"""Bags with labels: what fits together is found, what does not is named."""

import numpy as np
import pytest
import torch

from saccade.datasets import Bag, BagData, save_bag
from saccade.datasets.bag_data import read_labels
from saccade.datasets.bag_splits import make_folds, read_split, write_folds
from saccade.errors import ConfigError, DataError
from tests.bag_folders import write_bags


@pytest.fixture
def folder(tmp_path):
    write_bags(tmp_path)
    return tmp_path


def data(folder, **options):
    return BagData(str(folder / "bags"), str(folder / "labels.csv"), **options)


def test_batches(folder):
    module = data(folder, batch_size=3)
    assert (module.class_names, module.num_classes, module.feature_dim) == (["normal", "tumour"], 2, 8)
    batch = next(iter(module.train_dataloader()))
    assert batch["bags"].shape[0] == 3
    for row, key in enumerate(batch["id"]):
        count = int(batch["mask"][row].sum())
        features, coords = module.read(key)
        assert torch.equal(batch["bags"][row, :count], features)
        assert not batch["bags"][row, count:].any()
        assert np.array_equal(batch["coords"][row], coords)
    assert sum(module.class_counts) == len(module.part("train"))
    ids = [key for batch in module.test_dataloader() for key in batch["id"]]
    assert ids == [slide.id for slide in module.part("test")]


def test_patients_never_cross(folder):
    module = data(folder)
    parts = {}
    for slide in module.slides:
        parts.setdefault(slide.patient, set()).add(module.parts[slide.id])
    assert all(len(found) == 1 for found in parts.values())
    assert set(module.parts.values()) == {"train", "val", "test"}


def test_instances_are_drawn_anew_but_repeatably(folder):
    def epochs():
        module = data(folder, max_instances=3, batch_size=30)
        torch.manual_seed(0)
        loader = module.train_dataloader()
        draws = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batch = next(iter(loader))
            draws.append({key: batch["bags"][row].sum().item() for row, key in enumerate(batch["id"])})
        return draws

    first, again = epochs(), epochs()
    assert first == again
    assert first[0] != first[1]


def test_standardisation_is_of_the_training_tiles(folder):
    module = data(folder, standardize=True)
    tiles = torch.cat([module.read(slide.id)[0] for slide in module.part("train")])
    np.testing.assert_allclose(module.data_config["mean"], tiles.mean(0), atol=1e-5)
    np.testing.assert_allclose(module.data_config["std"], tiles.std(0, unbiased=False), atol=1e-5)


@pytest.mark.parametrize("task", ["regression", "survival"])
def test_other_tasks(folder, task):
    module = data(folder, task=task, label_column="value")
    batch = next(iter(module.val_dataloader()))
    assert batch["target"].shape == ((1,) if task == "regression" else (1, 2))
    assert module.data_config["task"] == task
    if task == "survival":
        assert module.num_classes == len(module.data_config["time_edges"]) + 1


def test_prediction_needs_no_labels(folder):
    module = BagData(str(folder / "bags"))
    assert len(module.part("predict")) == 24


def test_folds():
    ids = [f"s{i}" for i in range(40)]
    groups, labels = [f"p{i // 2}" for i in range(40)], ["ab"[i % 4 < 2] for i in range(40)]
    folds = make_folds(ids, folds=5, groups=groups, labels=labels, seed=1)
    tested = [key for fold in folds for key, name in fold.items() if name == "test"]
    assert sorted(tested) == sorted(ids)
    for fold in folds:
        names = [{fold[f"s{i}"], fold[f"s{i + 1}"]} for i in range(0, 40, 2)]
        assert all(len(found) == 1 for found in names)
        assert set(fold.values()) == {"train", "val", "test"}
        assert [labels[i] for i in range(40) if fold[f"s{i}"] == "test"].count("a") == 4
    assert folds == make_folds(ids, folds=5, groups=groups, labels=labels, seed=1)
    with pytest.raises(ConfigError, match="2 patients cannot be divided into 5 folds"):
        make_folds(["a", "b"], folds=5)
    with pytest.raises(ConfigError, match="Class 'x' has fewer patients"):
        make_folds(ids, folds=5, labels=["x", *["y"] * 39])


def test_split_files(tmp_path):
    fold = {"a": "train", "b": "val", "c": "test"}
    (path,) = write_folds(tmp_path, [fold])
    assert read_split(path) == fold
    path.write_text(",train,val,test\n0,a,b,c\n1,d,,\n")  # CLAM's splits_0.csv
    assert read_split(path) == {**fold, "d": "train"}
    path.write_text(",train,val,test\na,True,False,False\nb,False,True,False\n")  # and splits_0_bool.csv
    assert read_split(path) == {"a": "train", "b": "val"}
    for text, message in [
        ("x,y\n", "is no split"),
        ("slide,split\na,other\n", "has split 'other'"),
        ("slide,split\na,train\na,test\n", "is in train and in test"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_split(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,b\n", "has no column 'slide'"),
        ("slide,label\ns00,a\ns00.svs,b\n", "line 3: slide 's00' is listed twice"),
        ("slide,label\n../../etc/..,a\n", "names no slide"),
    ],
)
def test_tables_of_labels(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_labels(tmp_path / "labels.csv")


def test_mistakes_are_named(folder):
    table = folder / "labels.csv"
    table.write_text(table.read_text() + "s77,tumour,p9,0,1,1\n=cmd|'/c calc'!A0,tumour,p9,0,1,1\n")
    with pytest.raises(ConfigError, match=r"names 2 slides without a bag.*'s77'"):
        data(folder)
    assert len(data(folder, missing="skip").slides) == 24
    write_bags(folder)
    with pytest.raises(ConfigError, match=r"no column 'lable'.* Did you mean 'label'"):
        data(folder, label_column="lable")
    table.write_text(table.read_text().replace("s03,tumour", "s03,"))
    with pytest.raises(ConfigError, match="slide 's03' has nothing in column 'label'"):
        data(folder)
    module = data(folder, task="regression", label_column="patient")
    with pytest.raises(ConfigError, match="expected a number"):
        module.target(module.slides[0])
    with pytest.raises(ConfigError, match=r"Pass --data\.root FOLDER"):
        BagData()


def test_width_and_damage(folder):
    save_bag(folder / "bags" / "s05.h5", Bag(np.zeros((3, 5), np.float32)))
    (folder / "bags" / "s06.h5").write_bytes(b"damaged")
    module = data(folder)
    with pytest.raises(DataError, match=r"s05\.h5 has features of width 5, the others 8"):
        module.read("s05")
    batches = {key: b for b in module.predict_dataloader() for key in b["id"]}
    assert batches["s06"]["reason"] == ["bad_bag"]
    with pytest.raises(DataError, match="Bag of slide 's06' cannot be used"):
        module.on_before_batch_transfer(batches["s06"], 0)
