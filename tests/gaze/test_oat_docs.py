"""The examples in the page on OAT, and in the docstrings of its modules, do what they say."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.attention.test_docs import check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gaze-oat.md"


def test_page():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert check(doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0)) > 20


@pytest.mark.parametrize("name", ["scenes", "oat_position", "object_features"])
def test_docstrings(name):
    module = importlib.import_module(f"saccade.gaze.{name}")
    tests = doctest.DocTestFinder().find(module, extraglobs={"torch": torch, "Image": Image})
    assert sum(check(test) for test in tests) > 0
