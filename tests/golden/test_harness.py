"""The golden harness itself: what is wrong fails, loudly and by name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.case import DATA, Case, load_cases
from tests.golden.runners import discover, runner
from tests.golden.trim import trim

REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def run_golden(folder):
    """Run the golden tests on a folder in their own process."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "golden", "tests/golden/test_golden.py"]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "SACCADE_GOLDEN_DIR": str(folder)}, capture_output=True, text=True
    )


def test_rows_that_are_wrong_fail_each_for_its_reason(tmp_path):
    area = tmp_path / "attention"
    area.mkdir()
    tensors = load_file(DATA / "attention" / "sink_logit.safetensors")
    files = {
        "right": tensors,
        "unknown": tensors,
        "output": {**tensors, "output.y": tensors["output.y"] * (1 + 1e-3)},
        "gradient": {**tensors, "grad.input.k": tensors["grad.input.k"] + 1e-3},
        "shape": {**tensors, "output.lse": tensors["output.lse"][:, :2].contiguous()},
        "extra": {**tensors, "output.other": torch.zeros(1)},
    }
    for name, content in files.items():
        save_file(content, area / f"{name}.safetensors")
    rows = [
        {
            "id": f"attention/{name}",
            "runner": "attention.sink.logit" if name != "unknown" else "attention.nothing",
            "file": f"attention/{name}.safetensors",
            "tolerance": TOLERANCE,
        }
        for name in [*files, "missing"]
    ]
    entries = [{"file": f"{name}.safetensors", "config": {}, "loss_over": ["y"]} for name in [*files, "missing"]]
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": rows}))
    (area / "index.json").write_text(json.dumps({"cases": entries}))
    result = run_golden(tmp_path)
    assert result.returncode == 1
    assert "1 passed" in result.stdout
    assert "skipped" not in result.stdout
    for name, reason in {
        "unknown": "no runner for 'attention.nothing'; register it",
        "output": "output.y differs in",
        "gradient": "grad.input.k differs in",
        "shape": r"output.lse has shape \(2, 3, 7\), expected \(2, 2, 7\)",
        "extra": "the runner compared nothing with output.other",
        "missing": "does not exist",
    }.items():
        assert re.search(f"attention/{name}: .*{reason}", result.stdout), result.stdout


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"cases": []}', "at least one case"),
        ('{"cases": [{"id": "a/b", "file": "f", "tolerance": 0}]}', "each with a unique id, runner"),
        (None, "No such file"),
    ],
)
def test_a_broken_manifest_stops_the_collection(manifest, reason, tmp_path):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        load_cases(tmp_path)
    if manifest == "{":
        result = run_golden(tmp_path)
        assert result.returncode == 2
        assert reason in result.stdout


LAYOUTS = {
    "list by file": {"cases": [{"file": "x.safetensors"}, {"file": "c.safetensors", "config": {"n": 1}}]},
    "list by name": {"area": "a", "cases": [{"name": "c", "config": {"n": 1}}]},
    "dictionary by name": {"other": {"config": {}}, "c": {"file": "c.safetensors", "config": {"n": 1}}},
    "files": {"about": "", "files": {"c.safetensors": {"config": {"n": 1}}, "x.json": {}}},
    "second list": {"cases": [{"case": "x"}], "full_size": [{"logits": "c.safetensors", "n": 1}]},
}


def case_in(folder, index, tolerance=TOLERANCE, tensors=None, **row):
    """Write a folder with one case and return it."""
    (folder / "a").mkdir(exist_ok=True)
    save_file(tensors or {"output.y": torch.zeros(1)}, folder / "a" / "c.safetensors")
    (folder / "a" / "index.json").write_text(json.dumps(index))
    rows = [{"id": "a/c", "runner": "r", "file": "a/c.safetensors", "tolerance": tolerance, **row}]
    (folder / "manifest.json").write_text(json.dumps({"cases": rows}))
    return load_cases(folder)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_finds_the_configuration_in_every_layout_of_an_index(layout, tmp_path):
    assert case_in(tmp_path, LAYOUTS[layout]).config["n"] == 1


