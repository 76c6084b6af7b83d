"""Small robustness suites in the official layouts, and a classifier that knows their classes by colour."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from PIL import Image

from saccade.datasets.corruptions import CORRUPTIONS, corrupt

WNIDS = ("n01440764", "n01443537", "n01484850", "n01498041", "n01514668", "n01514859")  # not in a row: 0 1 2 6 7 8
SIZE = 32
DATA_CONFIG = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 0.8,
    "crop_mode": "center",
}


def picture(label: int, index: int, size: int = SIZE) -> np.ndarray:
    """Return a noisy picture in the colour of a class."""
    colour = np.random.default_rng(label).integers(30, 225, 3)
    noise = np.random.default_rng(1000 * label + index).normal(0, 25, (size, size, 3))
    return np.clip(noise + colour, 0, 255).astype(np.uint8)


def write_classes(root: Path, names: Sequence[str] = WNIDS, count: int = 2) -> Path:
    """Write ``ROOT/CLASS/N.png`` with ``count`` pictures of each class."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(picture(label, index)).save(root / name / f"{index}.png")
    return root


def write_imagenet_c(root: Path, names: Sequence[str] = WNIDS, count: int = 1, *, kinds=tuple(CORRUPTIONS)) -> Path:
    """Write ``ROOT/CORRUPTION/SEVERITY/CLASS/N.png``."""
    for kind in kinds:
        for severity in range(1, 6):
            for label, name in enumerate(names):
                folder = root / kind / str(severity) / name
                folder.mkdir(parents=True)
                for index in range(count):
                    Image.fromarray(corrupt(picture(label, index), kind, severity, 0)).save(folder / f"{index}.png")
    return root


def write_clip(path: Path, frames: Sequence[np.ndarray]) -> None:
    """Write a film."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (width, height))
    for frame in frames:
        film.write(frame[..., ::-1])
    film.release()


def write_checkpoint(path: Path, names: Sequence[str] = WNIDS) -> Path:
    """Write a checkpoint as ``saccade fit`` does; the last layer is fitted to the colours of the classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=len(names)).eval()
    labels = [label for label in range(len(names)) for _ in range(8)]
    images = np.stack([picture(label, 50 + index) for index, label in enumerate(labels)])
    with torch.no_grad():
        normal = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        features = model.forward_head(model.forward_features(normal), pre_logits=True).double()
        ones = torch.ones(len(features), 1, dtype=torch.float64)
        target = torch.nn.functional.one_hot(torch.tensor(labels)).double()
        both = torch.cat([features, ones], 1)
        solution = torch.linalg.solve(both.T @ both + 1e-3 * torch.eye(both.shape[1]), both.T @ target)
        model.fc.weight.copy_(solution[:-1].T)
        model.fc.bias.copy_(solution[-1])
    facts = {
        "task": "image",
        "backbone": "test_resnet",
        "backbone_kwargs": {},
        "num_classes": len(names),
        "class_names": list(names),
        "data_config": DATA_CONFIG,
    }
    torch.save({"saccade": facts, "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, path)
    return path
