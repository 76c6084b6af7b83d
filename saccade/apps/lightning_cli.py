"""SaccadeCLI: Lightning's command line with our defaults, our messages, and configs that travel in checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import saccade.datasets.digits
import saccade.datasets.folder
import saccade.datasets.idx
import saccade.gaze.predictor
import saccade.mil.classifier
import saccade.vision_backbones.classifier
import saccade.vision_backbones.robust_classifier  # these imports make the classes known by their short names  # noqa: F401
from saccade.apps.config_errors import (
    LINKED,
    Chosen,
    Setting,
    check_names,
    explain,
    setting_of_option,
    settings_of_file,
    settings_of_text,
    split_options,
)
from saccade.checkpoints import read_checkpoint
from saccade.datasets.bag_data import BagData
from saccade.datasets.image_data import Augmentation, ImageData, Preprocess, Split
from saccade.datasets.scanpaths import ScanpathData
from saccade.errors import ConfigError
from saccade.vision_backbones.loading import check_name

__all__ = ["SaccadeCLI", "StoredRun", "check_config", "print_all_options", "read_stored_run"]

TRAINER_DEFAULTS = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@dataclass(frozen=True)
class StoredRun:
    """What a checkpoint of ``saccade fit`` says about its making.

    Args:
        checkpoint: The file.
        config: Full config, YAML.
        class_names: Names by class index.
    """

    checkpoint: Path
    config: str
    class_names: list[str] | None


def read_stored_run(checkpoint: Path) -> StoredRun:
    """Read what a checkpoint says about its making.

    Raises:
        ConfigError: If it was not written by ``saccade fit``.
    """
    content = read_checkpoint(checkpoint)
    if not isinstance(content.get("saccade_config"), str):
        raise ConfigError(f"{checkpoint} was not written by `saccade fit`: it holds no config.")
    return StoredRun(checkpoint, content["saccade_config"], content.get("saccade", {}).get("class_names"))


class SaccadeCLI(LightningCLI):
    """Parses configs and options and builds data and model; the trainer is built when its folder is known.

    Later ones win: the defaults, the config stored in a checkpoint, the config files from left to right, the options.

    Args:
        options: Options such as ``--model.lr 0.1``.
        configs: Config files.
        stored: The checkpoint that the weights come from.
        keep_trainer: Whether the trainer section of the checkpoint's config applies too.

    Raises:
        ConfigError: If something in them does not exist or has the wrong type, in one line.
    """

    def __init__(
        self,
        options: list[str],
        configs: list[Path],
        *,
        stored: StoredRun | None = None,
        keep_trainer: bool = False,
    ) -> None:
        # Lightning calls functions of jsonargparse in ways that newer versions of it complain about.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        self.stored = stored
        self.base = {} if stored is None else yaml.safe_load(stored.config)
        if not keep_trainer:
            self.base.pop("trainer", None)
        self.settings: list[Setting] = []
        self.chosen: Chosen = {}
        self.arguments: list[str] = []
        if stored is not None:
            text = yaml.safe_dump(self.base, sort_keys=False)
            self.add_source(["--config", text], settings_of_text(text, f"config in {stored.checkpoint.name}"))
        for path in configs:
            self.add_source(["--config", str(path)], settings_of_file(path))
        for option in split_options(options):
            setting = setting_of_option(option)
            self.add_source([option], [] if setting is None else [setting])
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"prog": "saccade fit", "exit_on_error": False, "allow_abbrev": False},
            save_config_callback=None,
            auto_configure_optimizers=False,
            run=False,
            args=self.arguments,
        )

    def add_source(self, arguments: list[str], settings: list[Setting]) -> None:
        """Append arguments for the parser, after checking their names.

        Where they name another class than the sources before, what those set for the old class is dropped first:
        jsonargparse would keep every argument whose name the new class has too, AdamW's weight decay for SGD.
        """
        replaced = check_names(settings, self.chosen)
        self.arguments += [f"--{key}=null" for key in replaced] + arguments
        self.settings += settings

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take from the data what the model needs to know about it."""
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and report a mistake in one line."""
        try:
            self.config = parser.parse_args(cast(list[str], args))
        except argparse.ArgumentError as error:
            raise ConfigError(explain(str(error), self.settings)) from error

    def before_instantiate_classes(self) -> None:
        """Complete the config before anything is built: the backbone's preprocessing, paths, classes."""
        model, data = self.config.model.init_args, self.config.data.init_args
        for name in ("root", "images", "features", "labels", "split"):
            if data.get(name) is not None:  # so that the checkpoint can be tested from another working directory
                data[name] = str(Path(data[name]).expanduser().absolute())
        if "backbone" in model:
            try:
                check_name(model.backbone)
            except ConfigError as error:
                raise ConfigError(f"{self.place('model', 'backbone')}: {error}") from error
        if "backbone" in model and "preprocess" in data:
            fill_preprocess(model, data)
        if self.stored is not None and "class_names" in data and data.class_names is None:
            data.class_names = self.stored.class_names
        self.config_text: str = self.parser.dump(self.config, skip_none=False)
        if self.stored is not None and "pretrained" in model:  # the weights are those of the checkpoint
            model.pretrained, model.weights = False, None

    def place(self, *key: str) -> str:
        """Return where a key was set last, e.g. ``"my.yaml, line 4"``."""
        paths = {
            tuple(part for part in setting.key if part != "init_args"): setting.source for setting in self.settings
        }
        return paths.get(key, ".".join(key))

    def instantiate_classes(self) -> None:
        """Build data and model, in this order: mistakes in the data are found before a large model is built."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule: LightningDataModule = self.config_init.data
        self.model: LightningModule = self.config_init.model

    def build_trainer(self, folder: Path, callbacks: list[Callback], **options: Any) -> Trainer:  # noqa: ANN401
        """Build the trainer.

        Args:
            folder: Where it writes.
            callbacks: Those that always run, after the ones in the config.
            **options: Override the config; see ``lightning.pytorch.Trainer``.

        Raises:
            ConfigError: If Lightning refuses the options.
        """
        chosen = self.config_init.trainer.callbacks or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        try:
            return self.instantiate_trainer(default_root_dir=str(folder), callbacks=[*chosen, *callbacks], **options)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise ConfigError(f"The trainer cannot be built: {str(error).splitlines()[0]}") from error

    @property
    def title(self) -> str:
        """Class and backbone or model, e.g. ``"ImageClassifier/resnet18"``."""
        arguments = self.config.model.init_args
        backbone = arguments.get("backbone") or arguments.get("model")
        name = type(self.model).__name__
        return f"{name}/{backbone}" if backbone else name

    def describe_model(self) -> str:
        """Return the title with the number of weights."""
        network = getattr(self.model, "model", self.model)
        count = sum(parameter.numel() for parameter in network.parameters())
        return f"{self.title} ({count / 1e6:.1f} M)"

    def describe_data(self, *splits: Split) -> str:
        """Return the name of the data and the number of samples in each split."""
        root = self.config.data.init_args.get("root")
        name = type(self.datamodule).__name__ if root is None else Path(root).name
        if isinstance(self.datamodule, BagData):
            counts = ", ".join(f"{len(self.datamodule.part(split)):,} {split}" for split in splits)
            return f"{name}: {counts} slides"
        if not isinstance(self.datamodule, ImageData | ScanpathData):
            return name
        counts = ", ".join(f"{len(self.datamodule.samples(split)):,} {split}" for split in splits)
        if isinstance(self.datamodule, ScanpathData):
            return f"{name}: {counts} trials"
        return f"{name}: {counts}, {self.datamodule.num_classes} classes"

    def changes(self) -> list[str]:
        """Return what differs from the checkpoint's config, as ``"model.lr 0.1 -> 0.2"``."""
        now = flat(yaml.safe_load(self.config_text))
        if self.stored is not None and now.get("data.class_names") == self.stored.class_names:
            now.pop("data.class_names", None)  # taken from the checkpoint, so nobody changed it
        return [f"{key} {old} -> {now[key]}" for key, old in flat(self.base).items() if key in now and now[key] != old]


