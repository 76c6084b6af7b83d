"""``saccade fit``: train a model with Lightning, every run in a folder of its own."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from saccade import __version__
from saccade.apps.run_folder import RUNS, create_run_folder, latest_run, run_of
from saccade.apps.shipped import config_path
from saccade.apps.training_options import add_screen_options, add_training_options, describe_trainer, lightning_options
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from saccade.apps.callbacks import EpochTable
    from saccade.apps.lightning_cli import SaccadeCLI
    from saccade.batch.progress import Reporter

__all__ = ["EXAMPLES", "PASSES_UNKNOWN", "add_arguments", "run"]

PASSES_UNKNOWN = True
EXAMPLES = {
    "fit": [
        "saccade fit -c image/finetune --model.backbone resnet18 --data.root photos/",
        "saccade fit -c image/digits_resnet10 --epochs 5 --lr 2e-3",
    ]
}
TASKS = {"gaze": "gaze/oat", "image": "image/finetune", "slides": "slides/acmil"}
INTERRUPTED, TERMINATED = 130, 143
FOLDER_VARIABLE = "SACCADE_RUN_FOLDER"
NEW_RUN_ONLY = (
    "model.class_path",
    "model.backbone",
    "model.model",
    "model.optimizer.class_path",
    "model.freeze",
    "model.ema_decay",
    "model.width",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "saccade fit [-c CONFIG]... [--data.root FOLDER] [options] [--SECTION.KEY VALUE]..."
    parser.description = (
        "Train a model. Any setting: --model.KEY, --data.KEY, --trainer.KEY VALUE (all of them: --help-all).\n"
        "Shipped configs: saccade config ls. Results go to runs/NAME/YYYYmmdd-HHMMSS/."
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="C", help="file or shipped name; several: later ones win"
    )
    parser.add_argument("--task", choices=sorted(TASKS), default="image", help="settings without -c (default: image)")
    parser.add_argument("--name", help="folder below runs/; default: the backbone's name")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run folder or checkpoint; default: the latest",
    )
    parser.add_argument("--epochs", metavar="N", help="trainer.max_epochs")
    parser.add_argument("--lr", metavar="X", help="highest learning rate (model.lr)")
    add_training_options(parser)
    add_screen_options(parser)
    parser.add_argument("--help-all", action="store_true", help="every option of trainer, model and data")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.apps.lightning_cli import print_all_options
    from saccade.apps.quiet import training_screen

    if args.help_all:
        print_all_options()
        return 0
    with training_screen(args) as reporter:
        return fit(args, reporter)


def fit(args: argparse.Namespace, reporter: Reporter) -> int:
    """Train, and return the exit code."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from saccade.apps.callbacks import Continuation, EpochTable, Interruption, StoredConfig
    from saccade.apps.lightning_cli import SaccadeCLI, read_stored_run

    checkpoint = resumed_checkpoint(args)
    stored = None if checkpoint is None else read_stored_run(checkpoint)
    configs = [config_path(name) for name in args.config]
    if stored is None and not configs:
        configs = [config_path(TASKS[args.task])]
    cli = SaccadeCLI(lightning_options(args), configs, stored=stored, keep_trainer=True)
    refuse_changes(cli.changes(), checkpoint)
    cli.build_trainer(Path(), [])  # what Lightning refuses should not leave a run folder behind
    folder = prepare_folder(args.name or cli.title.rpartition("/")[2], checkpoint, cli.config_text, reporter)
    monitor, mode = getattr(cli.model, "monitor", ("val/loss", "min"))
    table = EpochTable(folder, reporter, monitor, mode)
    interruption = Interruption(folder / "checkpoints" / "last.ckpt")
    callbacks = [StoredConfig(cli.config_text), table, interruption, *keep_checkpoints(folder, monitor, mode)]
    if checkpoint is not None:
        callbacks.append(Continuation(folder / "checkpoints"))
    trainer = cli.build_trainer(folder, callbacks)
    announce(reporter, cli, trainer, folder)
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        code = TERMINATED
    except SystemExit:  # how Lightning ends after Ctrl-C
        if not trainer.interrupted:
            raise
        code = INTERRUPTED
    else:
        conclude(reporter, table, trainer, folder, as_json=args.json and trainer.is_global_zero)
        return 0
    saved = "checkpoints/last.ckpt saved; " if interruption.saved else ""
    reporter.say(f"interrupted in epoch {trainer.current_epoch + 1}   {saved}go on: saccade fit --resume {folder}")
    return code


def keep_checkpoints(folder: Path, monitor: str, mode: str) -> list[Callback]:
    """Return the callbacks that keep the best and the last checkpoint; the last one knows the state of the best."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    place = folder / "checkpoints"
    keep = partial(ModelCheckpoint, dirpath=place, save_on_train_epoch_end=True, enable_version_counter=False)
    return [keep(filename="best", monitor=monitor, mode=mode), keep(filename="last")]


def refuse_changes(changes: list[str], checkpoint: Path | None) -> None:
    """Raise if a continued run would have another model or optimiser than its checkpoint."""
    refused = [change for change in changes if change.split()[0] in NEW_RUN_ONLY]
    if refused:
        raise ConfigError(
            f"A continued run cannot change {'; '.join(refused)}. Start a new one with --model.weights {checkpoint}."
        )


def resumed_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that ``--resume`` means, ``None`` without it."""
    from saccade.checkpoints import best_checkpoint

    if args.resume is None:
        return None
    return best_checkpoint(args.resume or latest_run(args.name), prefer="last")


def prepare_folder(name: str, checkpoint: Path | None, config: str, reporter: Reporter) -> Path:
    """Return the run folder, with config, command and log in it; processes but the first only learn its name."""
    from saccade.apps.quiet import is_first_process

    folder = None if checkpoint is None else run_of(checkpoint)
    if not is_first_process():
        return folder or Path(os.environ.get(FOLDER_VARIABLE, RUNS))
    folder = folder or create_run_folder(name)
    os.environ[FOLDER_VARIABLE] = str(folder)  # for the processes that Lightning starts on this machine
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    with (folder / "command.txt").open("a", encoding="utf-8") as stream:
        stream.write(shlex.join(["saccade", *sys.argv[1:]]) + "\n")
    reporter.log = (folder / "log.txt").open("a", encoding="utf-8")
    return folder


def announce(reporter: Reporter, cli: SaccadeCLI, trainer: Trainer, folder: Path) -> None:
    """Say what is trained on what, where, and what differs from the checkpoint."""
    reporter.say(f"saccade {__version__}  fit  {cli.describe_model()}  {cli.describe_data('train', 'val')}")
    reporter.say(f"run  {folder}   seed {cli.config.seed_everything}   {describe_trainer(trainer)}")
    if changes := cli.changes():
        reporter.say(f"changed since the checkpoint: {'; '.join(changes)}")


def conclude(reporter: Reporter, table: EpochTable, trainer: Trainer, folder: Path, *, as_json: bool) -> None:
    """Say what came out and what to do next."""
    best = table.best
    if not table.rows:
        reporter.say(f"nothing left to train: {trainer.current_epoch} epochs are done; more with --epochs N")
    elif best:
        score = f"best {table.monitor} {best[table.monitor]:.4g} (epoch {best['epoch']})"
        reporter.say(f"{score}   checkpoints/best.ckpt   next: saccade test {folder}")
    if as_json:
        print(json.dumps({"run": str(folder), **table.summary()}))
