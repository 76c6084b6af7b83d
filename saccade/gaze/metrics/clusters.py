"""Regions of an image found by mean shift over its human fixations, as the sequence score needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saccade.errors import DataError
from saccade.gaze.metrics.sequences import Sequences
from saccade.gaze.scanpath import ScanpathSet

__all__ = ["FACTORS", "Clusters", "ImageClusters", "estimate_bandwidth", "fit_clusters", "mean_shift"]

Floats = NDArray[np.float64]
FACTORS = (0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 1.8)


def estimate_bandwidth(points: Floats, *, quantile: float = 0.3) -> float:
    """Return the mean distance of a point to its ``quantile`` nearest neighbours' farthest, as scikit-learn does.

    Args:
        points: ``(n, 2)`` px.
        quantile: Share of the points that count as neighbours, the point itself included.
    """
    neighbours = max(1, int(len(points) * quantile))
    distance = np.sqrt(squared_distances(points, points))
    return float(np.partition(distance, neighbours - 1, axis=1)[:, neighbours - 1].mean())


def squared_distances(a: Floats, b: Floats) -> Floats:
    """Return squared distances of points, ``(n, m)``."""
    from scipy.spatial.distance import cdist

    squares: Floats = cdist(a, b, "sqeuclidean")
    return squares


def mean_shift(points: Floats, bandwidth: float, *, max_iterations: int = 300) -> Floats:
    """Return the cluster centres of mean shift with a flat kernel started at every point (Comaniciu and Meer 2002).

    All seeds move at once. A seed stops when it moves at most a thousandth of the bandwidth; of centres closer than the
    bandwidth the one with most points stays. The result is scikit-learn's ``MeanShift(bandwidth).fit``.

    Args:
        points: ``(n, 2)`` px.
        bandwidth: Radius in px, above 0.
        max_iterations: Most steps of a seed.

    Returns:
        ``(C, 2)`` centres, those with most points first.
    """
    seeds = points.copy()
    moving = np.arange(len(seeds))
    counts = np.zeros(len(seeds), np.int64)
    for iteration in range(max_iterations + 1):
        near = squared_distances(seeds[moving], points) <= bandwidth**2
        counts[moving] = near.sum(1)
        means = (near @ points) / counts[moving][:, None]
        step = np.sqrt(((means - seeds[moving]) ** 2).sum(1))
        seeds[moving] = means
        moving = moving[step > 1e-3 * bandwidth]
        if not moving.size or iteration == max_iterations:
            break
    # most points first, ties by larger coordinates, as sorting (count, centre) downwards gives
    order = np.lexsort((-seeds[:, 1], -seeds[:, 0], -counts))
    centres, unique = seeds[order], np.ones(len(seeds), bool)
    close = squared_distances(centres, centres) <= bandwidth**2
    for index in range(len(centres)):
        if unique[index]:
            unique[close[index]] = False
            unique[index] = True
    return centres[unique]


def nearest_centre(points: Floats, centres: Floats) -> NDArray[np.int64]:
    """Return the number of the centre nearest to each point, ``(n,)``; the first of equally near ones."""
    nearest: NDArray[np.int64] = squared_distances(points, centres).argmin(1)
    return nearest


@dataclass(frozen=True, eq=False)
class ImageClusters:
    """The regions of one image.

    Args:
        centres: ``(C, 2)`` px.
        bandwidth: Estimated from the fixations, px.
        factor: What of :data:`FACTORS` multiplied it.
        rates: Per factor, (transitions between clusters - transitions within) / clusters.
    """

    centres: Floats
    bandwidth: float
    factor: float
    rates: Floats


@dataclass(frozen=True, eq=False)
class Clusters:
    """Regions per image and task.

    Args:
        regions: By ``(image, task)``.
    """

    regions: Mapping[tuple[str, str | None], ImageClusters]

    def label(self, paths: ScanpathSet) -> Sequences:
        """Return for each fixation the number of the nearest centre of its image, as sequences of one number.

        Raises:
            DataError: If an image and task have no regions.
        """
        labels = np.empty(len(paths.x), np.int64)
        for key, members in paths.group_by("image", "task").items():
            region = self.regions.get(key)
            if region is None:
                message = f"{paths.places.name(int(members[0]))}, image, task: no human path of {key[0]!r}, {key[1]!r}"
                raise DataError(f"{message} to find regions with.", reason="no_clusters")
            at = paths.positions(members)
            labels[at] = nearest_centre(np.stack([paths.x[at], paths.y[at]], -1), region.centres)
        return Sequences.cut(labels[None], paths.offsets)


def fit_clusters(human: ScanpathSet) -> Clusters:
    """Find the regions of every image and task from all human fixations on it.

    Bandwidth by :func:`estimate_bandwidth`; mean shift with that times each of :data:`FACTORS`; of these the one whose
    labels have the best rate (transitions between clusters - transitions within) / clusters, the first on ties.

    Args:
        human: Paths of all viewers.
    """
    groups = human.group_by("image", "task")
    return Clusters({key: image_clusters(human, members) for key, members in groups.items()})


def image_clusters(human: ScanpathSet, members: NDArray[np.int64]) -> ImageClusters:
    """Find the regions of the image that the given paths look at."""
    at = human.positions(members)
    points = np.stack([human.x[at], human.y[at]], -1)
    lengths = human.lengths[members]
    inner = np.ones(len(at), bool)
    inner[np.cumsum(lengths) - 1] = False  # no transition from a path's last fixation
    inner = inner[:-1]
    estimated = estimate_bandwidth(points)
    centres, rates = [], []
    for factor in FACTORS:
        # all fixations in one place: any bandwidth gives the one cluster
        found = mean_shift(points, factor * estimated if estimated > 0 else 1.0)
        labels = nearest_centre(points, found)
        changes = (labels[1:] != labels[:-1])[inner]
        rates.append((changes.sum() - (~changes).sum()) / len(found))
        centres.append(found)
    best = int(np.argmax(rates))
    return ImageClusters(centres[best], estimated, FACTORS[best], np.array(rates))
