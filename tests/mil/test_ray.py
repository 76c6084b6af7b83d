"""``slides run`` on a Ray cluster: the files and the table of a local run, whoever is killed on the way."""

import sys
from functools import partial

import h5py
import numpy as np
import pytest

from saccade.apps.cli import main
from saccade.batch import BatchOptions
from saccade.batch.fleet import Fleet
from saccade.errors import ConfigError
from saccade.mil import Encoder, TileOptions, extract, load_bag
from tests.batch.fleet_functions import brightness
from tests.helpers import run_cli
from tests.mil_slides import drawn_slide, write_pyramid

TILES = TileOptions(mpp=0.5, tile_px=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five good slides, one without resolution, and no slide at all."""
    root = tmp_path_factory.mktemp("slides")
    pixels, _ = drawn_slide(700, 500)
    for index in range(5):
        write_pyramid(root / f"s{index}.tif", np.roll(pixels, 40 * index, 0))
    write_pyramid(root / "unknown.tif", pixels, mpp=None)
    (root / "text.svs").write_text("no slide")
    return root


def assert_same_files(one, other):
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        if name.suffix == ".h5":
            with h5py.File(one / name) as ours, h5py.File(other / name) as theirs:
                assert set(ours) == set(theirs)
                for key in ours:
                    assert np.array_equal(ours[key][()], theirs[key][()])
                    assert dict(ours[key].attrs) == dict(theirs[key].attrs)
        elif name.suffix in (".csv", ".geojson", ".jpg"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
def test_the_command_gives_what_a_local_run_gives(folder, tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra")
    run = ["slides", "run", folder, "--tile-px", "64", "-m", "stain-texture", "-b", "8", "-j", "1", "--json"]
    local = run_cli(*run, "-o", tmp_path / "local", env={"OMP_NUM_THREADS": "1"})
    part = run_cli(*run, "-o", tmp_path / "ray", "--limit", "3", env={"OMP_NUM_THREADS": "1"})
    assert (local.returncode, part.returncode) == (3, 0)
    fleet = run_cli(*run, "-o", tmp_path / "ray", "--engine", "ray", "--ray-address", "local")
    assert fleet.returncode == 3, fleet.stderr
    assert "resume: 3 already done" in fleet.stderr
    assert fleet.stdout.count("\n") == local.stdout.count("\n") == 1
    assert_same_files(tmp_path / "local", tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:ray")
def test_a_worker_killed_in_the_middle_of_a_slide(folder, tmp_path, capfd):
    pytest.importorskip("ray", reason="Ray is an extra")
    for name, fleet, marker in (("local", None, ""), ("ray", Fleet("local"), str(tmp_path / "killed"))):
        encoder = Encoder("brightness", partial(brightness, marker), 3, 0)
        options = BatchOptions(batch_size=8, num_workers=1, progress="plain")
        summary = extract(folder, out=tmp_path / name, encoder=encoder, tiles=TILES, fleet=fleet, options=options)
        assert (summary.done, summary.failed) == (5, 2)
    assert (tmp_path / "killed").exists()
    assert "tried again" in capfd.readouterr().err
    assert_same_files(tmp_path / "local", tmp_path / "ray")
    assert len(load_bag(tmp_path / "ray" / "features" / TILES.name / "brightness" / "s0.h5")) > 5


def test_options_of_the_cluster(folder, tmp_path, capsys, monkeypatch):
    run = ["slides", "tile", str(folder), "-o", str(tmp_path / "out"), "-q"]
    assert main([*run, "--ray-address", "local"]) == 2
    assert "--ray-address belongs to --engine ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*run, "--engine", "ray"]) == 4
    assert "pip install 'saccade[ray]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:ray")
def test_gpus_are_handed_out_by_ray(folder, tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra")
    with pytest.raises(ConfigError, match="Ray hands out the GPUs"):
        extract(folder, out=tmp_path, stage="tile", fleet=Fleet("local"), options=BatchOptions(device="cuda:1"))
