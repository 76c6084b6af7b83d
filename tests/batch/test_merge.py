import json

import h5py
import numpy as np
import pytest

from saccade.batch import ArrayOutput, BatchOptions, Run, merge_shards
from saccade.errors import ConfigError
from tests.batch.test_run import ITEMS, open_run, value, work


def shard_runs(folder, count=3, **changes):
    for index in range(1, count + 1):
        work(open_run(folder, shard=f"{index}/{count}", arrays=True, **changes), bad=["c.png"])


def test_united_shards_equal_the_whole(tmp_path):
    work(open_run(tmp_path / "whole", arrays=True), bad=["c.png"])
    shard_runs(tmp_path / "s")
    summary = merge_shards(tmp_path / "s/t.csv")
    merge_shards(tmp_path / "s/x.h5")
    assert (summary.done, summary.failed, summary.exit_code) == (3, 1, 3)
    assert (tmp_path / "s/t.csv").read_bytes() == (tmp_path / "whole/t.csv").read_bytes()
    with h5py.File(tmp_path / "s/x.h5") as got, h5py.File(tmp_path / "whole/x.h5") as expected:
        assert np.array_equal(got["x"][:], expected["x"][:])
        assert list(got["paths"][:]) == list(expected["paths"][:])
        assert dict(got.attrs) == dict(expected.attrs)
    assert json.loads((tmp_path / "s/t.run.json").read_text())["counts"] == {"total": 4, "done": 3, "failed": 1}
    assert open_run(tmp_path / "s").resumed == 3


def test_explicit_files_in_any_order_and_another_format(tmp_path):
    shard_runs(tmp_path)
    files = [tmp_path / f"t.shard{index}of3.csv" for index in (3, 1, 2)]
    merge_shards(files, out=tmp_path / "all.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [item.id for item in ITEMS]
    assert rows[0]["size"] == value(ITEMS[0])


@pytest.mark.parametrize("suffix", [".h5", ".npy"])
def test_array_runs(tmp_path, suffix):
    for index in (1, 2):
        arrays = {"x": ArrayOutput(tmp_path / f"f{suffix}", dataset="features")}
        options = BatchOptions(shard=f"{index}/2")
        run = Run("embed", items=ITEMS, out=tmp_path / f"f{suffix}", settings={}, options=options, arrays=arrays)
        with run:
            for item in run.pending:
                run.done(item, arrays={"x": np.array([value(item)])})
    assert merge_shards(tmp_path / f"f{suffix}").done == 4
    expected = [[value(item)] for item in ITEMS]
    if suffix == ".npy":
        assert np.load(tmp_path / "f.npy").tolist() == expected
    else:
        with h5py.File(tmp_path / "f.h5") as file:
            assert file["features"][:].tolist() == expected


def test_missing_shards_are_named(tmp_path):
    shard_runs(tmp_path)
    (tmp_path / "t.shard2of3.csv").unlink()
    with pytest.raises(ConfigError, match=r"missing: t\.shard2of3\.csv"):
        merge_shards(tmp_path / "t.csv")


def test_no_shards(tmp_path):
    with pytest.raises(ConfigError, match="No shards"):
        merge_shards(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="not the output of a shard"):
        merge_shards([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_unfinished_and_different_shards_are_refused(tmp_path):
    shard_runs(tmp_path)
    manifest = tmp_path / "t.shard2of3.run.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"status": "interrupted"}))
    with pytest.raises(ConfigError, match="interrupted"):
        merge_shards(tmp_path / "t.csv")
    manifest.write_text(json.dumps(content | {"settings": {"k": 9}}))
    with pytest.raises(ConfigError, match="different settings"):
        merge_shards(tmp_path / "t.csv")
