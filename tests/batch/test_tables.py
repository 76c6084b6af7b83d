import csv
import json

import pytest

from saccade.batch import atomic_path, write_table
from saccade.errors import ConfigError

ROWS = [{"path": "a, b.png", "prob_1": 0.25, "error": ""}, {"path": "ü\n.png", "error": 'say "no"'}]


def read(path):
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="," if path.suffix == ".csv" else "\t"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    write_table(path, ROWS, ["path", "prob_1", "error"])
    got = read(path)
    assert [row["path"] for row in got] == [row["path"] for row in ROWS]
    assert [row["error"] for row in got] == [row["error"] for row in ROWS]
    assert float(got[0]["prob_1"]) == 0.25
    assert got[1]["prob_1"] in (None, "")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_csv_is_plain(tmp_path):
    write_table(tmp_path / "t.csv", [{"path": "a", "prob_1": 0.5}])
    assert (tmp_path / "t.csv").read_bytes() == b"path,prob_1\na,0.5\n"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.csv"]


def test_unknown_extension(tmp_path):
    with pytest.raises(ConfigError, match=r"t\.xlsx.*\.csv"):
        write_table(tmp_path / "t.xlsx", ROWS)
