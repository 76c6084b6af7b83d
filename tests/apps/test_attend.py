import json

import numpy as np
import pytest
from PIL import Image

from saccade.apps.cli import main
from tests.helpers import run_cli
from tests.pictures import BROKEN, GOOD, write_pictures

VIT = ("-m", "test_vit", "--random-weights", "--img-size", "64")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("attend") / "pictures")


def test_the_folder_that_has_everything(pictures, tmp_path):
    got = run_cli("attend", pictures, *VIT, "-o", tmp_path / "overlays", "--maps", tmp_path / "maps.h5")
    assert got.returncode == 3, got.stderr
    assert got.stdout == ""
    assert got.stderr.splitlines()[0].endswith("cpu fp32  rollout")
    assert f"done {len(GOOD)}  failed {len(BROKEN)}" in got.stderr
    assert "broken/empty.png  failed: the file is empty" in got.stderr
    assert (tmp_path / "overlays/b/same.png").exists()
    assert (tmp_path / "maps.h5").exists()


def test_rotated_photograph_and_its_upright_twin_look_alike(pictures, tmp_path, capsys):
    inputs = [str(pictures / name) for name in ("rotated.jpg", "photo.jpg")]
    assert main(["attend", *inputs, *VIT, "-o", f"{tmp_path}/o", "--json", "-q", "-j", "0", "--method", "cam"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["done"] == 2
    with Image.open(tmp_path / "o/rotated.png") as lying, Image.open(tmp_path / "o/photo.png") as upright:
        assert lying.text["method"] == upright.text["method"] == "eigencam"
        assert lying.size == upright.size
        pixels = [list(picture.resize((8, 8)).convert("L").tobytes()) for picture in (lying, upright)]
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) < 12


def test_regions_that_a_place_reads(pictures, tmp_path):
    model = ("-m", "biformer_tiny", "--random-weights", "--img-size", "64")
    place = ("--method", "routes", "--layer", "stages.1", "--at", "150,100", "--heads", "1")
    got = run_cli("attend", pictures / "a/same.png", *model, *place, "-o", tmp_path / "o", "--maps", tmp_path / "m.npy")
    assert got.returncode == 0, got.stderr
    assert got.stderr.splitlines()[0].endswith("cpu fp32  routes")
    with Image.open(tmp_path / "o/same.png") as picture:
        assert (picture.text["layer"], picture.text["query"]) == ("stages.1.1.attn", "[2, 2]")  # 8 tokens in 7 regions
    maps = np.load(tmp_path / "m.npy")
    assert maps.shape == (1, 7, 7)
    assert (maps > 0).sum() <= 4
    assert abs(maps.sum() - 1) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "test_vit"), "would have random weights"),
        ((*VIT, "--method", "rollout", "--layer", "blocks.1"), "rollout takes all layers together"),
        (("-m", "test_resnet", "--random-weights", "--method", "rollout"), "Methods that fit: cam"),
        ((*VIT, "--class", "5000"), "no class '5000' among its 1,000"),
        ((*VIT, "--alpha", "2"), "alpha must be between 0 and 1"),
        ((*VIT, "--maps", "maps.csv"), "must end in one of .h5"),
        ((*VIT, "--at", "3,4"), "is for the methods routes and kernels"),
        ((*VIT, "--method", "routes", "--at", "3,4"), "has no bi-level routing attention, as BiFormer does"),
        ((*VIT, "--method", "kernels", "--at", "0.5,4"), "a place is X,Y in pixels of the photograph"),
        ((*VIT, "--heads", "median"), "heads must be mean, max or the number of a head"),
    ],
)
def test_what_cannot_be_done_is_exit_2_and_writes_nothing(pictures, tmp_path, capsys, options, message):
    assert main(["attend", str(pictures), *options, "-o", f"{tmp_path}/o"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_dry_run(pictures, tmp_path, capsys):
    assert main(["attend", str(pictures), *VIT, "-o", f"{tmp_path}/o", "--dry-run"]) == 0
    assert "13 images would be processed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
