"""The examples in the page on decoding do what they say."""

import doctest
import re
from pathlib import Path

import saccade.vlm.intervene
from tests.attention.test_docs import check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vlm.md"


def test_page():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0)
    assert check(test) > 20


def test_docstrings():
    for test in doctest.DocTestFinder().find(saccade.vlm.intervene):
        check(test)
