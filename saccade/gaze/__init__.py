"""Gaze: scanpath records, their metrics, and models that predict them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.gaze.decoding import DecodedPaths as DecodedPaths
    from saccade.gaze.decoding import PathModel as PathModel
    from saccade.gaze.decoding import beam_search as beam_search
    from saccade.gaze.decoding import greedy as greedy
    from saccade.gaze.decoding import log_prob as log_prob
    from saccade.gaze.decoding import sample as sample
    from saccade.gaze.formats import read_scanpaths as read_scanpaths
    from saccade.gaze.formats import write_scanpaths as write_scanpaths
    from saccade.gaze.metrics import multimatch as multimatch
    from saccade.gaze.oat import OAT as OAT
    from saccade.gaze.objects import assign_objects as assign_objects
    from saccade.gaze.scanpath import Scanpath as Scanpath
    from saccade.gaze.scanpath import ScanpathSet as ScanpathSet
    from saccade.gaze.scenes import SceneBatch as SceneBatch
    from saccade.gaze.scenes import box_positions as box_positions
    from saccade.gaze.scenes import grid_boxes as grid_boxes
    from saccade.gaze.scenes import grid_scene as grid_scene
    from saccade.gaze.scenes import stack_scenes as stack_scenes
    from saccade.gaze.splits import find_leaks as find_leaks
    from saccade.gaze.splits import split_scanpaths as split_scanpaths
    from saccade.gaze.validation import Notice as Notice
    from saccade.gaze.validation import notices as notices

# Looked up on first use: reading recordings needs no torch, and a model no file formats.
LAZY = {
    "OAT": "oat",
    "DecodedPaths": "decoding",
    "Notice": "validation",
    "PathModel": "decoding",
    "Scanpath": "scanpath",
    "ScanpathSet": "scanpath",
    "SceneBatch": "scenes",
    "assign_objects": "objects",
    "beam_search": "decoding",
    "box_positions": "scenes",
    "find_leaks": "splits",
    "greedy": "decoding",
    "grid_boxes": "scenes",
    "grid_scene": "scenes",
    "log_prob": "decoding",
    "multimatch": "metrics",
    "notices": "validation",
    "read_scanpaths": "formats",
    "sample": "decoding",
    "split_scanpaths": "splits",
    "stack_scenes": "scenes",
    "write_scanpaths": "formats",
}

__all__ = [
    "OAT",
    "DecodedPaths",
    "Notice",
    "PathModel",
    "Scanpath",
    "ScanpathSet",
    "SceneBatch",
    "assign_objects",
    "beam_search",
    "box_positions",
    "find_leaks",
    "greedy",
    "grid_boxes",
    "grid_scene",
    "log_prob",
    "multimatch",
    "notices",
    "read_scanpaths",
    "sample",
    "split_scanpaths",
    "stack_scenes",
    "write_scanpaths",
]


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
