"""Splits share no image, target or viewer, and say what they share otherwise."""

import numpy as np
import pytest

from saccade.errors import ConfigError
from saccade.gaze import ScanpathSet, find_leaks, split_scanpaths

PATHS = ScanpathSet.from_columns(
    np.full(120, 3),
    np.arange(360.0),
    np.arange(360.0),
    image=np.repeat(np.arange(20), 6),
    subject=np.tile(np.arange(6), 20),
    task=np.repeat(np.arange(20) % 5, 6),
)


@pytest.mark.parametrize(
    ("by", "column", "counts"),
    [("image", "image", (16, 2, 2)), ("target", "task", (3, 1, 1)), ("subject", "subject", (4, 1, 1))],
)
def test_parts_share_no_unit(by, column, counts):
    parts = split_scanpaths(PATHS, by=by, seed=3)
    assert list(parts) == ["train", "val", "test"]
    units = [set(part.column(column)) for part in parts.values()]
    assert tuple(map(len, units)) == counts
    assert not (units[0] & units[1] | units[0] & units[2] | units[1] & units[2])
    assert sum(map(len, parts.values())) == len(PATHS)
    assert set(parts["val"].split) == {"val"}
    assert f"shared_{column}" not in [leak.rule for leak in find_leaks(parts)]


def test_several_units_leave_out_what_would_be_shared():
    parts = split_scanpaths(PATHS, by=["image", "subject"], fractions=(0.5, 0.0, 0.5))
    assert len(parts["val"]) == 0
    assert len(parts["train"]) == 10 * 3
    assert [leak.rule for leak in find_leaks(parts)] == ["shared_task"]


def test_depends_on_the_seed_and_not_on_the_order():
    backwards = PATHS.take(np.arange(len(PATHS))[::-1])
    one, same, other = (split_scanpaths(paths, seed=seed) for paths, seed in ((PATHS, 0), (backwards, 0), (PATHS, 1)))
    assert set(one["test"].image) == set(same["test"].image) != set(other["test"].image)


def test_leaks():
    copied = ScanpathSet.from_columns([2, 2], [1, 2, 1, 2], [3, 4, 3, 4], image=["a", "a"], subject=["1", "2"])
    leaks = {leak.rule: leak for leak in find_leaks({"train": copied[:1], "test": copied[1:]})}
    assert list(leaks) == ["shared_image", "shared_path"]
    assert leaks["shared_path"].count == 1
    assert leaks["shared_image"].message == "1 images stand in several parts, e.g. a in train and test."
    assert {leak.rule for leak in find_leaks(split_scanpaths(PATHS, by="trial"))} == {
        "shared_image",
        "shared_task",
        "shared_subject",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "images"}, r"by is one of .* got 'images'. Did you mean 'image'"),
        ({"by": []}, "Give a unit"),
        ({"fractions": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "from 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        split_scanpaths(PATHS, **options)


def test_too_few_units():
    with pytest.raises(ConfigError, match="1 targets cannot fill 3 parts"):
        split_scanpaths(PATHS.filter(task="1"), by="target")
    with pytest.raises(ConfigError, match="record 0 has no task to divide by"):
        split_scanpaths(ScanpathSet.from_columns([1], [1], [1]), by="target")
