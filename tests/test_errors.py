"""The tree of errors and the two helpers that write messages."""

import pickle

import pytest

from saccade import errors
from saccade.apps.cli import exit_code
from saccade.errors import DataError, MissingDependencyError, SaccadeError, require, suggest

EVERY = [value for name in errors.__all__ if isinstance(value := getattr(errors, name), type)]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: error.__name__)
def test_every_error_is_in_the_tree_at_the_top_of_the_file(error):
    assert issubclass(error, SaccadeError)
    assert error.__name__ in errors.__doc__
    if error is not SaccadeError:
        builtin = error.__mro__[2]
        assert f"{error.__name__} ({builtin.__name__})" in errors.__doc__, "users catch it as the built-in kind too"
        assert issubclass(error, builtin)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("MissingDependencyError", 4),
        ("MissingResourceError", 4),
        ("DataError", 1),
        ("CheckpointError", 1),
        ("ShapeError", 1),
        ("BackendError", 4),
    ],
)
def test_exit_codes(name, code):
    assert exit_code(getattr(errors, name)("x")) == code


def test_data_error_keeps_its_reason_between_processes():
    error = pickle.loads(pickle.dumps(DataError("is empty", reason="empty_file")))
    assert (str(error), error.reason) == ("is empty", "empty_file")
    assert DataError("x").reason == "bad_data"


def test_require():
    assert require("json", purpose="Reading JSON").dumps([1]) == "[1]"
    with pytest.raises(
        MissingDependencyError, match=r"Writing \.x tables needs no_such_package: pip install 'saccade'\."
    ):
        require("no_such_package", purpose="Writing .x tables")
    with pytest.raises(ImportError, match=r"pip install 'saccade\[parquet\]'"):
        require("no_such_package", extra="parquet", purpose="Writing .x tables")


def test_suggest():
    assert suggest("biformer_tny", ["biformer_tiny", "resnet18"]) == " Did you mean 'biformer_tiny'?"
    assert suggest("xyz", ["biformer_tiny", "resnet18"]) == ""
    assert suggest("resnet", ["resnet18", "resnet34", "resnet50", "resnet101"], count=2).count(" or ") == 1
