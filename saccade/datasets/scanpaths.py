"""Scanpath recordings for training: trials with honest splits, generated scenes where there are no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from saccade.datasets.drawn_search import search_scenes
from saccade.datasets.image_data import Split
from saccade.datasets.images import read_image
from saccade.errors import ConfigError
from saccade.gaze.crops import cut_crops
from saccade.gaze.scanpath import ScanpathSet
from saccade.gaze.scenes import parse_grid
from saccade.gaze.splits import split_scanpaths
from saccade.gaze.trials import Trial, collate_trials, lay_grid, trials_of

__all__ = ["ScanpathData"]


class ScanpathData(LightningDataModule):
    """Human scanpaths over objects, one sample per image and task with everybody's paths.

    Batches hold ``scenes`` (a ``SceneBatch``), ``paths`` and ``viewers`` (int64 ``(B, K, T)`` and ``(B, K)``, padded
    with -1), ``image`` and ``task``.

    Args:
        root: Recordings in any format that ``saccade.gaze.read_scanpaths`` reads, with boxes or with a ``grid``.
            ``None``: scenes drawn and searched by simulated viewers.
        grid: ``"ROWSxCOLUMNS"`` of equal objects laid over every image, e.g. ``"6x14"``.
        generated_scenes: Number of scenes to draw without ``root``.
        images: Folder with the images, for crops; generated scenes have their own.
        seen: ``"crops"``, ``"features"`` or ``"nothing"``: what the model gets of an object besides its place.
        features: HDF5 file of ``saccade gaze features``, for ``seen="features"``.
        crop_size: Height and width of crops in pixels.
        split_by: What no two splits share: ``"image"``, ``"target"`` (task) or ``"subject"`` (viewer); ``"given"``
            takes the recordings' own splits. See ``split_scanpaths``.
        val_fraction: Share of the images, targets or viewers for validation.
        test_fraction: Share for testing.
        split_seed: Seed of that choice.
        max_length: Leave out longer paths; ``None`` keeps all.
        flips: Mirror the places of training scenes at random, left to right and top to bottom.
        batch_size: Trials per step and device.
        num_workers: Collating processes; trials are in memory, so none is rarely slow.

    Raises:
        ConfigError: If the options do not fit each other, or a split would be empty.
        DataError: If recordings cannot be used.
    """

    def __init__(
        self,
        root: str | None = None,
        grid: str | None = None,
        generated_scenes: int = 600,
        images: str | None = None,
        seen: Literal["crops", "features", "nothing"] = "crops",
        features: str | None = None,
        crop_size: int = 32,
        split_by: Literal["image", "target", "subject", "given"] = "image",
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        max_length: int | None = None,
        flips: bool = False,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if (features is None) == (seen == "features"):
            raise ConfigError("seen='features' needs the file that features names, and nothing else does.")
        if seen == "crops" and root is not None and images is None:
            raise ConfigError("seen='crops' needs the folder that images names.")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        self.root, self.grid, self.generated_scenes = root, grid, generated_scenes
        self.images, self.seen, self.features, self.crop_size = images, seen, features, crop_size
        self.split_by, self.split_seed, self.max_length = split_by, split_seed, max_length
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.flips = flips
        self.batch_size, self.num_workers = batch_size, num_workers
        self.trials: dict[str, list[Trial]] = {}

    def samples(self, split: Split) -> list[Trial]:
        """Return the trials of a split."""
        return self.prepare()[split]

    def prepare(self) -> dict[str, list[Trial]]:
        """Read and split the recordings, once.

        Raises:
            ConfigError: If a split would be empty.
        """
        if not self.trials:
            paths, images = self.recordings()
            look = None if self.seen == "nothing" else self.features_of(images)
            self.trials = {name: trials_of(part, features=look) for name, part in self.split(paths).items()}
        return self.trials

    def recordings(self) -> tuple[ScanpathSet, Callable[[str], Any]]:
        """Return all paths, and what gives an image by its name."""
        if self.root is None:
            scenes, paths = search_scenes(self.generated_scenes)
            pictures = {scene.name: scene.image for scene in scenes}
            return paths, pictures.__getitem__
        from saccade.gaze.formats import read_scanpaths

        folder = Path(self.images or ".")
        paths = read_scanpaths(self.root)
        if self.grid is not None:
            paths = lay_grid(paths, *parse_grid(self.grid))
        return paths, lambda name: read_image(folder / name)

    def features_of(self, images: Callable[[str], Any]) -> Callable[[str, Tensor], Tensor]:
        """Return what gives crops or features of an image's boxes."""
        if self.features is None:
            return lambda name, boxes: cut_crops(images(name), boxes, self.crop_size)
        from saccade.gaze.object_features import FeatureFile

        return FeatureFile(self.features)

    def split(self, paths: ScanpathSet) -> dict[str, ScanpathSet]:
        """Divide the paths as ``split_by`` says."""
        if self.split_by == "given":
            names = {"train": "train", "val": ["val", "valid"], "test": "test"}
            parts = {split: paths.filter(split=name) for split, name in names.items()}
        else:
            held_out = self.val_fraction + self.test_fraction
            fractions = (1 - held_out, self.val_fraction, self.test_fraction)
            parts = split_scanpaths(paths, by=self.split_by, fractions=fractions, seed=self.split_seed)
        for split, part in parts.items():
            if not len(part):
                raise ConfigError(f"No paths are left for {split!r}, with split_by {self.split_by!r}.")
        return parts

    @property
    def viewers(self) -> list[str]:
        """Names of the viewers in training, by number."""
        names = {viewer for trial in self.prepare()["train"] for viewer in trial.viewers}
        return sorted(names, key=lambda name: (len(name), name))

    @property
    def facts(self) -> dict[str, Any]:
        """What predictions need to know: viewers, longest training path, what is seen of objects."""
        lengths = [len(path) for trial in self.prepare()["train"] for path in trial.paths]
        longest = max(length for length in lengths if self.max_length is None or length <= self.max_length)
        seen: dict[str, Any] = {"kind": self.seen}
        if self.seen == "crops":
            seen["crop_size"] = self.crop_size
        if self.features is not None:
            from saccade.gaze.object_features import FeatureFile

            seen["encoder"] = FeatureFile(self.features).encoder
        return {"viewers": self.viewers, "max_length": longest, "features": seen}

    def collate(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """Make a batch."""
        scenes, paths, viewers = collate_trials(trials, viewers=self.viewers, max_length=self.max_length)
        names = {"image": [trial.image for trial in trials], "task": [trial.task or "" for trial in trials]}
        return {"scenes": scenes, "paths": paths, "viewers": viewers, **names}

    def collate_mirrored(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """Make a batch of scenes mirrored at random."""
        flipped = [
            replace(trial, scene=trial.scene.mirrored(*torch.randint(2, (2,)).bool().tolist())) for trial in trials
        ]
        return self.collate(flipped)

    def loader(self, split: Split, *, shuffle: bool = False) -> DataLoader[Any]:
        """Return the batches of a split."""
        trials = self.samples(split)
        collate = self.collate_mirrored if shuffle and self.flips else self.collate
        options: dict[str, Any] = {"num_workers": self.num_workers, "collate_fn": collate}
        return DataLoader(trials, batch_size=self.batch_size, shuffle=shuffle, **options)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled trials."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation trial once."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test trial once."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every test trial once."""
        return self.loader("test")
