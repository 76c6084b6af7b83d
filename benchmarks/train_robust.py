"""What token-aware average pooling and attention diversification do to a small FAN on small real data.

The shipped configs ``image/flowers_fan`` and ``image/fashion_mnist_fan`` are trained with cross entropy alone (CE),
with TAP, with ADL, and with both, three seeds each, and the weights of the last epoch are evaluated on all validation
images as they are and under the fifteen corruptions at five severities, made at the size of the model's input. The
weight of ADL is the paper's, 1; what another does, seed 0 without TAP shows.

The data is ``images/`` below SACCADE_TEST_DATA (default ../shared/data). Each run leaves a folder below
``runs/train_robust/`` of the repository (or SACCADE_TRAIN_ROBUST); what is there is not done again.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from torch import Tensor, nn

from benchmarks.harness import RESULTS
from saccade.apps.measure import machine
from saccade.apps.shipped import config_path
from saccade.checkpoints import best_checkpoint
from saccade.datasets import IDXData, ImageFolderData
from saccade.datasets.corruptions import CORRUPTIONS, GROUPS, SEVERITIES, corrupt
from saccade.vision_backbones import LoadedModel, load_model
from saccade.vision_backbones.diversity import DiversityCollector

SEEDS = (0, 1, 2)
WEIGHT = 1.0
REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SACCADE_TEST_DATA") or REPOSITORY.parent / "shared" / "data") / "images"
FOLDER = Path(os.environ.get("SACCADE_TRAIN_ROBUST") or REPOSITORY / "runs" / "train_robust")
# config, folder of the data, module that reads it
SETS = {
    "flowers": ("image/flowers_fan", DATA / "flowers", ImageFolderData),
    "fashion_mnist": ("image/fashion_mnist_fan", DATA / "fashion_mnist", IDXData),
}
VARIANTS = {"CE": (False, False), "CE + TAP": (True, False), "CE + ADL": (False, True), "CE + TAP + ADL": (True, True)}
COUNTED = [name for name in CORRUPTIONS if name not in GROUPS["extra"]]


class Run:
    """One training and what is known of it.

    Args:
        data: Which of SETS.
        pooling: With TAP.
        weight: Of ADL; 0 means without.
        seed: Of the training.
    """

    def __init__(self, data: str, pooling: bool, weight: float, seed: int) -> None:
        self.data, self.pooling, self.weight, self.seed = data, pooling, weight, seed
        parts = [data, "ce", *["tap"] * pooling, *[f"adl{weight:g}"] * (weight > 0), str(seed)]
        self.folder = FOLDER / "-".join(parts)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return one of the run's JSON files, ``None`` if it is not there yet."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write one of the run's JSON files."""
        (self.folder / name).write_text(json.dumps(content, indent=1) + "\n")


def variant_run(data: str, variant: str, seed: int) -> Run:
    """Return the run of a variant."""
    pooling, diverse = VARIANTS[variant]
    return Run(data, pooling, WEIGHT if diverse else 0.0, seed)


def train(one: Run) -> None:
    """Train once with ``saccade fit`` and note the outcome in ``run.json``, unless that is there."""
    folder = one.folder
    if (folder / "run.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config, root, _ = SETS[one.data]
    options = yaml.safe_load(config_path(config).read_text())["model"]["init_args"]["backbone_kwargs"]
    options = {key: value for key, value in options.items() if key != "num_scales"}
    options |= {"num_scales": 4} if one.pooling else {}
    settings = ["--model.backbone_kwargs", json.dumps(options), "--model.diversity_weight", str(one.weight)]
    command = [sys.executable, "-m", "saccade.apps.cli", "fit", "-c", config, "--data.root", str(root)]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, *settings, "--seed", str(one.seed), "-q", "--json"],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    summary = json.loads(done.stdout)
    metrics = json.loads((folder / summary["run"] / "metrics.json").read_text())
    outcome = {
        "run": summary["run"],
        "epochs": metrics["epochs"],
        "epoch_seconds": metrics["seconds"],
        "total_seconds": round(time.perf_counter() - start, 1),
        "last": metrics["last"],
    }
    one.write("run.json", outcome)
    print(f"{folder.name:<34}val acc {metrics['last']['val/acc']:.3f}   {outcome['total_seconds']:.0f} s", flush=True)


class Images:
    """The images of a data set, cropped for a model."""

    def __init__(self, data: str, split: str, data_config: dict[str, Any]) -> None:
        _, root, kind = SETS[data]
        samples = kind(root=str(root)).samples(split)
        crop = timm.data.create_transform(**data_config, use_prefetcher=True)
        self.pixels = np.stack([np.asarray(crop(sample.load())) for sample in samples])  # (N, 3, Y, X), uint8
        self.targets = torch.tensor([sample.target for sample in samples])
        self.mean, self.std = (torch.tensor(data_config[name]).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))

    def normalised(self, pixels: np.ndarray) -> Tensor:
        """Return pixels ``(N, 3, Y, X)`` as the model wants them."""
        return (torch.from_numpy(pixels).float() - self.mean) / self.std

    def corrupted(self, name: str, severity: int) -> Tensor:
        """Return all images under a corruption; each has its own seed, whatever the model."""
        changed = [
            corrupt(image.transpose(1, 2, 0), name, severity, zlib.crc32(f"{name} {severity} {index}".encode()))
            for index, image in enumerate(self.pixels)
        ]
        return self.normalised(np.stack(changed).transpose(0, 3, 1, 2))


def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Return top-1 accuracy."""
    with torch.inference_mode():
        right = [(model(part).argmax(1) == want).sum() for part, want in batches(images, targets)]
    return sum(int(count) for count in right) / len(targets)


def batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of 64."""
    return zip(*(tensor.split(64) for tensor in tensors), strict=True)


