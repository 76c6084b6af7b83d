"""Training in processes of its own: several at once, and interrupted."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.class_folders import write_folder
from tests.helpers import run_cli

pytestmark = pytest.mark.slow

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TINY = ["--model.backbone", "test_resnet", "--data.img_size", "32", "-j", "0", "--data.batch_size", "4"]
TWO = ["--devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Working directory with photos/: 11 training and 7 validation images per class, neither divisible by two."""
    folder = tmp_path_factory.mktemp("processes")
    write_folder(folder / "photos", {"train": 11, "val": 7})
    return folder


def succeed(*arguments, cwd):
    done = run_cli(*arguments, cwd=cwd, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return done


def rows_of(path):
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def trained(place):
    """A run on two processes."""
    done = succeed("fit", *TINY, *TWO, "--data.root", "photos", "--epochs", "2", "--name", "two", cwd=place)
    runs = list((place / "runs" / "two").glob("2*"))
    assert len(runs) == 1  # both processes agree on the folder
    assert done.stderr.count("\n") == 6  # and one of them speaks: two lines, table header, two rows, footer
    assert "2 x cpu fp32" in done.stderr
    assert (runs[0] / "log.txt").read_text() == done.stderr
    return runs[0]


def test_two_processes_evaluate_like_one(trained, place):
    """21 validation images on two processes: padded duplicates would change the metrics."""
    metrics = {}
    for name, options in (("one", ()), ("two", TWO)):
        done = succeed("validate", trained, *options, "--json", "-q", "-o", name, cwd=place)
        metrics[name] = json.loads(done.stdout)["metrics"]
    assert metrics["two"] == pytest.approx(metrics["one"], rel=1e-5)
    last = json.loads((trained / "metrics.json").read_text())
    assert metrics["one"]["val/acc"] == pytest.approx(last["best"]["val/acc"], rel=1e-5)
    assert metrics["one"]["val/loss"] == pytest.approx(last["best"]["val/loss"], rel=1e-5)


def test_two_processes_test_like_one(trained, place):
    results = [json.loads(succeed("test", trained, *more, "--json", "-q", cwd=place).stdout) for more in ((), TWO)]
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-5)


def test_two_processes_predict_every_item_once(trained, place):
    (place / "photos" / "val" / "red" / "broken.png").write_bytes(b"no image")
    try:
        tables = {}
        for name, options in (("one.csv", ()), ("two.csv", TWO)):
            done = run_cli("predict", trained, *options, "-o", name, "--overwrite", "-q", cwd=place, env=ONE_THREAD)
            assert done.returncode == 3, done.stderr
            tables[name] = rows_of(place / name)
    finally:
        (place / "photos" / "val" / "red" / "broken.png").unlink()
    paths = [row["path"] for row in tables["two.csv"]]
    assert paths == sorted(set(paths))
    assert len(paths) == 3 * (11 + 7) + 1
    for ours, theirs in zip(tables["two.csv"], tables["one.csv"], strict=True):
        assert [ours[name] for name in ("path", "status", "label_1", "error")] == [
            theirs[name] for name in ("path", "status", "label_1", "error")
        ]
        if ours["prob_1"]:
            assert float(ours["prob_1"]) == pytest.approx(float(theirs["prob_1"]), abs=1e-5)


def test_sharded_strategy_is_taken_or_refused_in_one_line(place):
    options = ["--data.root", "photos", "--epochs", "1", "--name", "fsdp", "--trainer.strategy", "fsdp"]
    done = run_cli("fit", *TINY, *options, cwd=place, env=ONE_THREAD)
    if done.returncode:  # no GPU: Lightning says so
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("saccade fit: The trainer cannot be built: ")
        assert len(done.stderr.strip().splitlines()) == 1


def start_fit(place, name):
    """Start a long fit in a process group of its own and wait until its second epoch has begun."""
    options = ["--data.root", "photos", "--epochs", "500", "--name", name, "-j", "1"]
    command = [sys.executable, "-m", "saccade.apps.cli", "fit", *TINY, *options]
    environment = {**os.environ, **ONE_THREAD}
    process = subprocess.Popen(
        command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not list((place / "runs" / name).glob("2*/metrics.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_t10_interrupted_fit_saves_and_goes_on(place, signum, code):
    name = signum.name.lower()
    process = start_fit(place, name)
    os.killpg(process.pid, signum)  # as a terminal or a cluster does: the decoding processes get it too
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    last = err.strip().splitlines()[-1]
    assert last.startswith("interrupted in epoch ")
    assert "checkpoints/last.ckpt saved; go on: saccade fit --resume runs/" in last
    assert "Traceback" not in err
    run = Path(place, last.partition("--resume ")[2])
    epochs = len(rows_of(run / "metrics.csv"))
    done = succeed("fit", "--resume", run, "--epochs", str(epochs + 2), cwd=place)
    assert "trainer.max_epochs 500 -> " in done.stderr
    assert [row["epoch"] for row in rows_of(run / "metrics.csv")] == [str(n + 1) for n in range(epochs + 2)]
