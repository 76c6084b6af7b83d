"""The dispatcher: what it imports, what it prints where, and the exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from saccade import __version__
from saccade.apps.cli import COMMANDS, main
from saccade.errors import ConfigError
from tests.helpers import run_cli

MODEL = ("-m", "test_resnet", "--random-weights", "--img-size", "64", "-j", "0")
HEAVY = {
    *("torch", "torchvision", "torchmetrics", "timm", "lightning", "transformers", "open_clip", "numpy", "PIL", "cv2"),
    *("sklearn", "skimage", "matplotlib", "h5py", "tifffile", "openslide", "safetensors", "jsonargparse", "rich"),
}
IMPORTED = """
import sys
from saccade.apps.cli import main
code = main(sys.argv[1:])
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (80, 60), "red").save(folder / "a.png")
    return folder


# What is imported


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["--version"],
        ["list", "models", "convnext*"],
        ["list", "mil"],
        ["config", "ls"],
        ["config", "show", "image/finetune"],
        ["completion", "bash"],
        *([command.name, "--help"] for command in COMMANDS),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(command):
    done = subprocess.run([sys.executable, "-c", IMPORTED, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not set(done.stderr.split()) & HEAVY


def test_fit_help_fits_one_screen(capsys):
    assert main(["fit", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_overview(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == shown
    for command in COMMANDS:
        assert f"  {command.name} " in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"saccade {__version__}\n"


# Exit codes, with the message on stderr and stdout empty


def test_0_all_done(photos, tmp_path):
    done = run_cli("classify", photos, *MODEL, "-o", tmp_path / "p.csv")
    assert (done.returncode, done.stdout) == (0, "")
    assert "done 1  failed 0" in done.stderr


def test_1_every_item_failed(photos, tmp_path, capsys):
    (photos / "a.png").write_bytes(b"no picture")
    assert main(["classify", str(photos), *MODEL, "-o", f"{tmp_path}/p.csv"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "done 0  failed 1" in err


def test_1_the_system_refuses(photos, capsys):
    file = photos / "a.png"
    assert main(["classify", str(photos), *MODEL, "-q", "-o", f"{file}/p.csv"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert one_line(err) == f"saccade classify: File exists: {file}"


def test_2_unknown_command():
    done = run_cli("clasify")
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr).startswith("saccade: unknown command 'clasify'. Did you mean 'classify'")


def test_2_wrong_option():
    done = run_cli("classify", "photos", "-m", "resnet18", "-o", "p.csv", "--tpok", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("unrecognized arguments: --tpok 3. Did you mean '--topk'?\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "resnt18", "-o", "p.csv"), "Unknown model 'resnt18'. Did you mean 'resnet18'"),
        (("-m", "resnet18", "-o", "p.csv"), "would have random weights"),
        ((*MODEL, "-o", "p.csv", "--shard", "4/3"), "shard must be I/N"),
        ((*MODEL, "-o", "p.csv", "--topk", "0"), "topk must be at least 1"),
    ],
)
def test_2_unusable_setting(photos, capsys, monkeypatch, options, message):
    monkeypatch.chdir(photos)
    assert main(["classify", ".", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in one_line(err)


def test_3_some_items_failed(photos, tmp_path, capsys):
    (photos / "b.png").write_bytes(b"no picture")
    assert main(["classify", str(photos), *MODEL, "-o", f"{tmp_path}/p.csv"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "done 1  failed 1" in err


def test_4_device_not_here(photos, tmp_path, capsys):
    assert main(["classify", str(photos), *MODEL, "-o", f"{tmp_path}/p.csv", "--device", "cuda:63"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "'cuda:63' is not on this machine" in one_line(err)


def test_130_interrupted(photos, tmp_path):
    for index in range(40):
        Image.new("RGB", (80, 60), (index, 0, 0)).save(photos / f"{index}.png")
    command = [
        sys.executable,
        "-m",
        "saccade.apps.cli",
        "classify",
        photos,
        *MODEL,
        "-b",
        "1",
        "-o",
        tmp_path / "p.csv",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "p.items.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted" in err
    assert "Traceback" not in err


def test_traceback_on_demand(monkeypatch):
    absent = ["config", "show", "image/absent"]
    assert main(absent) == 2
    monkeypatch.setenv("SACCADE_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="neither a file nor a shipped name"):
        main(absent)
    monkeypatch.setenv("SACCADE_TRACEBACK", "0")
    assert main(absent) == 2
    with pytest.raises(ConfigError, match="No images found"):
        main(["classify", "absent/*.png", *MODEL, "-o", "p.csv", "-vv"])


def test_reader_of_a_pipe_may_leave():
    command = f"{sys.executable} -m saccade.apps.cli list models | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("NAME")
    assert done.stderr == ""


# Without network


def cut_off() -> list[str]:
    """Return a command prefix that takes the network away, empty where the machine does not allow that."""
    prefix = ["unshare", "--net", "--map-root-user"]
    allowed = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if allowed and allowed.returncode == 0 else []


@pytest.mark.parametrize("model", [["hf-hub:org/x"], ["resnet18", "--pretrained"]], ids=" ".join)
def test_without_network(photos, tmp_path, model):
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path / "torch")}
    prefix = cut_off()
    if not prefix:  # an address that nothing answers at
        env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    command = [*prefix, sys.executable, "-m", "saccade.apps.cli", "classify", photos, "-o", tmp_path / "p.csv", "-m"]
    done = subprocess.run([*command, *model], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (4, "")
    assert f"Model {model[0]!r} is not in the local cache and cannot be downloaded" in one_line(done.stderr)
    assert not (tmp_path / "p.csv").exists()


def test_help_list_and_config_without_network():
    prefix = cut_off() or pytest.skip("this machine does not let a test take the network away")
    for command in (["--help"], ["list", "models", "--json"], ["config", "ls"]):
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "saccade.apps.cli", *command], capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert command != ["list", "models", "--json"] or len(json.loads(done.stdout)) > 1000


def one_line(text: str) -> str:
    """Return the only line of a message."""
    (line,) = text.splitlines()
    return line
