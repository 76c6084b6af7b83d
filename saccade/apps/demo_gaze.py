"""The demo's gaze: simulated viewers search drawn scenes, a small OAT learns to predict them, beside baselines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.apps.demo_report import Session, table

if TYPE_CHECKING:
    from saccade.gaze import PathModel, ScanpathSet, Trial

__all__ = ["show"]

SCENES, TEST_SCENES, VIEWERS, SAMPLES = 300, 24, 3, 5
SHOWN = 3
METRICS = {"object_sequence_score": "sequence score", "scanmatch": "ScanMatch"}


def show(session: Session) -> tuple[str, dict[str, str]]:
    """Run it in the current folder; return the finding and what the report's page is filled with."""
    from saccade.datasets import save_scenes, search_scenes
    from saccade.gaze import load_predictor, read_scanpaths, write_scanpaths
    from saccade.gaze.validation import ScanpathWarning

    scenes, viewers = search_scenes(TEST_SCENES, viewers=VIEWERS, seed=1)  # other scenes than those of the training
    save_scenes(scenes, "test")
    write_scanpaths(viewers, Path("viewers.h5"))
    session.call(
        f"saccade fit -c gaze/oat --data.generated_scenes {SCENES} --model.width 96 --model.hidden 192 "
        "--model.encoder_layers 1 --model.decoder_layers 1 --model.target_position known --data.batch_size 4 "
        "--epochs 8 --lr 2e-3 --name search"
    )
    session.call(
        "saccade gaze predict test/ -m runs/search --boxes test/boxes.csv --queries test/queries.csv "
        f"--samples {SAMPLES} -o paths.h5 --progress none"
    )
    session.call(f"saccade gaze metrics --pred paths.h5 --truth viewers.h5 --metrics {','.join(METRICS)} -o pairs.csv")
    shown = [scene.name for scene in scenes[:SHOWN]]
    for name in shown:
        picture = f"beside-{Path(name).stem}.png"
        session.call(f"saccade gaze plot test/{name} --scanpath paths.h5 --truth viewers.h5 -o {picture}")

    predictor = load_predictor("runs/search")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScanpathWarning)  # `gaze metrics` has said it
        drawn, trials = read_scanpaths("paths.h5"), test_trials(predictor.features["crop_size"])
    models = fit_baselines()
    rows = [[title, *evaluate(model, trials, viewers)] for title, model in models.items()]
    bits = bits_per_step(predictor.model, trials)
    figures, ceiling = scores(drawn, viewers)
    rows += [["OAT", bits, *figures], ["the viewers, each against the others", "", *ceiling]]
    values = {
        "scenes": str(SCENES),
        "test_scenes": str(TEST_SCENES),
        "viewers": str(VIEWERS),
        "samples": str(SAMPLES),
        "scores": table(["", "bits per step", *METRICS.values(), "fixations"], rows),
        "pictures": "\n".join(
            f'<p>Look for the {scene.task}.</p><img class="wide" src="gaze/beside-{Path(scene.name).stem}.png" '
            'alt="paths of the viewers and of the model">'
            for scene in scenes[:SHOWN]
        ),
    }
    result = (
        f"Sequence score with viewers on {TEST_SCENES} new scenes: OAT {figures[0]:.2f}, "
        f"random objects {rows[0][2]:.2f}, viewers among themselves {ceiling[0]:.2f}."
    )
    return result, values


def test_trials(crop_size: int) -> list[Trial]:
    """Return the trials of the test scenes, with crops of their objects."""
    from saccade.datasets import read_image
    from saccade.gaze import cut_crops, read_scanpaths, trials_of

    recordings = read_scanpaths("viewers.h5")
    return trials_of(recordings, features=lambda name, boxes: cut_crops(read_image(f"test/{name}"), boxes, crop_size))


def fit_baselines() -> dict[str, PathModel]:
    """Return the baselines, fitted on the scenes of the training."""
    from saccade.datasets import ScanpathData
    from saccade.gaze import CentreBias, NearestObjects, RandomObjects, collate_trials

    data = ScanpathData(generated_scenes=SCENES, seen="nothing")
    examples = [collate_trials(data.samples("train"))[:2]]
    return {
        "random objects": RandomObjects.fit(examples),
        "centre bias": CentreBias.fit(examples),
        "chain over distances": NearestObjects.fit(examples),
    }


def evaluate(model: PathModel, trials: Sequence[Trial], viewers: ScanpathSet) -> list[Any]:
    """Return bits per step of the viewers' paths, and the scores of sampled paths."""
    import torch

    from saccade.gaze import collate_trials, sample, scanpaths_of

    scenes, paths, _ = collate_trials(trials)
    with torch.inference_mode():
        drawn = sample(model, scenes, SAMPLES, max_length=paths.shape[-1], generator=torch.Generator().manual_seed(0))
    return [bits_per_step(model, trials), *scores(scanpaths_of(drawn, trials), viewers)[0]]


def bits_per_step(model: PathModel, trials: Sequence[Trial]) -> float:
    """Return the mean of ``-log2 p`` over the steps of the viewers' paths, the end included."""
    import torch

    from saccade.gaze import collate_trials
    from saccade.gaze.decoding import step_log_probs

    scenes, paths, _ = collate_trials(trials)
    with torch.inference_mode():
        steps, there = step_log_probs(model, scenes, paths)
    return -float(steps.sum() / there.sum()) / math.log(2)


def scores(paths: ScanpathSet, viewers: ScanpathSet) -> tuple[list[float], list[float]]:
    """Return the scores of paths and their mean length, and the same of viewers against each other."""
    from saccade.gaze.metrics import compare_paths

    found = {score.name: score for score in compare_paths(paths, viewers, metrics=list(METRICS)).scores}
    means = [found[name].mean for name in METRICS]
    ceiling = [value for name in METRICS if (value := found[name].human) is not None]
    return [*means, float(paths.lengths.mean())], [*ceiling, float(viewers.lengths.mean())]
