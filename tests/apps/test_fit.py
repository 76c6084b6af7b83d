import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from saccade.apps.cli import main
from tests.class_folders import write_folder
from tests.helpers import run_cli

TINY = ["--model.backbone", "test_resnet", "--data.img_size", "32", "-j", "0", "--data.batch_size", "6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Working directory with photos/ (12 training, 6 validation images)."""
    folder = tmp_path_factory.mktemp("fit")
    write_folder(folder / "photos", {"train": 4, "val": 2})
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """A finished run of two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert (
            main(["fit", *TINY, "--data.root", "photos", "--epochs", "2", "--lr", "0.01", "--name", "tiny", "-q"]) == 0
        )
    return next((place / "runs" / "tiny").glob("2*"))


@pytest.fixture
def fit(place, monkeypatch, capsys):
    """Call ``saccade fit`` in the working directory; returns exit code, stdout, stderr."""
    monkeypatch.chdir(place)

    def call(*options):
        code = main(["fit", *options])
        return code, *capsys.readouterr()

    return call


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def newest(name):
    parent = Path("runs") / name
    return parent / (parent / "latest").read_text().strip()


def test_run_folder_holds_everything(trained, place):
    files = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert files == {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "command.txt",
        "config.yaml",
        "log.txt",
        "metrics.csv",
        "metrics.json",
    }
    assert (place / "runs/tiny/latest").read_text().strip() == trained.name
    assert config_of(trained)["trainer"]["max_epochs"] == 2
    assert (trained / "command.txt").read_text().startswith("saccade fit ")


def test_metrics_files_agree(trained):
    with (trained / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    summary = json.loads((trained / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["val/acc"]) == summary["last"]["val/acc"]
    assert summary["best"]["val/acc"] == max(float(row["val/acc"]) for row in rows)
    assert summary["monitor"] == "val/acc"


def test_checkpoint_holds_config_and_facts(trained):
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert yaml.safe_load(content["saccade_config"]) == config_of(trained)
    assert content["saccade"]["class_names"] == ["blue", "green", "red"]
    assert content["saccade"]["data_config"]["input_size"] == [3, 32, 32]


def test_screen(fit):
    code, out, err = fit(*TINY, "--data.root", "photos", "--epochs", "1", "--name", "screen")
    assert (code, out) == (0, "")
    lines = err.splitlines()
    assert lines[0].startswith(
        "saccade 0.1.0  fit  ImageClassifier/test_resnet (0.4 M)  photos: 12 train, 6 val, 3 classes"
    )
    assert lines[1].split()[0] == "run"
    assert lines[1].endswith("seed 0   cpu fp32")
    assert lines[2].split() == ["epoch", "train/loss", "val/loss", "val/acc", "lr", "time"]
    assert lines[3].split()[0] == "1"
    assert lines[4].startswith("best val/acc")
    assert "next: saccade test runs/screen/" in lines[4]
    assert len(lines) == 5  # no tips, no banners, no warnings
    assert newest("screen").joinpath("log.txt").read_text() == err


def test_json_is_the_whole_of_stdout(fit):
    code, out, err = fit(*TINY, "--data.root", "photos", "--epochs", "1", "--name", "json", "--json", "-q")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert summary["epochs"] == 1
    assert Path(summary["run"], "metrics.json").is_file()


def test_second_fit_never_touches_the_first(fit, trained, monkeypatch):
    from saccade.apps import run_folder

    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}

    class Clock(run_folder.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    for _ in range(2):  # two in the same second
        assert fit(*TINY, "--data.root", "photos", "--epochs", "1", "--name", "tiny", "-q")[0] == 0
    assert {path.name for path in Path("runs/tiny").glob("20260102*")} == {"20260102-030405", "20260102-030405-2"}
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_t1_another_optimiser_gets_its_own_defaults(fit):
    options = ["--data.root", "photos", "--epochs", "1", "--model.optimizer", "SGD", "--name", "t1", "-q"]
    assert fit(*TINY, *options)[0] == 0
    optimizer = config_of(newest("t1"))["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert optimizer["init_args"]["weight_decay"] == 0.0
    state = torch.load(newest("t1") / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0}
    assert "nesterov" in state["param_groups"][0]


def test_t2_precedence(fit, trained, tmp_path):
    """Options win over later configs, those over earlier ones, those over the checkpoint, that over the defaults."""
    (tmp_path / "a.yaml").write_text("data: {init_args: {batch_size: 5, augment: {hflip: 0.25}}}\n")
    (tmp_path / "b.yaml").write_text("data: {init_args: {batch_size: 4}}\nmodel: {init_args: {lr: 0.5}}\n")
    configs = ["-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml")]
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    code, _, err = fit("--resume", str(run), *configs, "--lr", "0.02", "--epochs", "3")
    assert code == 0
    config = config_of(run)
    data, model = config["data"]["init_args"], config["model"]["init_args"]
    assert model["lr"] == 0.02  # option
    assert data["batch_size"] == 4  # later config
    assert data["augment"]["hflip"] == 0.25  # earlier config
    assert data["img_size"] == 32  # checkpoint
    assert data["val_fraction"] == 0.2  # default
    changed = next(line for line in err.splitlines() if line.startswith("changed since the checkpoint"))
    assert "model.lr 0.01 -> 0.02" in changed
    assert "data.batch_size 6 -> 4" in changed
    assert err.count("model.lr 0.01") == 1
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["initial_lr"] for group in state["param_groups"]} == {0.02}


def test_t3_checkpoint_alone_is_enough(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["validate", str(trained / "checkpoints" / "best.ckpt"), "--json", "-q"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    best = json.loads((trained / "metrics.json").read_text())["best"]
    assert metrics["val/acc"] == best["val/acc"]
    assert metrics["val/loss"] == pytest.approx(best["val/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "ImageClasifier"],
            "unknown LightningModule class 'ImageClasifier'. Did you mean 'ImageClassifier'",
        ),
        (
            ["--data", "ImageFolderDat"],
            "unknown LightningDataModule class 'ImageFolderDat'. Did you mean 'ImageFolderData'",
        ),
        (["--model.backbone", "test_resnt"], "Unknown model 'test_resnt'. Did you mean 'test_resnet'"),
        (["--trainer.max_epoch", "3"], "unknown key 'max_epoch' of trainer. Did you mean 'max_epochs'"),
        (["--model.optimizer", "SDG"], "unknown Optimizer class 'SDG'. Did you mean 'SGD'"),
        (["--data.batch_size", "many"], "option --data.batch_size: expected int, got many"),
        (["--model.num_classes", "7"], "model.num_classes is taken from the data; leave it out"),
        (["-c", "image/finetun"], "neither a file nor a shipped name. Did you mean 'image/finetune'"),
        (["--trainer.strategy", "ddq"], "The trainer cannot be built: You selected an invalid strategy name"),
        (["--precision", "fp8"], "Unknown precision 'fp8'. Use fp32, bf16, fp16"),
        (["--data.root", "nowhere"], "nowhere' does not exist. Pass --data.root FOLDER"),
        (["--resume", "nowhere"], "'nowhere' does not exist; expected a checkpoint or a run folder"),
    ],
)
def test_t5_mistakes_are_one_line_with_a_suggestion(fit, options, message):
    code, out, err = fit(*TINY, "--data.root", "photos", *options, "--epochs", "1", "--name", "mistake")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs/mistake").exists()


def test_unknown_key_of_a_config_is_named_with_its_line(fit, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("data:\n  class_path: ImageFolderData\n  init_args:\n    root: photos\n    bach_size: 3\n")
    code, _, err = fit("-c", "image/finetune", "-c", str(path))
    assert code == 2
    assert f"{path}, line 5: unknown key 'bach_size' of data. Did you mean 'batch_size'" in err


def test_no_data_folder_is_said_before_the_model_is_built(fit):
    code, _, err = fit("--model.backbone", "vit_giant_patch14_224")  # a billion weights: not built in this test
    assert code == 2
    assert "Pass --data.root FOLDER" in err


def test_unreadable_training_image_is_named(fit, place):
    write_folder(Path("damaged"), {"train": 4, "val": 2})
    Path("damaged/train/red/001.png").write_bytes(b"no image")
    options = [*TINY, "--data.root", "damaged", "--epochs", "1", "--name", "damaged"]
    code, _, err = fit(*options)
    assert code == 1
    assert "saccade fit: Image 'train/red/001.png' cannot be used" in err
    assert "Traceback" not in err
    code, _, err = fit(*options, "--data.skip_unreadable", "true")
    assert code == 0
    assert "warning: train/red/001.png is left out" in err


class StopAt(Callback):
    """Ctrl-C before a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 4])  # within the second epoch, and before it
