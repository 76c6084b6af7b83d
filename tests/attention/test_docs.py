"""The examples in the docs page and in the docstrings do what they say."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import saccade.attention

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attention.md"
MODULES = ["saccade.attention.softmax", "saccade.attention.merge", "saccade.attention.dispatch"]


def check(test):
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)
    return len(test.examples)


def test_page():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0)
    assert check(test) > 20


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    names = {name: getattr(saccade.attention, name) for name in saccade.attention.__all__}
    tests = doctest.DocTestFinder().find(importlib.import_module(module), extraglobs={"torch": torch, **names})
    for test in tests:
        check(test)
