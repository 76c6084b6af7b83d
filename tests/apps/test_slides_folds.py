"""``slides train`` over a folder of splits: every fold once, whatever interrupts it, and honest sums of them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from saccade.apps import slides_training
from saccade.apps.cli import main
from saccade.mil.evaluation import bootstrap, classification_metrics
from saccade.mil.result_tables import ResultTables, pool_folds
from tests.bag_folders import write_bags

DATA = ["slides", "train", "bags", "--labels", "labels.csv", "--split", "splits"]
TRAIN = [*DATA, "--model", "abmil", "--epochs", "2", "--lr", "0.01", "--name", "cv", "-q"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bags(tmp_path)
    folds = ["--folds", "3", "--group", "patient", "--stratify", "label"]
    assert main(["slides", "split", "labels.csv", "-o", "splits", *folds]) == 0
    return tmp_path


def rows_of(path):
    with Path(path).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_cross_validation_goes_on_where_it_stopped(place, monkeypatch, capsys):
    real, called = slides_training.fit, []

    def interrupted(args, split, name, run=None):
        called.append(name)
        if len(called) == 2:
            return 130  # as fit does after Ctrl-C
        return real(args, split, name, run)

    monkeypatch.setattr(slides_training, "fit", interrupted)
    capsys.readouterr()
    assert main(TRAIN) == 130
    assert called == ["cv-fold0", "cv-fold1"]
    assert json.loads(Path("runs/cv-folds/run.json").read_text())["status"] == "interrupted"
    assert main(TRAIN) == 0
    assert called[2:] == ["cv-fold1", "cv-fold2"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == [
        "METRIC",
        "FOLDS",
        "MEAN",
        "SD",
        "ALL",
        "SLIDES",
        "[95",
        "%]",
        "ALL",
        "PATIENTS",
        "[95",
        "%]",
    ]
    assert main(TRAIN) == 0  # nothing is trained again
    assert len(called) == 4
    assert capsys.readouterr().out.splitlines() == shown

    folds, slides = rows_of("runs/cv-folds/folds.csv"), rows_of("runs/cv-folds/slides.csv")
    assert [row["path"] for row in folds] == ["fold0", "fold1", "fold2"]
    assert [row["slide"] for row in slides] == [f"s{n:02d}" for n in range(24)]
    for row in slides:  # each by the model that has not seen it
        assert {r["slide"]: r["split"] for r in rows_of(f"splits/{row['fold']}.csv")}[row["slide"]] == "test"
    assert len(rows_of("runs/cv-folds/patients.csv")) == 12
    summary = {row["metric"]: row for row in rows_of("runs/cv-folds/summary.csv")}
    accuracies = [float(row["acc"]) for row in folds]
    assert float(summary["acc"]["mean"]) == pytest.approx(np.mean(accuracies))
    assert float(summary["acc"]["sd"]) == pytest.approx(np.std(accuracies, ddof=1))
    right = np.mean([row["label"] == row["target"] for row in slides])
    assert float(summary["acc"]["slide"]) == pytest.approx(right)

    changed = [*TRAIN, "--lr", "0.02"]
    assert main(changed) == 2
    assert "other settings" in capsys.readouterr().err
    assert main([*TRAIN, "--split", "bags"]) == 2
    assert "holds 0 folds" in capsys.readouterr().err


@pytest.mark.slow
def test_folds_that_cannot_be_trained_or_tested_are_told_and_tried_again(place):
    """A damaged bag, which is in the test of one fold and in the training of the others; the name is no folder's."""
    bag = place / "bags" / next(row["slide"] for row in rows_of("splits/fold1.csv") if row["split"] == "test")
    content = bag.with_suffix(".h5").read_bytes()
    bag.with_suffix(".h5").write_bytes(b"no bag")
    run = [*TRAIN, "--epochs", "1", "--name", "a try"]
    assert main(run) == 1
    journal = Path("runs/a_try-folds/items.jsonl").read_text(encoding="utf-8").splitlines()
    assert [entry["reason"] for entry in map(json.loads, journal)] == ["training", "test", "training"]
    bag.with_suffix(".h5").write_bytes(content)
    assert main(run) == 0
    assert len(rows_of("runs/a_try-folds/slides.csv")) == 24


@pytest.mark.slow
def test_an_interrupted_fold_goes_on_from_its_last_epoch(place, monkeypatch):
    real = slides_training.fit

    def after_one_epoch(args, split, name, run=None):
        assert real(args, split, name, run) == 0
        return 130

    monkeypatch.setattr(slides_training, "fit", after_one_epoch)
    assert main(TRAIN) == 130
    (first,) = Path("runs/cv-fold0").glob("2*")
    monkeypatch.setattr(slides_training, "fit", real)
    assert main(TRAIN) == 0
    assert [path.name for path in Path("runs/cv-fold0").glob("2*")] == [first.name]
    assert len(list(Path("runs/cv-fold1").glob("2*"))) == 1
    again = [row for row in rows_of("runs/cv-folds/folds.csv") if row["path"] == "fold0"]
    assert again[0]["run"] == first.as_posix()


@pytest.mark.parametrize(
    ("task", "names", "columns"),
    [("classification", ["a", "b", "c"], "label"), ("regression", [], "value"), ("survival", [], "risk")],
)
def test_pooled_tables(tmp_path, task, names, columns):
    rng = np.random.default_rng(0)
    tables = ResultTables(task, names)
    tests, everything = {}, []
    for fold in ("fold0", "fold1"):
        results = []
        for number in range(12):
            if task == "classification":
                predicted, target = rng.dirichlet(np.ones(3)).round(6).tolist(), number % 3
            else:
                predicted = [round(float(rng.normal()), 6)]
                target = float(rng.normal()) if task == "regression" else [float(rng.exponential()), number % 2]
            key = f"{fold}-{number:02d}"
            results.append({"id": key, "patient": f"{fold}-{number // 2}", "n_tiles": 3, "predicted": predicted})
            results[-1]["target"] = target
        tables.write(results, tmp_path / fold)
        tests[fold] = tmp_path / fold
        everything += results
    rows = {row["metric"]: row for row in pool_folds(tables, tests, tmp_path / "all")}
    predicted, target = (np.array([r[name] for r in everything]) for name in ("predicted", "target"))
    for metric, value in tables.metrics(predicted, target).items():
        assert rows[metric]["slide"] == pytest.approx(value, abs=1e-4)
        assert rows[metric]["slide_low"] <= rows[metric]["slide"] <= rows[metric]["slide_high"]
    table = rows_of(tmp_path / "all" / "slides.csv")
    assert [row["fold"] for row in table] == ["fold0"] * 12 + ["fold1"] * 12
    assert columns in table[0]
    if task == "classification":
        groups = [result["patient"] for result in everything]
        expected = bootstrap(classification_metrics, predicted, target, groups=groups)["acc"]
        assert (rows["acc"]["slide"], rows["acc"]["slide_low"], rows["acc"]["slide_high"]) == pytest.approx(expected)
