"""``saccade gaze`` as its users run it."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from saccade.apps.cli import main
from saccade.gaze import ScanpathSet, read_scanpaths, write_scanpaths
from tests.gaze.test_evaluate import HUMAN, viewers, with_objects
from tests.helpers import run_cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("gaze")
    write_scanpaths(with_objects(HUMAN), place / "human.csv")
    write_scanpaths(with_objects(viewers(subjects=1, seed=7)), place / "predicted.csv")
    return place


def test_metrics_of_predictions(folder):
    done = run_cli("gaze", "metrics", "--pred", "predicted.csv", "--truth", "human.csv", "-o", "pairs.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "METRIC",
        "SCORE",
        "SD",
        "95%",
        "N",
        "UNDEF",
        "BEST_HUMAN",
        "HUMAN",
        "RANDOM",
        "OTHER_IMAGE",
    ]
    assert any(line.startswith("scanmatch ") for line in lines)
    assert any(line.startswith("probability_mismatch ") for line in lines)
    assert "human.csv: ScanpathSet(24 paths" in done.stderr
    assert "without semantic_fed: needs label maps" in done.stderr
    rows = list(csv.DictReader((folder / "pairs.csv").read_text().splitlines()))
    assert len(rows) == 24
    assert rows[0]["image"] == "0.jpg"
    assert 0 < float(rows[0]["scanmatch"]) <= 1


def test_metrics_of_viewers_as_json(folder):
    done = run_cli("gaze", "metrics", "human.csv", "--metrics", "dtw,sed", "--ppd", "32", "--json", "-q", cwd=folder)
    assert done.returncode == 0
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert [score["name"] for score in document["scores"]] == ["dtw", "sed"]
    assert document["scores"][0]["unit"] == "deg"
    assert document["pairs"] == 24 * 3


def test_label_maps(folder):
    (folder / "maps").mkdir(exist_ok=True)
    for image in range(6):
        np.save(folder / "maps" / f"{image}.npy", np.arange(48).reshape(6, 8).repeat(100, 0).repeat(100, 1))
    done = run_cli("gaze", "metrics", "human.csv", "--maps", "maps", "--metrics", "semantic_fed", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("semantic_fed ")
    np.save(folder / "maps" / "0.npy", np.zeros((3, 3)))
    done = run_cli("gaze", "metrics", "human.csv", "--maps", "maps", cwd=folder)
    assert (done.returncode, "of float64; a label map is (H, W) whole numbers" in done.stderr) == (2, True)


def test_densities(folder, capsys):
    (folder / "densities").mkdir(exist_ok=True)
    for image in range(6):
        np.save(folder / "densities" / f"{image}.npy", np.full((30, 40), 1 / 1200))
    options = ["--densities", str(folder / "densities"), "--metrics", "sed", "-q"]
    assert main(["gaze", "metrics", str(folder / "human.csv"), *options]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["DENSITY", "SCORE", "95%", "N", "BASELINE"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    fixations = sum(len(path) - 1 for path in HUMAN)
    assert rows["auc"][:3] == ["0.5", "0.5..0.5", str(fixations)]
    assert float(rows["auc"][3]) > 0.5  # where people looked on other images
    assert main(["gaze", "metrics", str(folder / "human.csv"), *options, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["densities"]] == list(rows)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["metrics", "human.csv", "--baseline", "human.csv"], 2, "--baseline is of --densities"),
        (["metrics"], 2, "Give --pred and --truth, or one file"),
        (["metrics", "human.csv", "--pred", "predicted.csv", "--truth", "human.csv"], 2, "Give --pred and --truth"),
        (["metrics", "--pred", "predicted.csv"], 2, "Give --pred and --truth"),
        (["metrics", "human.csv", "--metrics", "scanmach"], 2, "Did you mean 'scanmatch'"),
        (["metrics", "human.csv", "-o", "x.png"], 2, "must end in one of .csv"),
        (["metrics", "human.csv", "--ppd", "0"], 2, "pixels per degree, above 0"),
        (["metrics", "nothing.csv"], 1, "No such file or directory: nothing.csv"),
        (["metrics", "broken.csv"], 1, "broken.csv line 3, duration[1]: -0.1 s is negative"),
        (["convert", "human.csv", "-o", "human.csv"], 2, "human.csv exists; --overwrite replaces it"),
        (["convert", "human.csv", "-o", "x.xyz"], 2, "x.xyz does not look like scanpaths"),
        (["convert", "human.csv", "--size", "800", "-o", "x.h5"], 2, "'800' is not WIDTHxHEIGHT"),
        (["split", "human.csv", "-o", "s.csv", "--by", "task"], 2, "by is one of image, target, subject, trial"),
        (["split", "human.csv", "-o", "s.csv", "--fractions", "half"], 2, "--fractions are three numbers"),
        (["plots"], 2, "invalid choice: 'plots'"),
    ],
)
def test_refused(arguments, code, message, folder):
    (folder / "broken.csv").write_text("image,x_px,y_px,duration_ms\na,1,2,100\na,3,4,-100\n")
    done = run_cli("gaze", *arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_convert_and_back(folder):
    for name, options in (
        ("a.h5", []),
        ("b.json", ["--to", "coco"]),
        ("c.csv", ["--format", "coco", "--size", "800x600"]),
    ):
        source = {"a.h5": "human.csv", "b.json": "a.h5", "c.csv": "b.json"}[name]
        done = run_cli("gaze", "convert", source, "-o", name, *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert f"{name}: ScanpathSet(24 paths" in done.stderr
    old, new = (read_scanpaths(folder / name) for name in ("human.csv", "c.csv"))
    np.testing.assert_array_equal(new.x, old.x)
    np.testing.assert_array_equal(new.duration, old.duration)


def test_several_files_become_one(folder):
    for subject in ("0", "1"):
        one = read_scanpaths(folder / "human.csv").filter(image="0.jpg", subject=subject)
        write_scanpaths(one, folder / f"viewer{subject}.tsv")
    done = run_cli("gaze", "convert", "viewer0.tsv", "viewer1.tsv", "-o", "both.csv", cwd=folder)
    assert done.returncode == 0
    assert read_scanpaths(folder / "both.csv").image.tolist() == ["viewer0", "viewer1"]


def test_split_says_what_is_shared(folder):
    done = run_cli("gaze", "split", "human.csv", "-o", "parts", "--by", "image", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "note: 4 subjects stand in several parts, e.g. 0 in train and val and test." in done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["PART", "PATHS"], ["train", "16"], ["val", "4"], ["test", "4"],
    ]  # fmt: skip
    parts = [set(read_scanpaths(folder / "parts" / f"{name}.csv").image) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == 6
    done = run_cli(
        "gaze", "split", "human.csv", "-o", "one.csv", "--by", "image,subject", "--fractions", "0.5,0,0.5", cwd=folder
    )
    assert "12 paths are left out, on which image and subject differ" in done.stderr
    assert set(csv.DictReader((folder / "one.csv").read_text().splitlines()).fieldnames) >= {"split", "x_px"}


def test_copied_viewers_are_noted(folder):
    copies = ScanpathSet.from_columns([2, 2], [1, 2, 1, 2], [3, 4, 3, 4], image="a", subject=["1", "2"])
    write_scanpaths(copies, folder / "copies.csv")
    done = run_cli(
        "gaze", "split", "copies.csv", "-o", "copied.csv", "--by", "subject", "--fractions", "0.5,0,0.5", cwd=folder
    )
    assert "note: copies.csv: 1 paths are identical to another viewer's" in done.stderr
    assert "note: 1 identical paths stand in several parts" in done.stderr


def test_list_metrics():
    done = run_cli("list", "metrics")
    assert done.returncode == 0
    assert "16 x 12 cells, threshold 3.5, gap 0, 50 ms bins" in done.stdout
    assert {row["name"] for row in json.loads(run_cli("list", "metrics", "--json").stdout)} >= {"scanmatch", "fed"}


def test_reading_and_scoring_need_no_torch(folder):
    code = (
        "import sys; from saccade.apps.cli import main;"
        "main(['gaze', 'metrics', 'human.csv', '--metrics', 'scanmatch,multimatch,sequence_score']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
