"""What all image data modules share: samples, transforms by timm, loaders."""

from __future__ import annotations

import os
import random
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.constants import DEFAULT_CROP_PCT
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saccade.datasets.images import read_image
from saccade.datasets.sampling import EvaluationSampler, TrainingSampler, world
from saccade.errors import ConfigError, DataError

__all__ = ["Augmentation", "ImageData", "ImageSamples", "Preprocess", "Sample", "Split", "hold_out"]

Split = Literal["train", "val", "test", "predict"]
DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the tensor that the model expects.

    ``None`` means timm's usual value for ImageNet; ``saccade fit`` fills in what the backbone was trained with.

    Args:
        mean: Per channel, of values in 0..1.
        std: Per channel.
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` or ``"lanczos"``.
        crop_pct: Share of the resized image that the centre crop of an evaluation keeps, in (0, 1].
        crop_mode: ``"center"`` (crop), ``"squash"`` (ignore the aspect ratio) or ``"border"`` (pad).
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, done by ``timm.data.create_transform``.

    Args:
        scale: Area of the random crop, as a share of the image: smallest and largest.
        ratio: Width over height of the random crop: smallest and largest.
        hflip: Probability of a left-right flip.
        vflip: Probability of an upside-down flip.
        color_jitter: Strength of random brightness, contrast and saturation; unused with ``auto_augment``.
        auto_augment: Policy in timm's notation, e.g. ``"rand-m9-mstd0.5-inc1"`` (RandAugment).
        random_erasing: Probability of erasing a rectangle.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    random_erasing: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Args:
        id: Unique within the data set; for files the path relative to the root, with ``/``.
        target: Class index, or -1 if unknown.
        source: File, or pixels, uint8 ``(Y, X)`` grey.
    """

    id: str
    target: int
    source: Path | np.ndarray[Any, np.dtype[np.uint8]]

    def load(self) -> Image.Image:
        """Return the RGB image.

        Raises:
            DataError: If the file cannot be read.
        """
        return read_image(self.source) if isinstance(self.source, Path) else Image.fromarray(self.source).convert("RGB")


class ImageSamples(Dataset[dict[str, Any]]):
    """Transformed samples. An unreadable one is returned as such, so that the main process can say which it was.

    Keys are indices, or ``(index, seed)`` from a ``TrainingSampler``; a seed makes the random transform repeatable.
    Items hold ``image`` (float32 ``(3, Y, X)``, zeros if unreadable), ``target``, ``id``, and ``error`` and ``reason``
    (empty if there is none).
    """

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor], size: int) -> None:
        self.samples = samples
        self.transform = transform
        self.size = size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        sample = self.samples[index]
        error = reason = ""
        try:
            image = self.transformed(sample.load(), seed)
        except DataError as failure:
            image, error, reason = torch.zeros(3, self.size, self.size), str(failure), failure.reason
        return {"image": image, "target": sample.target, "id": sample.id, "error": error, "reason": reason}

    def transformed(self, image: Image.Image, seed: int | None) -> Tensor:
        """Apply the transform, with its random numbers drawn from ``seed`` if there is one."""
        if seed is None:
            return self.transform(image)
        with isolate_rng(include_cuda=False):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            return self.transform(image)


class ImageData(LightningDataModule, ABC):
    """Base of the image data modules. A subclass names its classes and lists its samples.

    Batches are dictionaries with ``image`` (float32 ``(B, 3, size, size)``, normalised), ``target`` (int64 ``(B,)``),
    ``id``, ``error`` and ``reason`` (lists of ``B`` strings). A sample that cannot be read stops training and
    evaluation with a message that names it; predictions go on and report it.

    Args:
        img_size: Height and width of the model's input in pixels; ``None`` means 224.
        batch_size: Images per step and device.
        num_workers: Decoding processes; 0 decodes in the main process; ``None`` means one per core, at most 4. Results
            do not depend on it.
        preprocess: Normalisation and evaluation crop.
        augment: Random changes to training images; ``None`` means the defaults of ``Augmentation``.
    """

    def __init__(
        self,
        img_size: int | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        preprocess: Preprocess | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        self.img_size = DEFAULT_SIZE if img_size is None else img_size
        self.batch_size = batch_size
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self.preprocess = preprocess or Preprocess()
        self.augment = augment or Augmentation()
        self.progress = {"epoch": 0, "batches": 0}

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names by class index."""

    @abstractmethod
    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of a split, in a fixed order.

        Raises:
            ConfigError: If the data set has no such split.
        """

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """Number of training samples of each class."""
        counts = Counter(sample.target for sample in self.samples("train"))
        return [counts[index] for index in range(self.num_classes)]

    @property
    def data_config(self) -> dict[str, Any]:
        """The preprocessing of evaluations, in timm's words; stored with the weights."""
        chosen = self.preprocess
        return {
            "input_size": [3, self.img_size, self.img_size],
            "mean": list(chosen.mean or IMAGENET_DEFAULT_MEAN),
            "std": list(chosen.std or IMAGENET_DEFAULT_STD),
            "interpolation": chosen.interpolation or "bilinear",
            "crop_pct": DEFAULT_CROP_PCT if chosen.crop_pct is None else chosen.crop_pct,
            "crop_mode": chosen.crop_mode or "center",
        }

    def train_transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the random transform of training images: RGB image to float32 ``(3, size, size)``."""
        config, augment = self.data_config, self.augment
        transform: Callable[[Image.Image], Tensor] = create_transform(
            config["input_size"],
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing,
            re_mode="pixel",
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
        )
        return transform

    def eval_transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the fixed transform of evaluations: RGB image to float32 ``(3, size, size)``."""
        transform: Callable[[Image.Image], Tensor] = create_transform(**self.data_config, is_training=False)
        return transform

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled, augmented batches; an incomplete last one is dropped unless it is the only one."""
        samples = self.samples("train")
        dataset = ImageSamples(samples, self.train_transform(), self.img_size)
        skip = self.progress["batches"] * self.batch_size
        seed = torch.initial_seed() % 2**31
        sampler = TrainingSampler(dataset, *world(), seed=seed, epoch=self.progress["epoch"], skip=skip)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_parent,
            drop_last=len(sampler) >= self.batch_size,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every validation sample once."""
        return self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every test sample once."""
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every sample to predict once."""
        return self.evaluation_loader("predict")

    def evaluation_loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        """Return the loader of a split with the fixed transform."""
        dataset = ImageSamples(self.samples(split), self.eval_transform(), self.img_size)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EvaluationSampler(dataset, *world()),
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_parent,
            persistent_workers=self.num_workers > 0 and split == "val",
            pin_memory=torch.cuda.is_available(),
        )

    def state_dict(self) -> dict[str, int]:
        """Return where training stands, for checkpoints: the epoch and how many of its batches were used."""
        if self.trainer is None:
            return self.progress
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if batches >= self.trainer.num_training_batches:
            return {"epoch": self.trainer.current_epoch + 1, "batches": 0}
        return {"epoch": self.trainer.current_epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next training where a checkpoint stood, with the images that were left."""
        self.progress = state_dict

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Stop at an unreadable sample, except in predictions.

        Raises:
            DataError: Naming the sample.
        """
        predicting = self.trainer is not None and self.trainer.predicting
        for sample, error in zip(batch["id"], batch["error"], strict=True):
            if error and not predicting:
                raise DataError(
                    f"Image {sample!r} cannot be used: {error}. Remove it, or pass --data.skip_unreadable true."
                )
        return batch


def leave_signals_to_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker, which go to it too: its parent ends it after the last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples into a kept and a held-out part with the same class proportions.

    Args:
        samples: In a fixed order.
        fraction: Share held out, in (0, 1]. A class keeps at least one sample unless it is 1, and gives at least one
            if it has two.
        seed: The same seed gives the same split.

    Returns:
        (kept, held out), both in the order of ``samples``.
    """
    generator = np.random.default_rng(seed)
    targets = np.array([sample.target for sample in samples])
    held: set[int] = set()
    for target in np.unique(targets):
        members = generator.permutation(np.flatnonzero(targets == target))
        count = round(len(members) * fraction)
        if fraction < 1:
            count = min(max(count, 1), len(members) - 1)
        held.update(members[:count].tolist())
    kept = [sample for index, sample in enumerate(samples) if index not in held]
    return kept, [sample for index, sample in enumerate(samples) if index in held]
