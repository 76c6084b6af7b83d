"""Gaze: scanpath records, their metrics, and models that predict them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.gaze.objects import assign_objects as assign_objects
    from saccade.gaze.scanpath import Scanpath as Scanpath
    from saccade.gaze.scanpath import ScanpathSet as ScanpathSet
    from saccade.gaze.validation import Notice as Notice
    from saccade.gaze.validation import notices as notices

# Looked up on first use: reading recordings needs no torch, and a model no file formats.
LAZY = {
    "Notice": "validation",
    "Scanpath": "scanpath",
    "ScanpathSet": "scanpath",
    "assign_objects": "objects",
    "notices": "validation",
}

__all__ = [
    "Notice",
    "Scanpath",
    "ScanpathSet",
    "assign_objects",
    "notices",
]


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
