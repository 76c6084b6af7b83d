"""Slides to bags: the right status for each, nothing lost, the same results however a run is cut up."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile

from saccade.batch import BatchOptions
from saccade.errors import ConfigError, MissingDependencyError, MissingResourceError
from saccade.mil import Slide, TileOptions, extract, find_slides, load_bag, load_encoder
from saccade.mil.encoders import ENCODERS, build, wrap_model
from saccade.mil.geojson import write_polygons
from saccade.mil.stain_texture import FEATURE_NAMES
from saccade.mil.tissue import Polygon
from tests.helpers import run_cli
from tests.mil_slides import drawn_slide, write_pyramid

TILES = TileOptions(mpp=0.5, tile_px=64)
QUICK = BatchOptions(batch_size=8, num_workers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four slides: good, without resolution, without tissue, and no slide at all."""
    root = tmp_path_factory.mktemp("slides")
    pixels, _ = drawn_slide(700, 500)
    write_pyramid(root / "good.tif", pixels)
    write_pyramid(root / "unknown.tif", pixels, mpp=None)
    glass = np.random.default_rng(0).normal(243, 2, (400, 500, 3)).clip(0, 255).astype(np.uint8)
    write_pyramid(root / "glass.tif", glass)
    (root / "text.svs").write_text("no slide")
    (root / "notes.png").write_bytes(b"not an item")
    return root


def entries(out):
    lines = (out / "items.jsonl").read_text().splitlines()
    return {entry["id"]: entry for entry in map(json.loads, lines)}


def test_run_over_a_mixed_folder(folder, tmp_path):
    summary = extract(folder, out=tmp_path, encoder=load_encoder("stain-texture"), tiles=TILES, options=QUICK)
    assert (summary.done, summary.failed, summary.exit_code) == (2, 2, 3)
    found = entries(tmp_path)
    assert {key: (e["status"], e["reason"]) for key, e in found.items()} == {
        "good": ("done", ""),
        "glass": ("done", "no_tissue"),
        "unknown": ("failed", "no_mpp"),
        "text": ("failed", "unreadable"),
    }
    bag = load_bag(tmp_path / "features" / "mpp0.5_px64_ov0" / "stain-texture" / "good.h5")
    assert bag.features.shape == (found["good"]["row"]["n_tiles"], len(FEATURE_NAMES))
    assert bag.attributes["mpp_source"] == "openslide.mpp-x"
    assert load_bag(tmp_path / "features" / "mpp0.5_px64_ov0" / "stain-texture" / "glass.h5").features.shape[0] == 0
    for name in ("masks/good.geojson", "previews/good.jpg", "tiles/mpp0.5_px64_ov0/good.h5", "run.json"):
        assert (tmp_path / name).exists()
    again = extract(folder, out=tmp_path, encoder=load_encoder("stain-texture"), tiles=TILES, options=QUICK)
    assert again.resumed == 2
    fixed = extract(
        folder, out=tmp_path / "b", encoder=load_encoder("stain-texture"), tiles=TILES, slide_mpp=0.5, options=QUICK
    )
    assert fixed.failed == 1


def test_features_do_not_depend_on_workers_or_batches(folder, tmp_path):
    bags = []
    for workers, size in ((1, 8), (4, 8), (2, 5)):
        out = tmp_path / f"{workers}-{size}"
        options = BatchOptions(batch_size=size, num_workers=workers)
        extract(
            folder / "good.tif",
            out=out,
            encoder=load_encoder("stain-texture"),
            tiles=TILES,
            dtype="float32",
            options=options,
        )
        bags.append(load_bag(out / "features" / TILES.name / "stain-texture" / "good.h5"))
    assert np.array_equal(bags[0].features, bags[1].features)
    np.testing.assert_allclose(bags[0].features, bags[2].features, rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(bag.coords, bags[0].coords) for bag in bags)


