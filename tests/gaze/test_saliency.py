"""Maps against fixations, on cases whose values can be worked out."""

import numpy as np
import pytest

from saccade.errors import ConfigError, DataError
from saccade.gaze import Scanpath, ScanpathSet
from saccade.gaze import metrics as gm

RNG = np.random.default_rng(0)
MAPS = RNG.random((3, 6, 8))
MAPS /= MAPS.sum((1, 2), keepdims=True)
FIXATIONS = np.array([[[1, 2], [7, 5], [3, 3]]] * 3, float)


def test_against_the_definitions():
    values = np.stack([grid[[2, 5, 3], [1, 7, 3]] for grid in MAPS])
    uniform = np.full_like(MAPS, 1 / 48)
    np.testing.assert_allclose(gm.information_gain(MAPS, uniform, FIXATIONS), np.log2(values * 48).mean(1), rtol=1e-9)
    for unbiased in (False, True):
        flat = MAPS.reshape(3, -1)
        standard = (values - flat.mean(1)[:, None]) / flat.std(1, ddof=int(unbiased))[:, None]
        np.testing.assert_allclose(gm.nss(MAPS, FIXATIONS, unbiased=unbiased), standard.mean(1), rtol=1e-9)
    pairs = [
        np.mean(grid.ravel() < v) + np.mean(grid.ravel() == v) / 2
        for grid, row in zip(MAPS, values, strict=True)
        for v in row
    ]
    np.testing.assert_allclose(gm.auc(MAPS, FIXATIONS), np.reshape(pairs, (3, 3)).mean(1), rtol=1e-12)


def test_padding_is_left_out():
    padded = np.concatenate([FIXATIONS, np.full((3, 2, 2), np.nan)], 1)
    uniform = np.full_like(MAPS, 1 / 48)
    for function in (gm.nss, gm.auc, gm.auc_trapezoid):
        np.testing.assert_allclose(function(MAPS, padded), function(MAPS, FIXATIONS))
    np.testing.assert_allclose(
        gm.information_gain(MAPS, uniform, padded), gm.information_gain(MAPS, uniform, FIXATIONS)
    )
    assert np.isnan(gm.nss(MAPS, np.full((3, 1, 2), np.nan))).all()


def test_constant_maps_have_a_value():
    """Also those that are constant only up to rounding, where dividing by the deviation gives +-1."""
    constant = np.full((1, 6, 8), 0.1) * (1 + 1e-16 * np.arange(48).reshape(1, 6, 8))
    where = FIXATIONS[:1]
    assert gm.nss(constant, where)[0] == 0
    assert gm.auc(np.full((1, 6, 8), 0.1), where)[0] == 0.5
    assert gm.auc_trapezoid(np.full((1, 6, 8), 0.1), where)[0] == 0.5
    assert gm.correlation(constant, MAPS[:1])[0] == 0


def test_the_best_map_and_the_two_areas():
    peak = np.zeros((1, 6, 8))
    peak[0, 3, 2] = 1
    assert gm.auc_trapezoid(peak, [[[2, 3]]])[0] == 1
    assert gm.auc(peak, [[[2, 3]]])[0] == pytest.approx(1 - 1 / 96)  # its own pixel is among all pixels
    assert gm.auc(peak, [[[2, 3]]], exclude_fixated=True)[0] == 1
    everywhere = np.stack(np.meshgrid(range(8), range(6)), -1).reshape(1, -1, 2).repeat(3, 0)
    np.testing.assert_allclose(gm.auc(MAPS, everywhere), 0.5, rtol=1e-12)
    np.testing.assert_allclose(gm.auc_trapezoid(MAPS, everywhere), 0.75, rtol=1e-12)


def test_shuffled_area_takes_out_what_all_images_share():
    rows, columns = np.mgrid[:6, :8]
    centre = np.exp(-((rows - 2.5) ** 2 + (columns - 3.5) ** 2) / 4)[None]
    at_centre = np.array([[[3, 2], [4, 3], [3, 3], [4, 2]]], float)
    assert gm.auc(centre, at_centre)[0] > 0.9
    assert gm.auc_shuffled(centre, at_centre, at_centre[:, ::-1])[0] == 0.5
    corners = np.array([[[0, 0], [7, 5], [np.nan, np.nan]]])
    assert gm.auc_shuffled(centre, at_centre, corners)[0] == 1
    assert gm.auc_shuffled(centre, corners, at_centre)[0] == 0


def test_maps_against_maps():
    np.testing.assert_allclose(gm.correlation(MAPS, 3 * MAPS + 1), 1)
    np.testing.assert_allclose(gm.similarity(MAPS, 5 * MAPS), 1)
    np.testing.assert_allclose(gm.kl_divergence(MAPS, 5 * MAPS), 0, atol=1e-12)
    np.testing.assert_allclose(
        gm.kl_divergence(MAPS, MAPS[::-1], regularisation="mit"), gm.kl_divergence(MAPS, MAPS[::-1]), atol=1e-9
    )


