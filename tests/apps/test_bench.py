"""``saccade bench``: rows, reasons, and no speed without correctness."""

import json

import pytest
import torch

from saccade.apps.cli import main
from saccade.attention import attention, dispatch
from saccade.attention.dispatch import Backend, Decision, Operator
from saccade.attention.problem import describe
from tests.helpers import run_cli

SMALL = ["--shapes", "1x2x16x8", "--repeats", "2", "--device", "cpu"]


def test_attention_rows_and_report(tmp_path):
    result = run_cli("bench", "attention", *SMALL, "--mode", "fwdbwd", "-o", "bench.json", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.splitlines()[0].split()[:4] == ["OP", "BACKEND", "SHAPE", "DTYPE"]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"cpu", "gpu", "threads"} < report["machine"].keys()
    measured = {(row["name"], row["backend"]) for row in report["rows"]}
    assert measured >= {(name, backend) for name in ("attention", "attention_lse") for backend in ("sdpa", "reference")}
    assert {name for name, _ in measured} == set(dispatch.registry)
    for row in report["rows"]:
        assert (row["shape"], row["dtype"], row["mode"], row["status"]) == ("1x2x16x8", "fp32", "fwdbwd", "ok")
        assert row["median_ms"] > 0
        assert row["max_abs_difference"] < 1e-5


def test_json_on_stdout_is_one_document(capsys):
    assert main(["bench", "attention", *SMALL, "--ops", "attention_lse", "--dtype", "bf16", "--json"]) == 0
    assert {row["dtype"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"bf16"}


@pytest.fixture
def operators(monkeypatch):
    """One operator with a right backend, one that is wrong, one that gives NaN, one that cannot run."""

    def stand_in(query, key, value, *, backend):
        out = attention(query, key, value, backend="reference")
        return {"wrong": out * 1.01, "undefined": out * torch.nan}.get(backend, out)

    able, unable = (lambda problem: Decision(True, "")), (lambda problem: Decision(False, "no such hardware"))
    backends = [Backend(name, able, stand_in) for name in ("wrong", "undefined", "reference")]
    table = (Backend("absent", unable, stand_in), *backends)
    example = dispatch.registry["attention"].example
    monkeypatch.setitem(dispatch.registry, "stand_in", Operator(stand_in, "", table, describe, example))


def test_wrong_results_are_flagged_and_fail(operators, capsys):
    assert main(["bench", "attention", *SMALL, "--ops", "stand_in", "--json"]) == 1
    rows = {row["backend"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "absent": "cannot run",
        "wrong": "wrong",
        "undefined": "wrong",
        "reference": "ok",
    }
    assert rows["absent"]["reason"] == "no such hardware"
    assert "differs from the literal form" in rows["wrong"]["reason"]


def test_a_backend_that_one_operator_lacks_is_a_row(operators, capsys):
    arguments = ["bench", "attention", *SMALL, "--ops", "attention,stand_in", "--backends", "absent,reference"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("cannot run" in line for line in lines) == 2
    assert any("attention has no such backend" in line for line in lines)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_model_rows(mode, capsys):
    arguments = ["--batch-size", "1,3", "--img-size", "64", "--mode", mode, "--repeats", "2", "--device", "cpu"]
    assert main(["bench", "model", "resnet10t", *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["shape"] for row in rows] == ["1x3x64x64", "3x3x64x64"]
    for row in rows:
        batch = int(row["shape"][0])
        assert row["images_per_s"] == pytest.approx(1e3 * batch / row["median_ms"])
        assert row["peak_mib"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--ops", "atention"], "Unknown operator 'atention'. Did you mean 'attention'"),
        (["attention", "--backends", "sdp"], "Unknown backend 'sdp'. Did you mean 'sdpa'?"),
        (["attention", "--shapes", "2x8x16"], "--shapes takes BxHxNxD, e.g. 2x8x1024x64; got '2x8x16'"),
        (["attention", "--shapes", "2x8x0x64"], "at least 1; got '0'"),
        (["attention", "--repeats", "1"], "--repeats must be at least 2"),
        (["attention", "-o", "bench.csv"], "must end in .json; got bench.csv"),
        (["attention", "--device", "tpu9"], "Unknown device 'tpu9'"),
        (["model", "resnt18"], "Did you mean 'resnet18'"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
