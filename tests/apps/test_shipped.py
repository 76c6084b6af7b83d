"""Every shipped config: complete, buildable, and one batch of training and validation on data of its kind."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks.harness import RESULTS
from saccade.apps.cli import main
from saccade.apps.lightning_cli import check_config
from saccade.apps.shipped import config_path, list_configs
from saccade.errors import ConfigError
from tests.bag_folders import write_bags
from tests.class_folders import write_folder
from tests.datasets.test_idx import write_pair

every_config = pytest.mark.parametrize("name", list_configs())


@every_config
def test_builds(name):
    check_config(config_path(name))


@every_config
def test_one_batch(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", {"train": 12, "val": 2})
    for prefix in ("train", "t10k"):
        write_pair(tmp_path / "data", prefix, 32)
    own_data = ("DigitsData", "ScanpathData")
    write_bags(tmp_path)
    root = [] if any(data in config_path(name).read_text() for data in own_data) else ["--data.root", "data"]
    if "BagData" in config_path(name).read_text():
        root = ["--data.root", "bags", "--data.labels", "labels.csv"]
    assert main(["fit", "-c", name, *root, "--trainer.fast_dev_run", "true", "-j", "0", "-q"]) == 0


@every_config
def test_opening_comment_launches_it_and_all_arguments_are_given(name):
    text = config_path(name).read_text()
    comment = re.match(r"(?:#.*\n)+", text)[0]
    assert f"saccade fit -c {name}" in comment
    assert re.search(r"optimizer:\n\s+class_path: .*\n\s+init_args: \{lr: [\d.e+-]+, .*weight_decay", text)


def test_names_need_no_torch():
    code = "import sys; from saccade.apps.shipped import list_configs; assert list_configs();"
    code += " assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_win_over_names_and_unknown_names_get_suggestions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path("image/finetune").read_text().startswith("# Fine-tune")
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "finetune").write_text("mine")
    assert config_path("image/finetune").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"Did you mean 'image/flowers_resnet10'"):
        config_path("image/flower_resnet10")


@pytest.mark.parametrize("benchmark", ["train_images", "train_backbones"])
def test_figures_are_those_of_the_benchmark_and_our_models_beat_the_baseline(benchmark):
    for case in json.loads((RESULTS / f"{benchmark}.json").read_text())["cases"]:
        text = config_path(case.get("config") or f"image/{case['case']}").read_text()
        assert f"accuracy {case['mean_val_acc']:.3f} (" in text
        if case["baseline"] is not None:
            assert f"linear baseline {case['baseline']:.2f})" in text
            assert case["mean_val_acc"] > case["baseline"] or case["case"].endswith("vit")
