import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from saccade.errors import ConfigError, DataError, ShapeError
from saccade.mil import Polygon, lesion_localization, lesion_shares
from saccade.mil.tissue import polygons_of

PER_TILE = 16  # pixels of a tile in these tests


@pytest.fixture
def drawn():
    """A random lesion on a grid of 6 x 5 tiles of 64 pixels, its mask in steps of 4, and coordinates."""
    mask = np.zeros((5 * PER_TILE, 6 * PER_TILE), bool)
    mask[10:37, 20:61] = True
    mask[30:70, 40:50] = True
    coords = np.stack(np.meshgrid(np.arange(6), np.arange(5)), -1).reshape(-1, 2) * 64
    return mask, coords


def by_tile(mask):
    """Return the exact share of each tile of the grid, row by row."""
    rows, columns = mask.shape[0] // PER_TILE, mask.shape[1] // PER_TILE
    return mask.reshape(rows, PER_TILE, columns, PER_TILE).mean((1, 3)).ravel()


def test_shares_are_those_of_the_mask(drawn):
    mask, coords = drawn
    shares = lesion_shares(coords, 64.0, polygons_of(mask, 4, 4))
    np.testing.assert_allclose(shares, by_tile(mask), atol=1e-9)
    shuffled = np.random.default_rng(1).permutation(len(coords))
    np.testing.assert_allclose(lesion_shares(coords[shuffled], 64.0, polygons_of(mask, 4, 4)), shares[shuffled])


def test_shares_of_a_polygon_with_a_hole_and_oblong_tiles():
    square = Polygon(
        np.array([[0, 0], [96, 0], [96, 64], [0, 64.0]]), (np.array([[40, 0], [56, 0], [56, 64], [40, 64.0]]),)
    )
    shares = lesion_shares(np.array([[0, 0], [32, 0], [96, 0], [0, 64]]), (32.0, 64.0), [square])
    np.testing.assert_allclose(shares, [1, 0.5, 0, 0], atol=0.13)  # a pixel of 16 along each edge
    assert lesion_shares(np.zeros((0, 2)), 64.0, [square]).shape == (0,)


def test_average_precision_is_that_of_the_pixels(drawn):
    mask, coords = drawn
    scores = np.random.default_rng(2).random(len(coords)) ** 3
    found = lesion_localization(scores, by_tile(mask))
    pixels = np.kron(scores.reshape(5, 6), np.ones((PER_TILE, PER_TILE)))
    assert found.average_precision == pytest.approx(average_precision_score(mask.ravel(), pixels.ravel()))
    assert found.lesion_share == pytest.approx(mask.mean())
    chosen = pixels > scores.mean()
    assert found.iou == pytest.approx((chosen & mask).sum() / (chosen | mask).sum())


def test_best_worst_and_no_knowledge():
    shares = np.array([0, 1, 1, 0, 0, 0, 0, 0.0])
    best = lesion_localization(shares + 0.1, shares)
    assert (best.average_precision, best.iou, best.chosen) == (1, 1, 2)
    assert best.random_iou == pytest.approx(0.5 / 3.5)
    even = lesion_localization(np.full(8, 1 / 8), shares)
    assert (even.average_precision, even.iou, even.chosen) == (0.25, 0, 0)
    worst = lesion_localization(np.array([3, 0, 1, 4, 5, 6, 7, 8.0]), shares)
    assert worst.average_precision == pytest.approx((1 / 7 + 2 / 8) / 2)


def test_scale_of_scores_does_not_matter_and_the_threshold_does():
    rng = np.random.default_rng(3)
    scores, shares = rng.random(50), rng.random(50)
    assert lesion_localization(scores, shares) == lesion_localization(scores * 1024, shares)
    assert lesion_localization(scores, shares, threshold=1.5).chosen < lesion_localization(scores, shares).chosen
    assert lesion_localization(scores, shares, threshold=0).chosen == 50


def test_what_is_refused():
    with pytest.raises(DataError, match="nothing to find") as caught:
        lesion_localization(np.ones(3), np.zeros(3))
    assert caught.value.reason == "no_lesion"
    with pytest.raises(DataError, match="finite and not negative"):
        lesion_localization(np.array([1, np.nan]), np.ones(2))
    with pytest.raises(DataError, match="finite and not negative"):
        lesion_localization(np.array([1, -1.0]), np.ones(2))
    with pytest.raises(ShapeError, match=r"got \(3,\) and \(2,\)"):
        lesion_localization(np.ones(3), np.ones(2))
    with pytest.raises(ConfigError, match="threshold must be at least 0"):
        lesion_localization(np.ones(2), np.ones(2), threshold=-1)
    with pytest.raises(ShapeError, match="coords must be"):
        lesion_shares(np.zeros(4), 64, [])
