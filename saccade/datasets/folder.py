"""Image files in class folders."""

from __future__ import annotations

import logging
from pathlib import Path

from saccade.batch import IMAGE_EXTENSIONS, find_items
from saccade.datasets.image_data import Augmentation, ImageData, Preprocess, Sample, Split, hold_out
from saccade.errors import ConfigError, DataError, suggest

__all__ = ["ImageFolderData"]

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation"), "test": ("test", "t10k")}

logger = logging.getLogger(__name__)


class ImageFolderData(ImageData):
    """Images in folders: ``root/train/CLASS/...`` with ``val`` and perhaps ``test`` beside it, or ``root/CLASS/...``.

    Split folders (``train``; ``val`` or ``validation``; ``test`` or ``t10k``) are looked for first. What is missing is
    made up: without validation images a stratified part of the training images is held out, without test images the
    validation images serve as test. Sub-folders of a class belong to it. Predictions take every image below ``root``,
    whatever the folders mean.

    Args:
        root: The folder.
        val_fraction: Share of the training images held out where there is no validation folder, in (0, 1].
        split_seed: Seed of that choice.
        class_names: Class folders by index; ``None`` means the sorted names of those found. ``saccade test`` passes
            those of the checkpoint, so that indices keep their meaning in a folder with fewer classes.
        skip_unreadable: Read every image once before the start and leave out those that cannot be read, with a warning.
        img_size: Height and width of the model's input in pixels; ``None`` means the backbone's.
        batch_size: Images per step and device.
        num_workers: Decoding processes; ``None`` means one per core, at most 4. Results do not depend on it.
        preprocess: Normalisation and evaluation crop; ``None`` means the backbone's.
        augment: Random changes to training images.

    Raises:
        ConfigError: When the data is first looked at, if the folder is missing or is not laid out like this.
    """

    def __init__(
        self,
        root: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        class_names: list[str] | None = None,
        skip_unreadable: bool = False,
        img_size: int | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        preprocess: Preprocess | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, preprocess, augment)
        if not 0 < val_fraction <= 1:
            raise ConfigError(f"val_fraction must be in (0, 1], got {val_fraction}.")
        self.root = root
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.given_names = class_names
        self.skip_unreadable = skip_unreadable
        self.found: dict[Split, list[Sample]] = {}

    @property
    def folder(self) -> Path:
        """The root, if it is there.

        Raises:
            ConfigError: If it was not given or is not a folder.
        """
        if self.root is None:
            raise ConfigError("No data folder given. Pass --data.root FOLDER (one sub-folder per class).")
        folder = Path(self.root).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"Data folder {self.root!r} does not exist. Pass --data.root FOLDER.")
        return folder

    def split_folder(self, split: Split) -> Path | None:
        """Return the folder of a split, if the root has one."""
        candidates = (self.folder / name for name in SPLIT_FOLDERS[split])
        return next((path for path in candidates if path.is_dir()), None)

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders by class index."""
        if self.given_names is not None:
            return self.given_names
        splits = [self.split_folder(split) for split in ("train", "val", "test")]
        top = next((path for path in splits if path is not None), self.folder)
        names = sorted(path.name for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not names:
            raise ConfigError(f"Data folder {str(top)!r} has no class folders: expected {top.name}/CLASS/IMAGE.")
        return names

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of a split, sorted by path."""
        if not self.found.get(split):
            if split == "predict":
                items = find_items(self.folder, extensions=IMAGE_EXTENSIONS)
                return [Sample(item.id, -1, item.path) for item in items]
            self.find(split)
        return self.found[split]

    def find(self, split: Split) -> None:
        """Fill in the samples of a split, and of the others that are cut from the same folder."""
        folder = self.split_folder(split)
        if folder is not None and (split != "train" or self.split_folder("val") is not None):
            self.found[split] = self.scan(folder)
        elif split == "test":
            self.found[split] = self.samples("val")
        else:
            folder = self.split_folder("train")
            if folder is None and (self.split_folder("val") or self.split_folder("test")):
                raise ConfigError(f"Data folder {self.root!r} has no {split} split: no {split}/ in it.")
            samples = self.scan(self.folder if folder is None else folder)
            self.found["train"], self.found["val"] = hold_out(samples, self.val_fraction, self.split_seed)
        if not self.found[split]:
            raise ConfigError(f"Data folder {self.root!r} has no images for {split}.")

    def scan(self, folder: Path) -> list[Sample]:
        """Return the samples in the class folders of one folder."""
        index = {name: number for number, name in enumerate(self.class_names)}
        samples, prefix = [], folder.relative_to(self.folder).as_posix()
        for item in find_items(folder, extensions=IMAGE_EXTENSIONS):
            name, _, rest = item.id.partition("/")
            if not rest:
                raise ConfigError(
                    f"Image {str(item.path)!r} lies in no class folder: expected {folder.name}/CLASS/IMAGE."
                )
            if name not in index:
                raise ConfigError(
                    f"Folder {str(folder / name)!r} is no known class.{suggest(name, index)} "
                    f"Classes: {', '.join(list(index)[:20])}{', ...' if len(index) > 20 else ''}."
                )
            samples.append(Sample(item.id if prefix == "." else f"{prefix}/{item.id}", index[name], item.path))
        return self.readable(samples) if self.skip_unreadable else samples

    def readable(self, samples: list[Sample]) -> list[Sample]:
        """Leave out what cannot be read."""
        good = []
        for sample in samples:
            try:
                sample.load()
            except DataError as error:
                logger.warning("%s is left out: %s", sample.id, error)
            else:
                good.append(sample)
        return good
