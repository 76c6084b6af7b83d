import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from saccade.batch import ArrayOutput, BatchOptions, Item, Run
from saccade.batch.progress import Reporter
from saccade.errors import ConfigError, DataError

ITEMS = [Item(name, Path(name)) for name in ("a.png", "b.png", "c.png", "d/a.png")]


def value(item):
    return float(sum(item.id.encode()))


def open_run(folder, *, items=ITEMS, settings=None, arrays=False, **options):
    return Run(
        "count",
        items=items,
        out=folder / "t.csv",
        settings={"k": 1} if settings is None else settings,
        options=BatchOptions(**options),
        table=folder / "t.csv",
        arrays={"x": ArrayOutput(folder / "x.h5", dataset="x")} if arrays else None,
    )


def work(run, *, bad=()):
    with run:
        for item in run.pending:
            step(run, item, bad=bad)
    return run.summary


def step(run, item, *, bad=()):
    if item.id in bad:
        run.fail(item, DataError("the file\nis bad", reason="bad_file"))
    else:
        extra = {"x": np.array([value(item)])} if run.arrays else None
        run.done(item, row={"size": value(item)}, arrays=extra)


def abandon(run, count):
    """Do what a SIGKILL leaves behind: some items recorded, nothing closed, nothing finished."""
    run.__enter__()
    for item in run.pending[:count]:
        step(run, item)
    run.stream.close()
    for array in run.arrays.values():
        array.close()


