"""A reduced OAT trained on visual search in collages of book covers, beside simple baselines and the viewers.

E = 128, 2 + 2 layers. The collages are not at hand, so objects differ by their place alone (6 x 14 grid) and by which
one is the target; with the target's place known, as published. No image is in two splits. The checkpoint of least
validation bits counts. Per test trial ten paths are sampled and compared with every viewer's; the viewers are compared
with each other in the same way. Three seeds of training on one split.

The recordings are ``gaze/amazon_books`` below SACCADE_TEST_DATA (default ../shared/data); their licence (CC BY-NC-SA
4.0) lets figures out, nothing else. Runs stay below ``runs/train_gaze`` (or SACCADE_TRAIN_GAZE), done once.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS
from saccade.apps.measure import machine
from saccade.datasets import ScanpathData
from saccade.gaze import (
    CentreBias,
    NearestObjects,
    PathModel,
    RandomObjects,
    ScanpathSet,
    Trial,
    collate_trials,
    load_predictor,
    sample,
    scanpaths_of,
)
from saccade.gaze.decoding import step_log_probs
from saccade.gaze.metrics import (
    behaviour,
    behaviour_difference,
    multimatch,
    object_sequence_score,
    probability_mismatch,
    scanmatch,
    target_fixation_probability,
)
from saccade.gaze.scanpath import Scanpath
from saccade.gaze.validation import ScanpathWarning

SEEDS = (0, 1, 2)
REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SACCADE_TEST_DATA") or REPOSITORY.parent / "shared" / "data") / "gaze" / "amazon_books"
FOLDER = Path(os.environ.get("SACCADE_TRAIN_GAZE") or REPOSITORY / "runs" / "train_gaze")
LONGEST = 54  # fixations; the published limit, mean + 3 SD, is 55.07
SAMPLES = 10
SETTINGS = {
    "root": str(DATA / "amazon_search.json"),
    "grid": "6x14",
    "seen": "nothing",
    "split_by": "image",
    "val_fraction": 0.15,
    "test_fraction": 0.2,
    "max_length": LONGEST,
    "flips": True,
    "batch_size": 2,
}
TRAINING = {
    "--model.seen": "nothing",
    "--model.pyramid_levels": "0",
    "--model.target_position": "known",
    "--epochs": "48",
}
Figures = dict[str, float]


def train(seed: int) -> None:
    """Train once with ``saccade fit`` and note the outcome in ``run.json``; goes on with a run that was interrupted."""
    folder = FOLDER / f"seed{seed}"
    if (folder / "run.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        f"--data.{name}": str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in SETTINGS.items()
    }
    words = [word for pair in (data | TRAINING | {"--seed": str(seed)}).items() for word in pair]
    begun = sorted(folder.glob("runs/*/*/checkpoints/last.ckpt"))
    what = ["--resume", str(begun[-1].parents[1])] if begun else ["-c", "gaze/oat", *words]
    command = [sys.executable, "-W", "ignore", "-m", "saccade.apps.cli", "fit", *what, "-q", "--json"]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    summary = json.loads(done.stdout)
    kept = ("run", "epochs", "best", "seconds")
    (folder / "run.json").write_text(json.dumps({"seed": seed} | {name: summary[name] for name in kept}))


def trials(split: str) -> list[Trial]:
    """Return the trials of a split without the paths that are too long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScanpathWarning)
        data = ScanpathData(**SETTINGS)  # type: ignore[arg-type]
        return data.samples(split)  # type: ignore[arg-type]


def human_paths(tests: Sequence[Trial]) -> ScanpathSet:
    """Return the viewers' paths with fixations in the middle of their objects, as the models' are."""
    records = []
    for trial in tests:
        centre = ((trial.boxes[:, :2] + trial.boxes[:, 2:]) / 2).double().numpy()
        target = int(trial.scene.target)
        for viewer, path in zip(trial.viewers, trial.paths, strict=True):
            if len(path) <= LONGEST:
                fields: dict[str, Any] = {
                    "width": trial.size[0],
                    "height": trial.size[1],
                    "boxes": trial.boxes.double().numpy(),
                }
                fields |= {"objects": path, "target_object": target, "target_box": trial.boxes[target].double().numpy()}
                records.append(
                    Scanpath(trial.image, centre[path, 0], centre[path, 1], subject=viewer, task=trial.task, **fields)
                )
    return ScanpathSet.from_paths(records)


def pairs(first: ScanpathSet, second: ScanpathSet) -> tuple[ScanpathSet, ScanpathSet]:
    """Return all pairs of paths of the same trial and of different viewers."""
    members = second.group_by("image")
    chosen = [
        (i, int(j))
        for i, (image, subject) in enumerate(zip(first.image, first.subject, strict=True))
        for j in members[(image,)]
        if second.subject[j] != subject
    ]
    ours, theirs = (np.array(column) for column in zip(*chosen, strict=True))
    return first.take(ours), second.take(theirs)


