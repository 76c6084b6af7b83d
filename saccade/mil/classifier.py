"""Training, evaluation and prediction of MIL models on bags, through Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from saccade import __version__
from saccade.errors import ConfigError
from saccade.mil.aem import attention_entropy_maximization
from saccade.mil.model import Criterion, MILOutput, create_model
from saccade.mil.result_tables import ResultTables
from saccade.mil.standardize import Standardize
from saccade.mil.survival import cox_loss, discrete_hazard_loss, hazards_to_risk

__all__ = ["SlideClassifier"]

DEFAULT_LR = 1e-4
DEFAULT_WIDTH = 1024
DEFAULT_WEIGHT_DECAY = 1e-5


class SlideClassifier(LightningModule):
    """A MIL model with its own loss, for classes, values or survival.

    Logged: ``train/loss`` and its terms; ``val/...`` and ``test/...`` with ``loss`` and, by task, ``acc``,
    ``f1_macro``, ``balanced_acc``, ``auroc``, ``kappa``; ``mae``, ``rmse``, ``r2``, ``pearson``; or ``c_index``. A test
    writes ``slides.csv``, ``patients.csv`` (mean over a patient's slides) and ``intervals.csv`` (bootstrap intervals,
    by slide and by patient) into the trainer's ``log_dir``.

    Args:
        model: Name of a MIL model: ``acmil_ga``, ``acmil_mha``, ``abmil``, ``clam_sb``, ``clam_mb``, ``transmil``,
            ``dsmil``, ``mean``, ``max``.
        num_classes: Classes; 1 for a value; intervals of time for survival.
        class_names: Names by class index.
        data_config: What ``BagData`` says of the bags: ``feature_dim``, ``task``, standardisation, time edges;
            ``None`` means features of width 1024 for classification.
        options: Further arguments of the model.
        survival: ``"discrete"`` (hazards in intervals) or ``"cox"`` (needs several bags a step).
        class_weights: Weight of each class, or ``"balanced"``: inverse to its frequency in training.
        aem: Weight of attention entropy maximisation; 0 is off (its authors: 0.1).
        lr: Learning rate; ``None`` means the optimiser's own, 1e-4 for the default one.
        optimizer: Makes the optimiser; ``None`` means AdamW with weight decay 1e-5.
        scheduler: Makes a schedule that steps once an epoch; ``None`` means a cosine down to 0.

    Raises:
        ConfigError: If options do not fit each other or the model.
    """

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/loss", "min")

    def __init__(
        self,
        model: str = "acmil_ga",
        num_classes: int = 2,
        class_names: list[str] | None = None,
        data_config: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        survival: Literal["discrete", "cox"] = "discrete",
        class_weights: list[float] | Literal["balanced"] | None = None,
        aem: float = 0.0,
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.data_config = data_config or {"feature_dim": DEFAULT_WIDTH}
        self.task = self.data_config.get("task", "classification")
        self.survival = survival
        if self.task != "classification" and model.startswith(("clam", "dsmil")):
            raise ConfigError(
                f"{model} learns classes only; for {self.task} take acmil_ga, abmil, transmil, mean or max."
            )
        outputs = 1 if self.task == "survival" and survival == "cox" else num_classes
        self.model_name, self.options = model, dict(options or {})
        self.num_classes = outputs
        self.class_names = class_names or [str(index) for index in range(num_classes)]
        self.tables = ResultTables(self.task, self.class_names)
        self.model = create_model(
            model, feature_dim=self.data_config["feature_dim"], num_classes=outputs, **self.options
        )
        self.standardize = Standardize(self.data_config)
        self.class_weights, self.aem, self.lr = class_weights, aem, lr
        self.loss_weight: Tensor | None
        self.register_buffer("loss_weight", None, persistent=False)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.results: list[dict[str, Any]] = []

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> MILOutput:
        """Run the model on bags ``(B, N, D)`` as they are in the files."""
        output: MILOutput = self.model(self.standardize(bags, mask), mask)
        return output

    @property
    def criterion(self) -> Criterion | None:
        """Loss of bag logits; ``None`` means the model's own."""
        if self.task == "regression":
            return lambda logits, target: F.mse_loss(logits[:, 0].float(), target.float())
        if self.task == "survival" and self.survival == "cox":
            return cox_loss
        if self.task == "survival":
            edges = torch.tensor(self.data_config["time_edges"])
            return lambda logits, target: discrete_hazard_loss(logits, target, edges.to(logits.device))
        if self.model_name == "dsmil":
            return None
        return partial(F.cross_entropy, weight=self.loss_weight)

    def losses(self, output: MILOutput, target: Tensor) -> dict[str, Tensor]:
        """Return the named terms of the loss."""
        criterion = self.criterion
        terms = self.model.loss(output, target) if criterion is None else self.model.loss(output, target, criterion)
        if self.aem:
            terms["aem"] = attention_entropy_maximization(output.attention)
            terms["loss"] = terms["loss"] + self.aem * terms["aem"]
        return terms

    def predictions(self, output: MILOutput) -> Tensor:
        """Return probabilities ``(B, C)``, values ``(B, 1)``, or risks ``(B, 1)``."""
        if self.task == "classification":
            return self.model.probabilities(output)
        if self.task == "survival" and self.survival == "discrete":
            return hazards_to_risk(output.logits)[:, None]
        return output.logits.float()[:, :1]

    def setup(self, stage: str) -> None:
        """Work out balanced class weights from the data module."""
        weights = self.class_weights
        if weights is None or stage != "fit":
            return
        if self.task != "classification" or self.model_name == "dsmil":
            raise ConfigError("class_weights are for classification, and not for DSMIL's multi-label loss.")
        if weights == "balanced":
            counts = self.trainer.datamodule.class_counts  # type: ignore[attr-defined]
            present = sum(count > 0 for count in counts)
            weights = [sum(counts) / (present * count) if count else 0.0 for count in counts]
        if len(weights) != self.num_classes:
            raise ConfigError(f"class_weights has {len(weights)} entries, expected {self.num_classes}.")
        self.loss_weight = torch.tensor(weights, device=self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch of bags."""
        if self.task == "survival" and self.survival == "cox" and len(batch["bags"]) < 2:
            raise ConfigError("Cox's loss compares bags: set data.batch_size to 2 or more, or survival to 'discrete'.")
        terms = self.losses(self(batch["bags"], batch["mask"]), batch["target"])
        logged = {f"train/{name}": term.detach() for name, term in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(batch["bags"]), sync_dist=True)
        return terms["loss"]

    def evaluate(self, batch: Mapping[str, Any]) -> None:
        """Keep what a batch gives until the split is complete."""
        output = self(batch["bags"], batch["mask"])
        loss = self.losses(output, batch["target"])["loss"]
        predicted = self.predictions(output).cpu()
        for row, key in enumerate(batch["id"]):
            result = {"id": key, "patient": batch["patient"][row], "loss": float(loss)}
            result |= {"predicted": predicted[row].tolist(), "target": batch["target"][row].tolist()}
            self.results.append(result | {"n_tiles": int(batch["mask"][row].sum())})

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count one validation batch."""
        self.evaluate(batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count one test batch."""
        self.evaluate(batch)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``predicted`` ``(B, C)``, ``attention``, ``n_tiles``, ``id``, ``error`` and ``reason``."""
        output = self(batch["bags"], batch["mask"])
        tiles = batch["mask"].sum(1).tolist()
        reasons = [
            reason or ("" if count else "no_tissue") for reason, count in zip(batch["reason"], tiles, strict=True)
        ]
        known = {"id": batch["id"], "error": batch["error"], "reason": reasons, "n_tiles": tiles}
        return {"predicted": self.predictions(output), "attention": output.attention, **known}

    def gathered(self) -> list[dict[str, Any]]:
        """Return the results of all processes, in order of id, and begin anew."""
        results, self.results = self.results, []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, results)
            results = [result for part in parts for result in part]
        return sorted(results, key=lambda result: str(result["id"]))

    def conclude(self, stage: str) -> list[dict[str, Any]]:
        """Log the metrics of a split and return its results."""
        import numpy as np

        results = self.gathered()
        predicted = np.array([result["predicted"] for result in results])
        target = np.array([result["target"] for result in results])
        self.log(f"{stage}/loss", float(np.mean([result["loss"] for result in results])))
        self.log_dict({f"{stage}/{name}": value for name, value in self.tables.metrics(predicted, target).items()})
        return results

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.conclude("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics and write the tables."""
        results = self.conclude("test")
        folder = Path(self.trainer.log_dir or ".")
        if self.trainer.is_global_zero:
            self.tables.write(results, folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and the schedule."""
        make = self.make_optimizer or partial(AdamW, lr=DEFAULT_LR, weight_decay=DEFAULT_WEIGHT_DECAY)
        optimizer = make(self.model.parameters())
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.make_scheduler is not None:
            scheduler = self.make_scheduler(optimizer)
            monitor = scheduler.monitor if isinstance(scheduler, ReduceLROnPlateau) else "val/loss"
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        total = max(1, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, total), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what inference without Lightning needs, as plain values under ``saccade``."""
        checkpoint["saccade"] = {
            "version": __version__,
            "task": "slides",
            "model": self.model_name,
            "options": self.options,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "data_config": self.data_config,
            "survival": self.survival,
        }
