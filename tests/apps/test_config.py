"""Shipped configs: listed, shown, copied, checked."""

import json
import re

import pytest
import yaml

from saccade.apps.cli import main
from saccade.apps.shipped import config_path, list_configs
from tests.helpers import run_cli


def test_ls(capsys):
    assert main(["config", "ls"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "WHAT", "IT", "IS"]
    assert [row.split()[0] for row in rows] == list_configs()
    assert all(len(row.split()) > 3 for row in rows), "every config opens with a comment that says what it is"


def test_ls_json_and_pattern(capsys):
    assert main(["config", "ls", "*/finetune", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "image/finetune"
    assert main(["config", "ls", "image/finetun"]) == 2
    assert "Did you mean 'image/finetune'" in capsys.readouterr().err


def test_show_prints_the_file(capsys):
    for name in list_configs():
        assert main(["config", "show", name]) == 0
        assert capsys.readouterr().out == config_path(name).read_text()


def test_show_unknown_name(capsys):
    assert main(["config", "show", "image/finetun"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Did you mean 'image/finetune'" in err


def test_cp_keeps_what_is_there(tmp_path, capsys):
    copy = tmp_path / "my.yaml"
    assert main(["config", "cp", "image/finetune", str(copy)]) == 0
    assert copy.read_bytes() == config_path("image/finetune").read_bytes()
    copy.write_text("mine")
    assert main(["config", "cp", "image/finetune", str(copy)]) == 2
    assert "--force" in capsys.readouterr().err
    assert copy.read_text() == "mine"
    assert main(["config", "cp", "image/finetune", str(copy), "--force"]) == 0
    assert copy.read_bytes() == config_path("image/finetune").read_bytes()


def test_cp_into_a_folder_or_nowhere(tmp_path, capsys):
    assert main(["config", "cp", "image/finetune", str(tmp_path)]) == 0
    assert (tmp_path / "finetune.yaml").is_file()
    assert main(["config", "cp", "image/finetune", str(tmp_path / "absent" / "my.yaml")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", list_configs())
def test_every_shipped_config_passes(name, capsys):
    assert main(["config", "check", name]) == 0
    assert capsys.readouterr().out == f"{name}: ok\n"


def broken(tmp_path, change) -> tuple[str, str]:
    """Write a changed copy of a config and return its path and text."""
    content = yaml.safe_load(config_path("image/finetune").read_text())
    change(content)
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path), path.read_text()


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        (lambda c: c["model"]["init_args"].update(bakbone="resnet18"), "bakbone", "backbone"),
        (
            lambda c: c["model"].update(class_path="saccade.vision_backbones.ImageClassifer"),
            "ImageClassifer",
            "ImageClassifier",
        ),
        (lambda c: c["trainer"].update(max_epoch=3), "max_epoch", "max_epochs"),
        (lambda c: c["data"]["init_args"].update(batch_size="many"), "batch_size", "many"),
        (lambda c: c.update(modle={}), "modle", "model"),
        (lambda c: c["model"]["init_args"].update(backbone="resnt18"), "resnt18", "resnet18"),
    ],
    ids=["model key", "class", "trainer key", "type", "section", "backbone"],
)
def test_first_error_is_named_with_its_line(tmp_path, capsys, change, key, hint):
    path, text = broken(tmp_path, change)
    assert main(["config", "check", path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    number = next(number for number, line in enumerate(text.splitlines(), start=1) if re.search(rf"\b{key}\b", line))
    assert f"{path}:{number}" in err or f"{path}, line {number}" in err
    assert key in err
    assert hint in err
    assert len(err.splitlines()) == 1


def test_yaml_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("model:\n  a: [1, 2\ntrainer: {}\n")
    assert main(["config", "check", str(tmp_path / "my.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "my.yaml" in err
    assert "line" in err or "my.yaml:" in err


@pytest.mark.slow
def test_check_as_a_process():
    done = run_cli("config", "check", "image/finetune")
    assert (done.returncode, done.stdout) == (0, "image/finetune: ok\n")
