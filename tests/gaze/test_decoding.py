"""Decoding: cached, batched and compacted paths are those of the plain model; sampling and beams do what they say."""

import itertools

import pytest
import torch

from saccade.errors import ConfigError
from saccade.gaze.baselines import RandomObjects
from saccade.gaze.decoding import beam_search, greedy, log_prob, sample, step_log_probs
from saccade.gaze.scenes import grid_scene
from saccade.gaze.training import path_loss
from tests.gaze.oat_cases import padded, ragged_scenes, small_oat
from tests.helpers import assert_close


def test_sampled_paths_have_the_probability_of_the_whole_model():
    model, scenes = small_oat(), ragged_scenes()
    drawn = sample(model, scenes, 40, max_length=6, generator=torch.Generator().manual_seed(1))
    assert 1 < drawn.ended.sum() < drawn.ended.numel()  # some end early, some do not: paths are compacted on the way
    assert len(drawn.lengths.unique()) > 3
    with_end = log_prob(model, scenes, drawn.objects)
    without = log_prob(model, scenes, drawn.objects, with_end=False)
    assert_close(torch.where(drawn.ended, with_end, without), drawn.log_prob)
    assert (drawn.objects[2] < 2).all()  # the small scene has two objects


def test_sampling_does_not_depend_on_the_other_scenes():
    model, scenes = small_oat(), ragged_scenes()
    numbers = torch.rand(3, 9, 5, generator=torch.Generator().manual_seed(2))
    together = sample(model, scenes, 9, max_length=5, uniforms=numbers)
    for row in range(3):
        part = slice(row, row + 1)
        alone = sample(model, scenes[part], 9, max_length=5, uniforms=numbers[part])
        assert all(together.path(row, k) == alone.path(0, k) for k in range(9))


def test_samples_follow_the_model():
    model, scene = small_oat(), grid_scene(1, 3, 1)
    drawn = sample(model, scene, 20_000, max_length=1, generator=torch.Generator().manual_seed(3))
    share = torch.bincount(drawn.objects.flatten(), minlength=3) / 20_000
    expected = torch.stack([log_prob(model, scene, torch.tensor([[[i]]]), with_end=False) for i in range(3)]).exp()
    assert_close(share, expected.flatten(), atol=0.02)


def test_temperature_and_top_p():
    model, scenes = small_oat(), ragged_scenes()
    best = greedy(model, scenes, max_length=5)
    options = {"max_length": 5, "generator": torch.Generator().manual_seed(0)}
    for cold in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        drawn = sample(model, scenes, 3, **cold, **options)
        assert all(drawn.path(row, k) == best.path(row) for row in range(3) for k in range(3))
        assert_close(drawn.log_prob, best.log_prob.expand(-1, 3))
    first = step_log_probs(model, scenes[:1], torch.arange(6)[None, :, None])[0][0, :, 0]
    order = first.argsort(descending=True)
    kept = int((first[order].exp().cumsum(0) < 0.5).sum()) + 1
    drawn = sample(model, scenes[:1], 4000, top_p=0.5, **(options | {"max_length": 1}))
    assert set(drawn.objects.flatten().tolist()) == set(order[:kept].tolist())
    with pytest.raises(ConfigError, match="temperature must be > 0"):
        sample(model, scenes, 1, max_length=2, temperature=0.0)


def test_inhibition_forbids_return():
    model, scenes = small_oat(), grid_scene(2, 3, 4)
    drawn = sample(model, scenes, 50, max_length=5, inhibition=5, generator=torch.Generator().manual_seed(0))
    for k in range(50):
        assert len(set(drawn.path(0, k))) == len(drawn.path(0, k))


