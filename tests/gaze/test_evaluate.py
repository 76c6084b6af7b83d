"""The table of scores: aggregation, human agreement, chance, intervals, what is left out; the registry it walks."""

import numpy as np
import pytest

from saccade.errors import ConfigError
from saccade.gaze import Scanpath, ScanpathSet
from saccade.gaze import metrics as gm
from saccade.gaze.metrics.baselines import other_images, uniform_paths
from saccade.gaze.metrics.evaluate import compare_paths, compare_viewers
from saccade.gaze.metrics.registry import METRICS, Context, find_metrics
from saccade.gaze.metrics.search_table import search_table


def viewers(images=6, subjects=4, seed=0, **columns):
    """Viewers who look near one place per image, one after the other."""
    rng = np.random.default_rng(seed)
    places = np.random.default_rng(99).uniform(100, 500, (images, 2))
    paths = []
    for image in range(images):
        for subject in range(subjects):
            n = int(rng.integers(4, 9))
            x, y = np.clip(places[image] + rng.normal(0, 40, (n, 2)), 0, 590).T
            paths.append(
                Scanpath(
                    f"{image}.jpg", x, y, rng.uniform(0.1, 0.4, n), subject=subject, width=800, height=600, **columns
                )
            )
    return ScanpathSet.from_paths(paths)


HUMAN = viewers()


def by_name(comparison):
    return {score.name: score for score in comparison.scores}


