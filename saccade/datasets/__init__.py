"""LightningDataModules and file readers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.datasets.bag_data import BagData as BagData
    from saccade.datasets.bag_files import Bag as Bag
    from saccade.datasets.bag_files import find_bags as find_bags
    from saccade.datasets.bag_files import load_bag as load_bag
    from saccade.datasets.bag_files import load_bags as load_bags
    from saccade.datasets.bag_files import save_bag as save_bag
    from saccade.datasets.corruptions import CORRUPTIONS as CORRUPTIONS
    from saccade.datasets.corruptions import corrupt as corrupt
    from saccade.datasets.digits import DigitsData as DigitsData
    from saccade.datasets.drawn_search import save_scenes as save_scenes
    from saccade.datasets.drawn_search import search_scenes as search_scenes
    from saccade.datasets.drawn_slides import DrawnSlide as DrawnSlide
    from saccade.datasets.drawn_slides import draw_slide as draw_slide
    from saccade.datasets.drawn_slides import save_slide as save_slide
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
    "Bag": "bag_files",
    "BagData": "bag_data",
    "DigitsData": "digits",
    "DrawnSlide": "drawn_slides",
    "IDXData": "idx",
    "ImageData": "image_data",
    "ImageFolderData": "folder",
    "Preprocess": "image_data",
    "ScanpathData": "scanpaths",
    "corrupt": "corruptions",
    "draw_slide": "drawn_slides",
    "find_bags": "bag_files",
    "load_bag": "bag_files",
    "load_bags": "bag_files",
    "read_idx": "idx",
    "read_image": "images",
    "save_scenes": "drawn_search",
    "save_slide": "drawn_slides",
    "search_scenes": "drawn_search",
    "save_bag": "bag_files",
}

__all__ = [
    "CORRUPTIONS",
    "Augmentation",
    "Bag",
    "BagData",
    "DigitsData",
    "DrawnSlide",
    "IDXData",
    "ImageData",
    "ImageFolderData",
    "Preprocess",
    "ScanpathData",
    "corrupt",
    "draw_slide",
    "find_bags",
    "load_bag",
    "load_bags",
    "read_idx",
    "read_image",
    "save_bag",
    "save_scenes",
    "save_slide",
    "search_scenes",
]


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
