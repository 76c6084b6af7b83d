"""BiFormer of few blocks beside a plain ViT of equal size: validation accuracy from random weights.

python -m benchmarks train_backbones                         # everything, with one seed
python -m benchmarks.train_backbones flowers_biformer --seeds 0,1,2

Cases that were run replace those in results/train_backbones.json, the others stay. What counts is the last epoch, not
the best. CPU seconds are those of all threads and decoding processes; the clock says little on a busy machine.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import RESULTS
from benchmarks.train_images import DATA, train
from saccade.apps.measure import machine
from saccade.apps.shipped import config_path
from saccade.attention import use_backend
from saccade.vision_backbones import create_model

# what a linear classifier on simple features reaches (images/README.md)
BASELINES = {"flowers": 0.57, "trashnet": 0.52, "blood_cells": 0.97}
CASES = [f"{data}_{family}" for data in BASELINES for family in ("biformer", "vit")]


def size(config: str) -> dict[str, float]:
    """Return millions of parameters, and of multiply-adds for one image, of the model that a config describes."""
    settings: dict[str, Any] = yaml.safe_load(config_path(config).read_text())
    arguments, pixels = settings["model"]["init_args"], settings["data"]["init_args"]["img_size"]
    options = arguments["backbone_kwargs"] | ({"img_size": pixels} if "img_size" in arguments else {})
    model = create_model(arguments["backbone"], num_classes=5, **options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("reference"):
        model(torch.zeros(1, 3, pixels, pixels))
    return {
        "parameters_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "mmac": round(counter.get_total_flops() / 2e6, 1),
    }


def measure(name: str, seeds: list[int]) -> None:
    """Train one case, print its row and put it into the results."""
    data = next(data for data in BASELINES if name.startswith(data))
    with tempfile.TemporaryDirectory() as place:
        whole = [train(f"image/{name}", DATA / data, seed, Path(place)) for seed in seeds]
    runs = [{key: run[key] for key in ("seed", "val_acc", "epochs", "cpu_seconds")} for run in whole]
    accuracies = [run["val_acc"] for run in runs]
    case = {
        "case": name,
        "baseline": BASELINES[data],
        "mean_val_acc": statistics.mean(accuracies),
        **size(f"image/{name}"),
        "runs": runs,
        "machine": machine(),
        "load": os.getloadavg(),
    }
    path = RESULTS / "train_backbones.json"
    cases = {old["case"]: old for old in json.loads(path.read_text())["cases"]} if path.exists() else {}
    cases[name] = case
    ordered = [cases[known] for known in CASES if known in cases]
    path.write_text(json.dumps({"cases": ordered}, indent=1) + "\n")
    print(
        f"{name:<22}{case['parameters_m']:.2f} M  {case['mmac']:>5.1f} MMAC   val acc {case['mean_val_acc']:.3f} "
        f"({', '.join(f'{value:.3f}' for value in accuracies)})   baseline {BASELINES[data]}   "
        f"{runs[0]['epochs']} epochs, {max(run['cpu_seconds'] for run in runs):.0f} CPU s a run",
        flush=True,
    )


def main() -> None:
    """Run and save all cases."""
    for name in CASES:
        measure(name, [0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_backbones")
    parser.add_argument("cases", nargs="+", metavar="CASE", choices=CASES, help=", ".join(CASES))
    parser.add_argument("--seeds", default="0", help="default: 0")
    args = parser.parse_args()
    for case in args.cases:
        measure(case, [int(seed) for seed in args.seeds.split(",")])
