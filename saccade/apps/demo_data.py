"""Pictures for the demo: handwritten digits on photographs, as bundled in scikit-learn and scikit-image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["Scenes"]

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
DIGIT_PX = (22, 32)
PHOTOGRAPH_PX = (2.1, 5.2)  # pixels of the photograph per pixel of the picture
DIMMED = 0.6


class Scenes:
    """Draws pictures that show one handwritten digit somewhere on a dimmed photograph.

    Args:
        seed: Seed of digits, places and backgrounds.
    """

    def __init__(self, seed: int) -> None:
        from PIL import Image
        from skimage import data
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.rng = np.random.default_rng(seed)
        order = self.rng.permutation(len(digits.target))
        self.digits: NDArray[np.uint8] = (digits.images[order] / 16 * 255).astype(np.uint8)
        self.labels: NDArray[np.int64] = digits.target[order]
        self.photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]

    def draw(self, index: int, size: int, zoom: int = 1) -> Image.Image:
        """Draw digit ``index`` (0 to 1796) on a picture of ``size`` x ``size`` pixels, ``zoom`` times as fine."""
        from PIL import Image

        rng = self.rng
        photograph = self.photographs[rng.integers(len(self.photographs))]
        side = min(int(rng.uniform(*PHOTOGRAPH_PX) * size), *photograph.size)
        x, y = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
        scene = photograph.crop((x, y, x + side, y + side)).resize((size * zoom, size * zoom))
        scene = Image.fromarray((np.asarray(scene) * DIMMED).astype(np.uint8))
        width = int(rng.integers(*DIGIT_PX)) * zoom
        digit = Image.fromarray(self.digits[index]).resize((width, width), Image.Resampling.BICUBIC)
        scene.paste((255, 255, 255), tuple(rng.integers(0, size * zoom - width, 2).tolist()), digit)
        return scene

    def write(self, folder: Path, indices: range, size: int, *, by_class: bool, zoom: int = 1) -> None:
        """Write pictures as PNG, in a sub-folder per digit or all in one folder."""
        for index in indices:
            label = int(self.labels[index])
            path = folder / str(label) / f"{index:04d}.png" if by_class else folder / f"{index:04d}_digit{label}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.draw(index, size, zoom).save(path)
