import json
import shutil

import pytest

from saccade.apps.cli import main
from tests.apps.test_classify import kill_in_the_middle
from tests.helpers import run_cli
from tests.suite_trees import WNIDS, write_checkpoint, write_classes, write_imagenet_c


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("suites")
    write_checkpoint(root / "model.ckpt")
    write_classes(root / "val")
    write_imagenet_c(root / "c", kinds=["fog", "snow"])
    return root


def test_corruptions_of_a_folder_with_a_broken_image(trees, tmp_path):
    shutil.copytree(trees / "val", tmp_path / "val")
    (tmp_path / "val" / WNIDS[1] / "1.png").write_bytes(b"no picture")
    got = run_cli(
        *("robustness", tmp_path / "val", "-m", trees / "model.ckpt", "-o", tmp_path / "o", "--suite", "corruptions"),
        *("--corruptions", "fog,jpeg_compression", "--severities", "1,5", "-j", "1"),
    )
    assert got.returncode == 3, got.stderr
    header, *rows = got.stdout.splitlines()
    assert header.split() == ["metric", "value"]
    assert rows[0].split() == ["clean_top1_percent", "100.00"]
    assert "done 5  failed 0" in got.stderr
    assert f"fog/1/{WNIDS[1]}/1.png  failed: " in got.stderr
    written = {path.name for path in (tmp_path / "o").iterdir()}
    assert written == {
        *("metrics.json", "metrics.csv", "table.md", "table.tex", "plot.png", "parts.csv", "run.json", "items.jsonl")
    }


def test_summary_as_json(trees, tmp_path, capsys):
    command = ["robustness", f"{trees}/c", "-m", f"{trees}/model.ckpt", "-o", f"{tmp_path}/o", "--suite", "imagenet-c"]
    assert main([*command, "--corruptions", "weather", "--json", "-q"]) == 2
    assert main([*command, "--corruptions", "fog", "--json", "-q", "-j", "0"]) == 0
    out, err = capsys.readouterr()
    assert "frost/1, frost/2" in err
    summary = json.loads(out)
    assert summary["done"] == 5
    assert list(summary["metrics"]) == ["mean_top1_of_5_folders_percent"]
    assert main([*command, "--corruptions", "fog,snow", "-j", "0"]) == 0
    assert "resume: 5 already done" in capsys.readouterr().err


def test_dry_run_and_a_partial_download_write_nothing(trees, tmp_path, capsys):
    shutil.copytree(trees / "c" / "fog", tmp_path / "c" / "fog")
    shutil.rmtree(tmp_path / "c/fog/4" / WNIDS[3])
    command = ["robustness", "-m", f"{trees}/model.ckpt", "-o", f"{tmp_path}/o", "--suite", "imagenet-c"]
    assert main([*command, f"{trees}/c", "--corruptions", "fog", "--dry-run"]) == 0
    assert "5 folders would be processed" in capsys.readouterr().err
    assert main([*command, f"{tmp_path}/c", "--corruptions", "fog"]) == 2
    assert f"fog/4/{WNIDS[3]}" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 20])
def test_killed_and_run_again_equals_uninterrupted(trees, tmp_path, after):
    command = ("robustness", trees / "val", "-m", trees / "model.ckpt", "--suite", "corruptions", "-b", "4", "-j", "1")
    whole = run_cli(*command, "-o", tmp_path / "w")
    assert whole.returncode == 0, whole.stderr
    kill_in_the_middle((*command, "-o", f"{tmp_path}/k/"), tmp_path / "k/items.jsonl", after)
    assert not (tmp_path / "k/metrics.json").exists()
    again = run_cli(*command, "-o", tmp_path / "k")
    assert again.returncode == 0
    assert "resume:" in again.stderr
    for name in ("metrics.json", "metrics.csv", "parts.csv", "table.md", "table.tex", "plot.png"):
        assert (tmp_path / "k" / name).read_bytes() == (tmp_path / "w" / name).read_bytes(), name


@pytest.mark.slow
def test_united_shards_equal_the_whole(trees, tmp_path):
    command = (
        "robustness",
        trees / "c",
        "-m",
        trees / "model.ckpt",
        "--suite",
        "imagenet-c",
        "--corruptions",
        "fog,snow",
    )
    run_cli(*command, "-o", tmp_path / "w")
    for index in (1, 2, 3):
        assert run_cli(*command, "-o", f"{tmp_path}/s/", "--shard", f"{index}/3").returncode == 0
    assert run_cli("merge", tmp_path / "s").returncode == 0
    united = run_cli(*command, "-o", tmp_path / "s")
    assert "resume: 10 already done" in united.stderr
    for name in ("metrics.json", "parts.csv", "table.tex"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "w" / name).read_bytes(), name
