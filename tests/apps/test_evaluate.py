import csv
import json
import shutil

import pytest
import torch

from saccade.apps.cli import main
from tests.class_folders import COLOURS, write_folder, write_picture

TINY = ["--model.backbone", "test_resnet", "--data.img_size", "32", "-j", "0", "--data.batch_size", "6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder whose model knows blue, green and red, trained with a relative data folder."""
    place = tmp_path_factory.mktemp("evaluate")
    write_folder(place / "photos", {"train": 8, "val": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        options = ["--data.root", "photos", "--epochs", "6", "--lr", "0.01", "--name", "tiny", "-q"]
        assert main(["fit", *TINY, *options]) == 0
    return next((place / "runs" / "tiny").glob("2*"))


@pytest.fixture
def saccade(tmp_path, monkeypatch, capsys):
    """Call a command in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def rows_of(path):
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_test_prints_tables_and_writes_files(saccade, trained):
    code, out, err = saccade("test", trained)
    assert code == 0
    metrics, classes = (block.splitlines() for block in out.strip().split("\n\n"))
    assert metrics[0].split() == ["metric", "value"]
    assert [line.split()[0] for line in metrics[1:]] == ["test/loss", "test/acc", "test/f1"]
    assert [line.split()[0] for line in classes] == ["class", *COLOURS]
    assert "changed since" not in err
    assert err.splitlines()[0].startswith("saccade 0.1.0  test  ImageClassifier/test_resnet (0.4 M)  photos: 12 test")
    written = json.loads((trained / "test" / "metrics.json").read_text())["metrics"]
    assert f"{written['test/acc']:.4f}" == metrics[2].split()[1]
    assert written["test/acc"] > 0.8  # three colours
    assert (trained / "test" / "confusion_matrix.png").stat().st_size > 1000


def test_moved_run_in_another_working_directory(saccade, trained, tmp_path):
    """The checkpoint is enough: no config file, no relative path."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    (moved / "config.yaml").unlink()
    code, out, _ = saccade("test", "moved", "--json", "-q")
    assert code == 0
    assert json.loads(out)["metrics"]["test/acc"] > 0.8
    assert (moved / "checkpoints" / "best-test" / "metrics.json").is_file()


def test_folder_of_runs_means_the_latest(saccade, trained):
    assert saccade("validate", trained.parent, "-q")[0] == 0


def test_other_folder_without_splits_is_tested_whole_with_the_classes_of_the_checkpoint(saccade, trained, tmp_path):
    write_folder(tmp_path / "other", {"": 5}, classes=("green", "red"))
    code, out, err = saccade("test", "--data.root", "other", trained, "-o", "results", "--json")
    assert code == 0
    assert "other: 10 test, 3 classes" in err
    assert "changed since the checkpoint: " in err
    assert "data.root" in err
    metrics = json.loads(out)["metrics"]
    assert metrics["test/recall/blue"] == 0.0
    assert metrics["test/acc"] > 0.8
    assert (tmp_path / "results" / "confusion_matrix.png").is_file()


def test_folder_with_an_unknown_class_is_refused(saccade, trained, tmp_path):
    write_folder(tmp_path / "other", {"": 2})
    (tmp_path / "other" / "red").rename(tmp_path / "other" / "rad")
    code, out, err = saccade("test", trained, "--data.root", "other")
    assert (code, out) == (2, "")
    assert "other/rad' is no known class. Did you mean 'red'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", "nowhere.ckpt"), "'nowhere.ckpt' does not exist; expected a checkpoint or a run folder"),
        (("test", "."), "is no run folder: it has no checkpoints/best.ckpt"),
        (("predict", "RUN", "-o", "out.xls"), "Table 'out.xls' must end in one of"),
        (("predict", "RUN", "-o", "out.csv", "--topk", "0"), "--topk must be at least 1, got 0"),
        (("predict", "RUN", "-o", "taken.csv"), "taken.csv exists. Choose another --out, or pass --overwrite"),
        (("predict", "RUN", "-o", "out.csv", "--data.root", "nowhere"), "nowhere' does not exist"),
        (("validate", "RUN", "--data.bach_size", "3"), "unknown key 'bach_size' of data. Did you mean 'batch_size'"),
    ],
)
def test_mistakes(saccade, trained, tmp_path, arguments, message):
    (tmp_path / "taken.csv").touch()
    code, out, err = saccade(*(trained if argument == "RUN" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_foreign_checkpoint_is_refused(saccade, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    code, _, err = saccade("test", "x.ckpt")
    assert code == 2
    assert "was not written by `saccade fit`: it holds no config" in err


@pytest.fixture
def new_images(tmp_path):
    """Two good images of equal name and a broken one; the folder names mean nothing."""
    folder = tmp_path / "new"
    write_picture(folder / "a" / "same.png", COLOURS["red"], 901)
    write_picture(folder / "b" / "same.png", COLOURS["blue"], 902)
    (folder / "c.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an item")
    return folder


def test_predict_writes_every_item_once(saccade, trained, new_images):
    code, out, err = saccade("predict", trained, "--data.root", "new", "-o", "out.csv")
    assert (code, out) == (3, "")
    assert "done 2  failed 1   details: out.items.jsonl" in err
    rows = rows_of(new_images.parent / "out.csv")
    columns = [f"{name}_{rank}" for rank in (1, 2, 3) for name in ("label", "index", "prob")]
    assert list(rows[0]) == ["path", "status", *columns, "error"]
    assert [(row["path"], row["status"], row["label_1"]) for row in rows] == [
        ("a/same.png", "done", "red"),
        ("b/same.png", "done", "blue"),
        ("c.png", "failed", ""),
    ]
    assert rows[2]["error"] == "not an image, or its header is damaged"
    assert sum(float(rows[0][f"prob_{rank}"]) for rank in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    assert json.loads((new_images.parent / "out.run.json").read_text())["status"] == "done"
    assert not list(new_images.parent.glob("*.part"))


def test_predict_agrees_with_classify(saccade, trained, new_images):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    assert saccade("predict", checkpoint, "--data.root", "new", "-o", "p.csv", "--topk", "2", "-q")[0] == 3
    assert saccade("classify", "new", "-m", checkpoint, "-o", "c.csv", "--topk", "2", "-j", "0", "-q")[0] == 3
    predicted, classified = rows_of(new_images.parent / "p.csv"), rows_of(new_images.parent / "c.csv")
    for ours, theirs in zip(predicted, classified, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name.startswith("prob") and value:
                assert float(value) == pytest.approx(float(theirs[name]), abs=1e-4)
            else:
                assert value == theirs[name]


def test_predict_replaces_only_when_asked(saccade, trained, new_images):
    command = ("predict", trained, "--data.root", "new", "-o", "out.csv", "-q")
    assert saccade(*command)[0] == 3
    (new_images / "c.png").unlink()
    assert saccade(*command)[0] == 2
    assert saccade(*command, "--overwrite")[0] == 0
    assert [row["path"] for row in rows_of(new_images.parent / "out.csv")] == ["a/same.png", "b/same.png"]


def test_predict_json(saccade, trained, new_images):
    code, out, _ = saccade("predict", trained, "--data.root", "new", "-o", "out.jsonl", "--json", "-q")
    assert code == 3
    summary = json.loads(out)
    assert (summary["total"], summary["done"], summary["failed"]) == (3, 2, 1)
