"""Whole slides: bags of tiles, models that classify them, and where those models look."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from saccade.datasets.bag_files import Bag, find_bags, load_bag, load_bags, save_bag, save_clam, save_trident
from saccade.mil.abmil import ABMIL
from saccade.mil.acmil import ACMILGA, ACMILMHA
from saccade.mil.aem import attention_entropy_maximization
from saccade.mil.clam import CLAMMB, CLAMSB
from saccade.mil.dsmil import DSMIL
from saccade.mil.encoders import Encoder, load_encoder, wrap_model
from saccade.mil.extraction import extract
from saccade.mil.heatmap import draw_heatmap, normalize_scores, tile_map
from saccade.mil.heatmap_run import HeatmapOptions, draw_heatmaps
from saccade.mil.inference import TrainedClassifier, load_classifier, predict_bags
from saccade.mil.instance_pooling import MaxPooling, MeanPooling
from saccade.mil.loading import load_model
from saccade.mil.localization import Localization, lesion_localization, lesion_shares
from saccade.mil.model import MILModel, MILOutput, create_model, models
from saccade.mil.score_maps import ScoreMaps, load_scores
from saccade.mil.slide import Slide
from saccade.mil.slide_items import find_slides
from saccade.mil.tiles import TileGrid, TileOptions, make_grid
from saccade.mil.tissue import Polygon, Tissue, TissueOptions, find_tissue
from saccade.mil.transmil import TransMIL

if TYPE_CHECKING:
    from saccade.mil.classifier import SlideClassifier as SlideClassifier

__all__ = [
    "ABMIL",
    "ACMILGA",
    "ACMILMHA",
    "CLAMMB",
    "CLAMSB",
    "DSMIL",
    "Bag",
    "Encoder",
    "HeatmapOptions",
    "Localization",
    "MILModel",
    "MILOutput",
    "MaxPooling",
    "MeanPooling",
    "Polygon",
    "ScoreMaps",
    "Slide",
    "SlideClassifier",
    "TileGrid",
    "TileOptions",
    "Tissue",
    "TissueOptions",
    "TrainedClassifier",
    "TransMIL",
    "attention_entropy_maximization",
    "create_model",
    "draw_heatmap",
    "draw_heatmaps",
    "extract",
    "find_bags",
    "find_slides",
    "find_tissue",
    "lesion_localization",
    "lesion_shares",
    "load_bag",
    "load_bags",
    "load_classifier",
    "load_encoder",
    "load_model",
    "load_scores",
    "make_grid",
    "models",
    "normalize_scores",
    "predict_bags",
    "save_bag",
    "save_clam",
    "save_trident",
    "tile_map",
    "wrap_model",
]


def __getattr__(name: str) -> object:
    """Look up what needs Lightning on first use: reading slides must not import it."""
    if name != "SlideClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("saccade.mil.classifier").SlideClassifier
