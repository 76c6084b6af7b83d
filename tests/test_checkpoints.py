"""Reading weights safely and comparing them with a model."""

import argparse
import hashlib
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from saccade.checkpoints import (
    KeyReport,
    file_digest,
    file_sha256,
    filter_state_dict,
    load_weights,
    match_keys,
    read_checkpoint,
    read_state_dict,
)
from saccade.errors import CheckpointError, ConfigError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


def equal(got, expected=STATE) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    assert equal(read_state_dict(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path, legacy):
    torch.save(STATE, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert equal(read_state_dict(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"step": torch.tensor(1)}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"_orig_mod.module." + key: value for key, value in state.items()},
        lambda state: {"state_dict": {"weight": torch.zeros(1)}, "state_dict_ema": state},
        lambda state: {"model": {"weight": torch.zeros(1)}, "model_ema": state},
        lambda state: OrderedDict(state),
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, name="x")},
        lambda state: {**state, "version": "2", "epoch": 7},
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrap):
    torch.save(wrap(dict(STATE)), tmp_path / "w.pth")
    assert equal(read_state_dict(tmp_path / "w.pth"))


def test_a_module_called_module_keeps_its_name(tmp_path):
    state = {"encoder.module.weight": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    assert equal(read_state_dict(tmp_path / "w.pth"), state)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused(tmp_path):
    torch.save({"state_dict": STATE, "x": Attack(tmp_path / "trap")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        read_checkpoint(tmp_path / "w.pth")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut off"])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path / name)


def test_other_content(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list, expected a state dict"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"holds no tensors; its keys are \['epoch'\]"):
        read_state_dict(tmp_path / "none.pth")


def test_digests(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    digest = hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert file_sha256(tmp_path / "f") == digest
    assert file_digest(tmp_path / "f") == digest[:16]


def test_report():
    report = match_keys({"weight": torch.zeros(4, 3), "extra": torch.zeros(1)}, nn.Linear(3, 2))
    assert report == KeyReport(
        matched=(), missing=("bias",), unexpected=("extra",), reshaped=("weight: (4, 3) -> (2, 3)",)
    )
    assert not report.complete
    assert str(report) == "0 keys match; 1 missing: bias; 1 unexpected: extra; 1 reshaped: weight: (4, 3) -> (2, 3)"
    assert match_keys(STATE, nn.Linear(3, 2)).complete


def test_a_long_report_is_cut_and_the_details_are_not():
    report = match_keys({f"extra.{index}": torch.zeros(1) for index in range(20)}, nn.Identity())
    assert "... (12 more)" in str(report)
    assert "extra.19" not in str(report)
    assert "    extra.19" in report.details().splitlines()


def test_load_weights():
    layer = nn.Linear(3, 2)
    load_weights(layer, STATE, source="w.pth")
    assert equal(layer.state_dict())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"The weights in w\.pth do not fit Linear: .*1 missing: bias"):
        load_weights(layer, {"weight": torch.zeros(2, 3)}, source="w.pth")
    assert equal(layer.state_dict(), before), "nothing is loaded if not everything fits"


class Official(nn.Linear):
    """A model whose module has a key map, this one."""


def checkpoint_filter_fn(state, model):
    """Translate ``fc.*``; refuse anything else, as key maps of published models do, without a good message."""
    return {"weight": state["fc.weight"].reshape(model.weight.shape), "bias": state.pop("fc.bias")}


def test_key_map_of_the_models_module():
    state = {"fc.weight": STATE["weight"][:, :, None], "fc.bias": STATE["bias"]}
    assert equal(filter_state_dict(state, Official(3, 2)))
    assert "fc.bias" in state, "the argument stays as it is"
    with pytest.raises(CheckpointError, match="not those of Official: its key map fails with KeyError"):
        filter_state_dict(STATE, Official(3, 2))
