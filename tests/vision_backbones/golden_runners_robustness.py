"""Golden runners of robustness evaluation: corruptions and metrics."""

import re

import numpy as np
import pytest
from safetensors.torch import load_file

from saccade.datasets.corruptions import CORRUPTIONS, SEVERITIES
from saccade.vision_backbones.robustness_metrics import (
    corruption_error,
    corruption_metrics,
    flip_probability,
    top5_distance,
    zipf_distance,
)
from tests.golden.case import Case
from tests.golden.runners import runner


@runner("robust.corruptions")
def corruptions(case: Case) -> None:
    """Every stored severity, from the stored draws: within one grey level; JPEG within two on average."""
    image = case.tensors["input.image"].numpy()
    for name in case.expected():
        _, word, severity = name.split(".")
        stored = case.group(f"draw.{word}.{severity}")
        draws = [stored[key].numpy() for key in sorted(stored, key=lambda key: int(key.partition(".")[0]))]
        got = CORRUPTIONS[word].apply(image, int(severity), *draws)
        difference = np.abs(got.astype(int) - case.tensors[name].numpy())
        limit = difference.mean() < 2 if word == "jpeg_compression" else difference.max() <= 1
        assert limit, f"{name}: {difference.max()} levels at most, {difference.mean():.3f} on average"
        case.compared.add(name)


def close(case: Case, got: dict[str, float], expected: dict[str, float]) -> None:
    """Compare numbers by name within the row's tolerance."""
    tolerance = case.row["tolerance"]["out"]
    assert got == pytest.approx(expected, rel=tolerance["rtol"], abs=tolerance["atol"]), case.id


@runner("robust.mce")
def mce(case: Case) -> None:
    """CE of each corruption, mCE, mean accuracy; relative mCE and retention where they are stored."""
    document = case.document()
    percent = {
        name: dict(zip(SEVERITIES, values, strict=True)) for name, values in document["accuracy_percent"].items()
    }
    accuracy = {name: {s: value / 100 for s, value in by.items()} for name, by in percent.items()}
    errors = {name: corruption_error(name, [1 - accuracy[name][s] for s in SEVERITIES]) for name in document["ce"]}
    close(case, errors, document["ce"])
    metrics = corruption_metrics(accuracy, document["clean_accuracy_percent"] / 100)
    got = {
        "mce": metrics["mCE_percent"] / 100,
        "mce_percent": metrics["mCE_percent"],
        "mean_corruption_accuracy_15": metrics["mean_corruption_accuracy_15_percent"],
        "relative_mce": metrics["relative_mCE_percent"] / 100,
        "relative_mce_percent": metrics["relative_mCE_percent"],
    }
    close(
        case,
        {key: value for key, value in got.items() if key in document},
        {k: document[k] for k in got if k in document},
    )


@runner("robust.imagenet_p")
def imagenet_p(case: Case) -> None:
    """Flip probability and both distances, from stored ranks and predictions, of every difficulty that is named."""
    document = case.document()
    stored = load_file(case.path.with_suffix(".safetensors"))
    places, predictions = stored["input.ranks"].numpy(), stored["input.predictions"].numpy()
    assert (places.argmin(axis=-1) == predictions).all()
    for name, expected in document["expected"].items():
        number, kind = re.fullmatch(r"difficulty(\d+)_(other|noise)", name).groups()
        how = {"noise": kind == "noise", "difficulty": int(number)}
        got = {
            "flip_prob": flip_probability(predictions, **how),
            "top5_dist": top5_distance(places, **how),
            "zipf_dist": zipf_distance(places, **how),
        }
        close(case, got, expected)