def with_objects(paths):
    boxes = np.array([[c * 200.0, r * 200.0, c * 200.0 + 200, r * 200.0 + 200] for r in range(3) for c in range(4)])
    return ScanpathSet.from_paths(
        [
            Scanpath(p.image, p.x, p.y, p.duration, p.subject, width=800, height=600, boxes=boxes, task="cup",
                     objects=(p.x // 200 + 4 * (p.y // 200)).astype(int), target_object=5, target_box=boxes[5])
            for p in paths
        ]
    )  # fmt: skip


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_registry(metric):
    """Every entry computes its columns, is best for equal paths where it says so, and is symmetric where it says so."""
    paths = with_objects(HUMAN)
    maps = {name: np.arange(48).reshape(6, 8).repeat(100, 0).repeat(100, 1) for name in set(paths.image)}
    context = Context(paths, maps)
    assert not metric.lacks(paths, context=context)
    rng = np.random.default_rng(1)
    i = rng.permutation(len(paths))
    j = np.array([rng.choice(np.flatnonzero(paths.image == paths.image[k])) for k in i])
    a, b = paths.take(i), paths.take(j)
    values = metric.compare(a, b, context).reshape(len(i), -1)
    assert values.shape == (len(i), len(metric.columns))
    back = metric.compare(b, a, context).reshape(len(i), -1)
    if metric.symmetric:
        np.testing.assert_allclose(values, back, atol=1e-9)
    same = metric.compare(a, a, context).reshape(len(i), -1)
    if metric.best:
        np.testing.assert_allclose(same, 1.0 if metric.best == "high" else 0.0, atol=1e-12)
        assert (np.nan_to_num(values) <= same + 1e-12 if metric.best == "high" else values >= same - 1e-12).all()
    if metric.in_pixels:
        double = ScanpathSet.from_columns(a.lengths, a.x * 2, a.y * 2, image=a.image, sample=range(len(a)))
        other = ScanpathSet.from_columns(b.lengths, b.x * 2, b.y * 2, image=b.image, sample=range(len(b)))
        np.testing.assert_allclose(metric.compare(double, other, context), 2 * values[:, 0])
    assert metric.definition
    assert set(metric.needs) <= {"size", "duration", "objects", "maps"}


def test_names():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    columns = [column for metric in METRICS for column in metric.columns]
    assert len(set(columns)) == len(columns)
    assert [metric.name for metric in find_metrics(["dtw", "sed", "dtw"])] == ["dtw", "sed"]
    with pytest.raises(ConfigError, match=r"Unknown metric 'scanmach'. Did you mean 'scanmatch'"):
        find_metrics(["scanmach"])


def test_agreement_is_the_plain_loop():
    """Mean over the other viewers, then over viewers, for a symmetric and an asymmetric metric."""
    scores = by_name(compare_viewers(HUMAN, metrics=["scanmatch", "tde_2"], chance=False))
    for name, function in (("scanmatch", gm.scanmatch), ("tde_2", lambda a, b: gm.time_delay_embedding(a, b, k=2))):
        means = []
        for path in HUMAN:
            others = [other for other in HUMAN if other.image == path.image and other.subject != path.subject]
            means.append(np.mean([function(path, other)[0] for other in others]))
        assert scores[name].mean == pytest.approx(np.mean(means))
        assert scores[name].sd == pytest.approx(np.std(means, ddof=1))
        assert (scores[name].n, scores[name].undefined) == (24, 0)
        assert scores[name].low < scores[name].mean < scores[name].high


def test_predictions_stand_between_chance_and_viewers():
    good, poor = viewers(subjects=1, seed=7), uniform_paths(viewers(subjects=1, seed=8), seed=5)
    names = ["scanmatch", "multimatch", "sequence_score", "dtw"]
    first, second = (by_name(compare_paths(paths, HUMAN, metrics=names)) for paths in (good, poor))
    for name, sign in (("scanmatch", 1), ("multimatch_position", 1), ("sequence_score", 1), ("dtw", -1)):
        score = first[name]
        assert sign * score.mean > sign * score.random
        assert sign * score.mean > sign * second[name].mean
        assert sign * score.human > sign * score.other_image
        assert score.mean == pytest.approx(score.human, rel=0.3)
        assert second[name].mean == pytest.approx(score.random, rel=0.3)
    ceiling = by_name(compare_viewers(HUMAN, metrics=names))
    assert first["dtw"].human == ceiling["dtw"].mean
    assert ceiling["dtw"].human is None


def test_samples_have_a_mean_and_a_best():
    samples = viewers(subjects=3, seed=11)
    samples = ScanpathSet.from_paths(
        [
            Scanpath(p.image, p.x, p.y, p.duration, "model", sample=n % 3, width=800, height=600)
            for n, p in enumerate(samples)
        ]
    )
    comparison = compare_paths(samples, HUMAN, metrics=["scanmatch", "dtw", "recurrence"], chance=False)
    scores = by_name(comparison)
    table = [row for row in comparison.rows() if row["image"] == "0.jpg" and row["predicted_sample"] == 2]
    assert [row["human"] for row in table] == ["0", "1", "2", "3"]
    assert table[0]["scanmatch"] == gm.scanmatch(samples[2], HUMAN[0])[0]
    each = {}
    for row in comparison.rows():
        each.setdefault((row["image"], row["predicted_sample"]), []).append(row["dtw"])
    best = [min(np.mean(each[image, k]) for k in range(3)) for image in dict.fromkeys(samples.image)]
    assert scores["dtw"].best_of_k == pytest.approx(np.mean(best))
    assert scores["scanmatch"].best_of_k > scores["scanmatch"].mean
    assert np.isnan(scores["recurrence_rec"].best_of_k)


def test_undefined_pairs_are_counted_and_left_out():
    short = ScanpathSet.from_paths(
        [Scanpath("0.jpg", [300, 310], [300, 310], width=800, height=600), Scanpath("1.jpg", [1, 2, 3], [4, 1, 3])]
    )
    comparison = compare_paths(short, HUMAN, metrics=["multimatch", "scanmatch"], chance=False)
    score = by_name(comparison)["multimatch_shape"]
    assert (score.n, score.undefined) == (1, 4)
    assert comparison.rows()[0]["multimatch_shape"] is None
    assert by_name(comparison)["multimatch_duration"].n == 0
    assert np.isnan(by_name(comparison)["multimatch_duration"].mean)


def test_what_cannot_be_computed_is_said():
    bare = ScanpathSet.from_paths([Scanpath(p.image, p.x, p.y, subject=p.subject) for p in HUMAN])
    comparison = compare_viewers(bare)
    assert comparison.left_out["scanmatch"] == "needs image sizes"
    assert comparison.left_out["scanmatch_time"] == "needs image sizes, durations"
    assert comparison.left_out["semantic_fed"] == "needs label maps"
    assert comparison.left_out["chance"] == "needs image sizes"
    assert {"dtw", "sequence_score", "recurrence"} <= set(comparison.definitions)
    with pytest.raises(ConfigError, match="scanmatch needs image sizes, which the paths do not have"):
        compare_viewers(bare, metrics=["scanmatch"])
    other = ScanpathSet.from_paths([Scanpath("9.jpg", [1], [1]), *HUMAN[:1]])
    assert compare_paths(other, HUMAN, metrics=["dtw"]).left_out == {
        "predictions": "1 without a human path of their image and task"
    }
    with pytest.raises(ConfigError, match=r"e.g. '9.jpg', None predicted, '0.jpg', None human"):
        compare_paths(other[:1], HUMAN)
    with pytest.raises(ConfigError, match="No image and task has paths of two viewers"):
        compare_viewers(HUMAN[:1])
    resized = HUMAN.with_size(np.full((len(HUMAN), 2), 512.0))
    with pytest.raises(ConfigError, match=r"0.jpg is 800x600 for one path and 512x512 for another"):
        compare_paths(resized, HUMAN)
    with pytest.raises(ConfigError, match="pairs is"):
        compare_viewers(HUMAN, pairs="some")


def test_predictions_take_the_size_that_the_truth_knows():
    unsized = ScanpathSet.from_paths([Scanpath(p.image, p.x, p.y, p.duration) for p in HUMAN[::4]])
    assert by_name(compare_paths(unsized, HUMAN, metrics=["scanmatch"]))["scanmatch"].n == 6


def test_all_pairs_of_a_set():
    comparison = compare_viewers(HUMAN, pairs="all")
    assert comparison.pairs.shape == (2, 24 * 23 // 2)
    assert comparison.left_out["sequence_score"] == "compares paths of one image"
    assert by_name(comparison)["dtw"].random is None


def test_degrees():
    pixels, degrees = (
        by_name(compare_viewers(HUMAN, metrics=["dtw", "recurrence"], pixels_per_degree=n)) for n in (None, 32)
    )
    assert degrees["dtw"].mean == pytest.approx(pixels["dtw"].mean / 32)
    assert (pixels["dtw"].unit, degrees["dtw"].unit) == ("px", "deg")
    assert degrees["recurrence_rec"].mean == pixels["recurrence_rec"].mean  # 2 degrees are the 64 px


def test_the_same_seed_gives_the_same_table():
    one, same, other = (compare_viewers(HUMAN, metrics=["dtw"], seed=seed).scores for seed in (0, 0, 1))
    assert one == same
    assert one[0].random != other[0].random
    assert one[0].mean == other[0].mean


def test_chance_keeps_names_lengths_and_objects():
    paths = with_objects(HUMAN)
    guessed = uniform_paths(paths, seed=3)
    assert (guessed.lengths == paths.lengths).all()
    assert (guessed.image == paths.image).all()
    np.testing.assert_array_equal(guessed.objects, (guessed.x // 200 + 4 * (guessed.y // 200)).astype(int))
    foreign = other_images(paths, seed=3)
    own = {(path.image, path.x[0]) for path in paths}
    assert not own & {(path.image, path.x[0]) for path in foreign}
    assert {path.x[0] for path in foreign} <= {path.x[0] for path in paths}


def test_search_table():
    paths = with_objects(HUMAN)
    rows = {row.name: row for row in search_table(with_objects(viewers(subjects=1, seed=9)), paths, max_step=5)}
    assert rows["found"].human == pytest.approx(np.mean([np.isfinite(gm.steps_to_target(paths))]))
    assert rows["tfp_sum"].predicted == pytest.approx(
        gm.target_fixation_probability(with_objects(viewers(subjects=1, seed=9)), max_step=5).sum()
    )
    assert rows["probability_mismatch"].human < rows["probability_mismatch"].random
    assert {"behaviour_correct", "behaviour_delta"} <= set(rows)
    assert search_table(None, HUMAN, max_step=5) == []
    assert search_table(None, paths, max_step=5)[0].predicted is None


def test_first_fixations_and_the_most_similar_human():
    predicted = viewers(subjects=1, seed=7)
    cut = by_name(compare_paths(predicted, HUMAN, metrics=["dtw", "scanmatch", "sequence_score"], first=3))
    context = Context(HUMAN)
    values = {"dtw": [], "scanmatch": [], "sequence_score": []}
    for path in predicted.first(3):
        assert len(path) == 3
        others = HUMAN.first(3).filter(image=path.image)
        same = ScanpathSet.from_paths([path]).take(np.zeros(len(others), int))
        for metric in find_metrics(list(values)):
            values[metric.name].append(metric.compare(same, others, context))
    for name, word in (("dtw", np.min), ("scanmatch", np.max), ("sequence_score", np.max)):
        assert cut[name].mean == pytest.approx(np.mean(values[name]))
        assert cut[name].best_human == pytest.approx(np.mean([word(row) for row in values[name]]))
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        compare_paths(predicted, HUMAN, first=0)
    assert np.isnan(by_name(compare_viewers(HUMAN, metrics=["recurrence"]))["recurrence_det"].best_human)
