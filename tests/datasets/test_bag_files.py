"""Bag files: round trips, the files of other programs, and files that want to do harm."""

import h5py
import numpy as np
import pytest
import torch

from saccade.datasets.bag_files import Bag, find_bags, load_bag, load_bags, save_bag, save_clam, save_trident
from saccade.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def make_bag(count=7, width=5, dtype=np.float16):
    features = RNG.normal(size=(count, width)).astype(dtype)
    return Bag(
        features, RNG.integers(0, 10_000, (count, 2)), {"target_mpp": 0.5, "patch_size_level0": 512, "encoder": "e"}
    )


def same(a, b):
    assert a.features.dtype == b.features.dtype
    assert np.array_equal(a.features, b.features)
    assert np.array_equal(a.coords, b.coords)


@pytest.mark.parametrize("count", [0, 1, 3000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_round_trip(tmp_path, count, dtype):
    bag = make_bag(count, 5, dtype)
    save_bag(tmp_path / "s.h5", bag)
    again = load_bag(tmp_path / "s.h5")
    same(again, bag)
    assert again.attributes["encoder"] == "e"
    assert again.attributes["complete"] == 1
    assert again.tile_size_level0 == 512
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]


def test_clam_and_trident_layouts(tmp_path):
    bag = make_bag(dtype=np.float32)
    save_clam(tmp_path, "s", bag)
    same(load_bag(tmp_path / "h5_files" / "s.h5"), bag)
    assert torch.equal(torch.load(tmp_path / "pt_files" / "s.pt", weights_only=True), torch.from_numpy(bag.features))
    with h5py.File(tmp_path / "h5_files" / "s.h5") as file:
        assert (file["coords"].dtype, file["features"].chunks, dict(file["features"].attrs)) == (np.int32, (7, 5), {})
    assert list(find_bags(tmp_path)) == ["s"]
    save_trident(tmp_path / "20x", "s", bag, "uni")
    same(load_bag(tmp_path / "20x" / "features_uni" / "s.h5"), bag)
    with h5py.File(tmp_path / "20x" / "features_uni" / "s.h5") as file:
        assert file["features"].chunks == (1, 5)
        assert file["coords"].attrs["patch_size_level0"] == 512


def test_files_of_other_programs(tmp_path):
    features = RNG.normal(size=(4, 3)).astype(np.float32)
    np.save(tmp_path / "torchmil.npy", features)
    assert np.array_equal(load_bag(tmp_path / "torchmil.npy").features, features)
    torch.save(torch.from_numpy(features), tmp_path / "slideflow.pt")
    np.savez(tmp_path / "slideflow.index.npz", np.array([[1, 2], [3, 4], [5, 6], [7, 8]]))
    assert load_bag(tmp_path / "slideflow.pt").coords.tolist()[3] == [7, 8]
    with h5py.File(tmp_path / "acmil.h5", "w") as file:
        group = file.create_group("slide_1")
        group.create_dataset("feat", data=features.astype(np.float16))
        group.create_dataset("coords", data=np.zeros((4, 2), int))
        group.attrs["label"] = np.int64(2)
    bags = load_bags(tmp_path / "acmil.h5")
    assert (list(bags), bags["slide_1"].label) == (["slide_1"], 2)
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file.create_dataset("features", data=np.zeros(0, np.float32))
    assert load_bag(tmp_path / "empty.h5").features.shape == (0, 0)


def test_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group["features"], group["coords"] = np.ones((3, 2), np.float32), np.zeros((3, 2), int)
    assert load_bag(tmp_path / "s.zarr").features.tolist() == [[1, 1]] * 3


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a data file ran')",))


def hostile_files(folder):
    (folder / "secret.h5").write_bytes(b"")
    with h5py.File(folder / "secret.h5", "w") as file:
        file.create_dataset("features", data=np.ones((2, 2), np.float32))
    with h5py.File(folder / "external.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(folder / "secret.h5"), "/features")
    with h5py.File(folder / "raw.h5", "w") as file:
        file.create_dataset("features", (4, 4), np.float32, external=[(str(folder / "secret.h5"), 0, 64)])
    with h5py.File(folder / "huge.h5", "w") as file:
        file.create_dataset("features", (1 << 40, 1 << 10), np.float32, chunks=(1, 1024))
    with h5py.File(folder / "text.h5", "w") as file:
        file.create_dataset("features", data=np.array([b"a", b"b"]))
    with h5py.File(folder / "patches.h5", "w") as file:
        file.create_dataset("coords", data=np.zeros((3, 2)))
    with h5py.File(folder / "unequal.h5", "w") as file:
        file.create_dataset("features", data=np.zeros((3, 2), np.float32))
        file.create_dataset("coords", data=np.zeros((4, 2)))
    (folder / "cut.h5").write_bytes((folder / "unequal.h5").read_bytes()[:700])
    torch.save({"features": Hostile()}, folder / "code.pt")
    np.save(folder / "objects.npy", np.array([Hostile()]), allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("external.h5", "link to another place"),
        ("raw.h5", "numbers in other files"),
        ("huge.h5", "claims"),
        ("text.h5", "no array of numbers"),
        ("patches.h5", "patch file"),
        ("unequal.h5", r"coords must be \(3, 2\)"),
        ("cut.h5", "cannot be read as a bag"),
        ("code.pt", "cannot be read as a bag"),
        ("objects.npy", "cannot be read as a bag"),
    ],
)
def test_hostile_and_damaged_files(tmp_path, name, message):
    hostile_files(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_bag(tmp_path / name)
    assert caught.value.reason == "bad_bag"
    assert name in str(caught.value)


def test_find_bags(tmp_path):
    with pytest.raises(ConfigError, match="No bags below"):
        find_bags(tmp_path)
    for folder in ("a", "b"):
        save_bag(tmp_path / folder / "s.h5", make_bag())
    with pytest.raises(ConfigError, match="both bags of slide 's'"):
        find_bags(tmp_path)
    assert find_bags(tmp_path / "a") == {"s": tmp_path / "a" / "s.h5"}
    with pytest.raises(ConfigError, match="does not exist"):
        load_bag(tmp_path / "absent.h5")


def test_trident_and_clam_files_themselves(data_root):
    interop = data_root.parent / "golden" / "mil" / "interop"
    if not interop.is_dir():
        pytest.skip(f"no files of CLAM and TRIDENT: {interop} is not a folder")
    bag = load_bag(interop / "trident" / "20x_256px_0px_overlap" / "features_tinystat" / "cmu-1-small-region.h5")
    assert (bag.features.shape, bag.coords.shape, bag.tile_size_level0) == ((58, 8), (58, 2), 256)
    clam = load_bag(interop / "clam" / "features" / "h5_files" / "cmu-1-small-region.h5")
    tensor = load_bag(interop / "clam" / "features" / "pt_files" / "cmu-1-small-region.pt")
    assert np.array_equal(clam.features, tensor.features)
    with pytest.raises(DataError, match="patch file"):
        load_bag(interop / "trident" / "20x_256px_0px_overlap" / "patches" / "cmu-1-small-region_patches.h5")
