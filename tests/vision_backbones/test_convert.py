"""Converting checkpoints: official names, reshaping, refusals, and that nothing in a file can run code."""

import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saccade.checkpoints import file_sha256
from saccade.errors import CheckpointError, ConfigError
from saccade.vision_backbones import ImageClassifier, ModelSource, load_model
from saccade.vision_backbones.convert import convert_checkpoint
from tests.helpers import assert_close, randn

MODEL = "convnext_atto"


def make(name: str = MODEL, classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=classes).eval()


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a timm ConvNeXt's weights as facebookresearch/ConvNeXt publishes them; its 1x1 convolutions are linear."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"stages\.(\d+)\.downsample\.(\d+)", r"downsample_layers.\1.\2", key)
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        name = name.replace("head.fc.", "head.").replace("head.norm.", "norm.")
        renamed[name] = value.flatten(1) if "pwconv" in name and value.ndim == 4 else value
    return renamed


def test_official_names_and_shapes(tmp_path):
    model = make(classes=5)
    source, out = tmp_path / "official.pth", tmp_path / "w.safetensors"
    torch.save({"model": official(model.state_dict())}, source)
    assert not set(official(model.state_dict())) & set(model.state_dict()) - {"head.weight", "head.bias"}

    done = convert_checkpoint(source, model=MODEL, out=out)
    assert (done.model, done.num_classes, done.report.complete) == (MODEL, 5, True)
    written = load_file(out)
    assert list(written) == sorted(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(written[key], value), key
    with safe_open(out, "pt") as file:
        assert file.metadata()["source_sha256"] == file_sha256(source)
        assert file.metadata()["model"] == MODEL
        assert file.metadata()["saccade_version"]

    images = randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert_close(load_model(ModelSource(MODEL, weights=out)).model(images), model(images), rtol=0, atol=0)
        plain = timm.create_model(MODEL, num_classes=5, checkpoint_path=str(out)).eval()
        assert_close(plain(images), model(images), rtol=0, atol=0)


def test_every_key_must_be_accounted_for(tmp_path):
    state = make("test_vit").state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    state["head.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "w.safetensors", model="test_vit", out=tmp_path / "out.safetensors")
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "norm.weight" in lines
    assert "extra.weight" in lines
    assert "head.bias: (4,) -> (3,)" in lines
    assert not (tmp_path / "out.safetensors").exists()


def test_another_models_weights(tmp_path):
    save_file(make("test_vit").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="not those of ConvNeXt"):
        convert_checkpoint(tmp_path / "w.safetensors", model=MODEL, out=tmp_path / "out.safetensors")


class Attack:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(tmp_path, legacy):
    trap = tmp_path / "trap"
    content = {"state_dict": make("test_vit").state_dict(), "optimizer": Attack(trap)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        convert_checkpoint(tmp_path / "w.pth", model="test_vit", out=tmp_path / "out.safetensors")
    assert not trap.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert trap.exists(), "the attack itself must work, or this test shows nothing"


def test_existing_file_is_kept(tmp_path):
    out = tmp_path / "out.safetensors"
    save_file(make("test_vit").state_dict(), tmp_path / "w.safetensors")
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists"):
        convert_checkpoint(tmp_path / "w.safetensors", model="test_vit", out=out)
    assert out.read_bytes() == b"mine"
    convert_checkpoint(tmp_path / "w.safetensors", model="test_vit", out=out, overwrite=True)
    assert "norm.weight" in load_file(out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "w.safetensors"]


@pytest.mark.parametrize(
    ("source", "model", "out", "message"),
    [
        ("absent.pth", "test_vit", "out.safetensors", "does not exist"),
        ("w.pth", "test_vit", "out.pth", "must end in .safetensors"),
        ("w.pth", None, "out.safetensors", "Say with -m"),
        ("w.pth", "tset_vit", "out.safetensors", "Did you mean 'test_vit'"),
    ],
)
def test_unusable_arguments(tmp_path, source, model, out, message):
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(tmp_path / source, model=model, out=tmp_path / out)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_training_checkpoint(tmp_path, ema):
    from lightning.pytorch import Trainer

    module = ImageClassifier("test_vit", num_classes=2, class_names=["cat", "dög"], ema_decay=ema)
    if module.ema is not None:
        torch.nn.init.constant_(module.ema.get_parameter("head.bias"), 7.0)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    source, out = tmp_path / "best.ckpt", tmp_path / "w.safetensors"
    trainer.save_checkpoint(source, weights_only=True)

    done = convert_checkpoint(source, out=out)
    assert (done.model, done.num_classes) == ("test_vit", 2)
    used = module.model if module.ema is None else module.ema
    for key, value in used.state_dict().items():
        assert torch.equal(load_file(out)[key], value), key
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == ["cat", "dög"]
        assert json.loads(file.metadata()["data_config"])["input_size"] == [3, 160, 160]
    with pytest.raises(ConfigError, match="holds 'test_vit', not 'convnext_atto'"):
        convert_checkpoint(source, model=MODEL, out=tmp_path / "other.safetensors")
