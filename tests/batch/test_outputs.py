import warnings

import h5py
import numpy as np
import pytest

from saccade.batch import ArrayOutput
from saccade.errors import ConfigError, ShapeError


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, 2)).astype(np.float32)


def load(path):
    if path.suffix == ".npy":
        return np.load(path), None
    if path.suffix == ".zarr":
        import zarr

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr announces that its string type may change
            group = zarr.open_group(path, mode="r")
            return group["features"][:], list(group["paths"][:])
    with h5py.File(path) as file:
        return file["features"][:], [name.decode() for name in file["paths"][:]]


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".zarr"])
def test_round_trip_sorted_with_names(tmp_path, suffix):
    path, values = tmp_path / f"x{suffix}", rows(3)
    output = ArrayOutput(path, dataset="features", attributes={"model": "m"})
    for name, row in zip("cab", values, strict=True):
        output.append(name, row)
    assert not path.exists()
    output.finish(["a", "b", "c"])
    got, names = load(path)
    assert np.array_equal(got, values[[1, 2, 0]])
    assert names in (None, ["a", "b", "c"])
    assert not output.part.exists()


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".zarr"])
def test_a_finished_file_can_be_extended(tmp_path, suffix):
    path, values = tmp_path / f"x{suffix}", rows(3)
    first = ArrayOutput(path, dataset="features")
    for name, row in zip("ac", values, strict=False):
        first.append(name, row)
    first.finish(["a", "c"])
    second = ArrayOutput(path, dataset="features")
    assert second.resume(["a", "c"]) == {"a", "c"}
    second.append("b", values[2])
    second.finish(["a", "b", "c"])
    if suffix != ".zarr":
        assert np.array_equal(load(path)[0], values[[0, 2, 1]])


@pytest.mark.parametrize("cut", [0, 1, 5, 23, 24, 39, 40, 41])
def test_a_journal_cut_anywhere_loses_only_the_last_row(tmp_path, cut):
    """A kill can end the file in the middle of a row; rows behind the cut must not be shifted."""
    path, values = tmp_path / "x.h5", rows(3)
    output = ArrayOutput(path, dataset="features")
    output.append("a", values[0])
    output.append("b", values[1])
    output.close()
    data = output.part.read_bytes()
    output.part.write_bytes(data[: len(data) - cut])
    again = ArrayOutput(path, dataset="features")
    expected = {"a", "b"} if cut == 0 else {"a"} if cut <= 40 else set()
    safe = again.resume(["a", "b"])
    assert safe == expected
    for name, row in zip("abc", values, strict=True):
        if name not in safe:
            again.append(name, row)
    again.finish(["a", "b", "c"])
    assert np.array_equal(load(path)[0], values)


def test_the_last_row_of_an_item_counts(tmp_path):
    output = ArrayOutput(tmp_path / "x.h5", dataset="features")
    values = rows(2)
    output.append("a", values[0])
    output.append("a", values[1])
    output.finish(["a"])
    assert np.array_equal(load(tmp_path / "x.h5")[0], values[1:])


def test_rows_of_another_shape_are_refused(tmp_path):
    output = ArrayOutput(tmp_path / "x.h5", dataset="features")
    output.append("a", np.zeros((2, 3), np.float32))
    with pytest.raises(ShapeError, match=r"\(2, 3\)"):
        output.append("b", np.zeros((3, 2), np.float32))
    output.close()


def test_a_file_of_another_run_is_not_extended(tmp_path):
    np.save(tmp_path / "x.npy", rows(5))
    with pytest.raises(ConfigError, match="does not belong"):
        ArrayOutput(tmp_path / "x.npy", dataset="features").resume(["a", "b"])


def test_many_rows_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("saccade.batch.outputs.BLOCK_BYTES", 100)
    values = rows(50)
    output = ArrayOutput(tmp_path / "x.h5", dataset="features")
    names = [f"{index:03d}" for index in range(50)]
    for name, row in zip(names, values, strict=True):
        output.append(name, row)
    output.finish(names)
    assert np.array_equal(load(tmp_path / "x.h5")[0], values)


@pytest.mark.parametrize("suffix", [".h5", ".npy"])
def test_a_run_without_any_success_leaves_an_empty_file(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    ArrayOutput(path, dataset="features").finish([])
    assert load(path)[0].shape == (0, 0)
    assert ArrayOutput(path, dataset="features").resume([]) == set()


def test_unknown_extension(tmp_path):
    with pytest.raises(ConfigError, match=r"\.h5"):
        ArrayOutput(tmp_path / "x.pickle", dataset="features")