def test_a_case_that_its_index_does_not_know(tmp_path):
    with pytest.raises(LookupError, match="has no entry for a/c"):
        _ = case_in(tmp_path, {"cases": []}).config


def test_tolerance_relative_to_the_largest_or_element_wise(tmp_path):
    expected = {"output.y": torch.tensor([100.0, 0.0]), "grad.x": torch.tensor([100.0, 0.0])}
    got = torch.tensor([100.0, 0.05])
    relative = {"out": {"rtol": 1e-3, "atol": 0, "per": "max"}, "grad": {"rtol": 1e-4, "atol": 0, "per": "max"}}
    case = case_in(tmp_path, {"cases": []}, relative, expected)
    case.compare({"output.y": got})
    with pytest.raises(AssertionError, match=r"a/c: grad.x differs in 1 of 2 elements, e.g. 0.05\d* for 0 at \(1,\)"):
        case.compare({"grad.x": got})
    element_wise = case_in(tmp_path, {"cases": [{"name": "c"}]}, {"rtol": 1e-3, "atol": 0}, expected)
    with pytest.raises(AssertionError, match=r"output\.y differs"):
        element_wise.compare({"output.y": got})


def test_special_values(tmp_path):
    """An empty row's log-sum-exp may be stored as -1e30, NaN means undefined, integers are exact."""
    stored = {
        "output.lse": torch.tensor([-1e30, 1.0]),
        "output.nan": torch.tensor([torch.nan, torch.inf]),
        "output.index": torch.tensor([3, 4]),
    }
    case = case_in(tmp_path, {"cases": [{"name": "c"}]}, tensors=stored)
    case.compare({"output.lse": torch.tensor([-torch.inf, 1.0]), "output.nan": stored["output.nan"]})
    assert case.unchecked() == ["output.index"]
    for wrong in (torch.tensor([3, 5]), torch.tensor([3.5, 4.0])):
        with pytest.raises(AssertionError, match="1 of 2 integers"):
            case.compare({"output.index": wrong})
    for wrong in (torch.tensor([0.0, torch.inf]), torch.tensor([torch.nan, torch.nan])):
        with pytest.raises(AssertionError, match=r"output\.nan differs in 1 of 2"):
            case.compare({"output.nan": wrong})


def test_results_of_numbered_parts_are_expected_and_state_is_not():
    case = Case("a/c", {}, Path())
    names = ["case0.output.y", "case0.input.x", "output.y", "grad.state.w", "state.output.dense.weight", "input.grad"]
    case.tensors = dict.fromkeys(names)
    assert case.expected() == ["case0.output.y", "output.y", "grad.state.w"]


def test_two_runners_for_one_word():
    discover()
    with pytest.raises(ValueError, match=r"two golden runners for 'attention\.sink\.logit'"):
        runner("attention.sink.logit")(print)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trim_keeps_the_rows_with_a_runner(layout, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    case_in(source, LAYOUTS[layout])
    manifest = json.loads((source / "manifest.json").read_text())
    other = {"id": "a/x", "runner": "later", "file": "a/x.safetensors", "tolerance": TOLERANCE}
    private = {"id": "a/p", "runner": "r", "file": "a/p.safetensors", "tolerance": TOLERANCE, "commit": False}
    manifest["cases"] += [other, private]
    (source / "manifest.json").write_text(json.dumps(manifest))
    assert trim(source, target, {"r"}) == ["a/c"]
    (kept,) = load_cases(target)
    assert kept.config["n"] == 1
    assert kept.path.read_bytes() == (source / "a" / "c.safetensors").read_bytes()
    assert "x.safetensors" not in (target / "a" / "index.json").read_text()
    assert json.loads((target / "manifest.json").read_text())["cases"] == manifest["cases"][:1]