def every_path(count: int, longest: int) -> list[list[int]]:
    """Return all paths over ``count`` objects."""
    return [list(p) for length in range(1, longest + 1) for p in itertools.product(range(count), repeat=length)]


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
def test_wide_beam_finds_the_best_of_all_paths(penalty):
    model, scene = small_oat(), grid_scene(1, 3, 1)
    paths = every_path(3, 4)
    scores = log_prob(model, scene, padded([paths]))[0]
    cut = log_prob(model, scene, padded([paths]), with_end=False)[0]
    rated = [(s / (len(p) + 1) ** penalty, p) for s, p in zip(scores.tolist(), paths, strict=True) if len(p) < 4]
    rated += [(s / 4**penalty, p) for s, p in zip(cut.tolist(), paths, strict=True) if len(p) == 4]
    best = sorted(rated, reverse=True)[:5]
    found = beam_search(model, scene, 81, max_length=4, length_penalty=penalty)
    assert [found.path(0, k) for k in range(5)] == [path for _, path in best]
    ratings = found.log_prob[0, :5] / (found.lengths[0, :5] + found.ended[0, :5]) ** penalty
    assert_close(ratings, torch.tensor([score for score, _ in best]))


def test_beams_of_a_batch_are_those_of_each_scene():
    model, scenes = small_oat(), ragged_scenes()
    together = beam_search(model, scenes, 4, max_length=5)
    for row in range(3):
        alone = beam_search(model, scenes[row : row + 1], 4, max_length=5)
        assert [together.path(row, k) for k in range(4)] == [alone.path(0, k) for k in range(4)]
        assert_close(together.log_prob[row], alone.log_prob[0])
    one = beam_search(model, scenes, 1, max_length=5)
    assert (one.log_prob <= together.log_prob[:, :1] + 1e-5).all()


def test_probabilities_of_all_paths_sum_to_one():
    model, scene = small_oat(), grid_scene(1, 2, 1)
    paths = every_path(2, 5)
    total = log_prob(model, scene, padded([paths]))[0].exp().sum()
    cut = [path for path in paths if len(path) == 5]
    going_on = log_prob(model, scene, padded([cut]), with_end=False)[0].exp().sum()
    longest = torch.tensor([len(path) == 5 for path in paths])
    ended_longest = log_prob(model, scene, padded([paths]))[0][longest].exp().sum()
    assert_close(total - ended_longest + going_on, torch.tensor(1.0))


def test_paths_that_cannot_be():
    model, scenes = small_oat(), ragged_scenes()
    for paths, message in (
        ([[[0]], [[0]], [[2]]], "object that its scene does not have"),
        ([[[0, -1, 3]], [[0]], [[0]]], "-1 behind their end alone"),
        ([[[0]]], "B = 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            log_prob(model, scenes, padded(paths))


def test_loss_counts_every_step_once():
    model, scenes = small_oat(), ragged_scenes()
    paths = padded([[[0, 4, 4], [5, 4]], [[11, 3], [7]], [[1, 0], []]])
    logits = model(scenes, paths)
    steps = [logits[b, k, t].log_softmax(-1)[c] for b, k, t, c in steps_of(paths)]
    assert len(steps) == 4 + 3 + 3 + 2 + 3
    assert_close(path_loss(logits, paths), -torch.stack(steps).mean())


def steps_of(paths):
    """Yield scene, path, step and class of every step."""
    for b, scene in enumerate(paths.tolist()):
        for k, path in enumerate(scene):
            objects = [o for o in path if o >= 0]
            if objects:
                yield from ((b, k, t, c) for t, c in enumerate([*(o + 1 for o in objects), 0]))


@pytest.mark.parametrize("model", [small_oat(), RandomObjects(0.2)], ids=["oat", "baseline"])
def test_path_of_nothing_has_a_first_step(model):
    logits = model(grid_scene(2, 3, 4), torch.empty(1, 2, 0, dtype=torch.long))
    assert logits.shape == (1, 2, 1, 7)
    assert_close(logits, model(grid_scene(2, 3, 4), torch.tensor([[[1], [5]]]))[:, :, :1])
