"""The examples in the pages on slides, and in the docstrings of the package, do what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import saccade.mil
from tests.attention.test_docs import check

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs").glob("slides*.md"))
MODULES = [module.name for module in pkgutil.iter_modules(saccade.mil.__path__, "saccade.mil.")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert check(doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)) > 2


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    for test in doctest.DocTestFinder().find(importlib.import_module(module), extraglobs={"torch": torch}):
        check(test)
