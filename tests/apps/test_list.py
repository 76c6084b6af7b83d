"""The catalogue: complete, right, and cheap to print."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import timm
import torch

import saccade.vision_backbones  # noqa: F401 - registers our models
from saccade.apps.catalogue import MODELS, TIMM_TABLE, find_models, input_size, timm_names, write_timm_table
from saccade.apps.cli import main
from saccade.attention import operators
from saccade.mil import models as aggregators


def read_manifest():
    return json.loads((Path(__file__).parents[1] / "golden" / "data" / "manifest.json").read_text())["cases"]


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_timm_names_are_those_that_timm_registers():
    ours = {name for name in timm.list_models() if registered_by_saccade(name)}
    assert sorted(timm_names()) == sorted(set(timm.list_models()) - ours)


def test_saccade_models_are_those_that_saccade_registers():
    registered = [name for name in timm.list_models() if registered_by_saccade(name)]
    assert sorted(model.name for model in MODELS) == sorted(registered)
    assert all(model.library == "saccade" and model.verified for model in MODELS)


def registered_by_saccade(name: str) -> bool:
    return timm.models.model_entrypoint(name).__module__.startswith("saccade.")


def test_table(capsys):
    assert main(["list", "models", "convnext_t*"]) == 0
    header, *rows = lines(capsys)
    assert header.split() == ["NAME", "PARAMS", "INPUT", "TASK", "SOURCE", "VERIFIED"]
    assert rows[0].split() == ["convnext_tiny", "28.6", "M", "224", "image", "timm", "-"]
    assert [row.split()[0] for row in rows] == timm.list_models("convnext_t*")


def test_json(capsys):
    assert main(["list", "models", "vit_tiny_patch16_224", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model == {
        "name": "vit_tiny_patch16_224",
        "params": sum(p.numel() for p in timm.create_model("vit_tiny_patch16_224").parameters()),
        "input": "224",
        "task": "image",
        "source": "timm",
        "verified": "",
        "library": "timm",
    }


@pytest.mark.parametrize("pattern", ["*", "vit_*_384", "resnet50", "convnext_tiny.fb*", "*in21k"])
def test_order_and_patterns_are_timms(pattern):
    assert [model.name for model in find_models(pattern, pretrained=True)] == timm.list_pretrained(pattern)
    if names := timm.list_models(pattern):
        assert [model.name for model in find_models(pattern)] == names


def test_pretrained_only_shows_the_input_of_each_tag(capsys):
    assert main(["list", "models", "convnext_tiny", "--pretrained-only", "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert models["convnext_tiny.in12k_ft_in1k_384"]["input"] == "384"
    assert models["convnext_tiny.in12k_ft_in1k"]["input"] == "224"


@pytest.mark.parametrize("options", [[], ["--pretrained-only"]])
def test_no_match_suggests(capsys, options):
    assert main(["list", "models", "convnxt_tin*", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "No model matches 'convnxt_tin*'. Did you mean 'convnext_tiny" in err


def test_source(capsys):
    assert main(["list", "models", "resnet18", "--source", "timm"]) == 0
    assert len(lines(capsys)) == 2
    assert main(["list", "models", "resnet18", "--source", "saccade"]) == 2


def test_names_that_the_table_lacks_are_listed_without_sizes(tmp_path, monkeypatch, capsys):
    write_timm_table(["test_vit", "test_resnet"], tmp_path / "table.csv")
    monkeypatch.setattr("saccade.apps.catalogue.TIMM_TABLE", tmp_path / "table.csv")
    assert main(["list", "models", "test_*t"]) == 0
    rows = {row.split()[0]: row.split()[1] for row in lines(capsys)}
    assert rows["test_vit"] == "0.4"
    assert rows["test_convnext"] == "-"


@pytest.mark.slow
def test_sizes_are_those_of_the_installed_timm():
    with TIMM_TABLE.open(encoding="utf-8") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    names = [name for name in timm.list_models() if name in rows][::17]
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        assert int(rows[name]["params"]) == sum(p.numel() for p in model.parameters()), name
    if timm.__version__ == "1.0.31":
        assert set(rows) == set(timm_names())
        assert all(rows[name]["input"] == input_size(name) for name in rows)


def test_operators(capsys):
    assert main(["list", "ops"]) == 0
    shown = capsys.readouterr().out
    assert main(["list", "ops", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["operator"] for row in listed] == [operator.name for operator in operators()]
    for row, operator in zip(listed, operators(), strict=True):
        assert row["chosen"] == operator.explain().chosen
        assert [backend["backend"] for backend in row["backends"]] == [backend.name for backend in operator.backends]
        assert all(backend["reason"] in shown for backend in row["backends"])
        assert row["summary"] in shown


def test_operators_follow_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("SACCADE_ATTENTION_BACKEND", "reference")
    assert main(["list", "ops", "--json"]) == 0
    assert {row["chosen"] for row in json.loads(capsys.readouterr().out)} == {"reference"}


def test_models_of_slides(capsys):
    assert main(["list", "mil", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in listed] == aggregators()
    golden = {row["runner"] for row in read_manifest() if row["runner"].startswith("mil.")}
    assert {f"mil.{model['name']}" for model in listed if "golden" in model["verified"]} == golden - {"mil.heatmap"}
    assert main(["list", "mil"]) == 0
    header, *rows = lines(capsys)
    assert header.split()[0] == "NAME"
    assert [row.split()[0] for row in rows] == aggregators()


def test_configs_are_those_of_config_ls(capsys):
    assert main(["list", "configs", "image/*"]) == 0
    shown = capsys.readouterr().out
    assert main(["config", "ls", "image/*"]) == 0
    assert capsys.readouterr().out == shown


def test_a_kind_is_required(capsys):
    assert main(["list"]) == 2
    assert "models|ops|mil|metrics|configs" in capsys.readouterr().err
    assert importlib.import_module("saccade.apps.list_command").EXAMPLES
