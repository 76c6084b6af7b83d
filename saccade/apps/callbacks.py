"""Lightning callbacks of the commands: what a fit shows and records, and how it is interrupted and continued."""

from __future__ import annotations

import csv
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from saccade.batch.progress import Reporter, clock
from saccade.batch.tables import write_json, write_table

__all__ = ["Continuation", "EpochTable", "Interruption", "StoredConfig"]


class StoredConfig(Callback):
    """Puts the full config into every checkpoint, so that a checkpoint is enough to test or continue a run.

    Args:
        text: The config, YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the entry."""
        checkpoint["saccade_config"] = self.text


class EpochTable(Callback):
    """Shows one row per epoch and keeps ``metrics.csv`` and ``metrics.json`` up to date.

    Args:
        folder: Run folder.
        reporter: The screen.
        monitor: Metric that decides which epoch is best.
        mode: ``"max"`` or ``"min"``.
    """

    def __init__(self, folder: Path, reporter: Reporter, monitor: str, mode: str) -> None:
        self.folder = folder
        self.reporter = reporter
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.logged: dict[str, Tensor] = {}
        self.shown = list(dict.fromkeys(("train/loss", "val/loss", monitor)))
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.rate = 0.0

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best epoch, the first of equal ones; empty before the first validation."""
        rated = [row for row in self.rows if self.monitor in row]
        return max(rated, key=lambda row: self.sign * row[self.monitor]) if rated else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the rows of the epochs before, if the run is continued, and show the header of the table."""
        path = self.folder / "metrics.csv"
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as stream:
                for row in csv.DictReader(stream):
                    if int(row["epoch"]) <= trainer.current_epoch:
                        self.rows.append({key: number(value) for key, value in row.items() if value})
        names = "".join(f"{name:>12}" for name in self.shown)
        self.reporter.say(f"{'epoch':>5}{names}{'lr':>10}{'time':>8}")
        self.started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar."""
        self.started = time.monotonic()
        if self.reporter.mode == "bar":
            self.reporter.finished = 0
            self.reporter.start(int(trainer.num_training_batches))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Note the learning rate."""
        self.rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Move the bar."""
        if self.reporter.mode == "bar":
            self.reporter.advance()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row of this epoch."""
        self.reporter.stop()
        seconds = time.monotonic() - self.started
        logged = {name: value for name, value in sorted(trainer.callback_metrics.items()) if "/" in name}
        # Lightning keeps what an earlier epoch logged: the very same tensors
        values = {name: value.item() for name, value in logged.items() if value is not self.logged.get(name)}
        self.logged = logged
        row = {"epoch": trainer.current_epoch + 1, **values, "lr": self.rate, "seconds": round(seconds, 2)}
        before = self.best
        self.rows.append(row)
        cells = "".join(f"{row[name]:>12.4g}" if name in row else f"{'-':>12}" for name in self.shown)
        star = "  *" if before and self.best is row else ""
        self.reporter.say(f"{row['epoch']:>5}{cells}{self.rate:>10.1e}{clock(seconds):>8}{star}")
        if trainer.is_global_zero:
            write_table(self.folder / "metrics.csv", self.rows)
            write_json(self.folder / "metrics.json", self.summary())

    def summary(self) -> dict[str, Any]:
        """Return the best and the last epoch."""
        return {
            "monitor": self.monitor,
            "epochs": self.rows[-1]["epoch"] if self.rows else 0,
            "seconds": round(sum(row["seconds"] for row in self.rows), 1),
            "best": self.best,
            "last": self.rows[-1] if self.rows else {},
        }


def number(text: str) -> int | float:
    """Read a cell of ``metrics.csv``."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


class Interruption(Callback):
    """Ends training between two steps on Ctrl-C or SIGTERM and saves a checkpoint from which it can continue exactly.

    A second Ctrl-C ends it at once. With several processes Ctrl-C is not caught, as they would stop at different steps;
    the checkpoint of the last epoch is the one to continue from.

    Args:
        checkpoint: Where to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.asked = False
        self.saved = False
        self.usual_handler = signal.getsignal(signal.SIGINT)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the handling of Ctrl-C."""
        if trainer.world_size == 1:
            signal.signal(signal.SIGINT, self.ask)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give it back."""
        signal.signal(signal.SIGINT, self.usual_handler)

    def ask(self, signum: int, frame: FrameType | None) -> None:
        """Note the wish to stop; the second time, stop."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Stop here."""
        if self.asked:
            raise KeyboardInterrupt
        if trainer.received_sigterm and trainer.world_size == 1:  # with more, Lightning agrees on a step
            raise SIGTERMException

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Stop before a training step."""
        self.stop_if_asked(trainer)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop before a validation step."""
        self.stop_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless the processes disagree about the step."""
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and together:
            trainer.save_checkpoint(self.checkpoint)
            self.saved = True
        self.on_train_end(trainer, pl_module)


class Continuation(Callback):
    """What a continued run needs beyond its checkpoint: the settings of now, and the folder of now.

    Lightning restores the optimiser's settings with its state, so that a new learning rate would be ignored, and it
    forgets which checkpoint is best when the run folder was moved.

    Args:
        checkpoints: Folder of the checkpoints.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.configured: list[list[dict[str, Any]]] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell ``ModelCheckpoint`` that its files are where they are now."""
        for state in checkpoint["callbacks"].values():
            if "best_k_models" in state:
                moved = {key: self.moved(state[key]) for key in ("best_model_path", "kth_best_model_path")}
                scores = {self.moved(path): score for path, score in state["best_k_models"].items()}
                state |= {**moved, "best_k_models": scores, "dirpath": str(self.checkpoints.resolve())}

    def moved(self, path: str) -> str:
        """Return the place of a checkpoint in the folder of now."""
        return str(self.checkpoints.resolve() / Path(path).name) if path else path

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the optimiser's settings before the stored ones replace them."""
        self.configured = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back; the schedule keeps its position."""
        for optimizer, configured in zip(trainer.optimizers, self.configured, strict=True):
            for group, settings in zip(optimizer.param_groups, configured, strict=True):
                restore_settings(group, settings)
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]


def restore_settings(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Overwrite an optimiser's group with configured settings; a learning rate that is on a schedule is scaled."""
    new = dict(settings)
    if "initial_lr" in settings:
        new["lr"] = group["lr"] * settings["initial_lr"] / group["initial_lr"]
    group.update(new)
