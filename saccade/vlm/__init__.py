"""Interventions on the attention of Hugging Face models while they generate."""

from saccade.vlm.answering import Answer, Answerer, GenerationOptions, generate_answers
from saccade.vlm.calibrate import GIFTLayers, find_sink_channels, select_gift_layers
from saccade.vlm.contrastive import VCD, CoDa, ContrastRule, ImageGuidance, contrastive_generate, diffusion_noise
from saccade.vlm.intervene import INTERVENTIONS, Intervening, intervene, make_intervention
from saccade.vlm.intervention import Intervention
from saccade.vlm.interventions import ACT, GIFT, PAI, VAF, VAR, VHR
from saccade.vlm.loading import LoadedVLM, load_vlm
from saccade.vlm.model_facts import ModelFacts, read_facts
from saccade.vlm.presets import MODEL_PRESETS, ModelPreset
from saccade.vlm.questions import Question, read_questions

__all__ = [
    "ACT",
    "GIFT",
    "INTERVENTIONS",
    "MODEL_PRESETS",
    "PAI",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "Answer",
    "Answerer",
    "CoDa",
    "ContrastRule",
    "GIFTLayers",
    "GenerationOptions",
    "ImageGuidance",
    "Intervening",
    "Intervention",
    "LoadedVLM",
    "ModelFacts",
    "ModelPreset",
    "Question",
    "contrastive_generate",
    "diffusion_noise",
    "find_sink_channels",
    "generate_answers",
    "intervene",
    "load_vlm",
    "make_intervention",
    "read_facts",
    "read_questions",
    "select_gift_layers",
]
