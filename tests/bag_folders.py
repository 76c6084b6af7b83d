"""Small folders of bags with labels: a few tiles of the positive class stand out."""

from pathlib import Path

import numpy as np

from saccade.datasets.bag_files import Bag, save_bag


def write_bags(folder: Path, count: int = 24, width: int = 8, seed: int = 0) -> Path:
    """Write ``bags/`` and ``labels.csv`` (slide, label, patient, value, time, event; two slides a patient)."""
    rng = np.random.default_rng(seed)
    lines = ["slide,label,patient,value,time,event"]
    for index in range(count):
        positive, tiles = index % 4 >= 2, int(rng.integers(4, 20))
        features = rng.normal(size=(tiles, width)).astype(np.float32)
        if positive:
            features[: max(2, tiles // 4), 0] += 5
        bag = Bag(features, rng.integers(0, 9999, (tiles, 2)), {"tile_size_level0": 256.0})
        save_bag(folder / "bags" / f"s{index:02d}.h5", bag)
        time = rng.exponential(2.0 if positive else 8.0) + 0.1
        label, event = "tumour" if positive else "normal", int(index % 3 > 0)
        value = features[:, 0].max()
        lines.append(f"s{index:02d},{label},p{index // 2:02d},{value:.3f},{time:.3f},{event}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"
