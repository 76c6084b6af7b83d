"""What is public stays public: a name that goes away fails here until the inventory is edited in the same change."""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import saccade

INVENTORY = Path(__file__).with_name("api_surface.json")
MODULES = sorted(info.name for info in pkgutil.walk_packages(saccade.__path__, "saccade."))
INTERNAL = ("saccade.apps", "saccade.attention.kernels")
PUBLIC = [
    "saccade",
    *(name for name in MODULES if importlib.util.find_spec(name).submodule_search_locations and name not in INTERNAL),
    "saccade.checkpoints",
    "saccade.errors",
]


def test_inventory():
    recorded = json.loads(INVENTORY.read_text())
    present = {name: sorted(importlib.import_module(name).__all__) for name in PUBLIC}
    assert recorded == present, f"public names changed; if that is meant, edit {INVENTORY.name} and CHANGELOG.md"


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    assert not any(part.startswith("_") for part in name.split("."))
    module = importlib.import_module(name)
    assert module.__doc__, "says what it is"
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    assert all(hasattr(module, word) for word in exported)