def test_refused():
    uniform = np.full_like(MAPS, 1 / 48)
    for where in ([[[8, 0]]] * 3, [[[0, -1]]] * 3):
        with pytest.raises(DataError, match="outside its map of 8 x 6"):
            gm.nss(MAPS, where)
    with pytest.raises(ConfigError, match=r"fixations \(B, F, 2\), got \(3, 6, 8\) and \(3, 2\)"):
        gm.nss(MAPS, FIXATIONS[:, 0])
    with pytest.raises(DataError, match="NaN or infinite"):
        gm.nss(np.where(MAPS > 0.02, np.nan, MAPS), FIXATIONS)
    with pytest.raises(DataError, match="negative values"):
        gm.information_gain(-MAPS, uniform, FIXATIONS)
    with pytest.warns(UserWarning, match=r"3 of 3 maps do not sum to 1, e.g. number 0: 2\."):
        gm.information_gain(2 * MAPS, uniform, FIXATIONS)
    with pytest.raises(ConfigError, match="'floor' or 'mit'"):
        gm.kl_divergence(MAPS, MAPS, regularisation="none")


def test_density_of_fixations():
    density = gm.fixation_density([[3, 2], [3.9, 2.2], [-1, 2], [8, 2]], size=(8, 6), sigma=0.3)
    assert density.sum() == pytest.approx(1)
    assert np.unravel_index(density.argmax(), density.shape) == (2, 3)
    assert density[2, 3] > 0.9
    with pytest.raises(DataError, match="None of 1 fixations lies inside 8 x 6"):
        gm.fixation_density([[9, 9]], size=(8, 6), sigma=1)


def looking(images=4, subjects=2):
    """Return paths on images of 80 x 60 px, each image with a favourite place."""
    rng = np.random.default_rng(1)
    paths = []
    for image in range(images):
        place = rng.uniform([10, 10], [70, 50])
        for subject in range(subjects):
            x, y = (place + rng.normal(0, 3, (5, 2))).clip(0, [79, 59]).T
            paths.append(Scanpath(f"{image}.jpg", x, y, subject=str(subject), width=80, height=60))
    return ScanpathSet.from_paths(paths)


def test_densities_are_scored_at_the_fixations_that_come_next():
    people = looking()

    def exact(path):
        """A map of half the size for every fixation, that one alone known beforehand."""
        maps = np.full((5, 30, 40), 0.5 / 1200)
        maps[np.arange(5), (path.y / 2).astype(int), (path.x / 2).astype(int)] += 0.5
        return maps

    gain, peak, _, area, trapezoid = gm.density_table(people, exact)
    assert (gain.name, gain.n, gain.baseline) == ("information_gain", 8 * 4, 0)
    base = {
        image: gm.fixation_density(
            np.concatenate([np.stack([p.x, p.y], -1)[1:] / 2 for p in people if p.image != image]),
            size=(40, 30),
            sigma=40 * 24 / 512,
        )
        for image in set(people.image)
    }
    expected = [
        np.log2(0.5 + 0.5 / 1200) - np.log2(base[p.image][int(y / 2), int(x / 2)] + 2.2204e-16)
        for p in people
        for x, y in zip(p.x[1:], p.y[1:], strict=True)
    ]
    assert gain.mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert gain.low <= gain.mean <= gain.high
    assert peak.mean > 30 > peak.baseline
    assert trapezoid.mean == 1
    without_first = gm.density_table(people, lambda path: exact(path)[1:])
    assert without_first[0] == gain
    flat = gm.density_table(people, lambda path: np.full((30, 40), 1 / 1200), baseline=looking(2))
    assert (flat[1].mean, flat[3].mean) == (0, 0.5)
    assert flat[0].baseline == 0 != flat[0].mean
    assert area.baseline < area.mean


def test_densities_that_do_not_fit(tmp_path):
    people = looking()
    with pytest.raises(DataError, match=r"5 fixations takes densities \(H, W\), \(4, H, W\) or \(5, H, W\), got \(3, "):
        gm.density_table(people, lambda path: np.full((3, 30, 40), 1 / 1200))
    with pytest.raises(ConfigError, match="No path of two fixations has densities"):
        gm.density_table(people, lambda path: None)
    with pytest.raises(ConfigError, match="a second fixation on another image is needed"):
        gm.density_table(people.filter(image="0.jpg"), lambda path: np.full((30, 40), 1 / 1200))
    off = ScanpathSet.from_paths([Scanpath("a", [1, 80], [1, 5], width=80, height=60)])
    with pytest.raises(DataError, match=r"record 0, x, y: outside the image, where a density"):
        gm.density_table(off, lambda path: np.full((30, 40), 1 / 1200))
    with pytest.raises(ConfigError, match=r"has no \.npy file"):
        gm.DensityFiles(tmp_path)
    for name, value in (("0", 1), ("0.1", 2), ("0.mug", 3), ("0.mug.1", 4)):
        np.save(tmp_path / f"{name}.npy", np.full((2, 2), value))
    files = gm.DensityFiles(tmp_path)
    found = [
        files(Scanpath("a/0.jpg", [1], [1], subject=subject, task=task))[0, 0]
        for subject, task in (("0", None), ("1", None), ("0", "mug"), ("1", "mug"))
    ]
    assert found == [1, 2, 3, 4]
    assert files(Scanpath("1.jpg", [1], [1])) is None
