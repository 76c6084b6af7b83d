"""The examples in the docs pages and in the docstrings do what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import saccade.attention

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs").glob("attention*.md"))
MODULES = [module.name for module in pkgutil.iter_modules(saccade.attention.__path__, "saccade.attention.")]


def check(test):
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)
    return len(test.examples)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    assert check(test) > (20 if page.stem == "attention" else 2)


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    names = {name: getattr(saccade.attention, name) for name in saccade.attention.__all__}
    tests = doctest.DocTestFinder().find(importlib.import_module(module), extraglobs={"torch": torch, **names})
    for test in tests:
        check(test)
