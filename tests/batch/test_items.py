import io
import os

import pytest

from saccade.batch import IMAGE_EXTENSIONS, find_items
from saccade.errors import ConfigError


def find(inputs):
    return find_items(inputs, extensions=IMAGE_EXTENSIONS)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "photos/b.JPG",
        "photos/a.png",
        "photos/sub/a.png",
        "photos/.x/c.png",
        "photos/._a.png",
        "photos/n.txt",
        "more/a.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def ids(inputs):
    return [item.id for item in find(inputs)]


def test_a_folder_is_searched_and_sorted_with_relative_ids(tree):
    assert ids("photos") == ids(["photos/"]) == ids(tree / "photos") == ["a.png", "b.JPG", "sub/a.png"]


def test_several_inputs_keep_the_path_as_typed(tree):
    assert ids(["photos", "more"]) == ["more/a.png", "photos/a.png", "photos/b.JPG", "photos/sub/a.png"]
    assert ids("photos/sub/a.png") == ["photos/sub/a.png"]


def test_each_file_once(tree):
    assert ids(["photos", "photos/sub", "photos/a.png"]) == ["photos/a.png", "photos/b.JPG", "photos/sub/a.png"]


def test_globs_take_images_alone(tree):
    assert ids("photos/*") == ["photos/a.png", "photos/b.JPG"]
    assert ids("photos/**/a.png") == ["photos/a.png", "photos/sub/a.png"]


def test_named_files_are_taken_whatever_their_name(tree):
    assert ids(["photos/n.txt"]) == ["photos/n.txt"]


def test_lists_from_file_and_standard_input(tree, monkeypatch):
    (tree / "list.txt").write_text("# mine\nphotos/a.png\n\nmore\nphotos/gone.png\n")
    assert ids("@list.txt") == ["more/a.png", "photos/a.png", "photos/gone.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/b.JPG\n"))
    assert ids("-") == ["photos/b.JPG"]


def test_links_are_followed_and_loops_end(tree):
    (tree / "photos/linked").symlink_to(tree / "more")
    (tree / "photos/sub/loop").symlink_to(tree / "photos")
    assert ids("photos") == ["a.png", "b.JPG", "linked/a.png", "sub/a.png"]


def test_names_that_are_not_utf8_do_not_stop_a_run(tree):
    (tree / "more" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    assert ids("more") == ["a.png", "caf\\xe9.png"]
    ids("more")[1].encode("utf-8")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("nowhere", "'nowhere' does not exist"),
        ("@none.txt", "Cannot read the list"),
        ("photos/.x", "No images found"),
        ("photos/*.gif", "No images found"),
    ],
)
def test_wrong_inputs(tree, inputs, message):
    (tree / "photos/.x/c.png").unlink()
    with pytest.raises(ConfigError, match=message.replace("*", ".")):
        find(inputs)
