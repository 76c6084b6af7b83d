"""Validation accuracy and time of the shipped image configs from random weights: ``saccade fit`` with three seeds each.

The data is ``images/`` below SACCADE_TEST_DATA (default ../shared/data). What counts is the last epoch, not the best.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS
from saccade.apps.measure import machine

SEEDS = (0, 1, 2)
DATA = Path(os.environ.get("SACCADE_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "images"
# config: folder, and what a linear classifier on simple features reaches (images/README.md)
CASES = {
    "image/flowers_resnet10": (DATA / "flowers", 0.57),
    "image/fashion_mnist_resnet10": (DATA / "fashion_mnist", 0.82),
    "image/digits_resnet10": (None, None),
}


def train(config: str, root: Path | None, seed: int, place: Path) -> dict[str, float]:
    """Run one fit and return its last validation accuracy, the time of its epochs and that of the whole command."""
    where = [] if root is None else ["--data.root", str(root)]
    command = [
        sys.executable,
        "-m",
        "saccade.apps.cli",
        "fit",
        "-c",
        config,
        *where,
        "--seed",
        str(seed),
        "-q",
        "--json",
    ]
    start, cpu_start = time.perf_counter(), child_seconds()
    done = subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE, text=True)
    summary = json.loads(done.stdout)
    metrics = json.loads((place / summary["run"] / "metrics.json").read_text())
    return {
        "seed": seed,
        "val_acc": metrics["last"]["val/acc"],
        "epochs": metrics["epochs"],
        "epoch_seconds": metrics["seconds"],
        "total_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(child_seconds() - cpu_start, 1),
    }


def child_seconds() -> float:
    """Return the CPU time of all processes started and finished so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run and save."""
    cases = []
    for config, (root, baseline) in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            runs = [train(config, root, seed, Path(place)) for seed in SEEDS]
        accuracies = [run["val_acc"] for run in runs]
        mean, seconds = statistics.mean(accuracies), max(run["total_seconds"] for run in runs)
        print(
            f"{config:<32}val acc {mean:.3f} ({', '.join(f'{value:.3f}' for value in accuracies)})   "
            f"baseline {baseline}   {runs[0]['epochs']} epochs, at most {seconds:.0f} s a run",
            flush=True,
        )
        cases.append({"config": config, "baseline": baseline, "mean_val_acc": mean, "runs": runs})
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "load": os.getloadavg(), "cases": cases}
    (RESULTS / "train_images.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