def fill_preprocess(model: Any, data: Any) -> None:  # noqa: ANN401 - jsonargparse namespaces
    """Set what the data leaves open to the preprocessing that the backbone was made for."""
    cfg = timm.models.get_pretrained_cfg(model.backbone) if timm.is_model(model.backbone) else None
    if cfg is None:
        return
    own = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict(), verbose=False)
    if data.img_size is None:
        data.img_size = own["input_size"][-1]
    if "img_size" in model and model.img_size is None:
        model.img_size = data.img_size
    given = data.preprocess.as_dict() if data.preprocess is not None else {}
    names = [field.name for field in dataclasses.fields(Preprocess)]
    data.preprocess = {name: own[name] if given.get(name) is None else given[name] for name in names}


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys, ``init_args`` left out."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result |= flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


class ConfigCheck(SaccadeCLI):
    """Parses a config and builds its model without memory, and no data."""

    def _set_seed(self) -> None:
        """Leave the random numbers of the process alone."""

    def instantiate_classes(self) -> None:
        """Build the model on the meta device, as large as the classes that the config names, or ten."""
        arguments = self.config.model.init_args.as_dict()
        offline = {"pretrained": False, "weights": None, "ema_decay": None}
        arguments |= {name: value for name, value in offline.items() if name in arguments}
        names = self.config.data.init_args.get("class_names")
        if "num_classes" in arguments:
            arguments |= {"num_classes": len(names or range(10)), "class_names": names}
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningModule, "model")
        spec = {"class_path": self.config.model.class_path, "init_args": arguments}
        with torch.device("meta"):
            parser.instantiate_classes(parser.parse_object({"model": spec}))


def check_config(path: str | Path) -> None:
    """Parse a config file and build its model on the meta device.

    Args:
        path: YAML file.

    Raises:
        ConfigError: At the first mistake, with file and line where it has one.
    """
    ConfigCheck([], [Path(path)])


def print_all_options() -> None:
    """Print every option of the trainer, of ``ImageClassifier`` and of ``ImageFolderData``."""
    for topic in ("--help", "--model.help=ImageClassifier", "--data.help=ImageFolderData"):
        with suppress(SystemExit):  # how the parser ends after printing
            SaccadeCLI([topic], [])
    for name, group in (("preprocess", Preprocess), ("augment", Augmentation)):
        print(f"\n--data.{name}.KEY VALUE: {inspect.getdoc(group)}")
