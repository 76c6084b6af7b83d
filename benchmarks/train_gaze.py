"""A reduced OAT trained on visual search in collages of book covers, beside simple baselines and the viewers.

E = 128, 2 + 2 layers. The collages are not at hand, so objects differ by their place alone (6 x 14 grid) and by which
one is the target. Three variants: the target's place ``known``, as published; ``hidden``, where without pictures the
model can only tell that it is there; and ``viewers``, known with an embedding for each viewer. No image is in two
splits. The checkpoint of least validation bits counts. Per test trial ten paths are sampled (for ``viewers``: of each
viewer) and compared with every viewer's; the viewers are compared with each other in the same way. Three seeds of
training on one split.

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

import numpy as np
import torch

from benchmarks.harness import RESULTS
from saccade.apps.measure import machine
from saccade.datasets import ScanpathData
from saccade.gaze import (
    CentreBias,
    DecodedPaths,
    NearestObjects,
    PathModel,
    RandomObjects,
    ScanpathSet,
    Trial,
    collate_trials,
    load_predictor,
    recordings_of,
    sample,
    scanpaths_of,
)
from saccade.gaze.decoding import step_log_probs
from saccade.gaze.metrics import object_sequence_score, path_scores
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
    "--epochs": "48",
}
VARIANTS = {
    "known": {"--model.target_position": "known"},
    "hidden": {"--model.target_position": "hidden"},
    "viewers": {"--model.target_position": "known", "--model.num_viewers": "6"},
}
Figures = dict[str, float]


def train(variant: str, seed: int) -> None:
    """Train once with ``saccade fit`` and note the outcome in ``run.json``; goes on with a run that was interrupted."""
    folder = FOLDER / variant / f"seed{seed}"
    if (folder / "run.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        f"--data.{name}": str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in SETTINGS.items()
    }
    words = [word for pair in (data | TRAINING | VARIANTS[variant] | {"--seed": str(seed)}).items() for word in pair]
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


def evaluate(
    model: PathModel, tests: list[Trial], human: ScanpathSet, names: Sequence[str] = (), *, samples: int = SAMPLES
) -> Figures:
    """Return bits per step and the figures of sampled paths; with ``names``, of a model that knows the viewers."""
    scenes, paths, viewers = collate_trials(tests, viewers=names, max_length=LONGEST)
    figures = {}
    others = viewers.where(viewers < 0, (viewers + 1) % max(1, len(names)))
    for suffix, who in {"": viewers, "_as_another_viewer": others}.items() if names else [("", None)]:
        with torch.inference_mode():
            steps, there = step_log_probs(model, scenes, paths, viewers=who)
        objects = paths >= 0
        figures |= {
            f"bits_per_step{suffix}": -float(steps.sum() / there.sum()) / math.log(2),
            f"bits_per_fixation{suffix}": -float(steps[..., :-1][objects].mean()) / math.log(2),
            f"probability{suffix}": float(steps[..., :-1][objects].exp().mean()),
        }
    everyone = torch.arange(len(names)).repeat_interleave(samples).expand(len(tests), -1) if names else None
    number = samples if everyone is None else everyone.shape[1]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        drawn = sample(model, scenes, number, max_length=LONGEST, viewers=everyone, generator=generator)
    figures |= path_scores(scanpaths_of(drawn, tests), human)
    if everyone is not None:
        figures |= own_and_other(drawn, tests, human, [names[index] for index in everyone[0].tolist()])
    return figures


def own_and_other(drawn: DecodedPaths, tests: list[Trial], human: ScanpathSet, viewers: list[str]) -> Figures:
    """Return the sequence score of paths with the viewer that they were drawn for, and with the others."""
    paths = scanpaths_of(drawn, tests, viewers=viewers)
    members = human.group_by("image", "task")
    rows = [
        (number, int(other))
        for number, key in enumerate(zip(paths.image, paths.task, strict=True))
        for other in members[key]
    ]
    ours, theirs = np.array(rows).T
    score = object_sequence_score(paths.take(ours), human.take(theirs))
    own = paths.subject[ours] == human.subject[theirs]
    return {
        "sequence_score_own_viewer": float(score[own].mean()),
        "sequence_score_other_viewers": float(score[~own].mean()),
    }


def collect() -> None:
    """Evaluate everything on the test split, print the table, and write the JSON."""
    tests = trials("test")
    human = recordings_of(tests, max_length=LONGEST)
    examples = [collate_trials(trials("train"), max_length=LONGEST)[:2]]
    rows = {
        "random object": evaluate(RandomObjects.fit(examples), tests, human),
        "centre bias": evaluate(CentreBias.fit(examples), tests, human),
        "nearest-object chain": evaluate(NearestObjects.fit(examples), tests, human),
    }
    runs = []
    for variant in VARIANTS:
        found = []
        for seed in SEEDS:
            outcome = json.loads((FOLDER / variant / f"seed{seed}" / "run.json").read_text())
            loaded = load_predictor(FOLDER / variant / f"seed{seed}" / outcome["run"])
            names = loaded.viewers if loaded.model.num_viewers else ()
            found.append(evaluate(loaded.model, tests, human, names))
            kept = {name: outcome[name] for name in ("seed", "epochs", "best", "seconds")}
            runs.append({"variant": variant} | kept | {"figures": found[-1]})
        for what, over in {"mean of seeds": statistics.mean, "SD over seeds": statistics.stdev}.items():
            rows[f"OAT {variant}, {what}"] = {name: over(one[name] for one in found) for name in found[0]}
    rows["viewers, leave one out"] = path_scores(human, human)
    columns = [
        "bits_per_step",
        "probability",
        "sequence_score",
        "scanmatch",
        "multimatch_vector",
        "multimatch_direction",
    ]
    columns += ["multimatch_length", "multimatch_position", "tfp_sum", "tfp_mismatch", "delta", "mean_length"]
    print(" " * 28 + "".join(f"{name.removeprefix('multimatch_')[:10]:>12}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<28}" + "".join(f"{row[c]:>12.3f}" if c in row else f"{'-':>12}" for c in columns))
    counts = {split: len(trials(split)) for split in ("train", "val", "test")} | {"test_paths": len(human)}
    content = {
        "machine": machine(),
        "trials": counts,
        "data": {key: value for key, value in SETTINGS.items() if key != "root"},
        "training": TRAINING,
        "variants": VARIANTS,
        "samples_per_trial": SAMPLES,
        "rows": rows,
        "runs": runs,
    }
    (RESULTS / "train_gaze.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Train, evaluate, save."""
    for variant in VARIANTS:
        for seed in SEEDS:
            train(variant, seed)
    collect()


if __name__ == "__main__":
    main()
