"""Tissue masks, their outlines, and the grid of tiles, on drawn slides whose truth is known."""

import json

import cv2
import numpy as np
import pytest

from saccade.errors import ConfigError, DataError
from saccade.mil import Slide, TileOptions, TissueOptions, find_tissue, make_grid
from saccade.mil.geojson import read_polygons, tissue_from_geojson, write_polygons, write_tiles
from saccade.mil.tiles import snapped_mpp
from saccade.mil.tissue import Polygon, Tissue, draw_outlines, overview, polygons_of, rasterize
from tests.mil_slides import drawn_slide, write_pyramid


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    pixels, mask = drawn_slide()
    return Slide(write_pyramid(tmp_path_factory.mktemp("slides") / "drawn.tif", pixels, (1, 4))), mask


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def at_level_0(tissue, shape):
    size = (shape[1], shape[0])
    grid_x = np.minimum((np.arange(size[0]) / tissue.scale_x).astype(int), tissue.mask.shape[1] - 1)
    grid_y = np.minimum((np.arange(size[1]) / tissue.scale_y).astype(int), tissue.mask.shape[0] - 1)
    return tissue.mask[grid_y[:, None], grid_x]


@pytest.mark.parametrize("method", ["otsu", "hsv"])
def test_tissue_of_a_drawn_slide(drawn, method):
    slide, mask = drawn
    tissue = find_tissue(slide, TissueOptions(method, mpp=4.0, saturation=20))
    assert overlap(at_level_0(tissue, mask.shape), mask) > 0.97
    assert sorted(len(polygon.holes) for polygon in tissue.polygons) == [0, 1]
    assert tissue.share == pytest.approx(mask.mean(), rel=0.03)


def test_pen_is_no_tissue_and_small_slides_keep_theirs(tmp_path):
    pixels, mask = drawn_slide(1200, 900)
    cv2.line(pixels, (20, 20), (1100, 60), (20, 60, 200), 70)
    cv2.line(pixels, (20, 880), (900, 860), (15, 15, 15), 70)
    slide = Slide(write_pyramid(tmp_path / "pen.tif", pixels))
    assert overlap(at_level_0(find_tissue(slide, TissueOptions(mpp=4.0)), mask.shape), mask) > 0.95
    kept = find_tissue(slide, TissueOptions(mpp=4.0, pens=False))
    assert at_level_0(kept, mask.shape)[:60].sum() > 5000
    assert find_tissue(slide, TissueOptions(min_area_mm2=50)).mask.any()


def test_glass_alone_has_no_tissue(tmp_path):
    glass = np.random.default_rng(0).normal(243, 3, (600, 800, 3)).clip(0, 255).astype(np.uint8)
    slide = Slide(write_pyramid(tmp_path / "glass.tif", glass))
    tissue = find_tissue(slide)
    assert not tissue.mask.any()
    assert len(make_grid(slide, tissue)) == 0


def test_overview_in_blocks_is_the_overview_at_once(drawn, monkeypatch):
    slide, _ = drawn
    whole = overview(slide, 8.0)
    monkeypatch.setattr("saccade.mil.tissue.BLOCK", 100)
    difference = np.abs(overview(slide, 8.0).astype(int) - whole)
    assert difference.max() <= 2


def test_outlines_and_back(drawn):
    tissue = find_tissue(drawn[0])
    again = rasterize(tissue.polygons, tissue.mask.shape, tissue.scale_x, tissue.scale_y)
    assert np.array_equal(again, tissue.mask)
    assert polygons_of(np.zeros((5, 5), bool), 1, 1) == ()


