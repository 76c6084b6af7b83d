"""Slides in two processes: training, evaluation and prediction are those of one."""

import csv
import json

import numpy as np
import pytest
import torch

from saccade.apps.cli import main
from saccade.datasets import Bag, save_bag
from tests.bag_folders import write_bags
from tests.helpers import run_cli

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TWO = ["--devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
MODEL = ["--model.model", "abmil", "--model.options", '{"hidden_dim": 16}', "--lr", "0.01"]
SHIFT = (
    "model.attention.attention_weights.bias"  # a softmax does not feel it: its gradient is rounding, which Adam scales
)
DATA = ["--data.root", "bags", "--data.labels", "labels.csv", "--data.split", "split.csv", "-j", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """24 bags: 14 train, 5 validate, 5 test; the last two numbers are not divisible by two."""
    folder = tmp_path_factory.mktemp("slides")
    write_bags(folder)
    parts = ["train"] * 14 + ["val"] * 5 + ["test"] * 5
    order = np.random.default_rng(1).permutation(24).tolist()
    rows = [f"s{slide:02d},{part}" for slide, part in zip(order, parts, strict=True)]
    (folder / "split.csv").write_text("\n".join(["slide,split", *rows]) + "\n")
    return folder


def succeed(*arguments, cwd, code=0):
    done = run_cli(*arguments, cwd=cwd, env=ONE_THREAD, timeout=900)
    assert done.returncode == code, done.stderr
    return done


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def assert_equal_tables(one, other):
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name.startswith(("prob_", "value", "low", "high")):
                assert float(value) == pytest.approx(float(theirs[name]), abs=2e-5, nan_ok=True), name
            else:
                assert value == theirs[name]


@pytest.fixture(scope="module")
def trained(place):
    """Two runs, one bag a step on each of two processes and two bags a step on one."""
    fit = ["fit", "--task", "slides", *MODEL, *DATA, "--epochs", "2", "--seed", "0"]
    succeed(*fit, *TWO, "--data.batch_size", "1", "--name", "two", cwd=place)
    succeed(*fit, "--data.batch_size", "2", "--name", "one", cwd=place)
    return {name: next((place / "runs" / name).glob("2*")) for name in ("one", "two")}


@pytest.mark.slow
def test_two_processes_train_like_one(trained):
    states, metrics = [], []
    for run in trained.values():
        content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        states.append(content["state_dict"])
        metrics.append(json.loads((run / "metrics.json").read_text())["best"])
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        if key != SHIFT:
            torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)
    for name in ("val/loss", "val/auroc", "train/loss"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4, nan_ok=True)


@pytest.mark.slow
def test_two_processes_test_like_one(trained, place):
    results = {}
    for name, options in (("one", ()), ("two", TWO)):
        done = succeed("test", trained["two"], *options, "--json", "-q", "-o", f"test-{name}", cwd=place)
        results[name] = json.loads(done.stdout)["metrics"]
    assert results["two"] == pytest.approx(results["one"], rel=1e-5, nan_ok=True)
    for table in ("slides.csv", "patients.csv", "intervals.csv"):
        assert_equal_tables(rows_of(place / "test-one" / table), rows_of(place / "test-two" / table))
    assert len(rows_of(place / "test-two" / "slides.csv")) == 5


@pytest.mark.slow
def test_two_processes_predict_every_bag_once(trained, place):
    """An empty bag and one that is none among them."""
    (place / "more").mkdir()
    for path in (place / "bags").iterdir():
        (place / "more" / path.name).write_bytes(path.read_bytes())
    save_bag(place / "more" / "empty.h5", Bag(np.zeros((0, 8), np.float32)))
    (place / "more" / "damaged.h5").write_bytes(b"no bag")
    more = ["--data.root", "more", "--data.labels", "null", "--data.split", "null", "-q"]
    tables = {}
    for name, options in (("one.csv", ()), ("two.csv", TWO)):
        succeed("predict", trained["two"], *options, *more, "-o", name, cwd=place, code=3)
        tables[name] = rows_of(place / name)
    assert [row["path"] for row in tables["two.csv"]] == ["damaged", "empty", *(f"s{n:02d}" for n in range(24))]
    assert_equal_tables(tables["two.csv"][2:], tables["one.csv"][2:])
    damaged, empty, *others = tables["two.csv"]
    assert (damaged["status"], damaged["label"]) == ("failed", "")
    assert (empty["status"], empty["n_tiles"], empty["label"]) == ("done", "0", "")
    assert (
        main(["slides", "predict", str(place / "bags"), "-m", str(trained["two"]), "-q", "-o", str(place / "p.csv")])
        == 0
    )
    assert_equal_tables(rows_of(place / "p.csv"), others)


def test_shards_of_predictions_unite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bags(tmp_path, count=7)
    from saccade.mil import create_model

    torch.manual_seed(0)
    torch.save({"model": create_model("abmil", feature_dim=8, num_classes=2).state_dict()}, "abmil.pth")
    predict = ["slides", "predict", "bags", "-m", "abmil.pth", "-q", "-o"]
    assert main([*predict, "whole.csv"]) == 0
    for shard in ("1/2", "2/2"):
        assert main([*predict, "parts.csv", "--attention", "attention", "--shard", shard]) == 0
    assert main(["merge", "parts.csv"]) == 0
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(list((tmp_path / "attention").glob("*.h5"))) == 7
