"""Ten-fold cross-validation of every MIL model on MUSK1, MUSK2 and Elephant: mean and spread of the accuracy.

The data is ``mil_benchmarks/`` below SACCADE_TEST_DATA (default ../shared/data). Width 64, features standardised on
each training fold, last epoch, no validation set: what the literature does on these bags.
"""

import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.model_selection import StratifiedKFold
from torch.utils.data import DataLoader

from benchmarks.harness import RESULTS
from saccade.apps.measure import machine
from saccade.datasets.bag_data import collate_bags
from saccade.mil import SlideClassifier, models

DATA = Path(os.environ.get("SACCADE_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
SETS = ("musk1", "musk2", "elephant")
FOLDS, EPOCHS, BATCH, LR, DECAY, WIDTH = 10, 40, 4, 1e-3, 5e-3, 64
# Accuracy of the reference code, mean over the folds and its standard deviation (specs/mil.md 1.9).
REFERENCE = {
    ("musk1", "abmil"): (0.904, 0.096),
    ("elephant", "abmil"): (0.815, 0.095),
    ("musk1", "acmil_ga"): (0.914, 0.077),
    ("elephant", "acmil_ga"): (0.855, 0.072),
}


def options_of(model: str) -> dict[str, object]:
    """Return sizes for a model on these small bags."""
    if model.startswith("clam"):
        return {"size": (WIDTH, WIDTH), "dropout": 0.25}
    if model == "dsmil":
        return {}
    options: dict[str, object] = {"hidden_dim": WIDTH}
    return options | ({"attention_dim": WIDTH} if model in ("abmil", "acmil_ga") else {})


def read(name: str) -> tuple[list[torch.Tensor], np.ndarray]:
    """Return bags and labels of a set."""
    with np.load(DATA / "mil_benchmarks" / f"{name}.npz", allow_pickle=False) as file:
        instances, index, labels = (file[key] for key in ("instances", "bag_index", "bag_label"))
    features = torch.from_numpy(instances.astype(np.float32))
    return [features[torch.from_numpy(index == bag)] for bag in range(len(labels))], labels.astype(np.int64)


def loader(bags: list[torch.Tensor], labels: np.ndarray, chosen: np.ndarray, *, shuffle: bool) -> DataLoader:
    """Return batches of some bags."""
    items = [
        {
            "features": bags[i],
            "coords": None,
            "target": torch.tensor(labels[i]),
            "id": str(i),
            "patient": str(i),
            "error": "",
            "reason": "",
        }
        for i in chosen
    ]
    return DataLoader(items, BATCH, shuffle=shuffle, collate_fn=collate_bags)


def fold_accuracy(
    model: str, bags: list[torch.Tensor], labels: np.ndarray, train: np.ndarray, test: np.ndarray
) -> float:
    """Train on one part and return the accuracy on the other."""
    seed_everything(0, verbose=False)
    tiles = torch.cat([bags[i] for i in train])
    std = tiles.std(0, unbiased=False)
    config = {
        "feature_dim": tiles.shape[1],
        "task": "classification",
        "mean": tiles.mean(0).tolist(),
        "std": torch.where(std > 1e-6, std, 1.0).tolist(),
    }
    module = SlideClassifier(
        model,
        data_config=config,
        options=options_of(model),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LR, weight_decay=DECAY),
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", **quiet)
    trainer.fit(module, loader(bags, labels, train, shuffle=True))
    batches = trainer.predict(module, loader(bags, labels, test, shuffle=False))
    predicted = torch.cat([batch["predicted"] for batch in batches]).argmax(1).numpy()
    return float((predicted == labels[test]).mean())


def read_cases(path: Path) -> list[dict[str, object]]:
    """Return what is in the results, perhaps from a run beside this one."""
    return json.loads(path.read_text())["cases"] if path.exists() else []


def main() -> None:
    """Run what is not in the results yet, and save after every model."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path = RESULTS / "train_mil.json"
    for name in SETS:
        bags, labels = read(name)
        folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(len(labels)), labels))
        for model in sorted(models(), key=lambda model: (name, model) not in REFERENCE):  # those that can be compared
            if any((case["set"], case["model"]) == (name, model) for case in read_cases(path)):
                continue
            start = time.process_time()  # of this process alone, whatever else the machine does
            accuracies = [fold_accuracy(model, bags, labels, train, test) for train, test in folds]
            mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
            known = REFERENCE.get((name, model))
            beside = f"   reference {known[0]:.3f} +- {known[1]:.3f}" if known else ""
            seconds = time.process_time() - start
            print(
                f"{name:<9}{model:<10} accuracy {mean:.3f} +- {spread:.3f}{beside}   {seconds:.0f} s of CPU", flush=True
            )
            case = {"set": name, "model": model, "mean": mean, "std": spread}
            cases = [*read_cases(path), case | {"folds": accuracies, "cpu_seconds": seconds}]
            path.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
