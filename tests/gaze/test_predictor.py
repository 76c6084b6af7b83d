"""Training: data modules with honest splits, the LightningModule, checkpoints that know what prediction needs."""

import csv
import math
import warnings

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from saccade.apps.cli import main
from saccade.datasets import ScanpathData
from saccade.datasets.drawn_search import search_scenes
from saccade.errors import CheckpointError, ConfigError
from saccade.gaze import FeatureFile, ScanpathPredictor, load_predictor, log_prob, recordings_of
from saccade.gaze.formats import write_scanpaths
from saccade.gaze.metrics import path_scores

SMALL = {"width": 48, "heads": 2, "hidden": 32, "encoder_layers": 1, "decoder_layers": 1, "position_rows": 7}


def train(model: ScanpathPredictor, data: ScanpathData, epochs: int) -> Trainer:
    """Train without files."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", **dict.fromkeys(silent, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer.fit(model, datamodule=data)
    return trainer


@pytest.fixture(scope="module")
def trained() -> tuple[ScanpathPredictor, ScanpathData, Trainer, list[float]]:
    """Train a small model on drawn scenes."""
    seed_everything(0, verbose=False)
    data = ScanpathData(generated_scenes=50, seen="nothing", batch_size=8)
    model = ScanpathPredictor(**SMALL, num_viewers=3, target_position="known", lr=3e-3)
    before = bits(model, data)
    trainer = train(model, data, 12)
    return model, data, trainer, [before, bits(model, data)]


def bits(model: ScanpathPredictor, data: ScanpathData) -> float:
    """Return bits per step of the validation paths, counted apart from the module."""
    model.eval()
    (batch,) = list(data.val_dataloader())
    viewers = batch["viewers"]
    total = log_prob(model.model, batch["scenes"], batch["paths"], viewers=viewers).sum()
    steps = int((batch["paths"] >= 0).sum()) + batch["paths"][..., 0].ge(0).sum()
    return -float(total / steps) / math.log(2)


def test_training_lowers_the_bits_and_logs_them(trained):
    trainer, (before, after) = trained[2:]
    assert after < before - 0.5
    assert trainer.callback_metrics["val/bits"].item() == pytest.approx(after, abs=1e-3)
    assert 0 < trainer.callback_metrics["val/probability"].item() < 1
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()


def test_sampled_paths_are_scored_against_the_viewers(trained):
    model, data, trainer, _ = trained
    logged = {name.removeprefix("val/"): value.item() for name, value in trainer.callback_metrics.items()}
    expected = model.eval().sampled_scores(data, "val")
    assert {"sequence_score", "scanmatch", "multimatch_direction", "tfp_sum", "delta"} <= expected.keys()
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    trials = data.samples("val")
    people = recordings_of(trials)
    agreement = path_scores(people, people)
    assert agreement["delta"] == agreement["tfp_mismatch"] == 0
    assert agreement["sequence_score"] < 1  # nobody is compared with himself
    assert people.lengths.tolist() == [len(path) for trial in trials for path in trial.paths]


def test_how_often_paths_are_sampled():
    data = ScanpathData(generated_scenes=20, seen="nothing")
    model = ScanpathPredictor(**SMALL, paths_every=2, path_trials=1)
    found = []
    model.sampled_scores = lambda data, stage: found.append(model.current_epoch) or {}
    train(model, data, 4)
    assert found == [1, 3]
    with pytest.raises(ConfigError, match="paths_every from 0"):
        ScanpathPredictor(**SMALL, paths_every=-1)


def test_checkpoint_is_enough_to_predict(trained, tmp_path):
    model, data, trainer, _ = trained
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    loaded = load_predictor(tmp_path / "model.ckpt")
    assert loaded.viewers == ["1", "2", "3"]
    assert loaded.max_length == max(len(path) for trial in data.samples("train") for path in trial.paths)
    assert loaded.features == {"kind": "nothing"}
    (batch,) = list(data.val_dataloader())
    with torch.inference_mode():
        expected = model.eval()(batch["scenes"], batch["paths"], batch["viewers"])
        assert torch.equal(loaded.model(batch["scenes"], batch["paths"], batch["viewers"]), expected)


def test_other_checkpoints_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="was not written by `saccade fit -c gaze"):
        load_predictor(tmp_path / "other.ckpt")


def test_viewers_of_model_and_data_must_agree():
    with pytest.raises(ConfigError, match="num_viewers is 5, the training data has 3 viewers"):
        train(ScanpathPredictor(**SMALL, num_viewers=5), ScanpathData(generated_scenes=20, seen="nothing"), 1)


@pytest.mark.parametrize(("unit", "column"), [("image", "image"), ("target", "task"), ("subject", "viewers")])
def test_splits_share_nothing(unit, column):
    data = ScanpathData(generated_scenes=60, seen="nothing", split_by=unit, val_fraction=0.2, test_fraction=0.2)
    values = []
    for split in ("train", "val", "test"):
        found = [getattr(trial, column) for trial in data.samples(split)]
        values.append({name for item in found for name in (item if isinstance(item, tuple) else (item,))})
    assert len(set.union(*values)) == sum(map(len, values))
    assert all(values)


@pytest.mark.filterwarnings("ignore:.*longer than mean:saccade.gaze.validation.ScanpathWarning")
def test_recordings_from_a_file(tmp_path):
    scenes, paths = search_scenes(12)
    write_scanpaths(paths, tmp_path / "paths.h5")
    for scene in scenes:
        scene.image.save(tmp_path / scene.name)
    data = ScanpathData(root=str(tmp_path / "paths.h5"), images=str(tmp_path), crop_size=20)
    drawn = ScanpathData(generated_scenes=12, crop_size=20)
    ours, theirs = (next(iter(module.val_dataloader())) for module in (data, drawn))
    assert ours["image"] == theirs["image"]
    assert torch.equal(ours["paths"], theirs["paths"])
    assert torch.equal(ours["scenes"].features, theirs["scenes"].features)
    gridded = ScanpathData(root=str(tmp_path / "paths.h5"), grid="3x4", seen="nothing")
    assert next(iter(gridded.train_dataloader()))["scenes"].num_objects == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seen": "features"}, "needs the file that features names"),
        ({"root": "a.csv"}, "needs the folder that images names"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_data_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        ScanpathData(**options)


def test_default_schedule_rises_and_falls_to_zero():
    model = ScanpathPredictor(**SMALL, lr=1e-2, warmup_epochs=1.0)
    data = ScanpathData(generated_scenes=40, seen="nothing", batch_size=4)
    rates = []

    def note(module: ScanpathPredictor) -> None:
        rates.append(module.optimizers().param_groups[0]["lr"])

    model.on_train_batch_start = lambda batch, number: note(model)
    train(model, data, 3)
    assert rates[0] < rates[3] < max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-3


@pytest.mark.filterwarnings("ignore:.*longer than mean:saccade.gaze.validation.ScanpathWarning")
def test_training_on_features_of_an_encoder(tmp_path):
    scenes, paths = search_scenes(12)
    write_scanpaths(paths, tmp_path / "paths.h5")
    kinds = {
        scene.name: (
            torch.from_numpy(scene.boxes).float(),
            torch.nn.functional.one_hot(torch.from_numpy(scene.colour), 4).float(),
        )
        for scene in scenes
    }
    FeatureFile.write(tmp_path / "colours.h5", kinds, encoder="colours")
    options = {"root": str(tmp_path / "paths.h5"), "seen": "features", "features": str(tmp_path / "colours.h5")}
    data = ScanpathData(**options)
    model = ScanpathPredictor(**SMALL, seen="features", feature_dim=4)
    train(model, data, 1)
    assert model.facts["features"] == {"kind": "features", "encoder": "colours"}
    batch = next(iter(data.val_dataloader()))
    first = kinds[batch["image"][0]][1]
    assert torch.equal(batch["scenes"].features[0, : len(first)], first)


@pytest.mark.slow
def test_the_table_of_a_run_has_sampled_figures_where_paths_were_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data.generated_scenes", "20", "--epochs", "3", "--model.paths_every", "2", "--name", "a", "-q"]
    assert main(["fit", "-c", "gaze/oat", *options]) == 0
    (table,) = tmp_path.glob("runs/a/2*/metrics.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [bool(row["val/scanmatch"]) for row in rows] == [False, True, False]
    assert all(row["val/bits"] for row in rows)
