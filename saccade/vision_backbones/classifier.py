"""Training and evaluation of image classifiers on any timm backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import ClasswiseWrapper, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from saccade import __version__
from saccade.checkpoints import filter_state_dict
from saccade.errors import ConfigError
from saccade.vision_backbones.block_maps import BlockMaps
from saccade.vision_backbones.finetuning import classifier_layers, load_starting_weights
from saccade.vision_backbones.loading import create_model, download, size_option
from saccade.vision_backbones.optimization import (
    balanced_weights,
    cosine_with_warmup,
    parameter_groups,
    scale_learning_rates,
)

__all__ = ["ImageClassifier"]

DEFAULT_LR = 1e-3
DEFAULT_WEIGHT_DECAY = 0.05
LABELS_DRAWN = 50  # beyond this many classes the confusion matrix shows colours alone


class ImageClassifier(LightningModule):
    """A timm model with a classification loss, metrics and an optimiser.

    Logged: ``train/loss``, ``train/acc`` (not with mixup or cutmix), ``val/loss``, ``val/acc``, ``val/f1``, the same
    for ``test``, and per class ``test/precision/NAME``, ``test/recall/NAME``, ``test/f1/NAME``. A test also draws
    ``confusion_matrix.png`` into the trainer's ``log_dir``.

    Args:
        backbone: timm name, saccade's own models included.
        num_classes: Number of classes.
        class_names: Names by class index; ``None`` means ``"0"``, ``"1"``, ...
        data_config: timm's description of the evaluation preprocessing, stored with the weights; ``None`` means the
            backbone's.
        img_size: Input size in pixels, for backbones that are built for one size; ``None`` means the backbone's.
        backbone_kwargs: More arguments of the backbone's constructor, such as ``{"depth": [1, 1, 2, 1]}``; stored with
            the weights.
        pretrained: Start from the weights that timm knows for this name, downloading them if need be.
        weights: Start from a file: ``.safetensors``, ``.pth`` (official key names accepted) or a ``.ckpt`` of
            ``saccade fit``. A head with another number of classes starts fresh.
        freeze: Train the classifier layer alone (linear probe).
        layer_decay: Factor of the learning rate from one layer to the one below it, e.g. 0.75; ``None``: all equal.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, for backbones that have it.
        label_smoothing: Share of the target spread over all classes.
        class_weights: Weight of each class in the loss, or ``"balanced"``: inverse to its frequency in training.
        mixup_alpha: Strength of mixup; 0 is off.
        cutmix_alpha: Strength of cutmix; 0 is off. With both, each batch gets one of the two.
        ema_decay: Keep an exponential moving average of the weights, and evaluate and predict with it; e.g. 0.999.
        lr: Highest learning rate; ``None`` means the optimiser's own, 1e-3 for the default one.
        warmup_epochs: Epochs of linear rise at the start of the default schedule.
        optimizer: Makes the optimiser from parameter groups; ``None`` means AdamW with weight decay 0.05.
        scheduler: Makes a schedule that steps once per epoch; ``None`` means warm-up and half a cosine down to 0.

    Raises:
        ConfigError: If the backbone is unknown or takes no such options, or the options do not fit each other.
        CheckpointError: If ``weights`` do not fit the backbone.
    """

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/acc", "max")

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        class_names: list[str] | None = None,
        data_config: dict[str, Any] | None = None,
        img_size: int | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        freeze: bool = False,
        layer_decay: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        ema_decay: float | None = None,
        lr: float | None = None,
        warmup_epochs: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        if pretrained and weights is not None:
            raise ConfigError("pretrained and weights exclude each other: give one source of starting weights.")
        self.backbone = backbone
        self.num_classes = num_classes
        self.class_names = class_names or [str(index) for index in range(num_classes)]
        if len(self.class_names) != num_classes:
            raise ConfigError(f"class_names has {len(self.class_names)} names, expected num_classes = {num_classes}.")
        self.backbone_kwargs = {**size_option(backbone, img_size), **(backbone_kwargs or {})}
        rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        options = {**self.backbone_kwargs, **{name: rate for name, rate in rates.items() if rate}}
        options["num_classes"] = num_classes
        self.model = download(backbone, options) if pretrained else create_model(backbone, **options)
        if weights is not None:
            load_starting_weights(self.model, weights)
        self.data_config = data_config or timm.data.resolve_model_data_config(self.model)

        self.probing = freeze
        if freeze:
            self.model.requires_grad_(False)
            for head in classifier_layers(self.model):
                head.requires_grad_(True)
        self.layer_decay = layer_decay
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.loss_weight: Tensor | None
        self.register_buffer("loss_weight", None, persistent=False)
        self.mixup: Mixup | None = None
        if mixup_alpha > 0 or cutmix_alpha > 0:
            self.mixup = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=label_smoothing, num_classes=num_classes)
        # The averaged copy is a child, so that it moves and is saved with the module; timm's updater around it is not.
        self.ema_updater = None if ema_decay is None else (ModelEmaV3(self.model, decay=ema_decay, use_warmup=True),)
        self.ema = None if self.ema_updater is None else self.ema_updater[0].module.requires_grad_(False)
        self.steps_averaged = 0
        self.lr = lr
        self.warmup_epochs = warmup_epochs
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler

        common: dict[str, Metric | MetricCollection] = {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes),
        }
        per_class = {"precision": MulticlassPrecision, "recall": MulticlassRecall, "f1_class": MulticlassF1Score}
        self.train_metrics = MetricCollection({"acc": common["acc"].clone()}, prefix="train/")
        self.val_metrics = MetricCollection(common, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        self.test_metrics.add_metrics(
            {
                name: ClasswiseWrapper(
                    metric(num_classes, average=None), labels=self.class_names, prefix=f"{name.removesuffix('_class')}/"
                )
                for name, metric in per_class.items()
            }
        )
        self.confusion = MulticlassConfusionMatrix(num_classes)
        # Lightning's own mean over processes divides by a rounded number of samples where these have unequal shares.
        self.mean_loss = MeanMetric()
        self.train()  # what stays in evaluation mode does so from the start

    def forward(self, images: Tensor) -> Tensor:
        """Classify, with the averaged weights if they are kept.

        Args:
            images: Preprocessed as ``data_config`` says, float ``(B, 3, Y, X)``.

        Returns:
            Logits ``(B, num_classes)``.
        """
        logits: Tensor = (self.model if self.ema is None else self.ema)(images)
        return logits

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy with the class weights; ``target`` holds class indices ``(B,)`` or probabilities ``(B, K)``."""
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0  # mixup has smoothed its targets
        return F.cross_entropy(logits, target, weight=self.loss_weight, label_smoothing=smoothing)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.probing:
            self.model.eval()
            for head in classifier_layers(self.model):
                head.train(mode)
        if self.ema is not None:
            self.ema.eval()
        return self

    def setup(self, stage: str) -> None:
        """Work out balanced class weights from the data module."""
        weights = self.class_weights
        if weights == "balanced" and stage == "fit":
            counts: list[int] | None = getattr(getattr(self.trainer, "datamodule", None), "class_counts", None)
            if counts is None:
                raise ConfigError("class_weights 'balanced' needs a data module with class_counts; give a list.")
            weights = balanced_weights(counts)
        if isinstance(weights, list):
            if len(weights) != self.num_classes:
                raise ConfigError(f"class_weights has {len(weights)} entries, expected {self.num_classes}.")
            self.loss_weight = torch.tensor(weights, device=self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of ``batch["image"]`` and ``batch["target"]``, mixed if asked for."""
        images, target = self.mix(batch)
        logits = self.model(images)
        loss = self.loss(logits, target)
        self.log_training(logits, target, {"loss": loss})
        return loss

    def mix(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images and targets of a training batch, mixed if asked for."""
        images, target = batch["image"], batch["target"]
        if self.mixup is not None:
            even = len(images) // 2 * 2  # timm mixes in pairs
            images, target = self.mixup(images[:even], target[:even])
        return images, target

    def log_training(self, logits: Tensor, target: Tensor, values: Mapping[str, Tensor]) -> None:
        """Log the means of ``values`` over the epoch as ``train/NAME``, and the accuracy on unmixed targets."""
        if target.ndim == 1:
            self.train_metrics.update(logits, target)
            self.log_dict(self.train_metrics, on_step=False, on_epoch=True, batch_size=len(logits))
        named = {f"train/{name}": value for name, value in values.items()}
        self.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(logits))

    def on_train_batch_end(self, outputs: object, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Move the average after each optimiser step."""
        if self.ema_updater is not None and self.global_step != self.steps_averaged:
            self.steps_averaged = self.global_step
            self.ema_updater[0].update(self.model, step=self.global_step)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count one validation batch."""
        self.evaluate(batch, self.val_metrics)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count one test batch."""
        logits = self.evaluate(batch, self.test_metrics)
        self.confusion.update(logits, batch["target"])

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``logits`` (``(B, num_classes)``, float32) and the batch's ``id``, ``error`` and ``reason``."""
        return {"logits": self(batch["image"]).float()} | {key: batch[key] for key in ("id", "error", "reason")}

    def evaluate(self, batch: Mapping[str, Any], metrics: MetricCollection) -> Tensor:
        """Count a batch in the mean loss and the metrics, and return its logits."""
        logits: Tensor = self(batch["image"])
        self.mean_loss.update(F.cross_entropy(logits, batch["target"]), weight=len(logits))
        metrics.update(logits, batch["target"])
        return logits

    def log_evaluation(self, stage: str, metrics: MetricCollection) -> None:
        """Log the metrics of a whole split, over all processes, and begin anew."""
        self.log(f"{stage}/loss", self.mean_loss.compute())
        self.log_dict(metrics.compute())
        self.mean_loss.reset()
        metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.log_evaluation("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics and draw the confusion matrix."""
        self.log_evaluation("test", self.test_metrics)
        matrix = self.confusion.compute()
        folder = Path(self.trainer.log_dir or ".")  # all processes take part in finding it
        if self.trainer.is_global_zero:
            draw_confusion(matrix.cpu(), self.class_names, folder / "confusion_matrix.png")
        self.confusion.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and the schedule."""
        groups = parameter_groups(self.model, self.layer_decay)
        make = self.make_optimizer or partial(AdamW, lr=DEFAULT_LR, weight_decay=DEFAULT_WEIGHT_DECAY)
        optimizer = make(groups)
        scale_learning_rates(optimizer, self.lr)
        if self.make_scheduler is not None:
            scheduler = self.make_scheduler(optimizer)
            monitor = scheduler.monitor if isinstance(scheduler, ReduceLROnPlateau) else "val/loss"
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ConfigError(
                "The default schedule needs to know the end: set trainer.max_epochs or trainer.max_steps."
            )
        epochs = self.trainer.max_epochs or 1
        warmup = round(total * min(1.0, self.warmup_epochs / epochs))
        factor = partial(cosine_with_warmup, total=int(total), warmup=warmup)
        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what inference without Lightning needs, as plain values under ``saccade``."""
        checkpoint["saccade"] = {
            "version": __version__,
            "task": "image",
            "backbone": self.backbone,
            "backbone_kwargs": self.backbone_kwargs,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "data_config": self.data_config,
        }
        # The checkpoint holds the weights: rebuilding the module from it must not fetch the ones it began with.
        checkpoint["hyper_parameters"] |= {"pretrained": False, "weights": None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give a FAN or RVT the layers that the file it began with had, where its name stands for others."""
        for prefix, model in (("model.", self.model), ("ema.", self.ema)):
            if isinstance(model, BlockMaps):
                state = checkpoint["state_dict"]
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                filter_state_dict(own, model)


def draw_confusion(matrix: Tensor, names: list[str], path: Path) -> None:
    """Draw a confusion matrix as PNG.

    Args:
        matrix: Counts, ``(K, K)``; rows are true classes, columns predicted ones.
        names: Names by class index.
        path: The picture; its folder is created.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    readable = len(names) <= LABELS_DRAWN
    side = min(4 + 0.4 * len(names), 16)
    figure = Figure(figsize=(side, side), layout="constrained")
    display = ConfusionMatrixDisplay(matrix.numpy(), display_labels=names if readable else None)
    display.plot(ax=figure.subplots(), include_values=readable, cmap="Blues", xticks_rotation=90, colorbar=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
