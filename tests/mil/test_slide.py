"""Slides: every reader gives OpenSlide's pixels, resolutions are never guessed, damage stays where it is."""

import pickle
import threading

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from saccade.errors import ConfigError, DataError
from saccade.mil import Slide
from saccade.mil.resolution import find_resolution
from tests.mil_slides import drawn_slide, write_pyramid

PIXELS, _ = drawn_slide(700, 500)


def through_openslide(path, x, y, width, height, level=0):
    with openslide.OpenSlide(path) as slide:
        origin = tuple(round(p * slide.level_downsamples[level]) for p in (x, y))
        rgba = slide.read_region(origin, level, (width, height))
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


@pytest.mark.parametrize("compression", ["jpeg", "lzw", "deflate", "zstd", None])
@pytest.mark.parametrize("region", [(0, 0, 256, 256), (100, 37, 300, 211), (-20, -30, 64, 64), (650, 480, 128, 128)])
def test_direct_reader_gives_openslides_pixels(tmp_path, compression, region):
    path = write_pyramid(tmp_path / "slide.tif", PIXELS, (1, 2), compression=compression)
    slide = Slide(path)
    assert slide.backend == "tiff"
    assert np.array_equal(slide.read(*region), through_openslide(path, *region))
    assert np.array_equal(Slide(path, backend="openslide").read(*region), slide.read(*region))


def test_a_whole_native_tile_is_the_readers_own(tmp_path):
    slide = Slide(write_pyramid(tmp_path / "slide.tif", PIXELS))
    for x, y in ((256, 0), (0, 0), (512, 256)):  # the last one reaches beyond the slide
        expected = slide.read(x - 1, y - 1, 258, 258)[1:-1, 1:-1].copy()
        for _ in range(2):
            tile = slide.read(x, y, 256, 256)
            assert np.array_equal(tile, expected)
            tile[:] = 0  # nobody else may see this
    fresh = Slide(slide.path)
    fresh.read(256, 0, 256, 256)[:] = 0
    assert np.array_equal(fresh.read(256, 0, 256, 256), through_openslide(slide.path, 256, 0, 256, 256))


def test_pyramid_and_resolution(tmp_path):
    slide = Slide(write_pyramid(tmp_path / "slide.tif", PIXELS, (1, 4), mpp=0.499))
    assert [(level.width, level.height) for level in slide.levels] == [(700, 500), (175, 125)]
    assert slide.resolution.x == pytest.approx(0.499, rel=1e-6)
    assert slide.resolution.source == "openslide.mpp-x"
    assert [slide.level_for(d) for d in (0.5, 1, 3.9, 3.97, 4, 50)] == [0, 0, 0, 1, 1, 1]


def test_given_resolution_wins_and_doubtful_ones_are_told(tmp_path):
    path = write_pyramid(tmp_path / "screen.tif", PIXELS, mpp=352.78)
    slide = Slide(path)
    assert slide.resolution is None
    assert "352.8" in slide.notices[0]
    with pytest.raises(DataError, match=r"352\.8.*pass --slide-mpp") as caught:
        slide.require_resolution()
    assert caught.value.reason == "no_mpp"
    assert Slide(path, mpp=0.25).resolution.source == "given"
    assert "not square" in Slide(path, mpp=(0.25, 0.26)).notices[0]
    with pytest.raises(ConfigError, match="positive"):
        Slide(path, mpp=0)


PER_CENTIMETER = {"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
PER_INCH = {"tiff.XResolution": "0", "tiff.YResolution": "0", "tiff.ResolutionUnit": "inch"}
SCREEN = {"openslide.mpp-x": "352.78", "openslide.mpp-y": "352.78", "openslide.objective-power": "40"}
SIZES = 'PhysicalSizeX="499" PhysicalSizeXUnit="nm" PhysicalSizeY="0.499"'


@pytest.mark.parametrize(
    ("properties", "ome", "expected"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, None, (0.25, 0.26, "openslide.mpp-x")),
        (SCREEN, None, (0.25, 0.25, "objective-power")),
        ({"aperio.MPP": "0,4990"}, None, (0.499, 0.499, "aperio.MPP")),
        (PER_CENTIMETER, None, (0.25, 0.25, "tiff.XResolution")),
        (PER_INCH, None, None),
        ({}, f'<OME xmlns="x"><Image><Pixels {SIZES}/></Image></OME>', (0.499, 0.499, "OME PhysicalSizeX")),
        ({}, "<OME", None),
        ({}, f'<!DOCTYPE x [<!ENTITY a "b">]><OME><Pixels {SIZES}/></OME>', None),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "1e999"}, None, None),
    ],
)
def test_sources_of_resolution(properties, ome, expected):
    found, _ = find_resolution(properties, ome)
    if expected is None:
        assert found is None
    else:
        assert (found.x, found.y) == pytest.approx(expected[:2])
        assert found.source == expected[2]


