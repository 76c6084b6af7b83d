import numpy as np
import pytest
from skimage import data

from saccade.datasets.corruption_kernels import enlarge, motion, plasma
from saccade.datasets.corruption_weather import frost_texture
from saccade.datasets.corruptions import CORRUPTIONS, GROUPS, SEVERITIES, corrupt
from saccade.errors import ConfigError, ShapeError

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


@pytest.fixture(scope="module")
def photo():
    return data.astronaut()[40:168, 150:310]


def test_nineteen_in_the_published_groups():
    assert {group: len(names) for group, names in GROUPS.items()} == {
        "noise": 3,
        "blur": 4,
        "weather": 4,
        "digital": 4,
        "extra": 4,
    }
    assert [name for names in GROUPS.values() for name in names] == list(CORRUPTIONS)


@every_corruption
def test_severities_move_away_from_the_image(photo, name):
    distances = [np.abs(corrupt(photo, name, s, 0).astype(int) - photo).mean() for s in SEVERITIES]
    assert min(distances) > 0.5
    if name == "saturate":  # severity 1 and 2 take colour away, 3 to 5 add some
        assert distances[0] < distances[1]
        assert distances[2] < distances[3] < distances[4]
    else:
        assert distances[4] > distances[0]


@every_corruption
def test_the_generator_alone_decides(photo, name):
    first, again = (corrupt(photo, name, 3, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, again)
    other = corrupt(photo, name, 3, np.random.default_rng(8))
    assert np.array_equal(first, other) == (CORRUPTIONS[name].draw is None)


@every_corruption
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 1), (7, 5), (3, 40, 3)])
def test_tiny_and_grey_images(name, shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    for severity in SEVERITIES:
        for version in (image, np.zeros_like(image), np.full_like(image, 255)):
            before = version.copy()
            got = corrupt(version, name, severity, 0)
            assert got.shape == shape
            assert got.dtype == np.uint8
            assert np.array_equal(version, before), "the input is left alone"


@every_corruption
def test_grey_images_are_treated_like_grey_colour_images(photo, name):
    grey = photo.mean(axis=2).astype(np.uint8)
    one = corrupt(grey, name, 2, 0)
    three = corrupt(grey[..., None].repeat(3, axis=2), name, 2, 0).mean(axis=2)
    assert abs(one.mean() - three.mean()) < 4
    assert abs(one.std() - three.std()) < 16  # noise on each colour averages out, grey noise does not


def test_impulse_noise_loses_the_amount_named():
    grey = np.full((200, 200, 3), 100, np.uint8)
    for severity, amount in zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True):
        noisy = corrupt(grey, "impulse_noise", severity, 0)
        assert set(np.unique(noisy)) == {0, 100, 255}
        assert (noisy == 0).mean() == pytest.approx(amount / 2, rel=0.1)
        assert (noisy == 255).mean() == pytest.approx(amount / 2, rel=0.1)


def test_glass_blur_exchanges_one_pixel_after_the_other(photo):
    glass = CORRUPTIONS["glass_blur"]
    sigma, reach, _ = constant = (0.01, 2, 2)  # a blur that changes nothing, so that the exchange is seen
    (offsets,) = glass.draw(photo, constant, np.random.default_rng(0))
    height, width = photo.shape[:2]
    assert offsets.shape == (2, height - 4, width - 4, 2)
    assert (offsets.min(), offsets.max()) == (-reach, reach - 1)
    expected = photo.copy()
    for sweep in offsets:
        for i, y in enumerate(range(height - reach, reach, -1)):
            for j, x in enumerate(range(width - reach, reach, -1)):
                near = (y + sweep[i, j, 0], x + sweep[i, j, 1])
                expected[y, x], expected[near] = expected[near].copy(), expected[y, x].copy()
    assert sigma < 0.1
    assert np.array_equal(glass.function(photo, constant, offsets), expected)


def test_glass_blur_keeps_the_pixels(photo):
    (offsets,) = CORRUPTIONS["glass_blur"].draw(photo, (0.01, 4, 2), np.random.default_rng(0))
    got = CORRUPTIONS["glass_blur"].function(photo, (0.01, 4, 2), offsets)
    assert np.array_equal(np.sort(got.reshape(-1, 3), axis=0), np.sort(photo.reshape(-1, 3), axis=0))


