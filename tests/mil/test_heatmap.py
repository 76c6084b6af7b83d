"""Heatmaps: overlap is averaged, borders are exact, uncovered glass stays as it is."""

import numpy as np
import pytest

from saccade.errors import ConfigError, ShapeError
from saccade.mil.heatmap import draw_heatmap, normalize_scores, tile_map


def literal_map(values, coords, size, slide, downsample):
    columns, rows = (int(side / downsample) for side in slide)
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    for value, (x, y) in zip(values, coords, strict=True):
        x0, x1, y0, y1 = (round(edge / downsample) for edge in (x, x + size, y, y + size))
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def test_overlapping_tiles_are_averaged():
    rng = np.random.default_rng(0)
    coords = np.unique(rng.integers(0, 40, (60, 2)) * 100 - 100, axis=0)
    values = rng.normal(size=len(coords))
    assert (coords < 0).any()  # some tiles reach beyond the slide
    got = tile_map(values, coords, 256.5, (4000, 3000), downsample=30)
    shifted = literal_map(values, coords + 3000, 256.5, (10000, 9000), 30)[100:200, 100:233]
    np.testing.assert_allclose(got.values, shifted, atol=1e-9)


def test_normalisations():
    scores = np.array([3.0, 1, 3, 8])
    assert normalize_scores(scores).tolist() == [0.625, 0.25, 0.625, 1]
    assert normalize_scores(scores, "minmax").tolist() == [2 / 7, 0, 2 / 7, 1]
    assert normalize_scores(np.full(4, 0.25), "times-uniform").tolist() == [1] * 4
    assert normalize_scores(np.ones(3), "minmax").tolist() == [0] * 3
    assert all(len(normalize_scores(np.zeros(0), method)) == 0 for method in ("percentile", "minmax", "none"))
    with pytest.raises(ConfigError, match="percentile, minmax"):
        normalize_scores(scores, "rank")
    with pytest.raises(ShapeError, match="choose a branch"):
        normalize_scores(scores[None])


def test_drawing_leaves_glass_alone():
    canvas = tile_map(np.array([0.0, 1.0]), np.array([[0, 0], [64, 64]]), 32, (128, 96), downsample=8)
    background = np.full((192, 256, 3), 200, np.uint8)
    drawn = draw_heatmap(canvas, background, alpha=1.0, smooth=1.0)
    assert (drawn[100:, :100] == 200).all()
    assert drawn[5, 5, 2] > drawn[5, 5, 0]  # low is blue
    assert drawn[140, 140, 0] > drawn[140, 140, 2]  # high is red
    assert np.array_equal(draw_heatmap(canvas, background, alpha=0.0), background)
    empty = tile_map(np.zeros(0), np.zeros((0, 2)), 32, (128, 96), downsample=8)
    assert np.array_equal(draw_heatmap(empty, background), background)


def test_messages():
    with pytest.raises(ConfigError, match="take a downsample above"):
        tile_map(np.zeros(1), np.zeros((1, 2)), 1, (10**6, 10**6), downsample=1)
    with pytest.raises(ShapeError, match=r"coords must be \(2, 2\)"):
        tile_map(np.zeros(2), np.zeros((3, 2)), 1, (10, 10))