def test_geojson_round_trip(drawn, tmp_path):
    slide, _ = drawn
    tissue = find_tissue(slide)
    write_polygons(tmp_path / "a.geojson", tissue.polygons, source=tissue.source)
    document = json.loads((tmp_path / "a.geojson").read_text())
    assert document["features"][0]["properties"]["objectType"] == "annotation"
    ring = document["features"][0]["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1]
    again = tissue_from_geojson(tmp_path / "a.geojson", slide)
    assert np.array_equal(again.mask, tissue.mask)
    assert again.source == "otsu"
    document["features"][0]["geometry"]["coordinates"][0].pop(1)
    (tmp_path / "edited.geojson").write_text(json.dumps(document))
    assert tissue_from_geojson(tmp_path / "edited.geojson", slide).source == "geojson"
    thin = np.zeros((9, 9), bool)
    thin[2, 2:6] = thin[7, 7] = True
    write_polygons(tmp_path / "thin.geojson", polygons_of(thin, 16.0, 16.0))
    assert np.array_equal(rasterize(read_polygons(tmp_path / "thin.geojson"), thin.shape, 16.0, 16.0), thin)
    write_tiles(tmp_path / "t.geojson", np.array([[0, 10]]), 5.5, 5.5, {"Attention": [0.25]})
    tile = json.loads((tmp_path / "t.geojson").read_text())["features"][0]["properties"]
    assert (tile["objectType"], tile["measurements"]) == ("tile", {"Attention": 0.25})
    assert read_polygons(tmp_path / "t.geojson") == ()


def feature(kind, coordinates):
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}}


def test_geojson_of_other_programs(tmp_path):
    square = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
    path = tmp_path / "x.geojson"
    for document in (
        {"type": "Polygon", "coordinates": [square]},
        [{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [[square]]}, "properties": None}],
        {"type": "FeatureCollection", "features": [feature("Polygon", [square]), feature("Point", [1, 2])]},
    ):
        path.write_text("\ufeff" + json.dumps(document))
        (polygon,) = read_polygons(path)
        assert polygon.exterior.tolist() == square[:4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("3", "expected features, got int"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "has 2 points"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [3, 3]]]}', "no pixels"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1e300, 1], [3, 3]]]}', "no pixels"),
        ('{"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [3, 3]]]}', "no list of points"),
        ('{"type": "Polygon", "coordinates": []}', "no rings"),
        (f'{{"type": "Polygon", "coordinates": [[[0, 0], [1{"0" * 400}, 1], [3, 3]]]}}', "no list of points"),
        ('{"type": "MultiPolygon", "coordinates": 5}', "expected a list of parts, got int"),
        ('{"type": "GeometryCollection", "geometries": true}', "expected a list of parts, got bool"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_hostile_geojson(tmp_path, text, message):
    (tmp_path / "x.geojson").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_polygons(tmp_path / "x.geojson")
    assert caught.value.reason == "bad_geojson"


def test_outlines_on_a_picture():
    """Also of polygons that reach far beyond it, as an edited file may."""
    white = np.full((60, 80, 3), 255, np.uint8)
    ring = np.array([[0, 0], [400, 0], [400, 2.0**39], [0, 2.0**39]])
    drawn = draw_outlines(
        white, [Polygon(ring, (np.array([[100, 200], [200, 200], [200, 300.0]]),))], 10, (9, 99, 9), 3
    )
    assert white.min() == 255
    assert (drawn[30, 40].tolist(), drawn[20, 15].tolist()) == ([9, 99, 9], [9, 99, 9])
    assert (drawn[:, 50:] == 255).all()


def test_coverage_is_exact_area():
    mask = np.random.default_rng(0).random((6, 9)) > 0.4
    fine = np.kron(mask, np.ones((40, 40)))  # a mask pixel is 4 x 4 level-0 pixels, here in tenths
    tissue = Tissue(mask, 4.0, 4.0)
    for x, y, width, height in [(0, 0, 8, 8), (3.5, 2.1, 7.3, 9.9), (30, 20, 12, 9)]:
        inside = fine[round(y * 10) : round((y + height) * 10), round(x * 10) : round((x + width) * 10)].sum() / 100
        got = tissue.coverage(np.array([[x, y]]), width, height)[0]
        assert got == pytest.approx(inside / (width * height), abs=1e-9)


@pytest.mark.parametrize("factors", [(1,), (1, 4), (1, 1.9997, 3.9993), (1, 2.0005)])
@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0, 2.0])
def test_tiles_cover_what_microns_say(tmp_path, factors, mpp):
    ramp = np.zeros((1400, 1900, 3), np.uint8)
    ramp[..., 0] = np.arange(1900) // 8
    slide = Slide(write_pyramid(tmp_path / "ramp.tif", ramp, factors, mpp=0.5, compression="deflate"))
    grid = make_grid(slide, None, TileOptions(mpp=mpp, tile_px=100, overlap_px=20))
    assert grid.width == pytest.approx(100 * mpp / 0.5)
    first_row = grid.coords[grid.coords[:, 1] == 0][:, 0]
    assert np.abs(first_row - np.arange(len(first_row)) * 80 * mpp / 0.5).max() <= 0.5
    columns = int((first_row + grid.width <= 1900).sum())
    for index in range(columns):
        tile = grid.read(slide, index).astype(float)
        assert tile.shape == (100, 100, 3)
        x = grid.coords[index, 0]
        middle = tile[:, 49:51, 0].mean() * 8 + 3.5
        assert abs(middle - (x + grid.width / 2)) < 9  # one grey level is 8 px


