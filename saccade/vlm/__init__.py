"""Interventions on the attention of Hugging Face models while they generate."""

from saccade.vlm.calibrate import GIFTLayers, find_sink_channels, select_gift_layers
from saccade.vlm.intervene import INTERVENTIONS, Intervening, intervene, make_intervention
from saccade.vlm.intervention import Intervention
from saccade.vlm.interventions import ACT, GIFT, PAI, VAF, VAR, VHR
from saccade.vlm.model_facts import ModelFacts, read_facts
from saccade.vlm.presets import MODEL_PRESETS, ModelPreset

__all__ = [
    "ACT",
    "GIFT",
    "INTERVENTIONS",
    "MODEL_PRESETS",
    "PAI",
    "VAF",
    "VAR",
    "VHR",
    "GIFTLayers",
    "Intervening",
    "Intervention",
    "ModelFacts",
    "ModelPreset",
    "find_sink_channels",
    "intervene",
    "make_intervention",
    "read_facts",
    "select_gift_layers",
]
