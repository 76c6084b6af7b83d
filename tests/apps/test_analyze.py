import csv
import html.parser
import json
import shutil

import h5py
import numpy as np
import pytest
import timm
import torch

from saccade.apps.cli import main
from saccade.batch import BatchOptions
from saccade.errors import ConfigError
from saccade.vision_backbones import ModelSource, analyze
from tests.apps.test_classify import kill_in_the_middle
from tests.helpers import run_cli
from tests.pictures import BROKEN, GOOD, write_pictures
from tests.suite_trees import WNIDS, write_classes

VIT = ("-m", "test_vit", "--random-weights", "--img-size", "64")
SOURCE = ModelSource("test_vit", random_weights=True, img_size=64)
TABLES = ("heads", "layers", "hops", "correlations", "images")
PATTERNS = ("clusters", "nearest", "head_patterns")
PICTURES = ("layers", "distances", "importance", "clusters", "head_patterns")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("analyze") / "pictures")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("analyze") / "val")


def read(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]


@pytest.mark.slow
def test_the_folder_that_has_everything(pictures, tmp_path):
    out = tmp_path / "report"
    got = run_cli("analyze", pictures, *VIT, "-o", out, "--pattern-images", "2", "-j", "1")
    assert got.returncode == 3, got.stderr
    assert got.stdout == ""
    assert got.stderr.splitlines()[0].endswith("cpu fp32  6 layers, 12 heads")
    assert f"done {len(GOOD)}  failed {len(BROKEN)}" in got.stderr
    assert "patterns: 24 maps of 2 images, 150 steps of training" in got.stderr
    assert got.stderr.splitlines()[-1] == f"report: {out}/report.html"
    names = {*(f"{name}.csv" for name in (*TABLES, *PATTERNS)), *(f"{name}.png" for name in PICTURES)}
    names |= {"report.html", "summary.json", "heads.h5", "run.json", "items.jsonl"}
    assert {path.name for path in out.iterdir()} == names
    page = (out / "report.html").read_text()
    assert "Labels are the predictions" in page
    assert "The weights are random" in page
    links = Links(page).found
    assert len(links) >= len(PICTURES) + len(TABLES)
    assert all((out / link).exists() for link in links)
    heads = read(out / "heads.csv")
    shares = [[float(v) for k, v in row.items() if k.startswith("cluster")] for row in read(out / "head_patterns.csv")]
    assert np.allclose(np.sum(shares, 1), 1)
    again = run_cli("analyze", pictures, *VIT, "-o", out, "--pattern-images", "0", "-j", "1")
    assert f"resume: {len(GOOD)} already done" in again.stderr
    assert not any((out / f"{name}.csv").exists() or (out / f"{name}.png").exists() for name in PATTERNS)
    assert len(heads) == 12
    assert sorted(int(row["js_divergence_rank"]) for row in heads) == list(range(1, 13))
    assert len(read(out / "correlations.csv")) == 10
    with h5py.File(out / "heads.h5") as file:
        columns = file.attrs["columns"].split(",")
        values = file["heads"][:]
    assert values.shape == (len(GOOD), 12, len(columns))
    drop = values[..., columns.index("js_divergence")].mean(0)
    np.testing.assert_allclose([float(row["js_divergence"]) for row in heads], drop, rtol=1e-5)


def run(inputs, out, **settings):
    options = BatchOptions(num_workers=0, batch_size=4, **settings.pop("options", {}))
    return analyze(inputs, model=settings.pop("model", SOURCE), out=out, pattern_images=0, options=options, **settings)


def test_labels_are_the_names_of_class_folders(classes, tmp_path):
    assert run(classes, tmp_path / "o").done == 12
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert (summary["labels"], summary["importance"]) == ("folders", "zero")
    names = timm.data.ImageNetInfo()
    rows = read(tmp_path / "o/images.csv")
    index = names.label_names().index(WNIDS[0])
    assert rows[0]["label"] in (str(index), names.index_to_description(index))
    assert summary["accuracy"] == np.mean([row["correct"] == "True" for row in rows])
    assert not (tmp_path / "o/clusters.png").exists()
    with pytest.raises(ConfigError, match=r"other settings .*labels: 'folders' -> 'predicted'"):
        run(classes, tmp_path / "o", labels="predicted")