def test_grid_borders_and_tissue(drawn):
    slide, mask = drawn
    padded = make_grid(slide, None, TileOptions(tile_px=256))
    assert len(padded) == 9 * 7
    assert len(make_grid(slide, None, TileOptions(tile_px=256, edge="drop"))) == 8 * 6
    tissue = find_tissue(slide)
    for share in (0.0, 0.25, 0.75):
        grid = make_grid(slide, tissue, TileOptions(tile_px=128, min_tissue=share))
        exact = [
            mask[y : y + 128, x : x + 128].sum() / 128**2
            for x, y in make_grid(slide, None, TileOptions(tile_px=128)).coords
        ]
        expected = sum(s >= share if share else s > 0 for s in exact)
        assert abs(len(grid) - expected) <= max(3, 0.06 * expected)
        assert (grid.tissue >= share).all()
        assert (np.diff(grid.coords[:, 1]) >= 0).all()


def test_messages(drawn):
    with pytest.raises(ConfigError, match="below tile_px"):
        TileOptions(overlap_px=256)
    with pytest.raises(ConfigError, match="share from 0 to 1"):
        TileOptions(min_tissue=25)
    with pytest.raises(ConfigError, match="too many"):
        make_grid(drawn[0], None, TileOptions(mpp=0.001, tile_px=64, overlap_px=63))
    with pytest.raises(ConfigError, match="'otsu' or 'hsv'"):
        TissueOptions("magic")


def test_snapped_resolution(drawn):
    assert snapped_mpp(drawn[0], 20) == pytest.approx(0.5)
    assert snapped_mpp(drawn[0], 10) == pytest.approx(1.0)


def test_layout_of_the_real_collection(data_root):
    slide = Slide(data_root / "slides" / "layout-4islands-2holes.tif")
    truth = cv2.imread(str(data_root / "slides" / "layout-4islands-2holes.mask-16x.png"), cv2.IMREAD_GRAYSCALE) > 0
    fine = find_tissue(slide, TissueOptions(mpp=4.0))
    assert overlap(fine.mask, truth) >= 0.97
    assert sorted(len(polygon.holes) for polygon in fine.polygons) == [0, 0, 1, 1]
    exact = Tissue(truth, 16.0, 16.0)
    for options in (TileOptions(), TileOptions(mpp=1.0), TileOptions(mpp=0.25, tile_px=224)):
        ours, theirs = (len(make_grid(slide, tissue, options)) for tissue in (find_tissue(slide), exact))
        assert abs(ours - theirs) <= max(2, 0.02 * theirs)
