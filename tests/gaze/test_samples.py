"""Raw samples to fixations, where pymovements is installed."""

import sys

import numpy as np
import pytest

from saccade.errors import ConfigError, DataError
from saccade.gaze.formats import Screen, from_samples, read_samples, read_scanpaths
from saccade.gaze.validation import ScanpathWarning
from tests.helpers import run_cli

SCREEN = Screen((1280, 1024), (38.0, 30.4), 68.0, 500.0)
PLACES = [(200.0, 300.0), (900.0, 350.0), (640.0, 800.0)]
HELD_S = [0.3, 0.2, 0.4]


def recording(places=PLACES, held=HELD_S, *, lost=0):
    """Return samples that stay at each place with a trembling hand, and jump in 20 ms; some are lost in the middle."""
    rng = np.random.default_rng(0)
    parts = []
    for number, (place, seconds) in enumerate(zip(places, held, strict=True)):
        if number:
            parts.append(np.linspace(places[number - 1], place, 12)[1:-1])
        parts.append(place + rng.normal(0, 0.3, (round(seconds * 500), 2)))
    x, y = np.concatenate(parts).T
    middle = round(held[0] * 250)
    x[middle : middle + lost] = y[middle : middle + lost] = np.nan
    return {"time": np.arange(len(x)) * 2.0, "x": x, "y": y}


@pytest.fixture
def needs_pymovements():
    pytest.importorskip("pymovements", reason="pymovements (extra) is not installed")


@pytest.mark.usefixtures("needs_pymovements")
@pytest.mark.parametrize("method", ["ivt", "idt"])
def test_fixations_are_where_and_as_long_as_the_eye_rested(method):
    path = from_samples(recording(), SCREEN, method=method)[0]
    np.testing.assert_allclose(np.stack([path.x, path.y], -1), PLACES, atol=3)
    np.testing.assert_allclose(path.duration, HELD_S, atol=0.03)
    assert (path.width, path.height) == (1280, 1024)


@pytest.mark.usefixtures("needs_pymovements")
def test_trials_and_lost_samples():
    one, two = recording(lost=10), recording(PLACES[::-1])
    both = {name: np.concatenate([one[name], two[name]]) for name in one}
    both |= {"image": ["b.png"] * len(one["x"]) + ["a.png"] * len(two["x"]), "subject": ["7"] * len(both["x"])}
    paths = from_samples(both, SCREEN)
    assert set(zip(paths.image, paths.subject, strict=True)) == {("b.png", "7"), ("a.png", "7")}
    by_image = {path.image: path for path in paths}
    np.testing.assert_allclose(by_image["a.png"].x, [640, 900, 200], atol=3)
    assert len(by_image["b.png"]) == 4  # the first is in two parts
    still = both | {"image": ["short.png"] * 100 + ["long.png"] * (len(both["x"]) - 100)}
    with pytest.warns(ScanpathWarning, match=r"1 of 2 trials have no fixation of 0\.35 s"):
        assert set(from_samples(still, SCREEN, minimum_s=0.35).image) == {"long.png"}
    with pytest.raises(DataError, match=r"No fixation of 5 s in 470 samples"):
        from_samples(recording(), SCREEN, minimum_s=5.0)
    with pytest.raises(ConfigError, match="Samples lack y; they have time, x"):
        from_samples({"time": [0], "x": [1]}, SCREEN)
    with pytest.raises(ConfigError, match="method is ivt or idt"):
        from_samples(recording(), SCREEN, method="speed")


@pytest.mark.slow
@pytest.mark.usefixtures("needs_pymovements")
def test_command(tmp_path):
    table = np.stack(list(recording().values()), -1)
    np.savetxt(tmp_path / "dog.csv", table, delimiter=",", header="time,x,y", comments="", fmt="%.3f")
    options = ["--samples", "ivt", "--size", "1280x1024", "--screen-cm", "38x30.4", "--distance-cm", "68"]
    done = run_cli("gaze", "convert", "dog.csv", *options, "-o", "paths.csv", cwd=tmp_path)
    assert (done.returncode, "--rate-hz" in done.stderr) == (2, True)
    done = run_cli("gaze", "convert", "dog.csv", *options, "--rate-hz", "500", "-o", "paths.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    paths = read_scanpaths(tmp_path / "paths.csv")
    assert (paths.image.tolist(), paths.lengths.tolist()) == (["dog"], [3])


def test_without_the_package_the_message_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymovements", None)
    (tmp_path / "a.csv").write_text("time,x,y\n0,1,2\n")
    with pytest.raises(ConfigError, match=r"pip install 'saccade\[pymovements\]'"):
        read_samples(tmp_path / "a.csv", SCREEN)
    with pytest.raises(ConfigError, match="Sizes, distance and rate of a screen are above 0"):
        Screen((1280, 1024), (38, 30), 0, 500)
