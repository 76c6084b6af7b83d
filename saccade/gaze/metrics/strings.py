"""Scanpaths as strings of labels: sequence score and edit distance over regions, meanings or objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, DataError
from saccade.gaze.metrics.alignment import edit_distance, longest_common
from saccade.gaze.metrics.clusters import Clusters
from saccade.gaze.metrics.sequences import Sequences, as_pairs, in_bins
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = [
    "fixation_edit_distance",
    "object_edit_distance",
    "object_sequence_score",
    "semantic_edit_distance",
    "semantic_sequence_score",
    "sequence_score",
]

Floats = NDArray[np.float64]
Paths = Scanpath | ScanpathSet
Maps = Mapping[str, NDArray[np.integer]]


def sequence_score(
    predicted: Paths, human: Paths, clusters: Clusters, *, first: int | None = None, bin_s: float | None = None
) -> Floats:
    """SS (Yang et al. 2020): longest common subsequence of region labels over the length of the longer path.

    Args:
        predicted: P paths.
        human: P paths, each compared with the one of the same number.
        clusters: Regions of the images, from :func:`fit_clusters` over all human paths.
        first: Compare only this many first fixations of both.
        bin_s: Repeat each label ``floor(duration / bin_s)`` times, seconds (0.05 in Gazeformer); ``None`` counts each
            fixation once.

    Returns:
        ``(P,)`` between 0 and 1; NaN where no fixation lasts a bin. Symmetric.

    Raises:
        ConfigError: If the sets differ in size, or ``first`` or ``bin_s`` is not above 0.
        DataError: If an image has no regions, or a duration that is needed is not known.
    """
    return score(*labelled(predicted, human, clusters.label, first, bin_s))


def fixation_edit_distance(
    predicted: Paths, human: Paths, clusters: Clusters, *, first: int | None = None, bin_s: float | None = None
) -> Floats:
    """FED (Mondal et al. 2023): Levenshtein distance of region labels, not normalised.

    Arguments and errors as :func:`sequence_score`.

    Returns:
        ``(P,)`` edits, 0 for equal strings; NaN where no fixation lasts a bin. Symmetric.
    """
    return edit_distance(*labelled(predicted, human, clusters.label, first, bin_s))


def semantic_sequence_score(
    predicted: Paths, human: Paths, maps: Maps, *, first: int | None = None, bin_s: float | None = None
) -> Floats:
    """SemSS (Yang et al. 2022): as :func:`sequence_score` with what is seen as the label.

    Arguments, result and errors as there, with ``maps`` in place of regions: the label of every pixel by image name,
    ``(H, W)`` integers, read at ``(int(y), int(x))``, clipped to the map. An image without a map raises DataError.
    """
    return score(*labelled(predicted, human, lambda paths: semantic_labels(paths, maps), first, bin_s))


def semantic_edit_distance(
    predicted: Paths, human: Paths, maps: Maps, *, first: int | None = None, bin_s: float | None = None
) -> Floats:
    """SemFED: Levenshtein distance of what is seen. Arguments and errors as :func:`semantic_sequence_score`.

    Returns:
        ``(P,)`` edits, 0 for equal strings; NaN where no fixation lasts a bin. Symmetric.
    """
    return edit_distance(*labelled(predicted, human, lambda paths: semantic_labels(paths, maps), first, bin_s))


def object_sequence_score(predicted: Paths, human: Paths, *, first: int | None = None) -> Floats:
    """As :func:`sequence_score` with the index of the fixated object as the label (OAT, Fang et al. 2024).

    Arguments, result and errors as there; the paths have objects in place of regions, a path without raises DataError.
    """
    return score(*labelled(predicted, human, object_labels, first, None))


def object_edit_distance(predicted: Paths, human: Paths, *, first: int | None = None) -> Floats:
    """Levenshtein distance of object indices. Arguments and errors as :func:`object_sequence_score`.

    Returns:
        ``(P,)`` edits, 0 for equal strings. Symmetric.
    """
    return edit_distance(*labelled(predicted, human, object_labels, first, None))


def score(first: Sequences, second: Sequences) -> Floats:
    """Return common subsequence over the longer length, ``(P,)``; NaN where one is empty."""
    longer = np.maximum(first.lengths, second.lengths)
    return longest_common(first, second) / np.maximum(longer, 1)


def labelled(
    predicted: Paths,
    human: Paths,
    label: Callable[[ScanpathSet], Sequences],
    first: int | None,
    bin_s: float | None,
) -> list[Sequences]:
    """Return both sides as sequences of labels, cut and repeated as asked."""
    if (first is not None and first < 1) or (bin_s is not None and not bin_s > 0):
        raise ConfigError(f"first and bin_s must be above 0, got {first} and {bin_s}.")
    sequences = []
    for paths in as_pairs(predicted, human, duration=bin_s is not None):
        labels = label(paths)
        if bin_s is not None:
            counts = np.floor(in_bins(paths.durations(), bin_s)).astype(np.int64)
            labels = labels.repeated(counts)
        sequences.append(labels.first(first))
    return sequences


def semantic_labels(paths: ScanpathSet, maps: Maps) -> Sequences:
    """Look the fixations up in the maps of their images."""
    labels = np.empty(len(paths.x), np.int64)
    for (image,), members in paths.group_by("image").items():
        if image not in maps:
            name = paths.places.name(int(members[0]))
            raise DataError(f"{name}, image: there is no map of labels for {image!r}.", reason="no_map")
        at = paths.positions(members)
        height, width = maps[image].shape
        rows = np.clip(paths.y[at].astype(np.int64), 0, height - 1)
        columns = np.clip(paths.x[at].astype(np.int64), 0, width - 1)
        labels[at] = maps[image][rows, columns]
    return Sequences.cut(labels[None], paths.offsets)


def object_labels(paths: ScanpathSet) -> Sequences:
    """Return the fixated objects."""
    if paths.objects is None:
        paths.places.fail(0, "objects", "unknown; assign_objects finds them from boxes", "no_objects")
    return Sequences.cut(paths.objects[None], paths.offsets)
