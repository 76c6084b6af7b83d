"""The handwritten digits that come with scikit-learn: data that is there without any file or network."""

from __future__ import annotations

import numpy as np

from saccade.datasets.image_data import Augmentation, ImageData, Preprocess, Sample, Split, hold_out
from saccade.errors import ConfigError

__all__ = ["DigitsData"]


class DigitsData(ImageData):
    """1797 grey 8x8 digits of ``sklearn.datasets.load_digits``; the held-out part is validation, test and prediction.

    Args:
        val_fraction: Share held out, in (0, 1).
        split_seed: Seed of that choice.
        img_size: Height and width of the model's input in pixels; ``None`` means the backbone's.
        batch_size: Images per step and device.
        num_workers: Decoding processes; ``None`` means one per core, at most 4. Results do not depend on it.
        preprocess: Normalisation and evaluation crop; ``None`` means the backbone's.
        augment: Random changes to training images.
    """

    def __init__(
        self,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        img_size: int | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        preprocess: Preprocess | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, preprocess, augment)
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction must be in (0, 1), got {val_fraction}.")
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    @property
    def class_names(self) -> list[str]:
        """``"0"`` to ``"9"``."""
        return [str(digit) for digit in range(10)]

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of a split in scikit-learn's order."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        pairs = enumerate(zip(pixels, digits.target.tolist(), strict=True))
        samples = [Sample(f"digits/{number:04d}", label, image) for number, (image, label) in pairs]
        return hold_out(samples, self.val_fraction, self.split_seed)[split != "train"]
