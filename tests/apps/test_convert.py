"""``saccade convert`` as a command: what it prints and how it ends. The conversion itself: vision_backbones."""

import pytest
import timm
from safetensors.torch import save_file

from saccade.apps.cli import main


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "official.safetensors"
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    return path


def test_success(weights, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    assert main(["convert", str(weights), "-m", "test_vit", "-o", str(out)]) == 0
    shown, err = capsys.readouterr()
    keys = len(timm.create_model("test_vit").state_dict())
    assert shown == f"{out}: test_vit, {keys} keys, 3 classes; none missing, unexpected or reshaped\n"
    assert err == ""
    assert main(["convert", str(weights), "-m", "test_vit", "-o", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", str(weights), "-m", "test_vit", "-o", str(out), "--overwrite"]) == 0


def test_keys_that_are_not_accounted_for(weights, tmp_path, capsys):
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    for index in range(12):
        state[f"extra.{index}"] = state["norm.bias"].clone()
    del state["norm.bias"]
    save_file(state, weights)
    assert main(["convert", str(weights), "-m", "test_vit", "-o", str(tmp_path / "w.safetensors")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.strip() for line in err.splitlines()]
    assert lines[0] == f"saccade convert: The weights in {weights} do not fit test_vit; nothing was written."
    assert "1 missing: the model has them, the file does not" in lines
    assert "12 unexpected: the file has them, the model does not" in lines
    assert {f"extra.{index}" for index in range(12)} | {"norm.bias"} <= set(lines), "all keys, however many"
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]


def test_strictness_is_not_optional(weights, capsys):
    assert main(["convert", str(weights), "-m", "test_vit", "-o", "w.safetensors", "--strict", "off"]) == 2
    assert "unrecognized arguments" in capsys.readouterr().err