def compare(paths: ScanpathSet, human: ScanpathSet) -> Figures:
    """Return the figures of paths against the viewers."""
    ours, theirs = pairs(paths, human)
    curve, goal = (target_fixation_probability(part, max_step=20) for part in (paths, human))
    vector, direction, length, position, _ = np.nanmean(multimatch(*with_durations(ours, theirs)), 0)
    return {
        "sequence_score": float(object_sequence_score(ours, theirs).mean()),
        "scanmatch": float(scanmatch(ours, theirs).mean()),
        "multimatch_vector": float(vector),
        "multimatch_direction": float(direction),
        "multimatch_length": float(length),
        "multimatch_position": float(position),
        "tfp_sum": float(curve.sum()),
        "tfp_mismatch": probability_mismatch(curve, goal),
        "delta": behaviour_difference(behaviour(paths).mean(0), behaviour(human).mean(0)),
        "mean_length": float(paths.lengths.mean()),
    }


def with_durations(*sets: ScanpathSet) -> list[ScanpathSet]:
    """Give every fixation the same duration: MultiMatch wants one, the recordings have none."""
    return [
        ScanpathSet.from_columns(
            part.lengths,
            part.x,
            part.y,
            duration=np.ones(len(part.x)),
            image=[str(i) for i in range(len(part))],
            width=part.width,
            height=part.height,
        )
        for part in sets
    ]


def evaluate(model: PathModel, tests: list[Trial], human: ScanpathSet) -> Figures:
    """Return bits per step and the figures of sampled paths."""
    scenes, paths, _ = collate_trials(tests, max_length=LONGEST)
    with torch.inference_mode():
        steps, there = step_log_probs(model, scenes, paths)
        objects = paths >= 0
        drawn = sample(model, scenes, SAMPLES, max_length=LONGEST, generator=torch.Generator().manual_seed(0))
    figures = {
        "bits_per_step": -float(steps.sum() / there.sum()) / math.log(2),
        "bits_per_fixation": -float(steps[..., :-1][objects].mean()) / math.log(2),
        "probability": float(steps[..., :-1][objects].exp().mean()),
    }
    return figures | compare(scanpaths_of(drawn, tests), human)


def collect() -> None:
    """Evaluate everything on the test split, print the table, and write the JSON."""
    tests = trials("test")
    human = human_paths(tests)
    examples = [collate_trials(trials("train"), max_length=LONGEST)[:2]]
    rows = {
        "random object": evaluate(RandomObjects.fit(examples), tests, human),
        "centre bias": evaluate(CentreBias.fit(examples), tests, human),
        "nearest-object chain": evaluate(NearestObjects.fit(examples), tests, human),
    }
    runs = []
    for seed in SEEDS:
        outcome = json.loads((FOLDER / f"seed{seed}" / "run.json").read_text())
        loaded = load_predictor(FOLDER / f"seed{seed}" / outcome["run"])
        kept = {name: outcome[name] for name in ("seed", "epochs", "best", "seconds")}
        runs.append(kept | {"figures": evaluate(loaded.model, tests, human)})
    names = list(runs[0]["figures"])
    rows["OAT, mean of seeds"] = {name: statistics.mean(run["figures"][name] for run in runs) for name in names}
    rows["OAT, SD over seeds"] = {name: statistics.stdev(run["figures"][name] for run in runs) for name in names}
    rows["viewers, leave one out"] = compare(human, human)
    columns = [
        "bits_per_step",
        "probability",
        "sequence_score",
        "scanmatch",
        "multimatch_vector",
        "multimatch_direction",
    ]
    columns += ["multimatch_length", "multimatch_position", "tfp_sum", "tfp_mismatch", "delta", "mean_length"]
    print(" " * 24 + "".join(f"{name.removeprefix('multimatch_')[:10]:>12}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<24}" + "".join(f"{row[c]:>12.3f}" if c in row else f"{'-':>12}" for c in columns))
    counts = {split: len(trials(split)) for split in ("train", "val", "test")} | {"test_paths": len(human)}
    content = {
        "machine": machine(),
        "trials": counts,
        "data": {key: value for key, value in SETTINGS.items() if key != "root"},
        "training": TRAINING,
        "samples_per_trial": SAMPLES,
        "rows": rows,
        "runs": runs,
    }
    (RESULTS / "train_gaze.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Train, evaluate, save."""
    for seed in SEEDS:
        train(seed)
    collect()


if __name__ == "__main__":
    main()
