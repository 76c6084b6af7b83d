"""CLAM's and TRIDENT's own files: the same tissue, the same patches, the same pixels."""

import json

import h5py
import numpy as np
import pytest
from PIL import Image

from saccade.errors import ConfigError
from saccade.mil import Slide
from saccade.mil.clam_tissue import CLAMPatching, CLAMSegmentation, clam_coordinates, clam_segmentation

SLIDES = {
    "cmu-1-small-region": "cmu-1-small-region.svs",
    "tcga-cr-7395-01a-01-ts1": "tcga-cr-7395-01a-01-ts1.svs",
    "layout-4islands-2holes": "layout-4islands-2holes.tif",
}


@pytest.fixture
def interop(data_root):
    folder = data_root.parent / "golden" / "mil" / "interop"
    if not folder.is_dir():
        pytest.skip(f"no files of CLAM and TRIDENT: {folder} is not a folder")
    return folder


@pytest.mark.parametrize("preset", ["bwh_biopsy", "tcga"])
@pytest.mark.parametrize("name", SLIDES)
def test_clams_tissue_and_patches(data_root, interop, name, preset):
    expected = json.loads((interop / "clam" / preset / "segmentation.json").read_text())[name]
    slide = Slide(data_root / "slides" / SLIDES[name])
    pieces = clam_segmentation(slide, preset)
    assert [piece.exterior.tolist() for piece in pieces] == expected["contours"]
    assert [[hole.tolist() for hole in piece.holes] for piece in pieces] == expected["holes"]
    centre = clam_coordinates(slide, pieces, CLAMPatching(step_size=128, contour_fn="center", use_padding=False))
    assert centre.tolist() == expected["center_step128_nopad"]
    patches = interop / "clam" / preset / "patches" / f"{name}.h5"
    if patches.exists():
        with h5py.File(patches) as file:
            assert np.array_equal(clam_coordinates(slide, pieces), file["coords"][:])


@pytest.mark.parametrize("name", SLIDES)
def test_tridents_features_come_out_of_our_pixels(data_root, interop, name):
    path = interop / "trident" / "20x_256px_0px_overlap" / "features_tinystat" / f"{name}.h5"
    slide = Slide(data_root / "slides" / SLIDES[name], fill="black")
    with h5py.File(path) as file:
        coords, features = file["coords"][:], file["features"][:]
        side = int(file["coords"].attrs["patch_size_level0"])
    for (x, y), expected in zip(coords[::7].tolist(), features[::7], strict=True):
        pixels = slide.read(x, y, side, side)
        tile = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)) / 255.0
        got = [*tile.mean((0, 1)), *tile.reshape(-1, 3).std(0, ddof=1), tile.max(), tile.min()]
        assert np.abs(np.array(got) - expected).max() < 1e-6
        ours = slide.read_scaled(x, y, side, side, (256, 256), resample="bicubic")
        assert np.array_equal(ours, np.round(tile * 255).astype(np.uint8))


def test_messages():
    with pytest.raises(ConfigError, match="Did you mean 'tcga'"):
        CLAMSegmentation.preset("tgca")
