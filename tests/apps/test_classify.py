import json
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from PIL import Image
from skimage import data

from saccade.apps.cli import main
from tests.helpers import run_cli
from tests.pictures import BROKEN, GOOD, write_pictures

MODEL = ("-m", "test_resnet", "--random-weights", "--img-size", "64")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("classify") / "pictures")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixty crops and two broken files."""
    folder = tmp_path_factory.mktemp("many") / "pictures"
    folder.mkdir()
    for index in range(60):
        crop = data.astronaut()[index * 5 : index * 5 + 180, 40:260]
        Image.fromarray(crop).save(folder / f"{index:03d}.png")
    (folder / "007.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / "999.png").touch()
    return folder


def test_the_folder_that_has_everything(pictures, tmp_path):
    got = run_cli("classify", pictures, *MODEL, "-o", tmp_path / "p.csv", "--topk", "2")
    assert got.returncode == 3, got.stderr
    assert got.stdout == ""
    assert f"done {len(GOOD)}  failed {len(BROKEN)}" in got.stderr
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0] == "path,status,label_1,index_1,prob_1,label_2,index_2,prob_2,error"
    assert len(lines) == 1 + len(GOOD) + len(BROKEN)
    assert "broken/empty.png,failed,,,,,,,the file is empty" in lines


def test_json_summary_alone_on_standard_output(pictures, tmp_path, capsys):
    assert main(["embed", f"{pictures}/a", *MODEL, "-o", f"{tmp_path}/f.h5", "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["done"] == 1


def test_dry_run(pictures, tmp_path, capsys):
    assert main(["classify", str(pictures), *MODEL, "-o", f"{tmp_path}/p.csv", "--dry-run"]) == 0
    assert "13 images would be processed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_setting_in_the_same_place(pictures, tmp_path, capsys):
    command = ["classify", f"{pictures}/a", *MODEL, "-o", f"{tmp_path}/p.csv"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*command, "--topk", "2"]) == 2
    assert "topk: 5 -> 2" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unwritable_format_is_refused_before_work(pictures, tmp_path, capsys):
    assert main(["classify", str(pictures), *MODEL, "-o", f"{tmp_path}/p.xlsx"]) == 2
    assert ".csv" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def kill_in_the_middle(command, journal, after=5):
    """Start a command, wait until some items are done, and kill it with no chance to clean up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "saccade.apps.cli", *map(str, command)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not journal.exists() or len(journal.read_bytes().splitlines()) < after:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 17, 40])
def test_killed_and_run_again_equals_uninterrupted(many, tmp_path, after):
    command = ("classify", many, *MODEL, "-b", "4", "-j", "1", "--logits")
    whole = run_cli(*command, tmp_path / "wl.h5", "-o", tmp_path / "w.csv")
    assert whole.returncode == 3, whole.stderr
    again = (*command, tmp_path / "kl.h5", "-o", tmp_path / "k.csv")
    kill_in_the_middle(again, tmp_path / "k.items.jsonl", after)
    assert not (tmp_path / "k.csv").exists()
    got = run_cli(*again)
    assert got.returncode == 3
    assert "resume:" in got.stderr
    assert (tmp_path / "k.csv").read_bytes() == (tmp_path / "w.csv").read_bytes()
    with h5py.File(tmp_path / "kl.h5") as one, h5py.File(tmp_path / "wl.h5") as other:
        assert np.array_equal(one["logits"][:], other["logits"][:])
        assert list(one["paths"][:]) == list(other["paths"][:])


@pytest.mark.slow
def test_killed_embed(many, tmp_path):
    command = ("embed", many, *MODEL, "-b", "4", "-j", "1")
    assert run_cli(*command, "-o", tmp_path / "w.h5").returncode == 3
    kill_in_the_middle((*command, "-o", tmp_path / "k.h5"), tmp_path / "k.items.jsonl")
    assert run_cli(*command, "-o", tmp_path / "k.h5").returncode == 3
    with h5py.File(tmp_path / "k.h5") as one, h5py.File(tmp_path / "w.h5") as other:
        assert np.array_equal(one["features"][:], other["features"][:])


@pytest.mark.slow
def test_interrupted_by_the_user(many, tmp_path):
    command = [sys.executable, "-m", "saccade.apps.cli", "classify", many, *MODEL, "-b", "2", "-o", tmp_path / "p.csv"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "p.items.jsonl"
    while not journal.exists() or not journal.read_bytes():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert json.loads((tmp_path / "p.run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_united_shards_equal_the_whole(many, tmp_path):
    command = ("classify", many, *MODEL, "-b", "8", "--logits")
    run_cli(*command, tmp_path / "wl.h5", "-o", tmp_path / "w.csv")
    for index in (1, 2, 3):
        run_cli(*command, tmp_path / "sl.h5", "-o", tmp_path / "s.csv", "--shard", f"{index}/3")
    assert run_cli("merge", tmp_path / "s.csv").returncode == 3
    assert run_cli("merge", tmp_path / "sl.h5").returncode == 0
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "w.csv").read_bytes()
    with h5py.File(tmp_path / "sl.h5") as one, h5py.File(tmp_path / "wl.h5") as other:
        assert np.array_equal(one["logits"][:], other["logits"][:])


@pytest.mark.slow
def test_real_photographs(data_root, tmp_path):
    flowers = data_root / "images/flowers/val"
    got = run_cli("classify", flowers, *MODEL, "-o", tmp_path / "p.jsonl")
    assert got.returncode == 0, got.stderr
    paths = [json.loads(line)["path"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert paths == sorted(path.relative_to(flowers).as_posix() for path in flowers.rglob("*.jpg"))
