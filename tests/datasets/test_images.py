import numpy as np
import pytest
from PIL import Image

from saccade.datasets.images import read_image
from saccade.errors import DataError
from tests.pictures import BROKEN, GOOD, write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images") / "pictures")


@pytest.mark.parametrize("name", GOOD)
def test_every_odd_file_becomes_rgb(pictures, name):
    image = read_image(pictures / name)
    assert image.mode == "RGB"
    assert np.asarray(image).std() > 10


@pytest.mark.parametrize(("name", "reason"), BROKEN.items())
def test_broken_files_say_why(pictures, name, reason):
    with pytest.raises(DataError) as caught:
        read_image(pictures / name)
    assert caught.value.reason == reason


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "nowhere.png")


def test_exif_orientation_is_applied(pictures):
    upright, turned = read_image(pictures / "photo.jpg"), read_image(pictures / "rotated.jpg")
    assert turned.size == upright.size
    assert np.abs(np.asarray(turned, float) - np.asarray(upright, float)).mean() < 3  # two JPEG codings of one picture


def test_sixteen_bits_scale_to_eight(pictures):
    expected = np.asarray(read_image(pictures / "b/same.png").convert("L"), float)
    assert np.array_equal(np.asarray(read_image(pictures / "deep.png"))[..., 0], expected)


def test_dark_sixteen_bit_stays_dark(tmp_path):
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(read_image(tmp_path / "dark.png")).max() <= 1


def test_transparent_pixels_are_white(pictures):
    values = np.asarray(read_image(pictures / "alpha.png"))
    assert (values[:, 0] == 255).all()
    assert np.array_equal(values[:, -1], np.asarray(read_image(pictures / "a/same.png"))[:, -1])


def test_palette_with_transparent_entry(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "p.png", transparency=0)
    values = np.asarray(read_image(tmp_path / "p.png"))
    assert values[0, 0].tolist() == [255, 255, 255]
    assert values[1, 1].tolist() == [200, 100, 50]


def test_cmyk_keeps_its_colours(pictures):
    got, expected = (np.asarray(read_image(pictures / name), float) for name in ("cmyk.jpg", "b/same.png"))
    assert np.abs(got - expected).mean() < 6


def test_floats_need_a_known_range(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "unit.tif")
    assert np.asarray(read_image(tmp_path / "unit.tif")).max() == 255
    Image.fromarray(np.full((8, 8), 7.5, np.float32)).save(tmp_path / "other.tif")
    with pytest.raises(DataError, match=r"0\.\.1"):
        read_image(tmp_path / "other.tif")


def test_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="too many pixels"):
        read_image(tmp_path / "bomb.png")


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x00")
    assert read_image(tmp_path / "x.jpg").size == (8, 8)
