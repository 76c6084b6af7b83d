"""Bags of slides with their labels, for training and prediction through Lightning."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saccade.datasets.bag_files import find_bags, load_bag
from saccade.datasets.bag_splits import make_folds, read_split
from saccade.datasets.sampling import EvaluationSampler, TrainingSampler, world
from saccade.errors import ConfigError, DataError, suggest

__all__ = ["BagData", "LabelledSlide", "collate_bags", "read_labels"]

Task = Literal["classification", "regression", "survival"]
SURVIVAL_BINS = 4


@dataclass(frozen=True)
class LabelledSlide:
    """One row of a table of labels.

    Args:
        id: Slide, the stem of its bag file.
        patient: Patient; the slide itself where the table has none.
        values: The row as it stands.
    """

    id: str
    patient: str
    values: Mapping[str, str]


def read_labels(path: str | Path) -> list[LabelledSlide]:
    """Read a table of labels.

    The slide is in the column ``slide``, ``slide_id``, ``wsi`` or ``path`` (a file's extension is taken off), the
    patient in ``patient``, ``patient_id`` or ``case_id``.

    Raises:
        ConfigError: If there is no column for the slide, a slide is listed twice, or an id is no file name.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = list(reader.fieldnames or [])
        rows = list(reader)
    slide = next((name for name in ("slide", "slide_id", "wsi", "path") if name in columns), None)
    patient = next((name for name in ("patient", "patient_id", "case_id") if name in columns), None)
    if slide is None:
        raise ConfigError(f"{path} has no column 'slide' (nor slide_id, wsi, path); it has {', '.join(columns)}.")
    found: dict[str, LabelledSlide] = {}
    for number, row in enumerate(rows, start=2):
        name = Path((row[slide] or "").strip()).name
        key = Path(name).stem if Path(name).suffix.lower() in (".svs", ".tif", ".tiff", ".ndpi", ".h5", ".pt") else name
        if not key or key in (".", ".."):
            raise ConfigError(f"{path}, line {number}: {row[slide]!r} names no slide.")
        if key in found:
            raise ConfigError(f"{path}, line {number}: slide {key!r} is listed twice.")
        found[key] = LabelledSlide(key, row[patient].strip() if patient and row[patient] else key, row)
    return list(found.values())


class BagDataset(Dataset[dict[str, Any]]):
    """Bags read when they are asked for, or kept once they were."""

    def __init__(self, owner: BagData, slides: Sequence[LabelledSlide], *, training: bool) -> None:
        self.owner = owner
        self.slides = slides
        self.training = training

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        slide, owner = self.slides[index], self.owner
        item: dict[str, Any] = {"id": slide.id, "patient": slide.patient, "error": "", "reason": ""}
        item["target"] = owner.target(slide) if owner.has_labels else torch.zeros(())
        try:
            features, coords = owner.read(slide.id)
        except DataError as error:
            empty = torch.zeros(0, owner.feature_dim)
            return item | {
                "features": empty,
                "coords": np.zeros((0, 2), np.int64),
                "error": str(error),
                "reason": error.reason,
            }
        limit = owner.max_instances
        if self.training and limit is not None and len(features) > limit:
            chosen = (
                torch.randperm(len(features), generator=torch.Generator().manual_seed(seed or 0))[:limit].sort().values
            )
            features, coords = features[chosen], coords[chosen.numpy()]
        return item | {"features": features, "coords": coords}


def collate_bags(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pad bags to the largest of the batch.

    Args:
        items: With ``features`` ``(N, D)``, ``coords``, ``target``, ``id``, ``patient``, ``error`` and ``reason``.

    Returns:
        ``bags`` ``(B, N, D)`` float32, ``mask`` bool ``(B, N)``, ``target``, and lists of the rest.
    """
    longest = max(1, max(len(item["features"]) for item in items))
    width = items[0]["features"].shape[1]
    bags = torch.zeros(len(items), longest, width)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, item in enumerate(items):
        count = len(item["features"])
        bags[row, :count] = item["features"]
        mask[row, :count] = True
    target = torch.stack([torch.as_tensor(item["target"]) for item in items])
    lists = {name: [item[name] for item in items] for name in ("id", "patient", "coords", "error", "reason")}
    return {"bags": bags, "mask": mask, "target": target, **lists}


class BagData(LightningDataModule):
    """A folder of bag files and a table of labels.

    Batches hold ``bags`` ``(B, N, D)`` float32 padded, ``mask`` bool ``(B, N)``, ``target``, and lists ``id``,
    ``patient``, ``coords``, ``error``, ``reason``. Targets: class indices; values; or ``(time, event)``.

    Args:
        root: Folder with one bag file for each slide, of any layout that ``load_bag`` reads.
        labels: CSV; ``None`` for prediction alone.
        label_column: Column of the class or value.
        task: ``"classification"``, ``"regression"`` or ``"survival"`` (columns ``time`` and ``event``).
        split: CSV of a split (ours or CLAM's); ``None`` means the column ``split`` of the labels, or a random division
            by patients.
        val_fraction: Share that validates in a random division; the same share tests.
        class_names: Order of the classes; ``None`` means sorted.
        batch_size: Bags a step.
        num_workers: Reading processes.
        max_instances: Largest number of tiles in training, drawn anew every time; ``None`` for all.
        standardize: Subtract the mean of the training tiles and divide by their standard deviation.
        missing: ``"error"`` or ``"skip"``, for labels without a bag.
        cache: Keep bags in memory once they were read.
        seed: Of the random division.

    Raises:
        ConfigError: If tables and files do not fit each other.
    """

    def __init__(
        self,
        root: str | None = None,
        labels: str | None = None,
        label_column: str = "label",
        task: Task = "classification",
        split: str | None = None,
        val_fraction: float = 0.2,
        class_names: list[str] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        max_instances: int | None = None,
        standardize: bool = False,
        missing: Literal["error", "skip"] = "error",
        cache: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (max_instances is not None and max_instances < 1):
            raise ConfigError(f"batch_size and max_instances must be at least 1; got {batch_size}, {max_instances}.")
        if root is None:
            raise ConfigError("No bags given. Pass --data.root FOLDER (one bag file per slide).")
        self.files = find_bags(root)
        self.root, self.labels, self.task = root, labels, task
        self.label_column, self.batch_size, self.num_workers = label_column, batch_size, num_workers
        self.max_instances, self.standardize, self.cache = max_instances, standardize, cache
        self.seed, self.val_fraction = seed, val_fraction
        self.has_labels = labels is not None
        self.kept: dict[str, tuple[Tensor, NDArray[np.int64]]] = {}
        rows = [LabelledSlide(key, key, {}) for key in self.files] if labels is None else read_labels(labels)
        absent = [row.id for row in rows if row.id not in self.files]
        if absent and missing == "error":
            raise ConfigError(
                f"{labels} names {len(absent)} slides without a bag below {root}, the first being {absent[0]!r}."
                f"{suggest(absent[0], self.files)} With missing='skip' they are left out."
            )
        self.slides = [row for row in rows if row.id in self.files]
        if not self.slides:
            raise ConfigError(f"None of the slides in {labels} has a bag below {root}.")
        self.parts = self.divide(split)
        self.names = class_names or self.find_classes()

    def divide(self, split: str | None) -> dict[str, str]:
        """Return the part of each slide."""
        ids = [slide.id for slide in self.slides]
        if not self.has_labels:
            return dict.fromkeys(ids, "predict")
        if split is not None:
            parts = read_split(split)
            if not set(parts) & set(ids):
                raise ConfigError(f"{split} names none of the slides in {self.labels}.")
            return parts
        given = {slide.id: slide.values["split"] for slide in self.slides if slide.values.get("split")}
        if given:
            return given
        labels = None
        if self.task == "classification":
            labels = [self.cell(slide, self.label_column) for slide in self.slides]
        folds = max(2, round(1 / self.val_fraction))
        return make_folds(
            ids,
            folds=folds,
            groups=[slide.patient for slide in self.slides],
            labels=labels,
            val_fraction=self.val_fraction,
            seed=self.seed,
        )[0]

    def find_classes(self) -> list[str]:
        """Return the class names in the labels, sorted; numbers by value."""
        if not self.has_labels or self.task != "classification":
            return []
        names = {self.cell(slide, self.label_column) for slide in self.slides}
        return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))

    def cell(self, slide: LabelledSlide, column: str) -> str:
        """Return what a row says in a column.

        Raises:
            ConfigError: If there is no such column, or the cell is empty.
        """
        if column not in slide.values:
            columns = list(slide.values)
            raise ConfigError(f"{self.labels} has no column {column!r}.{suggest(column, columns)} It has {columns}.")
        text = (slide.values[column] or "").strip()
        if not text:
            raise ConfigError(f"{self.labels}: slide {slide.id!r} has nothing in column {column!r}.")
        return text

    def number(self, slide: LabelledSlide, column: str) -> float:
        """Return a finite number from a column."""
        text = self.cell(slide, column)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            raise ConfigError(
                f"{self.labels}: slide {slide.id!r} has {text!r} in column {column!r}, expected a number."
            )
        return value

    def target(self, slide: LabelledSlide) -> Tensor:
        """Return class index, value, or ``(time, event)``."""
        if self.task == "classification":
            name = self.cell(slide, self.label_column)
            if name not in self.names:
                raise ConfigError(
                    f"{self.labels}: slide {slide.id!r} has class {name!r}; the classes are {self.names}."
                )
            return torch.tensor(self.names.index(name))
        if self.task == "regression":
            return torch.tensor(self.number(slide, self.label_column))
        return torch.tensor([self.number(slide, "time"), self.number(slide, "event")])

    @property
    def class_names(self) -> list[str]:
        """Names by class index; one output for regression, time bins for survival."""
        if self.task == "classification":
            return self.names
        return ["value"] if self.task == "regression" else [f"interval {i}" for i in range(SURVIVAL_BINS)]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """Number of training slides of each class."""
        counts = Counter(int(self.target(slide)) for slide in self.part("train"))
        return [counts[index] for index in range(self.num_classes)]

    @cached_property
    def feature_dim(self) -> int:
        """Width of the features, read from the first bag that can be read and has any tile."""
        for slide in self.slides:
            try:
                bag = load_bag(self.files[slide.id])
            except DataError:  # told when it is that bag's turn
                continue
            if bag.features.shape[1]:
                return int(bag.features.shape[1])
        raise ConfigError(f"No bag below {self.root} can be read and holds a tile.")

    @cached_property
    def data_config(self) -> dict[str, Any]:
        """What a model must know of the bags: width, task, standardisation, edges of survival times."""
        config: dict[str, Any] = {"feature_dim": self.feature_dim, "task": self.task}
        if self.standardize:
            tiles = [torch.from_numpy(load_bag(self.files[slide.id]).features).double() for slide in self.part("train")]
            count = sum(len(part) for part in tiles)
            mean = torch.stack([part.sum(0) for part in tiles]).sum(0) / count
            variance = torch.stack([(part - mean).square().sum(0) for part in tiles]).sum(0) / count
            std = torch.where(variance > 1e-12, variance, 1.0).sqrt()  # columns that do not vary stay as they are
            config |= {"mean": mean.tolist(), "std": std.tolist()}
        if self.task == "survival":
            times = torch.stack([self.target(slide) for slide in self.part("train")])
            dead = times[times[:, 1] > 0, 0]
            edges = torch.quantile(dead if len(dead) else times[:, 0], torch.linspace(0, 1, SURVIVAL_BINS + 1)[1:-1])
            config["time_edges"] = edges.tolist()
        return config

    def read(self, key: str) -> tuple[Tensor, NDArray[np.int64]]:
        """Return features as float32 and coordinates of a slide.

        Raises:
            DataError: If the file cannot be used.
        """
        if key not in self.kept:
            bag = load_bag(self.files[key])
            width = bag.features.shape[1]
            if len(bag) and width != self.feature_dim:
                raise DataError(
                    f"{self.files[key]} has features of width {width}, the others {self.feature_dim}; all bags must "
                    "come from one encoder.",
                    reason="bad_bag",
                )
            features = torch.from_numpy(bag.features).float().reshape(-1, self.feature_dim)
            coords = np.zeros((len(bag), 2), np.int64) if bag.coords is None else bag.coords
            if not self.cache:
                return features, coords
            self.kept[key] = features, coords
        return self.kept[key]

    def part(self, name: str) -> list[LabelledSlide]:
        """Return the slides of a split, in the order of the table.

        Raises:
            ConfigError: If it has none.
        """
        slides = [slide for slide in self.slides if self.parts.get(slide.id) == name]
        if name == "predict":
            slides = self.slides
        if not slides:
            raise ConfigError(f"No slide of {self.labels} is in the split {name!r}.")
        return slides

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled training bags."""
        dataset = BagDataset(self, self.part("train"), training=True)
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        sampler = TrainingSampler(dataset, *world(), seed=torch.initial_seed() % 2**31, epoch=epoch, skip=0)
        return DataLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers, collate_fn=collate_bags
        )

    def evaluation_loader(self, name: str) -> DataLoader[dict[str, Any]]:
        """Every bag of a split once."""
        dataset = BagDataset(self, self.part(name), training=False)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,  # by name: Lightning makes the loader anew for predictions
            sampler=EvaluationSampler(dataset, *world()),
            num_workers=self.num_workers,
            collate_fn=collate_bags,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every validation bag once."""
        return self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every test bag once."""
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every bag once."""
        return self.evaluation_loader("predict")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Stop at a bag that cannot be read, except in predictions.

        Raises:
            DataError: Naming the slide.
        """
        predicting = self.trainer is not None and self.trainer.predicting
        for key, error in zip(batch["id"], batch["error"], strict=True):
            if error and not predicting:
                raise DataError(f"Bag of slide {key!r} cannot be used: {error}", reason="bad_bag")
        return batch
