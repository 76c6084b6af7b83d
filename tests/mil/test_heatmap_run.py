"""`draw_heatmaps`: the pictures show the scores where the tiles are, and nothing is lost or computed twice."""

import json

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from saccade.apps.cli import main
from saccade.batch import BatchOptions
from saccade.datasets.bag_files import Bag, load_bag, save_bag
from saccade.errors import ConfigError, DataError
from saccade.mil import (
    HeatmapOptions,
    Slide,
    draw_heatmap,
    draw_heatmaps,
    load_classifier,
    load_scores,
    normalize_scores,
    tile_map,
)
from saccade.mil.heatmap_figures import contact_sheet, cumulative_attention, plot_concentration, side_by_side, top_tiles
from saccade.mil.slide_folder import SlideFolder
from saccade.mil.tissue import overview
from tests.mil.heatmap_folder import WIDTH, write_folder, write_model


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with the heatmaps of an ACMIL."""
    root = tmp_path_factory.mktemp("heatmaps")
    out, model = write_folder(root), write_model(root / "ga.pt")
    options = HeatmapOptions(geojson=True, top=5)
    summary = draw_heatmaps(out, classifier=load_classifier(model), name="ga", heatmap=options)
    assert (summary.done, summary.failed) == (2, 0)
    return out


def test_picture_is_the_map_of_the_models_attention(drawn):
    scores = load_scores(drawn / "attention" / "ga" / "a.h5")
    bag = load_bag(next(drawn.glob("features/*/*/a.h5")))
    classifier = load_classifier(drawn.parent / "ga.pt")
    import torch

    output = classifier(bag, torch.device("cpu"))
    np.testing.assert_allclose(scores.maps["attention"], output.attention[0].numpy(), atol=1e-7)
    np.testing.assert_allclose(scores.maps["branch 3"], output.branch_attention[0, 2].numpy(), atol=1e-7)
    with Slide(drawn.parent / "slides" / "a.tif") as slide:
        heatmap = tile_map(
            normalize_scores(scores.maps["attention"]), scores.coords, 128.0, (slide.width, slide.height), downsample=1
        )
        expected = draw_heatmap(heatmap, overview(slide, 1.0), limits=(0.0, 1.0))
    with Image.open(drawn / "heatmaps" / "ga" / "a.png") as picture:
        got = np.asarray(picture)
    assert got.shape == (700, 900, 3)
    assert np.array_equal(got, expected)


def test_files_beside_the_picture(drawn):
    place = drawn / "heatmaps" / "ga"
    assert {path.name for path in place.glob("*.png")} == {"a.png", "a.top.png", "a.branches.png", "concentration.png"}
    rows = (place / "heatmaps.csv").read_text().splitlines()
    assert rows[0] == "path,status,map,n_tiles,top10_attention,tiles_with_half,error"
    entries = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
    assert {entry["id"]: (entry["status"], entry["reason"]) for entry in entries} == {
        "a": ("done", ""),
        "e": ("done", "no_tissue"),
    }
    features = json.loads((place / "a.geojson").read_text())["features"]
    scores = load_scores(drawn / "attention" / "ga" / "a.h5")
    measured = features[3]["properties"]["measurements"]
    assert measured["Attention"] == scores.maps["attention"][3]
    assert set(measured) == {"Attention", "Percentile", *(f"Branch {m}" for m in range(1, 6))}


def test_pyramid_holds_the_same_picture(drawn, tmp_path):
    classifier = load_classifier(drawn.parent / "ga.pt")
    options = HeatmapOptions(format="tif", downsample=2.0, top=0, alpha=1.0)
    draw_heatmaps(drawn, classifier=classifier, name="ga", out=tmp_path, heatmap=options, only=["a"])
    path = tmp_path / "heatmaps" / "ga" / "a.tif"
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        assert [level.shape for level in file.series[0].levels] == [(350, 450, 3), (175, 225, 3)]
        picture = file.series[0].levels[0].asarray().astype(int)
    with Slide(path, backend="tiff") as slide:
        assert slide.resolution.x == pytest.approx(1.0)
    scores = load_scores(tmp_path / "attention" / "ga" / "a.h5")
    rank = normalize_scores(scores.maps["attention"])
    for index, (x, y) in enumerate(scores.coords):
        if x + 128 > 900 or y + 128 > 700:
            continue
        centre = picture[y // 2 + 20 : y // 2 + 44, x // 2 + 20 : x // 2 + 44].mean((0, 1))
        heatmap = tile_map(rank[[index]], np.zeros((1, 2)), 8, (8, 8), downsample=1)
        colour = draw_heatmap(heatmap, np.zeros((8, 8, 3), np.uint8), alpha=1.0, limits=(0.0, 1.0))[0, 0]
        assert np.abs(centre - colour).max() < 4  # JPEG
    covered = tile_map(rank, scores.coords, 128.0, (900, 700), downsample=2).covered
    assert abs(picture[~covered].mean() - 243) < 8


def test_resumes_and_reuses_attention(drawn, tmp_path):
    classifier = load_classifier(drawn.parent / "ga.pt")
    again = draw_heatmaps(drawn, classifier=classifier, name="ga", heatmap=HeatmapOptions(geojson=True, top=5))
    assert again.resumed == 2
    picture = drawn / "heatmaps" / "ga" / "a.png"
    before = picture.read_bytes()
    picture.unlink()
    again = draw_heatmaps(drawn, classifier=classifier, name="ga", heatmap=HeatmapOptions(geojson=True, top=5))
    assert (again.resumed, picture.read_bytes() == before) == (1, True)
    other = load_classifier(write_model(tmp_path / "other.pt", seed=1))
    with pytest.raises(ConfigError, match="other settings"):
        draw_heatmaps(drawn, classifier=other, name="ga", heatmap=HeatmapOptions(geojson=True, top=5))
    draw_heatmaps(drawn, classifier=other, name="ga", out=tmp_path, heatmap=HeatmapOptions(top=0))
    mine, theirs = (load_scores(root / "attention" / "ga" / "a.h5") for root in (drawn, tmp_path))
    assert not np.allclose(mine.maps["attention"], theirs.maps["attention"])


@pytest.mark.parametrize(("name", "first"), [("clam_mb", "class 0"), ("dsmil", "class 0"), ("max", "class 0")])
def test_a_map_of_a_class(drawn, tmp_path, name, first):
    model = write_model(tmp_path / f"{name}.pt", name)
    call = f"slides heatmap {drawn} -m {model} -o {tmp_path} --class 1 --top 0 -q --tissue"
    assert main(call.split()) == 0
    assert (tmp_path / "heatmaps" / f"{name}.class-1" / "a.png").exists()
    maps = load_scores(tmp_path / "attention" / name / "a.h5").maps
    assert first in maps
    assert ("logit 1" in maps) == (name != "clam_mb")


def test_what_is_missing_is_said_by_slide(drawn, tmp_path, capsys):
    bags, ga = tmp_path / "bags", drawn.parent / "ga.pt"
    original = load_bag(next(drawn.glob("features/*/*/a.h5")))
    save_bag(bags / "a.h5", Bag(original.features, original.coords, {"name": "a"}))  # how large the tiles are is lost
    save_bag(bags / "b.h5", Bag(original.features[:, : WIDTH - 1], original.coords, original.attributes))
    save_bag(bags / "c.h5", Bag(original.features, None, original.attributes))
    save_bag(bags / "d.h5", original)
    save_bag(bags / "e.h5", original)
    (bags / "e.h5").write_bytes((bags / "e.h5").read_bytes()[:2000])
    summary = draw_heatmaps(
        drawn, classifier=load_classifier(ga), name="ga", out=tmp_path / "out", bags=bags, heatmap=HeatmapOptions(top=0)
    )
    assert summary.exit_code == 1
    entries = [json.loads(line) for line in (tmp_path / "out/heatmaps/ga/items.jsonl").read_text().splitlines()]
    assert {entry["id"]: entry["reason"] for entry in entries} == {
        "a": "no_tile_size",
        "b": "feature_width",
        "c": "no_coords",
        "d": "no_slide",
        "e": "bad_bag",
    }


def test_usage_errors(drawn, tmp_path, capsys):
    ga = drawn.parent / "ga.pt"
    base = f"slides heatmap {drawn} -m {ga} -o {tmp_path} -q"
    for extra, message in {
        "--class tumour": "It has: attention, branch 1",
        "--slide zebra": "No bag of slide 'zebra'",
        "--alpha 2": "alpha must be between 0 and 1",
        "--colormap hot_or_not": "no colormap",
        "--name a/b": "one word without slashes",
        "--slides nowhere": "does not exist",
    }.items():
        assert main([*base.split(), *extra.split()]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="of a class or of a branch"):
        HeatmapOptions(class_name="a", branch=1)


def test_ids_that_are_paths_are_refused(tmp_path):
    entry = {"id": "../up", "path": "x", "status": "done", "reason": "", "seconds": 0, "error": ""}
    (tmp_path / "items.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ConfigError, match="is no name of a slide"):
        SlideFolder.open(tmp_path)


def test_scores_of_another_program_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["bag_attention"] = h5py.ExternalLink("/etc/passwd", "x")
    with pytest.raises(DataError, match="is a link"):
        load_scores(tmp_path / "a.h5")


def test_contact_sheet_is_in_order_of_score(drawn):
    scores = np.array([0.1, 0.9, 0.9, 0.4])
    assert top_tiles(scores, 3).tolist() == [1, 2, 3]
    coords = np.array([[0, 0], [300, 400], [350, 500], [800, 500]])
    with Slide(drawn.parent / "slides" / "a.tif") as slide:
        sheet = contact_sheet(slide, coords, (64.0, 64.0), scores, count=3, columns=2, tile_px=64)
        assert np.array_equal(sheet[8:72, 8:72], slide.read(300, 400, 64, 64))
        assert np.array_equal(sheet[8:72, 80:144], slide.read(350, 500, 64, 64))
        with pytest.raises(ConfigError, match="at least 1"):
            contact_sheet(slide, coords, (64.0, 64.0), scores, count=0)
    with pytest.raises(ConfigError, match="at least one picture"):
        side_by_side({})


def test_cumulative_attention(tmp_path):
    np.testing.assert_allclose(cumulative_attention(np.array([0.2, 0.5, 0.3])), [0.5, 0.8, 1.0])
    assert cumulative_attention(np.zeros(0)).shape == (0,)
    plot_concentration(tmp_path / "c.png", [cumulative_attention(np.ones(n)) for n in (1, 40)], title="t")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size == (720, 480)
    with pytest.raises(ConfigError, match="at least one curve"):
        plot_concentration(tmp_path / "c.png", [])


def test_shards_draw_each_slide_once(drawn, tmp_path):
    classifier = load_classifier(drawn.parent / "ga.pt")
    for shard in ("1/2", "2/2"):
        draw_heatmaps(
            drawn,
            classifier=classifier,
            name="ga",
            out=tmp_path,
            heatmap=HeatmapOptions(top=0),
            options=BatchOptions(shard=shard),
        )
    assert len(list(tmp_path.glob("heatmaps/ga/items.shard*.jsonl"))) == 2
    assert (tmp_path / "heatmaps" / "ga" / "a.png").exists()
