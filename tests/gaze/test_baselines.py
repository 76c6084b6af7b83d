"""Baselines: fitted on what they assume they find it, and they decode like any other model."""

import math

import pytest
import torch

from saccade.datasets.drawn_search import search_scenes
from saccade.errors import ConfigError, DataError
from saccade.gaze import CentreBias, NearestObjects, RandomObjects, SalientObjects
from saccade.gaze.decoding import greedy, log_prob, sample
from saccade.gaze.scenes import SceneBatch, grid_scene, stack_scenes
from saccade.gaze.trials import collate_trials, trials_of
from tests.helpers import assert_close, randn

BASELINES = (RandomObjects, CentreBias, SalientObjects, NearestObjects)


def salient_grids(count: int) -> SceneBatch:
    """Return grids with a saliency of each object."""
    scenes = stack_scenes([grid_scene(4, 5, target % 20) for target in range(count)])
    saliency = randn(count, 20).exp()
    return SceneBatch(scenes.position, scenes.valid, scenes.start, scenes.target, saliency=saliency)


@pytest.mark.parametrize("baseline", BASELINES)
def test_refitting_on_own_samples_finds_the_same_model(baseline):
    scenes = salient_grids(20)
    first = baseline.fit([(scenes, sample(NearestObjects.fit(human(6)), scenes, 3, max_length=9).objects)])
    drawn = sample(first, scenes, 60, max_length=80, generator=torch.Generator().manual_seed(0))
    again = baseline.fit([(scenes, drawn.objects)])
    here = torch.where(scenes.is_target(), 0.0, 1.0)[:, None].expand(-1, 20, -1)  # the rare transitions to targets vary
    for model, expected in ((first, True), (RandomObjects(0.5), False)):
        difference = (model.table(scenes).exp() - again.table(scenes).exp())[:, 1:, 1:].abs() * here
        assert (difference.max() < 0.05 and difference.mean() < 0.01) == expected


def human(count: int) -> list[tuple[SceneBatch, torch.Tensor]]:
    """Return simulated viewers as examples."""
    scenes, paths, _ = collate_trials(trials_of(search_scenes(count)[1]))
    return [(scenes, paths)]


@pytest.mark.parametrize("baseline", BASELINES)
def test_rows_are_distributions_over_objects_that_exist(baseline):
    scenes = stack_scenes([salient_grids(1), SceneBatch(*small_scene(), saliency=torch.ones(1, 2))])
    table = baseline.fit([(salient_grids(2), torch.tensor([[[3, 4, 4]], [[1, 2, 7]]]))]).table(scenes)
    assert_close(table.exp().sum(-1), torch.ones(2, 21))
    assert (table[1, :, 3:] == -torch.inf).all()


def small_scene() -> tuple[torch.Tensor, ...]:
    """Return the fields of a scene of two objects."""
    grid = grid_scene(1, 2, 1)
    return grid.position, grid.valid, grid.start, grid.target


def test_better_models_of_the_viewers_need_fewer_bits():
    train, test = human(60), [(*collate_trials(trials_of(search_scenes(100)[1])[60:])[:2],)]
    bits = {}
    for baseline in (RandomObjects, CentreBias, NearestObjects):
        model = baseline.fit(train)
        (scenes, paths), count = test[0], int((test[0][1] >= 0).sum())
        bits[baseline] = -float(log_prob(model, scenes, paths).sum()) / math.log(2) / count
    assert bits[NearestObjects] < bits[CentreBias] - 0.5
    assert bits[CentreBias] < bits[RandomObjects] + 0.02


def test_saliency_baseline_ranks_objects():
    scenes = salient_grids(3)
    ranked = greedy(SalientObjects(end_rate=1e-6, strength=1.0), scenes, max_length=20, inhibition=20)
    assert torch.equal(ranked.objects[:, 0], scenes.saliency.argsort(dim=1, descending=True))
    with pytest.raises(ConfigError, match=r"needs SceneBatch\.saliency"):
        SalientObjects(0.1, 1.0).table(grid_scene(1, 2))


def test_centre_bias_prefers_the_middle():
    table = CentreBias(0.1, 1.0).table(grid_scene(5, 5))
    assert int(table[0, 0, 1:].argmax()) in (12, 18)  # the official start is half a cell below and right of the middle


def test_no_paths_to_fit_on():
    with pytest.raises(DataError, match="needs human paths"):
        RandomObjects.fit([(grid_scene(1, 2), torch.full((1, 1, 3), -1))])
