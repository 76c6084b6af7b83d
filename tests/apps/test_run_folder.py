import pytest

from saccade.apps.run_folder import create_run_folder, latest_run, run_of
from saccade.checkpoints import best_checkpoint
from saccade.errors import ConfigError


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def with_checkpoints(folder, *names):
    (folder / "checkpoints").mkdir()
    for name in names:
        (folder / "checkpoints" / f"{name}.ckpt").touch()
    (folder / "config.yaml").touch()
    return folder


def test_names_that_are_no_folder_names():
    folder = create_run_folder("hf-hub:org/x y")
    assert folder.parent.name == "hf-hub_org_x_y"
    assert latest_run("hf-hub:org/x y") == folder


def test_latest_follows_the_newest_run():
    first = create_run_folder("a")
    second = create_run_folder("a")
    assert first != second
    assert latest_run("a") == latest_run(None) == second
    with pytest.raises(ConfigError, match="There is no run to resume in runs/b/"):
        latest_run("b")


def test_checkpoints_of_a_run():
    folder = with_checkpoints(create_run_folder("a"), "best", "last")
    assert best_checkpoint(folder).name == "best.ckpt"
    assert best_checkpoint(folder, prefer="last").name == "last.ckpt"
    assert best_checkpoint("runs/a") == best_checkpoint(folder)
    (folder / "checkpoints" / "best.ckpt").unlink()
    assert best_checkpoint(folder).name == "last.ckpt"


def test_run_of_a_checkpoint(tmp_path):
    folder = with_checkpoints(create_run_folder("a"), "best")
    assert run_of(best_checkpoint(folder)) == folder
    (tmp_path / "x.ckpt").touch()
    assert run_of(tmp_path / "x.ckpt") is None
