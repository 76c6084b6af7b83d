"""Options that fit, validate, test and predict share, and their translation into LightningCLI's."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from saccade.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["add_screen_options", "add_training_options", "describe_trainer", "lightning_options"]

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
SHORT = {
    "epochs": "trainer.max_epochs",
    "lr": "model.lr",
    "batch_size": "data.batch_size",
    "num_workers": "data.num_workers",
    "devices": "trainer.devices",
    "precision": "trainer.precision",
    "seed": "seed_everything",
}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the short names of LightningCLI options that every one of the commands takes."""
    parser.add_argument("-b", "--batch-size", metavar="N", help="images per step and device (data.batch_size)")
    parser.add_argument("-j", "--num-workers", metavar="N", help="decoding processes; default: min(4, cores)")
    parser.add_argument("--devices", metavar="N", help="GPUs or processes (trainer.devices); default: auto")
    parser.add_argument("--precision", metavar="P", help="fp32, bf16, fp16 (trainer.precision); default: fp32")
    parser.add_argument("--seed", metavar="N", help="default: the config's, else 0")


def add_screen_options(parser: argparse.ArgumentParser) -> None:
    """Add what concerns the screen."""
    parser.add_argument("--progress", choices=["auto", "bar", "plain", "none"], default="auto")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="-vv shows tracebacks")
    parser.add_argument("-q", "--quiet", action="store_true", help="results and errors only")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document on stdout")


def lightning_options(args: argparse.Namespace) -> list[str]:
    """Return the options for SaccadeCLI: short names under their dotted ones, then what was passed through.

    Raises:
        ConfigError: If the precision is unknown.
    """
    options = []
    for name, dotted in SHORT.items():
        value = getattr(args, name, None)
        if value is not None:
            if name == "precision":
                if value not in PRECISIONS and not value.endswith(("-true", "-mixed")):
                    raise ConfigError(f"Unknown precision {value!r}. Use {', '.join(PRECISIONS)}.")
                value = PRECISIONS.get(value, value)
            options += [f"--{dotted}", value]
    return options + list(args.unknown)


def describe_trainer(trainer: Trainer) -> str:
    """Return where and how it computes, e.g. ``"cuda:0 bf16-mixed"`` or ``"2 x cpu fp32"``."""
    names = {value: name for name, value in PRECISIONS.items()}
    count = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    device = trainer.strategy.root_device
    return f"{count}{device.type if count else device} {names.get(str(trainer.precision), trainer.precision)}"
