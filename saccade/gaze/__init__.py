"""Gaze: scanpath records, their metrics, and models that predict them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.gaze.baselines import CentreBias as CentreBias
    from saccade.gaze.baselines import NearestObjects as NearestObjects
    from saccade.gaze.baselines import RandomObjects as RandomObjects
    from saccade.gaze.baselines import SalientObjects as SalientObjects
    from saccade.gaze.bottom_up import object_saliency as object_saliency
    from saccade.gaze.bottom_up import spectral_residual as spectral_residual
    from saccade.gaze.convert import convert_oat as convert_oat
    from saccade.gaze.crops import cut_crops as cut_crops
    from saccade.gaze.decoding import DecodedPaths as DecodedPaths
    from saccade.gaze.decoding import PathModel as PathModel
    from saccade.gaze.decoding import beam_search as beam_search
    from saccade.gaze.decoding import greedy as greedy
    from saccade.gaze.decoding import log_prob as log_prob
    from saccade.gaze.decoding import sample as sample
    from saccade.gaze.fixation_regressor import FixationRegressor as FixationRegressor
    from saccade.gaze.fixation_regressor import RegressedFixations as RegressedFixations
    from saccade.gaze.fixation_regressor import fit_fixation_regressor as fit_fixation_regressor
    from saccade.gaze.formats import read_scanpaths as read_scanpaths
    from saccade.gaze.formats import write_scanpaths as write_scanpaths
    from saccade.gaze.loading import LoadedPredictor as LoadedPredictor
    from saccade.gaze.loading import load_predictor as load_predictor
    from saccade.gaze.metrics import multimatch as multimatch
    from saccade.gaze.oat import OAT as OAT
    from saccade.gaze.object_boxes import ObjectBoxes as ObjectBoxes
    from saccade.gaze.object_boxes import boxes_by_detector as boxes_by_detector
    from saccade.gaze.object_boxes import boxes_on_grid as boxes_on_grid
    from saccade.gaze.object_boxes import read_boxes as read_boxes
    from saccade.gaze.object_features import FeatureFile as FeatureFile
    from saccade.gaze.object_features import ObjectEncoder as ObjectEncoder
    from saccade.gaze.object_features import encode_objects as encode_objects
    from saccade.gaze.objects import assign_objects as assign_objects
    from saccade.gaze.plotting import animate_scanpath as animate_scanpath
    from saccade.gaze.plotting import draw_heatmap as draw_heatmap
    from saccade.gaze.plotting import draw_scanpaths as draw_scanpaths
    from saccade.gaze.plotting import fixation_map as fixation_map
    from saccade.gaze.prediction import Query as Query
    from saccade.gaze.prediction import Strategy as Strategy
    from saccade.gaze.prediction import predict_scanpaths as predict_scanpaths
    from saccade.gaze.prediction import read_queries as read_queries
    from saccade.gaze.predictor import ScanpathPredictor as ScanpathPredictor
    from saccade.gaze.scanpath import Scanpath as Scanpath
    from saccade.gaze.scanpath import ScanpathSet as ScanpathSet
    from saccade.gaze.scenes import SceneBatch as SceneBatch
    from saccade.gaze.scenes import box_positions as box_positions
    from saccade.gaze.scenes import grid_boxes as grid_boxes
    from saccade.gaze.scenes import grid_scene as grid_scene
    from saccade.gaze.scenes import parse_grid as parse_grid
    from saccade.gaze.scenes import stack_scenes as stack_scenes
    from saccade.gaze.splits import find_leaks as find_leaks
    from saccade.gaze.splits import split_scanpaths as split_scanpaths
    from saccade.gaze.training import path_loss as path_loss
    from saccade.gaze.trials import Trial as Trial
    from saccade.gaze.trials import collate_trials as collate_trials
    from saccade.gaze.trials import lay_grid as lay_grid
    from saccade.gaze.trials import recordings_of as recordings_of
    from saccade.gaze.trials import scanpaths_of as scanpaths_of
    from saccade.gaze.trials import scene_of as scene_of
    from saccade.gaze.trials import trials_of as trials_of
    from saccade.gaze.validation import Notice as Notice
    from saccade.gaze.validation import notices as notices

# Looked up on first use: reading recordings needs no torch, and a model no file formats.
LAZY = {
    "OAT": "oat",
    "CentreBias": "baselines",
    "DecodedPaths": "decoding",
    "FeatureFile": "object_features",
    "FixationRegressor": "fixation_regressor",
    "LoadedPredictor": "loading",
    "NearestObjects": "baselines",
    "Notice": "validation",
    "ObjectBoxes": "object_boxes",
    "ObjectEncoder": "object_features",
    "PathModel": "decoding",
    "Query": "prediction",
    "RandomObjects": "baselines",
    "RegressedFixations": "fixation_regressor",
    "SalientObjects": "baselines",
    "Scanpath": "scanpath",
    "ScanpathPredictor": "predictor",
    "ScanpathSet": "scanpath",
    "SceneBatch": "scenes",
    "Strategy": "prediction",
    "Trial": "trials",
    "animate_scanpath": "plotting",
    "assign_objects": "objects",
    "beam_search": "decoding",
    "box_positions": "scenes",
    "boxes_by_detector": "object_boxes",
    "boxes_on_grid": "object_boxes",
    "collate_trials": "trials",
    "convert_oat": "convert",
    "cut_crops": "crops",
    "draw_heatmap": "plotting",
    "draw_scanpaths": "plotting",
    "encode_objects": "object_features",
    "find_leaks": "splits",
    "fit_fixation_regressor": "fixation_regressor",
    "fixation_map": "plotting",
    "greedy": "decoding",
    "grid_boxes": "scenes",
    "grid_scene": "scenes",
    "lay_grid": "trials",
    "load_predictor": "loading",
    "log_prob": "decoding",
    "multimatch": "metrics",
    "notices": "validation",
    "object_saliency": "bottom_up",
    "parse_grid": "scenes",
    "path_loss": "training",
    "predict_scanpaths": "prediction",
    "read_boxes": "object_boxes",
    "read_queries": "prediction",
    "read_scanpaths": "formats",
    "recordings_of": "trials",
    "sample": "decoding",
    "scanpaths_of": "trials",
    "scene_of": "trials",
    "spectral_residual": "bottom_up",
    "split_scanpaths": "splits",
    "stack_scenes": "scenes",
    "trials_of": "trials",
    "write_scanpaths": "formats",
}

__all__ = [
    "OAT",
    "CentreBias",
    "DecodedPaths",
    "FeatureFile",
    "FixationRegressor",
    "LoadedPredictor",
    "NearestObjects",
    "Notice",
    "ObjectBoxes",
    "ObjectEncoder",
    "PathModel",
    "Query",
    "RandomObjects",
    "RegressedFixations",
    "SalientObjects",
    "Scanpath",
    "ScanpathPredictor",
    "ScanpathSet",
    "SceneBatch",
    "Strategy",
    "Trial",
    "animate_scanpath",
    "assign_objects",
    "beam_search",
    "box_positions",
    "boxes_by_detector",
    "boxes_on_grid",
    "collate_trials",
    "convert_oat",
    "cut_crops",
    "draw_heatmap",
    "draw_scanpaths",
    "encode_objects",
    "find_leaks",
    "fit_fixation_regressor",
    "fixation_map",
    "greedy",
    "grid_boxes",
    "grid_scene",
    "lay_grid",
    "load_predictor",
    "log_prob",
    "multimatch",
    "notices",
    "object_saliency",
    "parse_grid",
    "path_loss",
    "predict_scanpaths",
    "read_boxes",
    "read_queries",
    "read_scanpaths",
    "recordings_of",
    "sample",
    "scanpaths_of",
    "scene_of",
    "spectral_residual",
    "split_scanpaths",
    "stack_scenes",
    "trials_of",
    "write_scanpaths",
]


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
