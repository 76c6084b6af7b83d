"""Golden runners of robustness evaluation: corruptions and metrics."""

import numpy as np

from saccade.datasets.corruptions import CORRUPTIONS
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
