"""LightningDataModules and file readers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.datasets.corruptions import CORRUPTIONS as CORRUPTIONS
    from saccade.datasets.corruptions import corrupt as corrupt
    from saccade.datasets.digits import DigitsData as DigitsData
    from saccade.datasets.drawn_search import save_scenes as save_scenes
    from saccade.datasets.drawn_search import search_scenes as search_scenes
    from saccade.datasets.folder import ImageFolderData as ImageFolderData
    from saccade.datasets.idx import IDXData as IDXData
    from saccade.datasets.idx import read_idx as read_idx
    from saccade.datasets.image_data import Augmentation as Augmentation
    from saccade.datasets.image_data import ImageData as ImageData
    from saccade.datasets.image_data import Preprocess as Preprocess
    from saccade.datasets.images import read_image as read_image
    from saccade.datasets.scanpaths import ScanpathData as ScanpathData

# Looked up on first use: reading an image must not import Lightning.
LAZY = {
    "CORRUPTIONS": "corruptions",
    "Augmentation": "image_data",
    "DigitsData": "digits",
    "IDXData": "idx",
    "ImageData": "image_data",
    "ImageFolderData": "folder",
    "Preprocess": "image_data",
    "ScanpathData": "scanpaths",
    "corrupt": "corruptions",
    "read_idx": "idx",
    "read_image": "images",
    "save_scenes": "drawn_search",
    "search_scenes": "drawn_search",
}

__all__ = [
    "CORRUPTIONS",
    "Augmentation",
    "DigitsData",
    "IDXData",
    "ImageData",
    "ImageFolderData",
    "Preprocess",
    "ScanpathData",
    "corrupt",
    "read_idx",
    "read_image",
    "save_scenes",
    "search_scenes",
]


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