def test_continued_run_equals_an_uninterrupted_one(fit, step):
    common = [*TINY, "--data.root", "photos", "--lr", "0.01", "--epochs", "3"]
    assert fit(*common, "--name", f"whole{step}", "-q")[0] == 0
    stop = json.dumps([{"class_path": f"{StopAt.__module__}.StopAt", "init_args": {"step": step}}])
    code, _, err = fit(*common, "--name", f"parts{step}", "--trainer.callbacks", stop)
    assert code == 130
    assert (
        f"interrupted in epoch {step // 2 + 1}   checkpoints/last.ckpt saved; go on: saccade fit --resume runs/" in err
    )
    assert fit("--resume", "--name", f"parts{step}", "--trainer.callbacks", "null", "-q")[0] == 0
    whole, parts = (csv_rows(newest(f"{name}{step}") / "metrics.csv") for name in ("whole", "parts"))
    assert [row["epoch"] for row in parts] == ["1", "2", "3"]
    for name in ("val/loss", "val/acc", "lr"):
        assert [row[name] for row in parts] == [row[name] for row in whole]
    assert len((newest(f"parts{step}") / "command.txt").read_text().splitlines()) == 2


def csv_rows(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_resuming_a_finished_run_does_nothing(fit, trained):
    before = (trained / "metrics.csv").read_text()
    code, _, err = fit("--resume", str(trained))
    assert code == 0
    assert "nothing left to train: 2 epochs are done; more with --epochs N" in err
    assert (trained / "metrics.csv").read_text() == before


def test_resuming_cannot_change_the_model(fit, trained):
    code, _, err = fit("--resume", str(trained), "--model.backbone", "test_vit")
    assert code == 2
    assert "cannot change model.backbone test_resnet -> test_vit" in err


def test_moved_run_keeps_its_best_checkpoint(fit, trained, tmp_path):
    import shutil

    moved = tmp_path / "elsewhere"
    shutil.copytree(trained, moved)
    assert fit("--resume", str(moved), "--epochs", "4", "-q")[0] == 0
    rows = csv_rows(moved / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    best = torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)
    first_best = max(range(4), key=lambda index: float(rows[index]["val/acc"]))
    assert best["epoch"] == first_best
    assert len(list((moved / "checkpoints").iterdir())) == 2


def test_short_options_appear_under_their_dotted_names(fit, capsys):
    short = [
        "--epochs",
        "7",
        "--lr",
        "0.5",
        "-b",
        "9",
        "--devices",
        "1",
        "--precision",
        "bf16",
        "--seed",
        "3",
        "-j",
        "1",
    ]
    with pytest.raises(SystemExit) as stop:
        fit("--data.root", "photos", *short, "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_epochs"] == 7
    assert str(config["trainer"]["devices"]) == "1"
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["model"]["init_args"]["lr"] == 0.5
    assert (config["data"]["init_args"]["batch_size"], config["data"]["init_args"]["num_workers"]) == (9, 1)
    assert config["seed_everything"] == 3


def test_seed_decides_the_result(fit):
    def losses(name, seed):
        assert fit(*TINY, "--data.root", "photos", "--epochs", "1", "--name", name, "--seed", seed, "-q")[0] == 0
        return csv_rows(newest(name) / "metrics.csv")[0]["train/loss"]

    assert losses("seed-a", "1") == losses("seed-b", "1") != losses("seed-c", "2")


def test_help_fits_one_screen_and_points_on(capsys):
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 32
    assert "--help-all" in shown
    assert "saccade config ls" in shown


def test_help_imports_neither_torch_nor_lightning():
    code = "import sys; from saccade.apps.cli import main; main(['fit', '--help']); main(['test', '--help']);"
    code += "assert not {'torch', 'lightning', 'timm', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_all_shows_every_option(capsys):
    assert main(["fit", "--help-all"]) == 0
    shown = capsys.readouterr().out
    for option in ("--trainer.max_epochs", "--model.mixup_alpha", "--data.val_fraction", "--data.augment.KEY"):
        assert option in shown


def test_works_as_an_own_process(place):
    """Nothing of the above depends on living in the process of the tests."""
    done = run_cli(
        "fit", *TINY, "--data.root", "photos", "--epochs", "1", "--name", "own", cwd=place, env={"OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert len(done.stderr.splitlines()) == 5
