import numpy as np
import pytest

from saccade.datasets.corruptions import CORRUPTIONS, GROUPS
from saccade.errors import ShapeError
from saccade.vision_backbones.robustness_metrics import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    COUNTED,
    corruption_error,
    corruption_metrics,
    flip_probability,
    frame_pairs,
    ranks,
    relative_corruption_error,
    top5_distance,
    zipf_distance,
)


def alexnet():
    accuracy = {name: dict(enumerate((1 - e for e in errors), start=1)) for name, errors in ALEXNET_ERRORS.items()}
    return accuracy, 1 - ALEXNET_CLEAN_ERROR


def test_alexnet_has_one_hundred():
    metrics = corruption_metrics(*alexnet())
    assert metrics["mCE_percent"] == pytest.approx(100)
    assert metrics["relative_mCE_percent"] == pytest.approx(100)
    assert metrics["clean_top1_percent"] == pytest.approx(56.522)


def test_fifteen_corruptions_count_and_the_extra_four_do_not():
    assert set(COUNTED) == set(CORRUPTIONS) - set(GROUPS["extra"])
    accuracy, clean = alexnet()
    extra = {name: dict.fromkeys(range(1, 6), 0.9) for name in GROUPS["extra"]}
    with_extra, without = corruption_metrics(accuracy | extra, clean), corruption_metrics(accuracy, clean)
    assert with_extra.pop("extra_top1_percent") == pytest.approx(90)
    assert with_extra == without


def test_a_perfect_classifier():
    perfect = {name: dict.fromkeys(range(1, 6), 1.0) for name in COUNTED}
    metrics = corruption_metrics(perfect, 1.0)
    assert metrics["mCE_percent"] == metrics["relative_mCE_percent"] == 0
    assert metrics["retention_percent"] == metrics["mean_corruption_accuracy_15_percent"] == 100


def test_what_is_not_complete_is_left_out_not_guessed():
    accuracy, clean = alexnet()
    del accuracy["fog"]
    metrics = corruption_metrics(accuracy, clean)
    assert set(metrics) == {
        "clean_top1_percent",
        "mean_top1_of_70_folders_percent",
        "noise_top1_percent",
        "blur_top1_percent",
        "digital_top1_percent",
    }
    accuracy, _ = alexnet()
    assert "relative_mCE_percent" not in corruption_metrics(accuracy)
    assert "mCE_percent" not in corruption_metrics(accuracy, clean, alexnet=False)
    del accuracy["snow"][3]
    assert "mCE_percent" not in corruption_metrics(accuracy)
    assert corruption_metrics({}) == {}


def test_every_corruption_weighs_the_same_in_mce():
    accuracy, _ = alexnet()
    for name in ("fog", "brightness"):  # halving AlexNet's error of one takes 100 / 30 away, easy or hard
        better = {kind: dict(by) for kind, by in accuracy.items()}
        better[name] = {s: 1 - (1 - value) / 2 for s, value in better[name].items()}
        assert corruption_metrics(better)["mCE_percent"] == pytest.approx(100 - 100 / 30)


def test_relative_error_is_of_what_the_corruption_adds():
    errors = [e + 0.1 for e in ALEXNET_ERRORS["frost"]]
    assert relative_corruption_error("frost", errors, ALEXNET_CLEAN_ERROR + 0.1) == pytest.approx(1)
    assert corruption_error("frost", errors) > 1


def test_five_severities_are_needed():
    with pytest.raises(ShapeError, match="fog needs the errors at severity 1, 2, 3, 4 and 5, got 4"):
        corruption_error("fog", [0.5] * 4)


def test_frame_pairs():
    assert frame_pairs(5, noise=False).tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert frame_pairs(5, noise=False, difficulty=2).tolist() == [[0, 2], [1, 3], [2, 4]]
    assert frame_pairs(4, noise=True, difficulty=3).tolist() == [[0, 1], [0, 2], [0, 3]]


def test_flips():
    assert flip_probability(np.array([3, 3, 5, 3]), noise=False) == pytest.approx(2 / 3)
    assert flip_probability(np.array([3, 3, 5, 3]), noise=True) == pytest.approx(1 / 3)
    assert flip_probability(np.array([3, 5, 3, 5]), noise=False, difficulty=2) == 0
    clips = np.array([[1, 1, 1], [1, 2, 3]])
    assert flip_probability(clips, noise=False) == 0.5


def test_ranks_of_equal_logits_are_settled_by_the_class():
    assert ranks(np.array([[0.5, 2.0, 0.5, -1.0]])).tolist() == [[2, 1, 3, 4]]


def literal_top5(before, after):
    """Sum over the first five places of |F[r] - F[sigma_r]|, F = cumsum of [0, 1, 1, 1, 1, 1, 0, ...]."""
    count = len(before)
    f = np.cumsum([0, 1, 1, 1, 1, 1] + [0] * count)[:count]
    sigma = [after[list(before).index(place)] - 1 for place in range(1, count + 1)]
    return sum(abs(f[place] - f[sigma[place]]) for place in range(5))


def literal_zipf(before, after):
    """Sum over all places of |1/r - 1/sigma_r| / r."""
    sigma = [after[list(before).index(place)] for place in range(1, len(before) + 1)]
    return sum(abs(1 / place - 1 / sigma[place - 1]) / place for place in range(1, len(before) + 1))


def test_distances_are_the_literal_sums():
    generator = np.random.default_rng(0)
    places = np.stack([generator.permutation(12) + 1 for _ in range(4)])
    for noise in (False, True):
        pairs = frame_pairs(4, noise=noise)
        for ours, literal in ((top5_distance, literal_top5), (zipf_distance, literal_zipf)):
            expected = np.mean([literal(places[a], places[b]) for a, b in pairs])
            assert ours(places, noise=noise) == pytest.approx(expected)


def test_a_swap_behind_the_fifth_place_is_no_top5_distance():
    before = np.arange(1, 11)
    swapped = before.copy()
    swapped[[7, 9]] = swapped[[9, 7]]
    clip = np.stack([before, swapped])
    assert top5_distance(clip, noise=False) == 0
    assert zipf_distance(clip, noise=False) > 0
