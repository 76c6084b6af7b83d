"""The examples in the pages on decoding and its evaluation do what they say."""

import doctest
import re
from pathlib import Path

import pytest

import saccade.vlm.intervene
from tests.attention.test_docs import check

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", ["vlm.md", "vlm-attend.md", "vlm-evaluation.md"])
def test_page(name):
    page = DOCS / name
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, name, str(page), 0)
    assert check(test) > 10


def test_docstrings():
    for test in doctest.DocTestFinder().find(saccade.vlm.intervene):
        check(test)
