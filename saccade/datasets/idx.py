"""The IDX format of MNIST, Fashion-MNIST and their relatives."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from saccade.datasets.image_data import Augmentation, ImageData, Preprocess, Sample, Split, hold_out
from saccade.errors import ConfigError, DataError

__all__ = ["IDXData", "read_idx"]

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Read an IDX file, gzipped or not (told by content).

    Args:
        path: E.g. ``train-images-idx3-ubyte.gz``.

    Returns:
        The array, with the file's shape and element type.

    Raises:
        ConfigError: If the file does not exist.
        DataError: If it is no IDX file, or shorter or longer than its header says.

    Source:
        LeCun et al., "The MNIST database": a big-endian magic number whose third byte is the element type and whose
        fourth is the number of dimensions, the dimensions as 32-bit integers, then the elements.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"IDX file {str(path)!r} does not exist.")
    content = file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise DataError(f"{file} is a damaged gzip file ({error}).") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in DTYPES:
        magic = int.from_bytes(content[:4], "big")
        raise DataError(f"{file} is no IDX file: expected magic 2051 (images) or 2049 (labels), got {magic}.")
    dtype, rank = np.dtype(DTYPES[content[2]]), content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise DataError(f"{file} is cut off within its header.")
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = math.prod(shape) * dtype.itemsize
    if len(content) - start != expected:
        raise DataError(f"{file} holds {len(content) - start} bytes of data, expected {expected} for shape {shape}.")
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


class IDXData(ImageData):
    """Grey images in IDX files, named as in the official MNIST and Fashion-MNIST distributions.

    ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte`` (``.gz`` or not) are the training split, ``t10k-...``
    both the validation and the test split. The files lie in ``root``, or where torchvision puts them, ``root/*/raw``.

    Args:
        root: The folder.
        class_names: Names by class index; ``None`` means ``"0"``, ``"1"``, ...
        val_fraction: Share of the training images held out for validation; ``None`` validates on the ``t10k`` files.
        split_seed: Seed of that choice.
        img_size: Height and width of the model's input in pixels; ``None`` means the backbone's.
        batch_size: Images per step and device.
        num_workers: Decoding processes; ``None`` means one per core, at most 4. Results do not depend on it.
        preprocess: Normalisation and evaluation crop; ``None`` means the backbone's.
        augment: Random changes to training images.

    Raises:
        ConfigError: When the data is first looked at, if files are missing.
        DataError: If they are damaged, or images and labels do not fit together.
    """

    def __init__(
        self,
        root: str | None = None,
        class_names: list[str] | None = None,
        val_fraction: float | None = None,
        split_seed: int = 0,
        img_size: int | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        preprocess: Preprocess | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, preprocess, augment)
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction must be in (0, 1) or null, got {val_fraction}.")
        self.root = root
        self.given_names = class_names
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.found: dict[str, list[Sample]] = {}

    @property
    def class_names(self) -> list[str]:
        """Names by class index."""
        if self.given_names is not None:
            return self.given_names
        return [str(label) for label in range(1 + max(sample.target for sample in self.read("train")))]

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of a split in the order of the files."""
        if split in ("test", "predict"):
            return self.read("t10k")
        if self.val_fraction is None:
            return self.read("train" if split == "train" else "t10k")
        return hold_out(self.read("train"), self.val_fraction, self.split_seed)[split == "val"]

    def read(self, prefix: str) -> list[Sample]:
        """Read one pair of files, once."""
        if prefix not in self.found:
            images = read_idx(self.file(f"{prefix}-images-idx3-ubyte"))
            labels = read_idx(self.file(f"{prefix}-labels-idx1-ubyte"))
            if images.ndim != 3 or images.dtype != np.uint8:
                raise DataError(f"{prefix}-images: expected uint8 (N, Y, X), got {images.dtype} {images.shape}.")
            if labels.shape != images.shape[:1]:
                raise DataError(f"{prefix}: {images.shape[0]} images but labels of shape {labels.shape}.")
            if self.given_names is not None and labels.max(initial=0) >= len(self.given_names):
                raise DataError(f"{prefix}-labels: label {labels.max()} but only {len(self.given_names)} class names.")
            pairs = enumerate(zip(images, labels.tolist(), strict=True))
            self.found[prefix] = [Sample(f"{prefix}/{number:05d}", label, image) for number, (image, label) in pairs]
        return self.found[prefix]

    def file(self, stem: str) -> Path:
        """Find a file of the distribution."""
        if self.root is None:
            raise ConfigError(
                "No data folder given. Pass --data.root FOLDER (with train-images-idx3-ubyte.gz and so on)."
            )
        root = Path(self.root).expanduser()
        for pattern in (stem, f"{stem}.gz", f"raw/{stem}*", f"*/raw/{stem}*"):
            if match := next(iter(sorted(root.glob(pattern))), None):
                return match
        raise ConfigError(f"Data folder {self.root!r} has no {stem} or {stem}.gz.")
