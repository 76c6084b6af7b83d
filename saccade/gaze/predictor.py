"""Training and evaluation of OAT with Lightning."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchmetrics import MeanMetric

from saccade import __version__
from saccade.checkpoints import load_weights, read_state_dict
from saccade.errors import ConfigError
from saccade.gaze.decoding import DecodedPaths, path_log_probs, sample
from saccade.gaze.metrics import path_scores
from saccade.gaze.oat import OAT
from saccade.gaze.scenes import SceneBatch
from saccade.gaze.training import path_loss
from saccade.gaze.trials import collate_trials, recordings_of, scanpaths_of

__all__ = ["ScanpathPredictor"]

Batch = Mapping[str, Any]
LONGEST = 60  # fixations of a predicted path where no data said how long paths are


class ScanpathPredictor(LightningModule):
    """OAT with its loss, its figures and an optimiser.

    Batches are those of ``saccade.datasets.ScanpathData``. Logged: ``train/loss``; ``val/loss``; ``val/bits``, the mean
    of ``-log2 p`` over all steps of human paths, the end included ("bits per fixation", lower is better);
    ``val/probability``, the mean probability of the next human object; and of paths sampled in some trials, one for
    each human path, the figures of ``metrics.path_scores`` against the viewers: ``val/sequence_score``,
    ``val/scanmatch``, ``val/multimatch_vector`` and so on. The same for ``test``.

    Args:
        width: Numbers per token.
        heads: Attention heads.
        hidden: Width of the feed-forward networks.
        encoder_layers: Number of them.
        decoder_layers: Number of them.
        seen: ``"crops"``, ``"features"`` or ``"nothing"``: what the data gives of objects besides their place.
        feature_dim: Numbers per object for ``"features"``.
        pyramid_levels: Spatial pyramid of the crop network, for crops of any size; see ``OAT``.
        position_rows: Objects along the longer side of the largest scene.
        position_sigma: Width of the positions' Gaussian in objects.
        target_position: ``"known"`` or ``"hidden"``; see ``OAT``.
        num_viewers: Learn this many viewers apart; 0: paths of anybody.
        dropout: Everywhere; see ``OAT``.
        pad_class: ``"reference"`` adds the official constant class to the training loss, ``"none"`` does not.
        paths_every: Sample validation paths every so many epochs; 0: never. Testing samples unless this is 0.
        path_trials: Sample paths in this many of a split's trials, the first ones.
        weights: Start from a file: ``.safetensors``, ``.pth`` or a ``.ckpt`` of ``saccade fit``.
        lr: Highest learning rate; ``None`` means the optimiser's own, 1e-3 for the default one.
        warmup_epochs: Epochs of linear rise at the start of the default schedule.
        optimizer: Makes the optimiser; ``None`` means AdamW with weight decay 0.05.
        scheduler: Makes a schedule that steps once per epoch; ``None`` means warm-up and half a cosine down to 0.

    Raises:
        ConfigError: If the options do not fit each other.
        CheckpointError: If ``weights`` do not fit.
    """

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/bits", "min")

    def __init__(
        self,
        width: int = 128,
        heads: int = 4,
        hidden: int = 256,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        seen: Literal["crops", "features", "nothing"] = "nothing",
        feature_dim: int | None = None,
        pyramid_levels: int = 0,
        position_rows: int = 14,
        position_sigma: float = 2.0,
        target_position: Literal["known", "hidden"] = "known",
        num_viewers: int = 0,
        dropout: float = 0.1,
        pad_class: Literal["none", "reference"] = "none",
        paths_every: int = 1,
        path_trials: int = 32,
        weights: str | None = None,
        lr: float | None = None,
        warmup_epochs: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        known = inspect.signature(OAT.__init__).parameters
        self.options = {name: value for name, value in self.hparams.items() if name in known}
        self.model = OAT(**self.options)
        if weights is not None:
            load_weights(self.model, read_state_dict(weights), source=weights)
        if paths_every < 0 or path_trials < 1:
            raise ConfigError(f"paths_every from 0 and path_trials from 1, got {paths_every} and {path_trials}.")
        self.pad_class = pad_class
        self.paths_every, self.path_trials = paths_every, path_trials
        self.lr, self.warmup_epochs = lr, warmup_epochs
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.facts: dict[str, Any] = {"viewers": [], "max_length": LONGEST, "features": {}}
        self.bits, self.probability, self.mean_loss = MeanMetric(), MeanMetric(), MeanMetric()

    def forward(self, scenes: SceneBatch, paths: Tensor, viewers: Tensor | None = None) -> Tensor:
        """Score given paths; see ``OAT.forward``."""
        logits: Tensor = self.model(scenes, paths, viewers)
        return logits

    def setup(self, stage: str) -> None:
        """Note what the data knows and predictions need: viewers, longest path, where features come from."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and data is not None:
            self.facts = dict(data.facts)
            known = len(self.facts["viewers"])
            if self.model.num_viewers not in (0, known):
                raise ConfigError(f"num_viewers is {self.model.num_viewers}, the training data has {known} viewers.")

    def viewers_of(self, batch: Batch) -> Tensor | None:
        """Return the viewers if the model tells them apart."""
        viewers: Tensor | None = batch["viewers"] if self.model.num_viewers else None
        return viewers

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of human paths."""
        encoded = self.model.encode(batch["scenes"])
        states = self.model.decode(encoded, self.model.tokens_of(batch["paths"]), viewers=self.viewers_of(batch))
        pad = self.model.pad_logit(states) if self.pad_class == "reference" else None
        loss = path_loss(self.model.class_logits(encoded, states), batch["paths"], pad_logit=pad)
        size = int((batch["paths"] >= 0).sum())
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one validation batch."""
        self.evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one test batch."""
        self.evaluate(batch)

    def evaluate(self, batch: Batch) -> None:
        """Count the steps of a batch of human paths."""
        paths = batch["paths"]
        logits = self(batch["scenes"], paths, self.viewers_of(batch))
        log_probs, there = path_log_probs(logits, paths)
        self.bits.update(-log_probs[there] / math.log(2))
        self.probability.update(log_probs[..., :-1][paths >= 0].exp())
        self.mean_loss.update(path_loss(logits, paths), weight=there.sum())

    def log_evaluation(self, stage: Literal["val", "test"]) -> None:
        """Log the figures of a split, over all processes, and begin anew."""
        figures = {"loss": self.mean_loss, "bits": self.bits, "probability": self.probability}
        for name, metric in figures.items():
            self.log(f"{stage}/{name}", metric.compute())
            metric.reset()
        data: Any = getattr(self.trainer, "datamodule", None)
        due = self.paths_every and (stage == "test" or (self.current_epoch + 1) % self.paths_every == 0)
        if due and data is not None and not self.trainer.sanity_checking:
            for name, value in self.sampled_scores(data, stage).items():
                self.log(f"{stage}/{name}", value, sync_dist=True)  # every process samples the same

    @torch.no_grad()
    def sampled_scores(self, data: Any, stage: Literal["val", "test"]) -> dict[str, float]:  # noqa: ANN401 - any data
        """Compare a sampled path for each human path of a split's first trials with the viewers."""
        trials = data.samples(stage)[: self.path_trials]
        facts = data.facts
        scenes, _, viewers = collate_trials(trials, viewers=facts["viewers"])
        who = viewers.to(self.device) if self.model.num_viewers else None
        drawn = sample(
            self.model,
            scenes.to(self.device),
            viewers.shape[1],
            max_length=facts["max_length"],
            viewers=who,
            generator=torch.Generator().manual_seed(0),
        )
        human = recordings_of(trials, max_length=data.max_length)
        return path_scores(scanpaths_of(drawn, trials), human)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self.log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> DecodedPaths:
        """Return one sampled path for each human path of the batch."""
        scenes, viewers = batch["scenes"], batch["viewers"]
        length = self.facts["max_length"]
        return sample(self.model, scenes, viewers.shape[1], max_length=length, viewers=self.viewers_of(batch))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and the schedule."""
        make = self.make_optimizer or partial(AdamW, lr=1e-3, weight_decay=0.05)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = make(groups)
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.make_scheduler is not None:
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "monitor": "val/loss"},
            }
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ConfigError(
                "The default schedule needs to know the end: set trainer.max_epochs or trainer.max_steps."
            )
        warm = max(1, round(total * min(1.0, self.warmup_epochs / (self.trainer.max_epochs or 1))))
        parts = [
            LinearLR(optimizer, 1 / (warm + 1), total_iters=warm),
            CosineAnnealingLR(optimizer, max(1, int(total) - warm)),
        ]
        schedule = SequentialLR(optimizer, parts, [warm])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what prediction needs, as plain values under ``saccade``."""
        checkpoint["saccade"] = {"version": __version__, "task": "gaze", "options": self.options, **self.facts}
        checkpoint["hyper_parameters"] |= {"weights": None}
