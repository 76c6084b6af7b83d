"""Whole slides: bags of tiles, models that classify them, and where those models look."""

from saccade.mil.abmil import ABMIL
from saccade.mil.acmil import ACMILGA, ACMILMHA
from saccade.mil.aem import attention_entropy_maximization
from saccade.mil.clam import CLAMMB, CLAMSB
from saccade.mil.dsmil import DSMIL
from saccade.mil.instance_pooling import MaxPooling, MeanPooling
from saccade.mil.loading import load_model
from saccade.mil.model import MILModel, MILOutput, create_model, models
from saccade.mil.slide import Slide
from saccade.mil.tiles import TileGrid, TileOptions, make_grid
from saccade.mil.tissue import Polygon, Tissue, TissueOptions, find_tissue
from saccade.mil.transmil import TransMIL

__all__ = [
    "ABMIL",
    "ACMILGA",
    "ACMILMHA",
    "CLAMMB",
    "CLAMSB",
    "DSMIL",
    "MILModel",
    "MILOutput",
    "MaxPooling",
    "MeanPooling",
    "Polygon",
    "Slide",
    "TileGrid",
    "TileOptions",
    "Tissue",
    "TissueOptions",
    "TransMIL",
    "attention_entropy_maximization",
    "create_model",
    "find_tissue",
    "load_model",
    "make_grid",
    "models",
]
