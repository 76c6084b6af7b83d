"""Scanpath metrics, each for all pairs at once; what they need, return and mean stands in the registry."""

from __future__ import annotations

from saccade.gaze.metrics.clusters import Clusters, estimate_bandwidth, fit_clusters, mean_shift
from saccade.gaze.metrics.cross_recurrence import recurrence
from saccade.gaze.metrics.density_table import DensityFiles, DensityScore, density_table
from saccade.gaze.metrics.distances import (
    dtw,
    eyenalysis,
    frechet,
    hausdorff,
    scaled_time_delay_embedding,
    time_delay_embedding,
)
from saccade.gaze.metrics.evaluate import Comparison, Score, compare_paths, compare_viewers
from saccade.gaze.metrics.grids import scanmatch, string_edit_distance
from saccade.gaze.metrics.path_scores import path_scores
from saccade.gaze.metrics.registry import METRICS, Metric, find_metrics
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
from saccade.gaze.metrics.search_table import SearchScore, search_table
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
    "METRICS",
    "Clusters",
    "Comparison",
    "DensityFiles",
    "DensityScore",
    "Grouping",
    "Metric",
    "Score",
    "SearchScore",
    "auc",
    "auc_shuffled",
    "auc_trapezoid",
    "behaviour",
    "behaviour_difference",
    "compare_paths",
    "compare_viewers",
    "correlation",
    "density_table",
    "dtw",
    "estimate_bandwidth",
    "eyenalysis",
    "find_metrics",
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
    "path_scores",
    "probability_mismatch",
    "recurrence",
    "scaled_time_delay_embedding",
    "scanmatch",
    "scanpath_ratio",
    "search_table",
    "semantic_edit_distance",
    "semantic_sequence_score",
    "sequence_score",
    "similarity",
    "steps_to_target",
    "string_edit_distance",
    "target_fixation_probability",
    "time_delay_embedding",
]
