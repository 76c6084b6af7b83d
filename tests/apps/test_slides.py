"""``saccade slides split|train|predict`` one after the other, as a user would."""

import csv

import pytest

from saccade.apps.cli import COMMANDS, build_parser, main
from saccade.apps.slides_training import training_config
from tests.bag_folders import write_bags


def test_from_labels_to_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_bags(tmp_path)
    folds = "slides split labels.csv -o splits --folds 3 --group patient --stratify label"
    assert main(folds.split()) == 0
    assert "splits/fold2.csv" in capsys.readouterr().out
    train = "slides train bags --labels labels.csv --split splits/fold0.csv --model abmil --epochs 2 --patience 5"
    assert main(train.split()) == 0
    shown = capsys.readouterr().out
    assert "class_path: saccade.mil.SlideClassifier" in shown
    assert "EarlyStopping" in shown
    assert main(["test", "runs/abmil", "-q"]) == 0
    assert "test/auroc" in capsys.readouterr().out
    assert (
        main(["slides", "predict", "bags", "-m", "runs/abmil", "-o", "predictions.csv", "--attention", "att", "-q"])
        == 0
    )
    with (tmp_path / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 24
    assert main(["predict", "runs/abmil", "-o", "lightning.csv", "-q"]) == 0  # the same through Lightning
    with (tmp_path / "lightning.csv").open() as stream:
        others = list(csv.DictReader(stream))
    assert [(row["path"], row["label"], row["n_tiles"]) for row in others] == [
        (row["path"], row["label"], row["n_tiles"]) for row in rows
    ]
    for ours, theirs in zip(others, rows, strict=True):
        assert float(ours["prob_tumour"]) == pytest.approx(float(theirs["prob_tumour"]), abs=2e-6)
    assert len(list((tmp_path / "att").glob("*.h5"))) == 24


def test_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_bags(tmp_path)
    for folder in ("features/a/UNI", "features/a/CONCH"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    assert main(["slides", "train", "out", "--labels", "labels.csv", "-q"]) == 2
    assert "several sets of features" in capsys.readouterr().err
    assert main(["slides", "split", "labels.csv", "-o", "s", "--stratify", "colour"]) == 2
    assert "nothing in column 'colour'" in capsys.readouterr().err


def test_options_of_training_reach_its_config(tmp_path):
    command = next(command for command in COMMANDS if command.name == "slides")
    line = [str(tmp_path), "--labels", "labels.csv", "--class-weights", "balanced", "--aem", "0.1", "--patience", "3"]
    plain = training_config(build_parser(command).parse_args(["train", *line]), None)
    assert "standardize" not in plain["data"]["init_args"]
    config = training_config(
        build_parser(command).parse_args(["train", *line, "--standardize"]), tmp_path / "fold0.csv"
    )
    assert config["data"]["init_args"]["standardize"] is True
    assert config["data"]["init_args"]["split"] == str(tmp_path / "fold0.csv")
    assert config["model"]["init_args"]["class_weights"] == "balanced"
    assert config["model"]["init_args"]["aem"] == 0.1
    assert config["trainer"]["callbacks"][0]["init_args"]["patience"] == 3
