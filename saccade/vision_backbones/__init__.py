"""Image models: timm's and our own, registered in timm by importing this package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import saccade.vision_backbones.biformer  # registers its models
import saccade.vision_backbones.fan  # registers its models
import saccade.vision_backbones.overlock  # registers its models
import saccade.vision_backbones.rvt  # registers its models  # noqa: F401

if TYPE_CHECKING:
    from saccade.vision_backbones.analysis import analyze as analyze
    from saccade.vision_backbones.attention_overlays import attend as attend
    from saccade.vision_backbones.classifier import ImageClassifier as ImageClassifier
    from saccade.vision_backbones.convert import convert_checkpoint as convert_checkpoint
    from saccade.vision_backbones.inference import classify as classify
    from saccade.vision_backbones.inference import embed as embed
    from saccade.vision_backbones.loading import LoadedModel as LoadedModel
    from saccade.vision_backbones.loading import ModelSource as ModelSource
    from saccade.vision_backbones.loading import create_model as create_model
    from saccade.vision_backbones.loading import load_model as load_model
    from saccade.vision_backbones.robust_classifier import RobustClassifier as RobustClassifier
    from saccade.vision_backbones.robustness import RobustnessSummary as RobustnessSummary
    from saccade.vision_backbones.robustness import evaluate_robustness as evaluate_robustness

# Looked up on first use: a worker process that decodes images needs neither Lightning nor matplotlib.
LAZY = {
    "ImageClassifier": "classifier",
    "LoadedModel": "loading",
    "ModelSource": "loading",
    "RobustClassifier": "robust_classifier",
    "RobustnessSummary": "robustness",
    "analyze": "analysis",
    "attend": "attention_overlays",
    "classify": "inference",
    "convert_checkpoint": "convert",
    "create_model": "loading",
    "embed": "inference",
    "evaluate_robustness": "robustness",
    "load_model": "loading",
}

__all__ = [
    "ImageClassifier",
    "LoadedModel",
    "ModelSource",
    "RobustClassifier",
    "RobustnessSummary",
    "analyze",
    "attend",
    "classify",
    "convert_checkpoint",
    "create_model",
    "embed",
    "evaluate_robustness",
    "load_model",
]


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