@pytest.mark.parametrize(("scale", "size"), [(1.0, 64), (2.0, 64), (4.0, 64), (2.7, 100), (0.5, 64)])
def test_scaled_regions_show_the_same_place(tmp_path, scale, size):
    ramp = np.zeros((800, 1000, 3), np.uint8)
    ramp[..., 0] = np.arange(1000) // 4
    ramp[..., 1] = (np.arange(800) // 4)[:, None]
    slide = Slide(write_pyramid(tmp_path / "ramp.tif", ramp, (1, 1.9997, 3.9993), compression="lzw"))
    side = size * scale
    pixels = slide.read_scaled(201, 102, side, side, (size, size)).astype(float)
    at = (np.arange(size) + 0.5) * scale
    # A grey level is 4 pixels: half of one for the steps of the ramp, half for rounding, a quarter for half a pixel of
    # the level that is read.
    assert np.abs(pixels[size // 2, :, 0] - (201 + at - 0.5) / 4).max() < 1.25
    assert np.abs(pixels[:, size // 2, 1] - (102 + at - 0.5) / 4).max() < 1.25


def test_area_resampling_is_the_mean(tmp_path):
    slide = Slide(write_pyramid(tmp_path / "s.tif", PIXELS, (1,), compression="lzw"))
    got = slide.read_scaled(10, 20, 64, 64, (32, 32)).astype(float)
    exact = PIXELS[20:84, 10:74].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(got - exact).max() <= 0.51


def test_outside_is_white_or_black(tmp_path):
    path = write_pyramid(tmp_path / "s.tif", PIXELS)
    for backend in ("tiff", "openslide"):
        assert (Slide(path, backend=backend).read(-300, -300, 200, 200) == 255).all()
        assert (Slide(path, backend=backend, fill="black").read(5000, 0, 8, 8) == 0).all()


def test_plain_image_with_transparency(tmp_path):
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[:, :30] = (200, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    slide = Slide(tmp_path / "x.png", mpp=1.0)
    assert slide.read(29, 0, 2, 1).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def spoil(path, tile):
    """Overwrite the data of one native tile of the first level with zeros."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        start, count = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(count))


@pytest.mark.parametrize("backend", ["tiff", "openslide"])
def test_a_bad_tile_spoils_nothing_else(tmp_path, backend):
    path = write_pyramid(tmp_path / "s.tif", PIXELS, (1,))
    whole = Slide(path, backend=backend).read(0, 256, 256, 200)
    spoil(path, 1)
    slide = Slide(path, backend=backend)
    for _ in range(2):
        with pytest.raises(DataError, match=r"s\.tif: cannot") as caught:
            slide.read(300, 10, 32, 32)
        assert caught.value.reason == "bad_tile"
        assert np.array_equal(slide.read(0, 256, 256, 200), whole)


def test_truncated_and_foreign_files(tmp_path):
    path = write_pyramid(tmp_path / "s.tif", PIXELS)
    half = tmp_path / "half.tif"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        Slide(half)
    assert caught.value.reason in ("truncated", "unreadable")
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(DataError, match="no slide that OpenSlide reads"):
        Slide(tmp_path / "text.svs")
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        Slide(tmp_path / "x.png")
    with pytest.raises(ConfigError, match="does not exist"):
        Slide(tmp_path / "absent.svs")


def test_pickled_and_read_by_threads(tmp_path):
    slide = pickle.loads(pickle.dumps(Slide(write_pyramid(tmp_path / "s.tif", PIXELS))))
    expected = slide.read(0, 0, 700, 500)
    wrong = []

    def work(shift):
        for x in range(shift, 600, 50):
            if not np.array_equal(slide.read(x, x // 2, 60, 60), expected[x // 2 : x // 2 + 60, x : x + 60]):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(0, 50, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("saccade.mil.slide_backends.CACHE_BYTES", 2 * 256 * 256 * 3)
    slide = Slide(write_pyramid(tmp_path / "s.tif", PIXELS, (1,)))
    slide.read(0, 0, 700, 500)
    assert slide.reader.cached_bytes <= 2 * 256 * 256 * 3
    assert sum(tile.nbytes for tile in slide.reader.cache.values()) == slide.reader.cached_bytes


REAL = {
    "cmu-1-small-region.svs": "tiff",
    "tcga-cr-7395-01a-01-ts1.svs": "tiff",
    "cmu1-region.pyramid-1-4-16.tif": "tiff",
    "cmu1-region.ome.tif": "tiff",
    "cmu1-region.dicom/3.dcm": "openslide",
    "yb10kx5k.zstd.tiff": "tiff",
    "openslide-fixtures/😐.svs": "tiff",
}


@pytest.mark.parametrize("name", REAL)
def test_real_slides(data_root, name):
    path = data_root / "slides" / name
    slide = Slide(path)
    assert slide.backend == REAL[name]
    rng = np.random.default_rng(0)
    for _ in range(4):
        x, y = (int(rng.integers(-20, max(1, size - 40))) for size in (slide.width, slide.height))
        assert np.array_equal(slide.read(x, y, 90, 70), through_openslide(path, x, y, 90, 70))


def test_real_slides_without_and_with_odd_resolution(data_root):
    folder = data_root / "slides"
    assert Slide(folder / "tcga-cr-7395-01a-01-ts1.svs").resolution is None
    assert Slide(folder / "cmu1-region.72dpi.tif").resolution is None
    ome = Slide(folder / "cmu1-region.ome.tif")
    assert (len(ome.levels), ome.resolution.source) == (3, "OME PhysicalSizeX")
    broken = {
        "corrupt.truncated.tif": "truncated",
        "corrupt.header-only.svs": "unreadable",
        "openslide-fixtures/unopenable.tiff": "unreadable",
    }
    for name, reason in broken.items():
        with pytest.raises(DataError) as caught:
            Slide(folder / name)
        assert caught.value.reason == reason
