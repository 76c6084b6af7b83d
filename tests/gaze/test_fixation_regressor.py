"""The regressor for images without objects: its likelihood is one, it learns places, its paths are recordings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.errors import ConfigError, DataError
from saccade.gaze import (
    FixationRegressor,
    RegressedFixations,
    Scanpath,
    ScanpathSet,
    fit_fixation_regressor,
    metrics,
    read_scanpaths,
    spectral_residual,
)
from saccade.gaze.metrics import baselines
from tests.helpers import assert_close


def spots(count: int) -> tuple[dict[str, Image.Image], ScanpathSet]:
    """Return grey images with one bright spot, and paths of 1 to 3 fixations near it."""
    rng = np.random.default_rng(0)
    images, paths = {}, []
    for number in range(count):
        x, y = rng.uniform(15, 85, 2)
        image = Image.new("RGB", (100, 100), (90, 90, 90))
        image.paste((255, 240, 60), (int(x) - 9, int(y) - 9, int(x) + 9, int(y) + 9))
        images[f"{number}"] = image
        for subject in range(3):
            places = rng.normal((x, y), 4, (subject + 1, 2)).clip(0, 99)
            duration = rng.uniform(0.2, 0.3, subject + 1)
            paths.append(Scanpath(f"{number}", *places.T, duration, f"{subject}", width=100, height=100))
    return images, ScanpathSet.from_paths(paths)


def test_likelihood_is_that_of_each_part():
    mean = torch.tensor([[[0.5, 0.5, -1.0], [0.2, 0.8, -1.0], [0.1, 0.1, -1.0]]])
    found = RegressedFixations(mean, torch.full_like(mean, 0.1), torch.tensor([[9.0, -1.0, 2.0]]))
    target = mean + torch.tensor([0.1, 0.0, 0.2])
    nll = found.nll(target, torch.tensor([2]), with_duration=True)
    gauss = -3 * math.log(0.1 * math.sqrt(2 * math.pi)) - 0.5 * (1 + 0 + 4)
    steps = 2 * gauss + math.log(1 / (1 + math.exp(-1.0))) + math.log(1 / (1 + math.exp(-2.0)))
    assert_close(nll, torch.tensor([-steps]))
    cut = found.nll(target, torch.tensor([3]), with_duration=False)
    flat = 3 * (-2 * math.log(0.1 * math.sqrt(2 * math.pi)) - 0.5)
    assert_close(cut, -torch.tensor([flat - math.log1p(math.exp(-1.0)) - math.log1p(math.exp(2.0))]))


def test_it_looks_where_people_looked():
    images, paths = spots(60)
    model = FixationRegressor(width=32, longest=3, size=32)
    model, losses = fit_fixation_regressor(images, paths, epochs=12, model=model)
    assert losses[-1] < losses[0] - 1
    drawn = model.sample(list(images.values()), 20, names=list(images))
    centre = {name: np.array([paths.x[paths.image[paths.path_index] == name].mean()]) for name in images}
    error = [abs(path.x.mean() - centre[path.image][0]) for path in drawn]
    spread = np.mean([abs(50 - value[0]) for value in centre.values()])
    assert np.mean(error) < 0.4 * spread  # nearer than the middle of the image
    lengths = np.bincount(drawn.lengths, minlength=4)[1:4] / len(drawn)
    assert np.allclose(lengths, 1 / 3, atol=0.12)
    assert 0.2 < np.median(drawn.duration) < 0.3


@pytest.mark.filterwarnings("ignore:.*longer than mean:saccade.gaze.validation.ScanpathWarning")
def test_on_the_photographs_of_osie(data_root):
    """Saliency finds where people looked; the regressor learns what holds on a picture that it has not seen."""
    folder = data_root / "gaze" / "osie"
    pictures = {file.name: Image.open(file).convert("RGB") for file in sorted((folder / "stimuli").glob("*.jpg"))}
    people = read_scanpaths(folder / "osie_fixations.json", off_image="clip").filter(image=list(pictures))
    assert (len(pictures), len(people)) == (4, 60)
    for name, picture in pictures.items():
        seen = people.filter(image=name)
        assert picture.size == (seen.width[0], seen.height[0])
        saliency = spectral_residual(np.asarray(picture))
        assert metrics.auc(saliency[None], np.stack([seen.x, seen.y], -1)[None])[0] > 0.55
    last = list(pictures)[-1]
    train = people.filter(lambda path: path.image != last)
    model, losses = fit_fixation_regressor(pictures, train, epochs=10)
    assert losses[-1] < 0.5 * losses[0]
    drawn = [replace(path, task="freeview") for path in model.sample([pictures[last]], 15, names=[last])]
    human = people.filter(image=last)
    random = baselines.uniform_paths(human, seed=0)
    scores = [
        metrics.compare_paths(paths, human, metrics=["scanmatch"], chance=False)
        for paths in (ScanpathSet.from_paths(drawn), random)
    ]
    assert scores[0].scores[0].mean > scores[1].scores[0].mean


def test_samples_are_valid_and_repeatable():
    images, _ = spots(3)
    model = FixationRegressor(width=32, longest=5, size=32).eval()
    one, two = (model.sample(list(images.values()), 4, names=list(images), seed=3) for _ in range(2))
    assert one.x.tolist() == two.x.tolist()
    assert len(one) == 12
    assert ((one.x >= 0) & (one.x <= 99)).all()
    assert one.lengths.max() <= 5


def test_what_does_not_fit():
    images, paths = spots(2)
    with pytest.raises(DataError, match="Paths are on '1', which is not among the images"):
        fit_fixation_regressor({"0": images["0"]}, paths)
    with pytest.raises(ConfigError, match="multiple of 8"):
        FixationRegressor(size=30)
