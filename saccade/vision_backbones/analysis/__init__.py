"""What the attention heads of a vision transformer do, and what each is worth.

:func:`analyze` measures a folder of images and writes a report; its parts are here one by one.
"""

from saccade.vision_backbones.analysis.batch import analyze
from saccade.vision_backbones.analysis.layers import AttentionLayer, find_layers, watch_layers
from saccade.vision_backbones.analysis.measurement import HeadMeasurement
from saccade.vision_backbones.analysis.patterns import (
    Cluster,
    PatternMaps,
    PatternSummary,
    collect_patterns,
    summarise_patterns,
)
from saccade.vision_backbones.analysis.profile import AttentionProfile, attention_profile, pattern_label
from saccade.vision_backbones.analysis.pruning import HeadPruning, gate_gradients, mean_head_outputs

__all__ = [
    "AttentionLayer",
    "AttentionProfile",
    "Cluster",
    "HeadMeasurement",
    "HeadPruning",
    "PatternMaps",
    "PatternSummary",
    "analyze",
    "attention_profile",
    "collect_patterns",
    "find_layers",
    "gate_gradients",
    "mean_head_outputs",
    "pattern_label",
    "summarise_patterns",
    "watch_layers",
]
