import numpy as np
import pytest
import timm
from PIL import Image
from skimage import data

from saccade.datasets.images import read_image
from saccade.errors import DataError
from saccade.vision_backbones.overlay import Legend, draw_overlay, model_view

CONFIG = {
    "input_size": (3, 96, 96),
    "interpolation": "bicubic",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
LEGEND = Legend("Egyptian cat  93.1%", "attention rollout over 12 layers", "0.3 x mean", "4.2 x mean")
GREY = np.full((300, 450, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Landscape, portrait, and the portrait stored on its side."""
    folder = tmp_path_factory.mktemp("photographs")
    cat = Image.fromarray(data.chelsea())  # 451 x 300
    cat.save(folder / "landscape.png")
    upright = Image.fromarray(data.astronaut()[:, 100:400])
    upright.save(folder / "portrait.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(folder / "lying.png", exif=exif)
    return folder


@pytest.mark.parametrize("cell", [(0, 0), (2, 3), (3, 5), (1, 0)])
def test_the_brightest_pixel_is_in_the_cell_of_the_largest_value(cell):
    values = np.zeros((4, 6), np.float32)
    values[cell] = 1
    picture = np.asarray(draw_overlay(GREY, values, LEGEND, alpha=0.5))[:300]
    y, x = np.unravel_index(picture.astype(int).sum(2).argmax(), (300, 450))
    assert (y // 75, x // 75) == cell
    far = picture[(cell[0] * 75 + 190) % 300, (cell[1] * 75 + 260) % 450]
    assert (far < 80).all()  # grey under half of the map's black


def test_only_the_order_of_values_counts():
    values = np.random.default_rng(0).random((5, 5)).astype(np.float32)
    first, second = (draw_overlay(GREY, scaled, LEGEND, alpha=0.5) for scaled in (values, values * 64 - 7))
    assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
    flat = np.asarray(draw_overlay(GREY, np.ones((5, 5), np.float32), LEGEND, alpha=0.5))[:300]
    assert (flat == flat[0, 0]).all()


def test_opacity():
    view = data.chelsea()
    values = np.random.default_rng(0).random((3, 3))
    clear = np.asarray(draw_overlay(view, values, LEGEND, alpha=0.0))[:300]
    assert np.abs(clear.mean(2) - view.mean(2)).mean() < 20
    assert clear.std(2).mean() < 0.5 * view.std(2).mean()  # the photograph's own colours are toned down
    opaque = np.asarray(draw_overlay(view, values, LEGEND, alpha=1.0))[:300]
    assert (opaque == np.asarray(draw_overlay(view[::-1], values, LEGEND, alpha=1.0))[:300]).all()


@pytest.mark.parametrize("width", [288, 460, 1024])
def test_the_legend_stays_inside_the_picture(width):
    view = np.zeros((100, width, 3), np.uint8)
    long = Legend("a class with a name that goes on " * 5, "attention " * 30, "0.333 x mean", "12345 x mean")
    picture = np.asarray(draw_overlay(view, np.eye(3), long, alpha=0.5))
    assert picture.shape[1] == width
    strip = picture[100:].astype(int)
    assert (strip.min(2) < 100).any(), "nothing is written"
    for edge in (strip[:, :3], strip[:, -3:], strip[-3:]):
        assert (edge > 250).all(), "text runs out of the picture"


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(451, 300), (300, 512), (90, 70)])
def test_the_view_is_the_models_crop_to_within_a_pixel_of_its_input(size, mode, tmp_path):
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))  # red tells x, green tells y
    Image.fromarray(np.stack([x, y, 0 * x], axis=2).round().astype(np.uint8)).save(tmp_path / "p.png")
    config = CONFIG | {"crop_mode": mode}
    seen = timm.data.create_transform(**config)(read_image(tmp_path / "p.png")).numpy().transpose(1, 2, 0) * 255
    view = model_view(tmp_path / "p.png", config)
    assert view.dtype == np.uint8
    assert min(view.shape[:2]) >= 260
    small = np.asarray(Image.fromarray(view).resize((96, 96), Image.Resampling.BOX), float)
    inside = (seen[..., 1] > 8) & (seen[..., 1] < 247) & (seen[..., 0] > 8) & (seen[..., 0] < 247)  # without borders
    assert inside.sum() > 3000
    step = np.abs(np.diff(seen[48, 30:60, 0])).mean(), np.abs(np.diff(seen[30:60, 48, 1])).mean()
    assert np.abs(small - seen)[inside][:, 0].max() < step[0] + 1
    assert np.abs(small - seen)[inside][:, 1].max() < step[1] + 1


def test_a_photograph_stored_lying_is_shown_upright(photographs):
    lying, upright = (model_view(photographs / name, CONFIG) for name in ("lying.png", "portrait.png"))
    assert (lying == upright).all()


def test_sizes_of_pictures(tmp_path):
    for side, expected in ((40, 288), (400, 350), (3000, 1024)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "p.png")
        assert model_view(tmp_path / "p.png", CONFIG).shape == (expected, expected, 3)
    wide = model_view(tmp_path / "p.png", CONFIG | {"input_size": (3, 48, 96)})
    assert wide.shape == (512, 1024, 3)


def test_a_broken_photograph(tmp_path):
    (tmp_path / "p.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not an image"):
        model_view(tmp_path / "p.png", CONFIG)