def mean_diversity_loss(model: nn.Module, images: Tensor) -> float:
    """Return the diversity loss over all images."""
    collector = DiversityCollector(model)
    total = 0.0
    with torch.no_grad():
        for (part,) in batches(images):
            with collector:
                model(part)
            total += collector.loss().item() * len(part)
    collector.remove()
    return total / len(images)


def load(one: Run) -> LoadedModel:
    """Return the model of a finished run, with the weights of its last epoch."""
    trained = one.read("run.json")
    assert trained is not None
    return load_model(str(best_checkpoint(one.folder / trained["run"], prefer="last")))


def evaluate(data: str) -> None:
    """Evaluate all runs of a data set that have no ``evaluation.json`` yet; each corruption is made once for all."""
    runs = [variant_run(data, variant, seed) for variant in VARIANTS for seed in SEEDS]
    runs = [one for one in runs if one.read("run.json") and not one.read("evaluation.json")]
    if not runs:
        return
    loaded = [load(one) for one in runs]
    models = [one.model for one in loaded]
    images = Images(data, "val", loaded[0].data_config)
    clean = images.normalised(images.pixels)
    found = [
        {"clean": accuracy(model, clean, images.targets), "adl": mean_diversity_loss(model, clean), "corrupted": {}}
        for model in models
    ]
    for name in COUNTED:
        corrupted = [images.corrupted(name, severity) for severity in SEVERITIES]
        for model, result in zip(models, found, strict=True):
            result["corrupted"][name] = [accuracy(model, part, images.targets) for part in corrupted]
        print(f"{data}: {name} done", flush=True)
    for one, result in zip(runs, found, strict=True):
        one.write("evaluation.json", result)


def weigh(data: str) -> list[dict[str, Any]]:
    """Train seed 0 with several weights of ADL, without TAP, and print accuracy and diversity."""
    rows = []
    print(f"{data}, seed 0, no TAP: clean validation accuracy, and ADL over the training images, by the weight of ADL")
    for weight in (0.0, 0.1, WEIGHT):
        one = Run(data, False, weight, 0)
        train(one)
        row = one.read("weight.json")
        if row is None:
            loaded = load(one)
            images = Images(data, "train", loaded.data_config)
            trained = one.read("run.json")
            assert trained is not None
            row = {
                "weight": weight,
                "val_acc": trained["last"]["val/acc"],
                "adl_train": mean_diversity_loss(loaded.model, images.normalised(images.pixels)),
            }
            one.write("weight.json", row)
        print(f"  {weight:<6g}{row['val_acc']:.3f}   {row['adl_train']:.4f}", flush=True)
        rows.append(row)
    return rows


def mean_corrupted(one: Run) -> float:
    """Return an evaluated run's accuracy under corruptions; NaN if there is none yet."""
    found = one.read("evaluation.json")
    if found is None:
        return math.nan
    return statistics.mean(statistics.mean(values) for values in found["corrupted"].values())


def summary(data: str, variant: str) -> dict[str, Any]:
    """Return mean and spread over the seeds, and the figures of each."""
    seeds = []
    for seed in SEEDS:
        one = variant_run(data, variant, seed)
        trained, found = one.read("run.json"), one.read("evaluation.json")
        if trained is None or found is None:
            continue
        means = {name: statistics.mean(values) for name, values in found["corrupted"].items()}
        seeds.append(
            {
                "seed": seed,
                "clean": found["clean"],
                "corrupted": statistics.mean(means.values()),
                "groups": {
                    group: statistics.mean(means[name] for name in names)
                    for group, names in GROUPS.items()
                    if group != "extra"
                },
                "over_ce": statistics.mean(means.values()) - mean_corrupted(variant_run(data, "CE", seed)),
                "retention": statistics.mean(means.values()) / found["clean"],
                "adl": found["adl"],
                "by_corruption": means,
                "epochs": trained["epochs"],
                "total_seconds": trained["total_seconds"],
            }
        )
    values = {kind: [seed[kind] for seed in seeds] for kind in ("clean", "corrupted", "over_ce", "retention", "adl")}
    mean = {kind: statistics.mean(found) for kind, found in values.items() if found}
    spread = {kind: statistics.stdev(found) if len(found) > 1 else None for kind, found in values.items()}
    return {"data": data, "variant": variant, "mean": mean, "standard_deviation": spread, "seeds": seeds}


def main() -> None:
    """Run what is missing, print the table and save."""
    weights = {}
    for data in SETS:
        weights[data] = weigh(data)
        for seed in SEEDS:
            for variant in VARIANTS:
                train(variant_run(data, variant, seed))
        evaluate(data)
    report(weights)


def report(weights: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table of the evaluated runs and save it with what several weights did."""
    cases = []
    titles = ("clean", "corrupted", "over CE", "retention", "ADL")
    print(f"{'data':<15}{'loss':<16}{''.join(title.rjust(17) for title in titles)}   mean and sd, top-1")
    for data in SETS:
        for variant in VARIANTS:
            case = summary(data, variant)
            if not case["seeds"]:
                print(f"{data:<16}{variant:<18}not run")
                continue
            columns = (
                f"{mean:.3f} +- {'-' if spread is None else format(spread, '.3f')}".rjust(17)
                for mean, spread in zip(case["mean"].values(), case["standard_deviation"].values(), strict=True)
            )
            print(f"{data:<15}{variant:<16}{''.join(columns)}   {len(case['seeds'])} seeds")
            cases.append(case)
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "load": os.getloadavg(), "weights": weights, "cases": cases}
    (RESULTS / "train_robust.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
