"""Small generated image folders, one colour per class."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 50)}


def write_picture(path: Path, colour: tuple[int, int, int], seed: int, size: int = 24) -> None:
    """Write a noisy picture of one colour."""
    noise = np.random.default_rng(seed).normal(0, 40, (size, size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)


def write_folder(root: Path, counts: dict[str, int], classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Write ``counts[split]`` pictures per class and split; the split ``""`` puts the classes into ``root``."""
    for split, count in counts.items():
        for number, label in enumerate(classes):
            for index in range(count):
                seed = sum(map(ord, split)) + 1000 * number + index
                write_picture(root / split / label / f"{index:03d}.png", COLOURS[label], seed)
    return root
