"""From a model's name to a model with weights: every source, and what is said when one cannot be used."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from saccade.errors import CheckpointError, ConfigError, MissingResourceError
from saccade.vision_backbones import ImageClassifier, ModelSource, load_model
from tests.helpers import assert_close, randn, run_cli
from tests.tiny_clip import clip_folder

TINY = "test_vit"  # timm's own test models: a few hundred thousand weights at 160 px


def make(name: str = TINY, classes: int = 3, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes).eval()


def same(loaded, model, size: int) -> None:
    images = randn(2, 3, size, size, seed=5)
    with torch.inference_mode():
        assert_close(loaded.model(images), model(images), rtol=0, atol=0)


# Weights by file


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
def test_number_of_classes_follows_the_file(tmp_path, file):
    model = make(classes=7)
    path = tmp_path / file
    save_file(model.state_dict(), path) if file.endswith("safetensors") else torch.save(model.state_dict(), path)
    loaded = load_model(ModelSource(TINY, weights=path))
    assert loaded.model.num_classes == 7
    assert loaded.weights.startswith("file:")
    assert loaded.class_names is None
    same(loaded, model, 160)


def test_weights_without_a_classifier_give_features(tmp_path):
    model = make(classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(ModelSource(TINY, weights=tmp_path / "w.safetensors"))
    assert loaded.model.num_classes == 0
    same(loaded, model, 160)


def test_checkpoint_of_timms_train_script(tmp_path):
    model = make("resnet10t", classes=4)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    content = {"epoch": 3, "arch": "resnet10t", "args": argparse.Namespace(lr=0.1), "state_dict": state}
    torch.save(content, tmp_path / "last.pth.tar")
    same(load_model(ModelSource("resnet10t", weights=tmp_path / "last.pth.tar")), model, 64)


def test_averaged_weights_come_first(tmp_path):
    model = make(classes=4)
    content = {"state_dict": make(classes=4, seed=9).state_dict(), "state_dict_ema": model.state_dict()}
    torch.save(content, tmp_path / "w.pth")
    same(load_model(ModelSource(TINY, weights=tmp_path / "w.pth")), model, 160)


def test_input_size_resizes_position_embeddings(tmp_path):
    save_file(make().state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(ModelSource(TINY, weights=tmp_path / "w.safetensors", img_size=64))
    assert loaded.data_config["input_size"] == (3, 64, 64)
    assert loaded.model(randn(1, 3, 64, 64)).shape == (1, 3)


def test_input_size_of_models_that_take_it_through_another_class(tmp_path):
    save_file(make("deit_tiny_distilled_patch16_224").state_dict(), tmp_path / "w.safetensors")
    source = ModelSource("deit_tiny_distilled_patch16_224", weights=tmp_path / "w.safetensors", img_size=64)
    assert load_model(source).model(randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("name", ["convnext_atto", "deit_tiny_distilled_patch16_224", TINY])
def test_weights_of_another_model_are_refused(tmp_path, name):
    other = make("vit_tiny_patch16_224", classes=3)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit|are not those of"):
        load_model(ModelSource(name, weights=tmp_path / "w.safetensors"))


def test_missing_and_unexpected_keys_are_named(tmp_path):
    state = make().state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.weight; 1 unexpected: extra\.weight"):
        load_model(ModelSource(TINY, weights=tmp_path / "w.safetensors"))


# Names


def test_random_weights_must_be_asked_for():
    with pytest.raises(ConfigError, match="would have random weights"):
        load_model(TINY)
    first, second = (load_model(ModelSource(TINY, random_weights=True), seed=4) for _ in range(2))
    assert first.weights == "random"
    same(first, second.model, 160)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'convnext_tiny'"):
        load_model("convnxt_tiny")
    with pytest.raises(ConfigError, match="Did you mean 'ViT-S-32'"):
        load_model("open_clip:ViT-S32")
    with pytest.raises(ConfigError, match=r"Unknown weights 'laion2b' of ViT-B-32.*Did you mean"):
        load_model("open_clip:ViT-B-32/laion2b")


# Folders


def test_timm_folder(tmp_path):
    model = make()
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
    loaded = load_model(f"local-dir:{tmp_path}")
    assert loaded.class_names == ["a", "b", "c"]
    assert loaded.weights.startswith("file:")
    assert len(loaded.weights) > len("file:")
    same(loaded, model, 160)
    smaller = load_model(ModelSource(f"local-dir:{tmp_path}", img_size=64))
    assert smaller.model(randn(1, 3, 64, 64)).shape == (1, 3)


def test_timm_folder_with_wrong_weights_is_refused(tmp_path):
    timm.models.save_for_hf(make(), tmp_path, safe_serialization=True)
    save_file(make("resnet10t").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"local-dir.*cannot be loaded"):
        load_model(f"local-dir:{tmp_path}")


def test_open_clip_folder(tmp_path):
    whole = clip_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"]}')  # transformers' own, often beside it
    loaded = load_model(f"local-dir:{tmp_path}")
    assert len(loaded.weights) > len("file:")
    assert loaded.data_config == {
        "input_size": (3, 64, 64),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    same(loaded, whole.visual, 64)


def test_open_clip_folder_with_weights_from_a_file(tmp_path):
    whole = clip_folder(tmp_path / "model", weights=False)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "w.pt")
    same(load_model(ModelSource(f"local-dir:{tmp_path / 'model'}", weights=tmp_path / "w.pt")), whole.visual, 64)


def test_open_clip_folder_without_weights_is_refused(tmp_path):
    clip_folder(tmp_path, weights=False)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(f"local-dir:{tmp_path}")


def test_open_clip_folder_with_wrong_weights_is_refused(tmp_path):
    clip_folder(tmp_path)
    save_file(make().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(f"local-dir:{tmp_path}")


def test_folder_of_neither_kind(tmp_path):
    with pytest.raises(ConfigError, match="holds neither"):
        load_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_model(f"local-dir:{tmp_path}")


# Runs of saccade fit


def test_training_checkpoint_and_run_folder(tmp_path):
    module = ImageClassifier("test_vit", num_classes=2, class_names=["cat", "dog"]).eval()
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    run = tmp_path / "runs" / "pets" / "20250301-101502"
    trainer.save_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    (run.parent / "latest").write_text(f"{run.name}\n")
    for name in (run / "checkpoints" / "best.ckpt", run, run.parent):
        loaded = load_model(str(name))
        assert loaded.class_names == ["cat", "dog"]
        same(loaded, module.model, 160)
    with pytest.raises(ConfigError, match="has its own weights"):
        load_model(ModelSource(str(run), weights="w.pth"))
    with pytest.raises(ConfigError, match="is no run folder"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(str(run / "checkpoints" / "other.ckpt"))


def test_checkpoint_of_something_else(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="was not written by `saccade fit`"):
        load_model(str(tmp_path / "other.ckpt"))


# open_clip by name


def test_open_clip_tower_with_random_weights():
    loaded = load_model(ModelSource("open_clip:ViT-S-32", random_weights=True, img_size=64))
    assert loaded.weights == "random"
    assert loaded.model(randn(1, 3, 64, 64)).shape == (1, 384)
    with pytest.raises(ConfigError, match="would have random weights"):
        load_model("open_clip:ViT-S-32")


# The hub's cache


def hub_cache(cache: Path, repository: str, files: Path) -> dict[str, str]:
    """Lay files out as huggingface_hub caches a repository, and return the variables that make it the only source."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_cached_hub_models_work_offline(tmp_path, kind, picture_folder):
    files = tmp_path / "files"
    if kind == "timm":
        timm.models.save_for_hf(make(), files, safe_serialization=True)
    else:
        clip_folder(files)
        (files / "model.safetensors").rename(files / "open_clip_model.safetensors")
        (files / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    env = hub_cache(tmp_path / "cache", "org/x", files)
    done = run_cli("embed", picture_folder, "-m", "hf-hub:org/x", "-o", tmp_path / "f.npy", "-q", "-j", 0, env=env)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_cached_configuration_without_weights_is_no_model(tmp_path, picture_folder):
    clip_folder(tmp_path / "files", weights=False)
    env = hub_cache(tmp_path / "cache", "org/x", tmp_path / "files")
    done = run_cli("embed", picture_folder, "-m", "hf-hub:org/x", "-o", tmp_path / "f.npy", "-q", "-j", 0, env=env)
    assert done.returncode == 4
    assert "'hf-hub:org/x' is not in the local cache" in done.stderr
    assert not (tmp_path / "f.npy").exists()


@pytest.fixture
def picture_folder(tmp_path) -> Path:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    return folder


def test_absent_hub_model(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingResourceError, match="pass --model local-dir:PATH"):
        load_model("hf-hub:org/not-there")
