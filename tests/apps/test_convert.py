"""``saccade convert`` as a command: what it prints and how it ends. The conversion itself: vision_backbones."""

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from saccade.apps.cli import main
from saccade.mil import ABMIL, ACMILGA, ACMILMHA, CLAMMB, CLAMSB, DSMIL, TransMIL, load_model


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


def test_models_of_slides(tmp_path, capsys):
    """CLAM's files hold the labels of its instance loss, and the prefix of DataParallel inside the names."""
    state = CLAMSB(12, 3, (16, 8)).eval().state_dict()
    official = {key.replace("attention_net.", "attention_net.module."): value for key, value in state.items()}
    torch.save(official | {"instance_loss_fn.labels": torch.arange(2)}, tmp_path / "s_0_checkpoint.pt")
    out = tmp_path / "clam.safetensors"
    convert = ["convert", str(tmp_path / "s_0_checkpoint.pt"), "-m"]
    assert main([*convert, "clam_sb", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown == (
        f"{out}: clam_sb, features of width 12, 3 logits, {len(state)} keys; none missing, unexpected or reshaped; "
        "left out, no weights: instance_loss_fn.labels\n"
    )
    bags = torch.randn(1, 5, 12)
    model = CLAMSB(12, 3, (16, 8))
    model.load_state_dict(state)
    torch.testing.assert_close(load_model(out)(bags).logits, model.eval()(bags).logits)
    assert main([*convert, "clam_sb", "-o", str(out)]) == 2
    assert main([*convert, "transmil", "-o", str(tmp_path / "t.safetensors")]) == 1
    assert "are those of clam_sb, not of transmil" in capsys.readouterr().err
    torch.save(official | {"attention_net.9.weight": torch.zeros(1)}, tmp_path / "s_0_checkpoint.pt")
    assert main([*convert, "clam_sb", "-o", str(tmp_path / "u.safetensors")]) == 1
    assert "1 unexpected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("acmil_ga", ACMILGA(12, 3, 16, 8)),
        ("acmil_mha", ACMILMHA(12, 3, 16)),
        ("abmil", ABMIL(12, 3, 16, 8)),
        ("clam_mb", CLAMMB(12, 3, (16, 8))),
        ("transmil", TransMIL(12, 3, 32)),
        ("dsmil", DSMIL(12, 1)),
    ],
)
def test_every_aggregator_converts(tmp_path, capsys, name, model):
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "official.pth")
    assert main(["convert", str(tmp_path / "official.pth"), "-m", name, "-o", str(tmp_path / "m.safetensors")]) == 0
    assert f"{name}, features of width 12, " in capsys.readouterr().out
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["model"] == name
        assert set(file.keys()) == set(model.state_dict())
