from pathlib import Path

import pytest

from saccade.apps.config_errors import check_names, setting_of_option, settings_of_text, split_options
from saccade.apps.lightning_cli import check_config
from saccade.errors import ConfigError

GOOD = """\
model:
  class_path: ImageClassifier
  init_args:
    backbone: test_resnet
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: ImageFolderData
  init_args:
    augment: {hflip: 0.1}
trainer: {max_epochs: 3}
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("backbone: test_resnet", "bakbone: test_resnet", 4, "unknown key 'bakbone' of model. Did you mean 'backbone'"),
        ("test_resnet", "test_resnt", 4, "Unknown model 'test_resnt'. Did you mean 'test_resnet'"),
        ("ImageClassifier", "ImgClassifier", 2, "unknown LightningModule class 'ImgClassifier'"),
        (
            "torch.optim.AdamW",
            "torch.optim.AdmW",
            5,
            "unknown Optimizer class 'torch.optim.AdmW'. Did you mean 'AdamW'",
        ),
        ("{lr:", "{lrr:", 5, "unknown key 'lrr' of model.optimizer. Did you mean 'lr'"),
        ("1.0e-3", "fast", 5, "model.optimizer.lr: expected float, got fast"),
        ("hflip", "hflp", 9, "unknown key 'hflp' of data.augment. Did you mean 'hflip'"),
        ("max_epochs: 3", "max_epoch: 3", 10, "unknown key 'max_epoch' of trainer. Did you mean 'max_epochs'"),
        ("max_epochs: 3", "max_epochs: many", 10, "trainer.max_epochs: expected int, got many"),
        ("trainer:", "trainr:", 10, "unknown key 'trainr'. Did you mean 'trainer'"),
        ("{max_epochs: 3}", "{max_epochs: 3", 11, "not valid YAML"),
        ("backbone: test_resnet", "num_classes: 3", 4, "model.num_classes is taken from the data; leave it out"),
    ],
)
def test_first_mistake_of_a_file_is_placed(tmp_path, old, new, line, message):
    path = tmp_path / "my.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        check_config(path)
    assert f"{path}, line {line}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_file_passes_without_data_or_memory(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(GOOD.replace("test_resnet", "vit_giant_patch14_224"))
    check_config(path)


def test_what_is_required_is_named(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(GOOD.replace("    backbone: test_resnet\n", ""))
    with pytest.raises(ConfigError, match=r"model\.backbone is required: pass --model\.backbone VALUE"):
        check_config(path)


@pytest.mark.parametrize(("text", "message"), [("- a\n", "expected a mapping"), ("", "expected a mapping")])
def test_file_that_is_no_mapping(tmp_path, text, message):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_config(path)


def test_options_become_single_words():
    words = split_options(["--model", "ImageClassifier", "--model.lr=0.1", "--data.x", "-1", "--print_config"])
    assert words == ["--model=ImageClassifier", "--model.lr=0.1", "--data.x=-1", "--print_config"]
    assert setting_of_option(words[1]).key == ("model", "lr")
    assert setting_of_option(words[1]).value == "0.1"
    assert setting_of_option("--print_config") is None
    with pytest.raises(ConfigError, match="Unexpected argument 'stray'"):
        split_options(["--model.lr=1", "stray"])


def test_replaced_classes_are_noticed():
    chosen = {}
    assert check_names(settings_of_text(GOOD, "a"), chosen) == []
    assert check_names([setting_of_option("--model.optimizer=AdamW")], chosen) == []
    assert check_names([setting_of_option("--model.optimizer=SGD")], chosen) == ["model.optimizer"]
    assert check_names([setting_of_option("--data=DigitsData")], chosen) == ["data"]


def test_classes_from_elsewhere_are_accepted(tmp_path, monkeypatch):
    """A module of the user's, with its own options."""
    Path(tmp_path, "my_project.py").write_text(
        "from lightning.pytorch import LightningModule\n"
        "class Mine(LightningModule):\n"
        "    def __init__(self, width: int = 3) -> None:\n"
        "        super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check_names(settings_of_text("model: {class_path: my_project.Mine, init_args: {width: 4}}", "a"), {})
    with pytest.raises(ConfigError, match=r"unknown key 'widht' of model\. Did you mean 'width'"):
        check_names(settings_of_text("model: {class_path: my_project.Mine, init_args: {widht: 4}}", "a"), {})