def test_folders_that_are_no_classes(pictures, tmp_path):
    with pytest.raises(ConfigError, match="lies in no folder with the name of a class of 'test_vit', such as 'n0144"):
        run(pictures, tmp_path / "o", labels="folders")
    assert not (tmp_path / "o").exists()


def test_heads_replaced_by_their_mean_over_these_images(classes, tmp_path):
    shutil.copytree(classes, tmp_path / "val")
    run(tmp_path / "val", tmp_path / "o", importance="mean")
    rows = read(tmp_path / "o/heads.csv")
    assert all(float(row["js_divergence"]) > 0 for row in rows)
    run(tmp_path / "val", tmp_path / "z")
    zero = read(tmp_path / "z/heads.csv")
    assert all(float(a["js_divergence"]) < float(b["js_divergence"]) for a, b in zip(rows, zero, strict=True))
    (tmp_path / "val" / WNIDS[0] / "0.png").unlink()
    with pytest.raises(ConfigError, match="mean_over"):  # another mean, another measure
        run(tmp_path / "val", tmp_path / "o", importance="mean")


def test_without_importance_and_without_a_classifier(classes, tmp_path):
    run(classes, tmp_path / "o", importance="none", options={"limit": 2})
    assert not (tmp_path / "o/importance.png").exists()
    assert "js_divergence" not in read(tmp_path / "o/heads.csv")[0]
    state = {k: v for k, v in timm.create_model("test_vit").state_dict().items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "encoder.pth")
    encoder = ModelSource("test_vit", weights=tmp_path / "encoder.pth")
    with pytest.raises(ConfigError, match="has no classifier, so folders name no classes"):
        run(classes, tmp_path / "n", model=encoder, labels="folders")
    run(classes, tmp_path / "n", model=encoder, options={"limit": 2})
    row = read(tmp_path / "n/heads.csv")[0]
    assert float(row["cosine_distance"]) > 0
    assert (row["js_divergence"], "js_divergence_rank" in row) == ("", False)
    assert read(tmp_path / "n/correlations.csv") == []


def test_options_out_of_range(classes, tmp_path, capsys):
    command = ["analyze", str(classes), "-o", f"{tmp_path}/o", "-j", "0"]
    assert main([*command, *VIT, "--pattern-images", "-1"]) == 2
    assert "pattern_images must be 0 or more" in capsys.readouterr().err
    assert main([*command, "-m", "test_resnet", "--random-weights"]) == 2
    assert "shows no attention over places" in capsys.readouterr().err
    assert main([*command, *VIT, "--dry-run"]) == 0
    assert "12 images would be processed" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_shards_united_and_killed_runs_equal_the_whole(classes, tmp_path):
    command = ("analyze", classes, *VIT, "-b", "2", "-j", "1", "--pattern-images", "1")
    assert run_cli(*command, "-o", tmp_path / "w").returncode == 0
    kill_in_the_middle((*command, "-o", f"{tmp_path}/k/"), tmp_path / "k/items.jsonl", 3)
    assert not (tmp_path / "k/report.html").exists()
    for index in (1, 2):
        assert run_cli(*command, "-o", f"{tmp_path}/s/", "--shard", f"{index}/2").returncode == 0
    assert run_cli("merge", tmp_path / "s").returncode == 0
    for folder, resumed in (("k", "resume: "), ("s", "resume: 12 already done")):
        again = run_cli(*command, "-o", f"{tmp_path}/{folder}/")
        assert again.returncode == 0
        assert resumed in again.stderr
        for name in ("summary.json", "heads.csv", "hops.csv", "clusters.csv", "report.html", "clusters.png"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "w" / name).read_bytes(), (folder, name)
