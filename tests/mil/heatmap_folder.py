"""An output folder of ``saccade slides`` with a drawn slide, its tiles and bag, an empty one, and a model."""

from pathlib import Path

import h5py
import numpy as np
import torch

from saccade.batch import BatchOptions
from saccade.datasets.bag_files import Bag, save_bag
from saccade.mil import TileOptions, create_model, extract
from tests.mil_slides import drawn_slide, write_pyramid

WIDTH = 6


def write_folder(root: Path, *, empty: bool = True) -> Path:
    """Write ``slides/a.tif``, ``out/`` with bags of ``a`` and, without tiles, ``e``; return ``out``."""
    (root / "slides").mkdir(parents=True)
    write_pyramid(root / "slides" / "a.tif", drawn_slide(900, 700)[0])
    tiles = TileOptions(mpp=1.0, tile_px=64)
    extract(root / "slides", out=root / "out", stage="tile", tiles=tiles, options=BatchOptions(num_workers=0))
    with h5py.File(root / "out" / "tiles" / tiles.name / "a.h5") as file:
        coords, attributes = file["coords"][()], dict(file["coords"].attrs)
    features = np.random.default_rng(0).normal(size=(len(coords), WIDTH)).astype(np.float32)
    bags = root / "out" / "features" / tiles.name / "drawn"
    save_bag(bags / "a.h5", Bag(features, coords, {k: v for k, v in attributes.items() if np.isscalar(v)}))
    if empty:
        save_bag(bags / "e.h5", Bag(np.zeros((0, WIDTH), np.float32), np.zeros((0, 2), np.int64), {}))
    return root / "out"


def write_model(path: Path, name: str = "acmil_ga", seed: int = 0) -> Path:
    """Write the weights of a small model, as its repository's checkpoints are."""
    torch.manual_seed(seed)
    torch.save(create_model(name, feature_dim=WIDTH, num_classes=2).state_dict(), path)
    return path