def entries(folder, name="t.items.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_files_of_a_complete_run(tmp_path):
    summary = work(open_run(tmp_path), bad=["b.png"])
    assert (summary.total, summary.done, summary.failed, summary.exit_code) == (4, 3, 1, 3)
    table = (tmp_path / "t.csv").read_text().splitlines()
    assert table[:3] == ["path,status,size,error", "a.png,done,468.0,", "b.png,failed,,the file is bad"]
    rows = entries(tmp_path)
    assert [row["id"] for row in rows] == ["a.png", "b.png", "c.png", "d/a.png"]
    assert set(rows[0]) == {"id", "path", "status", "reason", "seconds", "error", "row"}
    assert rows[1]["reason"] == "bad_file"
    manifest = json.loads((tmp_path / "t.run.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["counts"] == {"total": 4, "done": 3, "failed": 1}
    assert manifest["settings"] == {"k": 1}
    assert {"saccade_version", "command_line", "start", "end", "host", "versions"} <= set(manifest)


def test_exit_codes(tmp_path):
    assert work(open_run(tmp_path / "1")).exit_code == 0
    assert work(open_run(tmp_path / "2"), bad=[item.id for item in ITEMS]).exit_code == 1


@pytest.mark.parametrize("count", range(5))
def test_a_killed_run_goes_on_and_ends_equal(tmp_path, count):
    abandon(open_run(tmp_path / "killed", arrays=True), count)
    assert not (tmp_path / "killed/t.csv").exists()
    resumed = open_run(tmp_path / "killed", arrays=True)
    assert resumed.resumed == count
    work(resumed)
    work(open_run(tmp_path / "whole", arrays=True))
    assert (tmp_path / "killed/t.csv").read_bytes() == (tmp_path / "whole/t.csv").read_bytes()
    with h5py.File(tmp_path / "killed/x.h5") as got, h5py.File(tmp_path / "whole/x.h5") as expected:
        assert np.array_equal(got["x"][:], expected["x"][:])
        assert list(got["paths"][:]) == list(expected["paths"][:])
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_cut_off_by_the_kill_is_done_again(tmp_path, cut):
    abandon(open_run(tmp_path, arrays=True), 3)
    journal = tmp_path / "t.items.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert open_run(tmp_path).resumed == 2
    assert work(open_run(tmp_path, arrays=True)).done == 4


def test_a_row_without_its_array_is_done_again(tmp_path):
    abandon(open_run(tmp_path, arrays=True), 3)
    (tmp_path / "x.h5.part").unlink()
    assert work(open_run(tmp_path, arrays=True)).done == 4
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["x"][:, 0].tolist() == [value(item) for item in ITEMS]


def test_failed_items_are_tried_again_and_done_ones_are_not(tmp_path):
    work(open_run(tmp_path), bad=["b.png"])
    again = open_run(tmp_path)
    assert [item.id for item in again.pending] == ["b.png"]
    assert work(again).exit_code == 0
    assert [row["status"] for row in entries(tmp_path)] == ["done"] * 4


def test_other_settings_are_refused_and_touch_nothing(tmp_path):
    work(open_run(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"k: 1 -> 2"):
        open_run(tmp_path, settings={"k": 2})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert work(open_run(tmp_path, settings={"k": 2}, overwrite=True)).resumed == 0


def test_a_foreign_file_is_not_overwritten(tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    with pytest.raises(ConfigError, match="saccade wrote it"):
        open_run(tmp_path)
    work(open_run(tmp_path, overwrite=True))
    assert (tmp_path / "t.csv").read_text().startswith("path,")


def test_batch_size_and_the_like_may_change(tmp_path):
    abandon(open_run(tmp_path, batch_size=2, num_workers=0), 2)
    assert open_run(tmp_path, batch_size=7, device="cpu", num_workers=3).resumed == 2


def test_added_inputs_extend_and_removed_ones_are_reported(tmp_path, capsys):
    work(open_run(tmp_path, items=ITEMS[:2]))
    assert work(open_run(tmp_path, items=ITEMS[1:], progress="plain")).total == 3
    assert "1 items of the earlier run are not among the inputs" in capsys.readouterr().err
    assert [row["id"] for row in entries(tmp_path)] == [item.id for item in ITEMS]


def test_limit_then_all(tmp_path):
    assert work(open_run(tmp_path, limit=2)).total == 2
    whole = open_run(tmp_path)
    assert whole.resumed == 2
    assert work(whole).done == 4


def test_dry_run_writes_nothing(tmp_path, capsys):
    run = open_run(tmp_path / "x", dry_run=True, progress="plain")
    with run:
        pass
    assert run.summary.status == "planned"
    assert run.summary.exit_code == 0
    assert "4 images would be processed" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_on_error_stop_keeps_what_was_done(tmp_path):
    with pytest.raises(DataError, match=r"b\.png failed"):
        work(open_run(tmp_path, on_error="stop"), bad=["b.png"])
    assert [row["status"] for row in entries(tmp_path)] == ["done", "failed"]
    assert json.loads((tmp_path / "t.run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "t.csv").exists()


def test_interruption_is_recorded(tmp_path):
    def interrupted():
        with open_run(tmp_path) as run:
            step(run, run.pending[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads((tmp_path / "t.run.json").read_text())["status"] == "interrupted"
    assert open_run(tmp_path).resumed == 1


def test_names_with_odd_line_breaks_survive(tmp_path):
    items = [Item("a\u2028b\x85.png", Path("x")), Item("c\n.png", Path("y"))]
    abandon(open_run(tmp_path, items=items), 2)
    assert open_run(tmp_path, items=items).resumed == 2


def test_a_damaged_journal_is_named_with_its_line(tmp_path):
    work(open_run(tmp_path))
    journal = tmp_path / "t.items.jsonl"
    journal.write_text("{}\n" + journal.read_text())
    with pytest.raises(ConfigError, match=r"t\.items\.jsonl, line 1"):
        open_run(tmp_path)


def test_folder_outputs_keep_their_files_inside(tmp_path):
    run = Run("count", items=ITEMS, out=f"{tmp_path}/out.d/", settings={})
    with run:
        for item in run.pending:
            run.done(item)
    assert sorted(path.name for path in (tmp_path / "out.d").iterdir()) == ["items.jsonl", "run.json"]


def test_shards_are_disjoint_and_complete(tmp_path):
    runs = [open_run(tmp_path, shard=f"{index}/3") for index in (1, 2, 3)]
    taken = [item.id for run in runs for item in run.items]
    assert sorted(taken) == [item.id for item in ITEMS]
    work(runs[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t.shard2of3.csv",
        "t.shard2of3.items.jsonl",
        "t.shard2of3.run.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "4/3"}, "I/N"),
        ({"shard": "0/3"}, "I/N"),
        ({"shard": "x"}, "I/N"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"limit": 0}, "limit"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        BatchOptions(**options)


def test_log_file_and_failures_on_screen(tmp_path, capsys):
    work(open_run(tmp_path, progress="plain", log_file=tmp_path / "log.txt"), bad=["b.png"])
    err = capsys.readouterr().err
    assert "b.png  failed: the file is bad" in err
    assert "done 3  failed 1" in err
    assert (tmp_path / "log.txt").read_text() == err


@pytest.mark.parametrize("total", [1, 9, 18, 30, 1000])
def test_without_a_terminal_there_is_a_line_for_each_tenth(total, capsys):
    reporter = Reporter("plain", unit="images")
    reporter.start(total)
    for _ in range(total):
        reporter.advance()
    assert len(capsys.readouterr().err.splitlines()) == {1: 0, 9: 8, 18: 8, 30: 9, 1000: 9}[total]