def test_edited_contours_count(folder, tmp_path):
    square = np.array([[0.0, 0], [190, 0], [190, 190], [0, 190]])
    (tmp_path / "masks").mkdir()
    write_polygons(tmp_path / "masks" / "good.geojson", [Polygon(square)])
    extract(folder / "good.tif", out=tmp_path, stage="tile", tiles=TILES, options=QUICK)
    row = entries(tmp_path)["good"]["row"]
    assert (row["n_tiles"], row["tissue_source"]) == (9, "geojson")  # 3 x 3 tiles of 64 px


@pytest.mark.parametrize(("policy", "expected"), [("skip", "done"), ("white", "done"), ("fail", "failed")])
def test_bad_tiles(tmp_path, policy, expected):
    pixels, _ = drawn_slide(700, 500)
    path = write_pyramid(tmp_path / "bad.tif", pixels, (1, 4), tile=64)
    with tifffile.TiffFile(path) as file:
        start, count = file.pages[0].dataoffsets[4 * 11 + 2], file.pages[0].databytecounts[4 * 11 + 2]
    with path.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(count))
    slide = Slide(path)
    extract(
        path,
        out=tmp_path / "out",
        encoder=load_encoder("stain-texture"),
        tiles=TILES,
        on_bad_tile=policy,
        options=QUICK,
    )
    entry = entries(tmp_path / "out")["bad"]
    assert entry["status"] == expected
    if expected == "done":
        assert entry["row"]["n_bad_tiles"] == 1
        bag = load_bag(tmp_path / "out" / "features" / TILES.name / "stain-texture" / "bad.h5")
        assert ([128, 256] in bag.coords.tolist()) == (policy == "white")
        assert bag.attributes["n_bad_tiles"] == 1
    else:
        assert "cannot decode the native tile in column 2, row 4" in entry["error"]
    assert slide.backend == "tiff"


def test_no_tissue_needs_no_resolution(tmp_path):
    """Glass, and what only a computer draws, have no tiles at any resolution; any trace of stain needs one."""
    pixels = np.full((250, 300, 3), 255, np.uint8)
    pixels[30:130, 30:180], pixels[70:200, 70:200], pixels[90:220, 150:270] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    write_pyramid(tmp_path / "boxes.tif", pixels, mpp=352.8, compression="deflate", tile=64)
    write_pyramid(tmp_path / "glass.tif", np.full_like(pixels, 244), mpp=None, tile=64)
    pixels[100:200, 20:60] = (190, 110, 170)
    write_pyramid(tmp_path / "stain.tif", pixels, mpp=None, tile=64)
    for number in (1, 2):  # the second time from the contours, with no slide counted as done
        run = {"encoder": load_encoder("stain-texture"), "tiles": TILES, "options": QUICK}
        extract(sorted(tmp_path.glob("*.tif")), out=tmp_path / "out", **run)
        found = entries(tmp_path / "out")
        for key in ("boxes", "glass"):
            assert (found[key]["status"], found[key]["reason"]) == ("done", "no_tissue"), number
            assert (found[key]["row"]["n_tiles"], found[key]["row"]["mpp_x"]) == (0, None)
            file = tmp_path / "out" / "features" / TILES.name / "stain-texture" / f"{key}.h5"
            assert load_bag(file).features.shape == (0, len(FEATURE_NAMES))
            file.unlink()
        assert found["stain"]["reason"] == "no_mpp"


def test_lists_and_names(folder, tmp_path):
    listing = tmp_path / "list.csv"
    listing.write_text("\ufeffslide,mpp,label\nunknown.tif,0.25,a\ngood,,b\n", encoding="utf-8")
    items = find_slides(folder, list_file=listing)
    assert [(item.id, item.mpp) for item in items] == [("good", None), ("unknown", 0.25)]
    extract(folder, out=tmp_path / "out", stage="tile", tiles=TILES, list_file=listing, options=QUICK)
    assert entries(tmp_path / "out")["unknown"]["row"]["mpp_source"] == "given"
    for text, message in [
        ("slide\ngood\ngood.tif\n", "line 3: slide 'good' is listed twice"),
        ("slide\nabsent\n", "line 2: slide 'absent' is not among the inputs"),
        ("slide\n../../../etc/passwd\n", "is not among the inputs"),
        ("slide,mpp\ngood,much\n", "mpp must be a positive number"),
        ("name\ngood\n", "has no column 'slide'"),
        ("slide\n", "lists no slides"),
    ]:
        listing.write_text(text)
        with pytest.raises(ConfigError, match=message):
            find_slides(folder, list_file=listing)