def test_frost_is_the_mean_it_is_defined_as(photo):
    texture = frost_texture(*photo.shape[:2], np.random.default_rng(3))
    for severity, (a, b) in zip(SEVERITIES, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), strict=True):
        expected = np.clip(a * photo + b * texture.astype(float), 0, 255)
        got = corrupt(photo, "frost", severity, np.random.default_rng(3))
        assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("size", [(300, 200), (40, 64)])
def test_frost_textures_are_ice_not_a_flat_veil(size):
    panes = [frost_texture(*size, np.random.default_rng(seed)) for seed in range(4)]
    assert all(60 < pane.mean() < 190 and pane.std() > 15 for pane in panes)
    assert all(pane[..., 2].mean() > pane[..., 0].mean() for pane in panes)
    assert not np.array_equal(panes[0], panes[1])


@pytest.mark.parametrize("name", ["motion_blur", "defocus_blur", "gaussian_blur", "zoom_blur", "glass_blur"])
@pytest.mark.parametrize("shape", [(4, 6, 3), (64, 48, 3)])
def test_blurs_leave_a_flat_image_flat(name, shape):
    flat = np.full(shape, 130, np.uint8)
    for severity in SEVERITIES:
        assert np.abs(corrupt(flat, name, severity, 0).astype(int) - 130).max() <= 1


@pytest.mark.parametrize("angle", [0.0, 37.0, -45.0, -120.0])
def test_motion_blur_of_a_dot_is_a_half_gaussian_along_the_angle(angle):
    dot = np.zeros((61, 61), np.float32)
    dot[30, 30] = 1
    blurred = motion(dot, 10, 3, angle)
    assert blurred.sum() == pytest.approx(1, rel=1e-5)
    y, x = np.nonzero(blurred)
    far = np.argmax((y - 30) ** 2 + (x - 30) ** 2)
    assert np.hypot(y[far] - 30, x[far] - 30) == pytest.approx(20, abs=1)
    assert np.hypot(*np.subtract(np.unravel_index(blurred.argmax(), dot.shape), 30)) < 2
    turned = np.rad2deg(np.arctan2(30 - y[far], 30 - x[far]))
    assert turned == pytest.approx(angle, abs=3)


@pytest.mark.parametrize("factor", [1.0, 1.13, 4.5])
def test_enlarging_a_ramp_gives_a_ramp(factor):
    ramp = np.tile(np.arange(40.0), (30, 1))
    large = enlarge(ramp, factor)
    assert large.shape[0] >= 30
    assert large.shape[1] >= 40
    assert np.allclose(np.diff(large, axis=1), np.diff(large, axis=1)[0, 0])
    assert large[0, 0] == (40 - np.ceil(40 / factor)) // 2


def test_plasma_grows_smoother_with_decay():
    rough, smooth = (plasma(128, decay, np.random.default_rng(0)) for decay in (1.4, 2.0))
    for cloud in (rough, smooth):
        assert (cloud.min(), cloud.max()) == (0, 1)
    assert np.abs(np.diff(rough)).mean() > 2 * np.abs(np.diff(smooth)).mean()
    edge = np.abs(rough[:, 0] - rough[:, -1]).mean()
    assert edge < 3 * np.abs(np.diff(rough)).mean(), "it repeats at its borders"


def test_brightness_and_saturation_keep_hue():
    from skimage.color import rgb2hsv

    colours = np.random.default_rng(0).integers(20, 200, (40, 40, 3)).astype(np.uint8)
    for name in ("brightness", "saturate"):
        before, after = rgb2hsv(colours), rgb2hsv(corrupt(colours, name, 1, 0))
        shift = np.abs(before[..., 0] - after[..., 0])
        clear = after[..., 1] * after[..., 2] > 0.15  # hue of nearly grey pixels is rounding
        assert np.minimum(shift, 1 - shift)[clear].max() < 0.03


def test_messages():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"'gaussian_noize'\. Did you mean 'gaussian_noise'"):
        corrupt(image, "gaussian_noize", 1, 0)
    with pytest.raises(ConfigError, match="severity must be 1, 2, 3, 4 or 5, got 0"):
        corrupt(image, "fog", 0, 0)
    with pytest.raises(ShapeError, match=r"float32 \(8, 8, 3\)"):
        corrupt(image.astype(np.float32), "fog", 1, 0)
    with pytest.raises(ShapeError, match=r"uint8 \(8, 8, 4\)"):
        corrupt(np.zeros((8, 8, 4), np.uint8), "fog", 1, 0)
