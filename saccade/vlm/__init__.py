"""Interventions on the attention of Hugging Face models while they generate."""

from saccade.vlm.act_heads import ACTHeads, find_act_heads
from saccade.vlm.answer_maps import AnswerMaps, map_answer
from saccade.vlm.answer_pictures import attend_answers, compare_answer, draw_answer_maps
from saccade.vlm.answer_run import AnswerPlan, generate_answers
from saccade.vlm.answering import Answer, Answerer, GenerationOptions
from saccade.vlm.calibrate import GIFTLayers, find_sink_channels, select_gift_layers
from saccade.vlm.contrastive import VCD, CoDa, ContrastRule, ImageGuidance, contrastive_generate, diffusion_noise
from saccade.vlm.image_grid import ImageGrid, find_image_grid, seen_picture
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
    "ACTHeads",
    "Answer",
    "AnswerMaps",
    "AnswerPlan",
    "Answerer",
    "CoDa",
    "ContrastRule",
    "GIFTLayers",
    "GenerationOptions",
    "ImageGrid",
    "ImageGuidance",
    "Intervening",
    "Intervention",
    "LoadedVLM",
    "ModelFacts",
    "ModelPreset",
    "Question",
    "attend_answers",
    "compare_answer",
    "contrastive_generate",
    "diffusion_noise",
    "draw_answer_maps",
    "find_act_heads",
    "find_image_grid",
    "find_sink_channels",
    "generate_answers",
    "intervene",
    "load_vlm",
    "make_intervention",
    "map_answer",
    "read_facts",
    "read_questions",
    "seen_picture",
    "select_gift_layers",
]