def test_a_hostile_drawing_or_name_harms_nobody(folder, tmp_path):
    """The drawing fails its slide alone and stays as it was; a formula is a name like any other."""
    (tmp_path / "slides").mkdir()
    for name in ("drawn.tif", "=HYPERLINK(1)+1.tif"):
        (tmp_path / "slides" / name).write_bytes((folder / "good.tif").read_bytes())
    drawing = '{"type": "Polygon", "coordinates": [[[0, 0], [1e300, 1], [3, 3]]]}'
    (tmp_path / "out" / "masks").mkdir(parents=True)
    (tmp_path / "out" / "masks" / "drawn.geojson").write_text(drawing)
    summary = extract(tmp_path / "slides", out=tmp_path / "out", stage="tile", tiles=TILES, options=QUICK)
    found = entries(tmp_path / "out")
    assert (summary.exit_code, found["drawn"]["reason"]) == (3, "bad_geojson")
    assert (tmp_path / "out" / "masks" / "drawn.geojson").read_text() == drawing
    assert found["=HYPERLINK(1)+1"]["row"]["n_tiles"] > 0
    assert (tmp_path / "out" / "tiles" / TILES.name / "=HYPERLINK(1)+1.h5").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "slides"]


def test_equal_stems(tmp_path):
    pixels, _ = drawn_slide(300, 200)
    for name in ("a/s.tif", "b/s.tif", "c/s.ome.tif", "other.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_pyramid(tmp_path / name, pixels, (1,))
    assert [item.id for item in find_slides(tmp_path)] == ["a-s", "b-s", "c-s", "other"]


def test_encoders():
    with pytest.raises(ConfigError, match=r"licence.*MahmoodLab/uni"):
        load_encoder("uni")
    with pytest.raises(ConfigError, match="Did you mean 'Virchow"):
        load_encoder("Virchov")
    encoder = load_encoder("resnet50", random_weights=True)
    import torch

    assert encoder(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape == (2, 1024)
    assert "trained on tiles of 256 px at 0.5" in encoder.notices(224, 0.5)[0]
    assert encoder.notices(256, 0.5) == []
    with pytest.raises(ConfigError, match="tiles are square"):
        wrap_model(torch.nn.Identity(), name="x", data_config={"input_size": (3, 4, 5)}, weights="", pool=lambda x: x)


def test_what_an_encoder_needs_is_said(tmp_path, monkeypatch):
    weights = tmp_path / "pytorch_model.bin"
    weights.write_bytes(b"")
    for name, options, message in [
        ("CONCH", {}, r"licence.*MahmoodLab/conch"),
        ("CONCH", {"random_weights": True}, r"--weights with its file pytorch_model.bin"),
        ("H0-mini", {"weights": weights}, "its repository only: pass --pretrained, or --weights with a folder"),
        ("Phikon-v2", {"random_weights": True}, "its repository only"),
        ("GPFM", {"pretrained": True}, "cannot be downloaded by itself: pass --weights"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_encoder(name, **options)
    monkeypatch.setitem(sys.modules, "conch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install git\+https://github.com/mahmoodlab/CONCH"):
        load_encoder("CONCH", weights=weights)
    with pytest.raises(MissingResourceError, match=r"Midnight cannot be had .* or a folder with a download of"):
        load_encoder("Midnight", weights=tmp_path)


def test_encoders_of_transformers_load_from_a_folder(tmp_path):
    """Phikon is a ViT and Midnight a DINOv2 of transformers; here small ones in their place."""
    import torch
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    torch.manual_seed(0)
    images = torch.randint(0, 255, (2, 224, 224, 3), dtype=torch.uint8)
    for name, model in (("Phikon", ViTModel(ViTConfig(**sizes))), ("Midnight", Dinov2Model(Dinov2Config(**sizes)))):
        model.eval().save_pretrained(tmp_path / name)
        encoder = load_encoder(name, weights=tmp_path / name)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in encoder.normalization)
        with torch.inference_mode():
            tokens = model((images.movedim(-1, 1) / 255 - mean) / std).last_hidden_state
        expected = tokens[:, 0] if name == "Phikon" else torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
        torch.testing.assert_close(encoder(images), expected)
        assert encoder.weights == f"folder:{name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, facts in ENCODERS.items() if facts.library == "timm" and facts.model])
def test_published_encoders_have_the_stated_width(name):
    import torch

    facts = ENCODERS[name]
    with torch.device("meta"):
        network = build(facts, pretrained=False).eval()
        assert network(torch.zeros(1, 3, facts.size, facts.size)).shape == (1, facts.dim)


def command(folder, out, *more):
    return ["slides", "run", folder, "-o", out, "--tile-px", "64", "-m", "stain-texture", "-b", "8", *more]


def test_command_line(folder, tmp_path):
    done = run_cli(*command(folder, tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert "done 2  no_tissue 1  failed 2" in done.stderr
    assert "unknown.tif does not say how large its pixels are" in done.stderr
    info = run_cli("slides", "info", folder)
    assert info.returncode == 3
    assert "openslide.mpp-x" in info.stdout


@pytest.mark.slow
def test_command_line_with_a_timm_encoder(folder, tmp_path):
    timm = run_cli(*command(folder / "good.tif", tmp_path / "t")[:-4], "-m", "test_vit", "--random-weights")
    assert timm.returncode == 0, timm.stderr
    assert (tmp_path / "t" / "features" / TILES.name / "test_vit" / "good.h5").exists()
    refused = run_cli(*command(folder / "good.tif", tmp_path / "t")[:-4], "-m", "test_vit")
    assert refused.returncode == 2


@pytest.mark.slow
def test_killed_run_goes_on(folder, tmp_path):
    pixels, _ = drawn_slide(1500, 1200)
    source = tmp_path / "slides"
    source.mkdir()
    for index in range(4):
        write_pyramid(source / f"s{index}.tif", np.roll(pixels, 50 * index, 0))
    arguments = [sys.executable, "-m", "saccade.apps.cli", *map(str, command(source, tmp_path / "killed"))]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    journal = tmp_path / "killed" / "features" / TILES.name / "stain-texture" / "items.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count("\n")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = run_cli(*command(source, tmp_path / "killed"))
    assert again.returncode == 0, again.stderr
    assert "resume:" in again.stderr
    whole = run_cli(*command(source, tmp_path / "whole"))
    assert whole.returncode == 0
    for index in range(4):
        name = f"features/{TILES.name}/stain-texture/s{index}.h5"
        one, other = load_bag(tmp_path / "killed" / name), load_bag(tmp_path / "whole" / name)
        assert np.array_equal(one.features, other.features)
        assert np.array_equal(one.coords, other.coords)
    assert not list((tmp_path / "killed").rglob(".*"))


def test_the_real_collection(data_root, tmp_path):
    summary = extract(data_root / "slides", out=tmp_path, stage="tile", options=QUICK)
    assert summary.exit_code == 3
    status = {key: (e["status"], e["reason"]) for key, e in entries(tmp_path).items()}
    good = (
        "cmu-1-small-region",
        "cmu1-region.pyramid-1-4-16",
        "cmu1-region",
        "0",
        "layout-4islands-2holes",
        "corrupt.two-bad-tiles",
    )
    assert all(status[key] == ("done", "") for key in good)
    assert all(status[key] == ("done", "no_tissue") for key in ("small", "😐", "boxes_0", "boxes", "yb10kx5k.zstd"))
    assert all(
        status[key] == ("failed", "no_mpp")
        for key in ("tcga-cr-7395-01a-01-ts1", "cmu1-region.72dpi", "cmu1-region.no-mpp")
    )
    assert all(
        status[key][0] == "failed" for key in ("corrupt.truncated", "corrupt.header-only", "unopenable", "unreadable")
    )
    assert "boxes_1" not in status
    assert not {"README", "tcga-lung-rgb"} & status.keys()
