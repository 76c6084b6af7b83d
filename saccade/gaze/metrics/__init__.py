"""Scanpath metrics, each for all pairs at once; what they need, return and mean stands in the registry."""

from __future__ import annotations

from saccade.gaze.metrics.clusters import Clusters, estimate_bandwidth, fit_clusters, mean_shift
from saccade.gaze.metrics.cross_recurrence import recurrence
from saccade.gaze.metrics.distances import (
    dtw,
    eyenalysis,
    frechet,
    hausdorff,
    scaled_time_delay_embedding,
    time_delay_embedding,
)
from saccade.gaze.metrics.grids import scanmatch, string_edit_distance
from saccade.gaze.metrics.saliency import (
    auc,
    auc_shuffled,
    auc_trapezoid,
    correlation,
    fixation_density,
    information_gain,
    kl_divergence,
    nss,
    similarity,
)
from saccade.gaze.metrics.search import (
    BEHAVIOURS,
    behaviour,
    behaviour_difference,
    length_error,
    probability_mismatch,
    scanpath_ratio,
    steps_to_target,
    target_fixation_probability,
)
from saccade.gaze.metrics.strings import (
    fixation_edit_distance,
    object_edit_distance,
    object_sequence_score,
    semantic_edit_distance,
    semantic_sequence_score,
    sequence_score,
)
from saccade.gaze.metrics.vectors import Grouping, multimatch

__all__ = [
    "BEHAVIOURS",
    "Clusters",
    "Grouping",
    "auc",
    "auc_shuffled",
    "auc_trapezoid",
    "behaviour",
    "behaviour_difference",
    "correlation",
    "dtw",
    "estimate_bandwidth",
    "eyenalysis",
    "fit_clusters",
    "fixation_density",
    "fixation_edit_distance",
    "frechet",
    "hausdorff",
    "information_gain",
    "kl_divergence",
    "length_error",
    "mean_shift",
    "multimatch",
    "nss",
    "object_edit_distance",
    "object_sequence_score",
    "probability_mismatch",
    "recurrence",
    "scaled_time_delay_embedding",
    "scanmatch",
    "scanpath_ratio",
    "semantic_edit_distance",
    "semantic_sequence_score",
    "sequence_score",
    "similarity",
    "steps_to_target",
    "string_edit_distance",
    "target_fixation_probability",
    "time_delay_embedding",
]
