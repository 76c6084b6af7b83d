"""The examples in the page on gaze data and metrics do what they say, and the page names what there is."""

import doctest
import re
from pathlib import Path

from saccade.gaze.formats import FORMATS
from tests.attention.test_docs import check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gaze.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_page():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert check(doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0)) > 20


def test_every_format_is_on_the_page():
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE) == [
        "csv", "hdf5", "coco", "osie", "amazon", "pysaliency", "pymovements", "multimatch", "oat",
    ]  # fmt: skip
    assert len(FORMATS) == 9
