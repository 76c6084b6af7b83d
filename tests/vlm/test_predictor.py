"""Answers through Lightning: the rows of one process, whatever the number of them, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from saccade.apps.cli import main
from saccade.errors import ConfigError
from saccade.vlm.predictor import predict_answers
from tests.helpers import run_cli
from tests.vlm.tiny_folder import write_tiny_llava

QUESTIONS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    write_tiny_llava(folder / "llava")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    rows = [{"id": f"q{i:02d}", "image": "a.png", "prompt": f"What is {i}?", "label": i} for i in range(QUESTIONS)]
    rows[5]["image"] = "gone.png"
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, rows[3:7])))
    return folder


def call(place, out, *options, questions="q.jsonl"):
    several = ["--device", "cpu", "-j", "0", "-b", "3", "--max-new-tokens", "6", "--intervention", "vhr"]
    given = ["vlm", "generate", "-m", f"local-dir:{place / 'llava'}", "--jsonl", place / questions, "-o", out]
    return [str(part) for part in [*given, *several, *options]]


def rows_of(path):
    """Return the rows in order, without times."""
    return [{**json.loads(line), "seconds": None} for line in path.read_text().splitlines()]


def test_one_process_and_what_an_interrupted_run_has_left(place, tmp_path, capsys):
    assert main(call(place, tmp_path / "plain.jsonl", questions="few.jsonl")) == 3
    expected = rows_of(tmp_path / "plain.jsonl")
    out = tmp_path / "out.jsonl"
    kept = {**expected[0], "answer": "written before"}
    row = {name: value for name, value in kept.items() if name not in ("path", "status", "error")}
    part = tmp_path / "out.jsonl.rank1.part"
    part.write_text(json.dumps({"id": "q03", "seconds": 1.0, "row": row}) + '\n{"id": "q04", "row": {"ans')
    capsys.readouterr()
    assert main(call(place, out, "--devices", "1", questions="few.jsonl")) == 3
    assert "1 x cpu" in capsys.readouterr().err
    assert rows_of(out) == [kept, *expected[1:]]
    assert not part.exists()
    assert main(call(place, out, "--devices", "1", "--set", "alpha=3", questions="few.jsonl")) == 2
    assert "settings: {} -> {'alpha': 3}" in capsys.readouterr().err
    assert main(call(place, out, "--devices", "1", "--overwrite", "--dry-run", questions="few.jsonl")) == 0
    assert rows_of(out)[0]["answer"] == "written before"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:1", "--devices", "1"], "device is a kind of device"),
        (["--devices", "1", "--on-error", "stop"], "on_error='stop' is for one process"),
        (["--devices", "1", "--strategy", "no_such"], "The trainer cannot be built"),
    ],
)
def test_what_is_refused(place, tmp_path, capsys, options, message):
    assert main(call(place, tmp_path / "out.jsonl", *options, questions="few.jsonl")) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_does_not_fit_writes_nothing(place, tmp_path):
    from saccade.vlm import AnswerPlan, read_questions

    questions = read_questions(place / "few.jsonl")
    plan = AnswerPlan(f"local-dir:{place / 'llava'}", "var")
    with pytest.raises(ConfigError, match="no sink channels are published"):
        predict_answers(questions, plan, out=tmp_path / "a.jsonl", devices=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_are_one_and_a_killed_run_goes_on_with_another_number(place, tmp_path):
    two = ["--devices", "2", "--strategy", "ddp"]
    env = {"OMP_NUM_THREADS": "1"}
    tables = {}
    for name, options in (("one", []), ("two", two)):
        done = run_cli(*call(place, tmp_path / f"{name}.jsonl", *options), env=env)
        assert done.returncode == 3, done.stderr
        tables[name] = rows_of(tmp_path / f"{name}.jsonl")
    assert tables["two"] == tables["one"]
    assert [row["path"] for row in tables["two"]] == [f"q{i:02d}" for i in range(QUESTIONS)]

    out = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "saccade.apps.cli", *call(place, out, *two)]
    process = subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.DEVNULL, start_new_session=True)
    part = tmp_path / "killed.jsonl.rank1.part"
    deadline = time.monotonic() + 280
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    left = part.read_text().count("\n")
    done = run_cli(*call(place, out, "--devices", "1"), env=env)
    assert done.returncode == 3, done.stderr
    assert rows_of(out) == tables["one"]
    assert not part.exists()
    answered = [json.loads(line)["id"] for line in (tmp_path / "killed.items.jsonl").read_text().splitlines()]
    assert len(answered) == len(set(answered)) == QUESTIONS
    assert 0 < left < QUESTIONS
