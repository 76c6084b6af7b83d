"""The examples in the pages on backbones, and in the docstrings of their blocks, do what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import saccade.vision_backbones
from tests.attention.test_docs import check

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [*sorted(DOCS.glob("backbones*.md")), DOCS / "analyze.md", DOCS / "robust.md", DOCS / "robustness.md"]
MODULES = [
    module.name for module in pkgutil.walk_packages(saccade.vision_backbones.__path__, "saccade.vision_backbones.")
]
EXAMPLES = ("overlock", "biformer", "diversity", "token_pooling", "measurement", "profile", "pruning")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert check(doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)) > 2


@pytest.mark.parametrize("module", [name for name in MODULES if name.rpartition(".")[2].startswith(EXAMPLES)])
def test_docstrings(module):

    for test in doctest.DocTestFinder().find(importlib.import_module(module), extraglobs={"torch": torch}):
        check(test)
