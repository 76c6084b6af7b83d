"""Search efficiency and behaviours on paths that can be read off."""

import numpy as np
import pytest

from saccade.errors import ConfigError, DataError
from saccade.gaze import Scanpath, ScanpathSet
from saccade.gaze import metrics as gm

BOX = [100, 100, 200, 200]


def search(points, subject, task="cup", objects=None, box=BOX, target=2):
    x, y = zip(*points, strict=True)
    return Scanpath("a", x, y, subject=subject, task=task, target_box=box, objects=objects, target_object=target)


PATHS = ScanpathSet.from_paths(
    [
        search([(0, 150), (150, 150), (0, 0)], 1, objects=[0, 2, 0]),
        search([(150, 150)], 2, objects=[2]),
        search([(0, 0), (100, 150)], 3, objects=[0, 0]),  # on the edge is not inside
        search([(0, 150), (0, 150), (0, 150), (300, 150), (150, 150)], 4, "fork", objects=[0, 0, 0, 1, 2]),
    ]
)


def test_steps_and_curves():
    assert gm.steps_to_target(PATHS).tolist() == [2, 1, np.inf, 5]
    cup, fork = [1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3], [0, 0, 0, 0, 1]
    curve = gm.target_fixation_probability(PATHS, max_step=4)
    np.testing.assert_allclose(curve, np.mean([cup, fork], 0))  # every task counts alike
    assert gm.probability_mismatch(curve, curve) == 0
    assert gm.probability_mismatch([0.0, 1.0], [0.5, 0.5]) == 1
    with pytest.raises(ConfigError, match="same max_step"):
        gm.probability_mismatch(curve, curve[:2])
    with pytest.raises(ConfigError, match="at least one path"):
        gm.target_fixation_probability(PATHS[:0], max_step=3)


def test_scanpath_ratio():
    """Straight 150 px; the last path walks 300 + 150 to get there. Found at once and never found have no ratio."""
    np.testing.assert_allclose(gm.scanpath_ratio(PATHS), [1, np.nan, np.nan, 150 / 450])
    assert np.isnan(gm.scanpath_ratio(PATHS, max_step=3)[3])
    assert gm.scanpath_ratio(PATHS, max_step=4)[3] == 150 / 450


def test_behaviours():
    got = gm.behaviour(PATHS)
    assert len(gm.BEHAVIOURS) == got.shape[1]
    np.testing.assert_allclose(
        got, [[0, 3, 2 / 3, 0, 1 / 3], [1, 1, 1, 0, 0], [0, 2, 0.5, 0.5, 0], [1, 5, 3 / 5, 2 / 5, 0]], atol=1e-12
    )
    np.testing.assert_allclose(got[:, 2:].sum(1), 1)
    assert gm.behaviour_difference(got.mean(0), got.mean(0)) == 0
    assert gm.behaviour_difference([1, 2, 3, 4, 5], [1, 1, 1, 1, 0]) == (0 + 1 + 2 + 3) / 4
    assert np.isnan(gm.behaviour_difference([1.0] * 5, [0.0] * 5))


def test_length_error():
    assert gm.length_error(PATHS, PATHS.take(np.array([1, 0, 2, 3]))).tolist() == [2, 2, 0, 0]
    with pytest.raises(ConfigError, match="there are 4 and 1"):
        gm.length_error(PATHS, PATHS[:1])


def test_needs_are_named():
    bare = ScanpathSet.from_paths([Scanpath("a", [1], [2])])
    with pytest.raises(DataError, match="target_box: unknown"):
        gm.steps_to_target(bare)
    with pytest.raises(DataError, match="objects: unknown"):
        gm.behaviour(bare)
    with pytest.raises(DataError, match="record 0, target_object: unknown"):
        gm.behaviour(ScanpathSet.from_paths([Scanpath("a", [1], [2], objects=[0])]))
