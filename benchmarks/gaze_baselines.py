"""Baselines of scanpath prediction at work: on drawn scenes with objects, and on photographs of OSIE without.

Drawn scenes (``search_scenes``, simulated viewers; no image in two splits): chains over objects fitted on the training
part, among them saliency-ranked objects by the spectral residual; the fixation regressor in the manner of Gazeformer,
which sees the picture alone. Ten sampled paths per scene are compared with every viewer's.

OSIE: the four pictures at hand, each in turn left out of fitting, 15 viewers. Chains run over the cells of a grid; all
paths are compared over these cells, and by place. Four pictures are too few to learn from: this shows that it runs.

The recordings are ``gaze/osie`` below SACCADE_TEST_DATA (default ../shared/data).
"""

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import RESULTS
from saccade.apps.measure import machine
from saccade.datasets import ScanpathData
from saccade.gaze import (
    CentreBias,
    NearestObjects,
    PathModel,
    RandomObjects,
    SalientObjects,
    ScanpathSet,
    Trial,
    assign_objects,
    collate_trials,
    fit_fixation_regressor,
    lay_grid,
    object_saliency,
    read_scanpaths,
    recordings_of,
    sample,
    scanpaths_of,
    spectral_residual,
    trials_of,
)
from saccade.gaze.decoding import step_log_probs
from saccade.gaze.metrics import path_scores
from saccade.gaze.validation import ScanpathWarning

REPOSITORY = Path(__file__).resolve().parents[1]
OSIE = Path(os.environ.get("SACCADE_TEST_DATA") or REPOSITORY.parent / "shared" / "data") / "gaze" / "osie"
BASELINES = {
    "random object": RandomObjects,
    "centre bias": CentreBias,
    "saliency-ranked objects": SalientObjects,
    "nearest-object chain": NearestObjects,
}
SCENES = 240
GRID = (6, 8)
SAMPLES = 10
Figures = dict[str, float]
Pictures = dict[str, Image.Image]


def with_saliency(trials: Sequence[Trial], pictures: Pictures) -> list[Trial]:
    """Add the spectral residual of the picture in each box."""
    found = []
    for trial in trials:
        saliency = object_saliency(spectral_residual(np.asarray(pictures[trial.image].convert("RGB"))), trial.boxes)
        found.append(replace(trial, scene=replace(trial.scene, saliency=saliency[None])))
    return found


def over_objects(model: PathModel, tests: Sequence[Trial], human: ScanpathSet) -> Figures:
    """Return bits per step and the figures of sampled paths of a model over objects."""
    scenes, paths, _ = collate_trials(tests)
    longest = paths.shape[-1]
    with torch.inference_mode():
        steps, there = step_log_probs(model, scenes, paths)
        drawn = sample(model, scenes, SAMPLES, max_length=longest, generator=torch.Generator().manual_seed(0))
    bits = -float(steps.sum() / there.sum()) / math.log(2)
    return {"bits_per_step": bits} | path_scores(scanpaths_of(drawn, tests), human)


def regressed(pictures: Pictures, train: ScanpathSet, tests: Sequence[Trial], human: ScanpathSet) -> Figures:
    """Train the fixation regressor, and return the figures of its paths, each fixation given to the nearest object."""
    begun = time.perf_counter()
    model, losses = fit_fixation_regressor({name: pictures[name] for name in sorted(set(train.image))}, train)
    seconds = time.perf_counter() - begun
    trial_of = {trial.image: trial for trial in tests}
    drawn = model.sample([pictures[name] for name in trial_of], SAMPLES, names=list(trial_of))
    records = []
    for record in drawn:
        trial = trial_of[record.image]
        boxes, target = trial.boxes.double().numpy(), int(trial.scene.target)
        records.append(
            replace(
                record,
                task=trial.task,
                boxes=boxes,
                objects=assign_objects(record.x, record.y, boxes),
                target_object=target if target >= 0 else None,
                target_box=boxes[target] if target >= 0 else None,
            )
        )
    scores = path_scores(ScanpathSet.from_paths(records), human)
    return scores | {"first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds}


def drawn_scenes() -> dict[str, Figures]:
    """Return the rows of the drawn scenes."""
    data = ScanpathData(generated_scenes=SCENES, seen="nothing")
    recordings, picture = data.recordings()
    pictures = {name: picture(name) for name in dict.fromkeys(recordings.image)}
    train, tests = (with_saliency(data.samples(split), pictures) for split in ("train", "test"))
    human = recordings_of(tests)
    examples = [collate_trials(train)[:2]]
    rows = {name: over_objects(kind.fit(examples), tests, human) for name, kind in BASELINES.items()}
    rows["fixation regressor"] = regressed(pictures, data.split(recordings)["train"], tests, human)
    return rows | {"viewers, leave one out": path_scores(human, human)}


def osie() -> dict[str, Figures]:
    """Return the rows of the pictures of OSIE, means over the picture left out."""
    files = sorted((OSIE / "stimuli").glob("*.jpg"))
    pictures = {file.name: Image.open(file).convert("RGB") for file in files}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScanpathWarning)  # a few long paths
        recordings = read_scanpaths(OSIE / "osie_fixations.json", format="osie")
    recordings = lay_grid(recordings.filter(image=list(pictures)), *GRID)
    folds: dict[str, list[Figures]] = {}
    for name in pictures:
        human = recordings.filter(image=name)
        seen = recordings.filter(lambda path, name=name: path.image != name)
        tests, train = (with_saliency(trials_of(part), pictures) for part in (human, seen))
        examples = [collate_trials(train)[:2]]
        rows = {kind_name: over_objects(kind.fit(examples), tests, human) for kind_name, kind in BASELINES.items()}
        rows["fixation regressor"] = regressed(pictures, seen, tests, human)
        rows["viewers, leave one out"] = path_scores(human, human)
        for row, figures in rows.items():
            folds.setdefault(row, []).append(figures)
    return {row: {key: float(np.mean([f[key] for f in found])) for key in found[0]} for row, found in folds.items()}


def show(title: str, rows: dict[str, Figures]) -> None:
    """Print one table."""
    columns = ["bits_per_step", "sequence_score", "scanmatch", "multimatch_vector", "multimatch_direction"]
    columns += ["multimatch_length", "multimatch_position", "tfp_sum", "delta", "mean_length"]
    print(title)
    print(" " * 26 + "".join(f"{name.removeprefix('multimatch_')[:10]:>12}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<26}" + "".join(f"{row[c]:>12.3f}" if c in row else f"{'-':>12}" for c in columns))


def main() -> None:
    """Fit, sample, compare, save."""
    content = {
        "machine": machine(),
        "scenes": SCENES,
        "samples": SAMPLES,
        "osie_grid": GRID,
        "drawn_scenes": drawn_scenes(),
    }
    show("drawn scenes", content["drawn_scenes"])
    if OSIE.is_dir():
        content["osie"] = osie()
        show("OSIE, four pictures, each left out in turn", content["osie"])
    (RESULTS / "gaze_baselines.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
