"""Every scanpath metric by name: what it needs, its parameters, where it comes from.

``saccade list metrics``, ``saccade gaze metrics``, the documentation and the tests walk this table. A variant of the
literature is an entry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, suggest
from saccade.gaze.metrics.clusters import Clusters, fit_clusters
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
from saccade.gaze.metrics.search import length_error
from saccade.gaze.metrics.strings import (
    fixation_edit_distance,
    object_edit_distance,
    object_sequence_score,
    semantic_edit_distance,
    semantic_sequence_score,
    sequence_score,
)
from saccade.gaze.metrics.vectors import Grouping, multimatch
from saccade.gaze.scanpath import ScanpathSet

__all__ = ["METRICS", "Context", "Metric", "find_metrics"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Context:
    """What a comparison knows beside the paths.

    Args:
        human: All human paths; regions of images come from them.
        maps: Labels of pixels by image, for the semantic metrics.
        pixels_per_degree: Distances are then in degrees, and the radius of recurrence is 2 degrees.
    """

    human: ScanpathSet
    maps: Mapping[str, NDArray[np.integer]] | None = None
    pixels_per_degree: float | None = None

    @cached_property
    def clusters(self) -> Clusters:
        """Regions of all images, found when first asked for."""
        return fit_clusters(self.human)

    @property
    def radius(self) -> float:
        """Radius of recurrence in px."""
        return 64.0 if self.pixels_per_degree is None else 2 * self.pixels_per_degree


@dataclass(frozen=True, eq=False)
class Metric:
    """One comparison of two scanpaths.

    Args:
        name: Word for the command line; its columns begin with it.
        compare: From predicted paths, human paths (P each) and the context, ``(P,)`` or ``(P, C)``.
        definition: Parameters and formula, one line.
        source: Paper.
        parts: Names of the C columns; none where there is one.
        best: ``"high"``, ``"low"``, or ``""`` for a description.
        needs: Of ``"size", "duration", "objects", "maps"``.
        in_pixels: A distance in px, reported in degrees where pixels per degree are known.
        symmetric: Exchanging the two changes nothing.
        within_image: Compares paths of one image only.
    """

    name: str
    compare: Callable[[ScanpathSet, ScanpathSet, Context], Floats]
    definition: str
    source: str
    parts: tuple[str, ...] = ()
    best: str = "high"
    needs: tuple[str, ...] = ()
    in_pixels: bool = False
    symmetric: bool = True
    within_image: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its columns in tables."""
        return tuple(f"{self.name}_{part}" for part in self.parts) or (self.name,)

    def lacks(self, *sets: ScanpathSet, context: Context) -> str:
        """Return what the metric needs and the paths do not have, or an empty string."""
        known = {
            "size": all(not np.isnan(s.width).any() and not np.isnan(s.height).any() for s in sets),
            "duration": all(s.duration is not None and not np.isnan(s.duration).any() for s in sets),
            "objects": all(s.objects is not None for s in sets),
            "maps": context.maps is not None,
        }
        words = {"size": "image sizes", "maps": "label maps", "duration": "durations"}
        return ", ".join(words.get(need, need) for need in self.needs if not known[need])


MATCHES = ("shape", "direction", "length", "position", "duration")
RECURRENCE = ("rec", "det", "lam", "corm")
LCS = "longest common subsequence / longer length"
REGIONS = "regions by mean shift over the image's human fixations (factors 0.2 to 1.8 of the estimated bandwidth)"
WARP = "sum of distances along the best monotone alignment"

METRICS: tuple[Metric, ...] = (
    Metric(
        "scanmatch",
        lambda a, b, _: scanmatch(a, b),
        "16 x 12 cells, threshold 3.5, gap 0, each fixation once",
        "Cristino et al. 2010",
        needs=("size",),
    ),
    Metric(
        "scanmatch_time",
        lambda a, b, _: scanmatch(a, b, bin_s=0.05),
        "16 x 12 cells, threshold 3.5, gap 0, 50 ms bins",
        "Cristino et al. 2010; settings of Chen et al. 2021",
        needs=("size", "duration"),
    ),
    Metric(
        "multimatch",
        lambda a, b, _: multimatch(a, b),
        "no grouping; NaN below 3 fixations",
        "Dewhurst et al. 2012",
        parts=MATCHES,
        needs=("size",),
        symmetric=False,
    ),
    Metric(
        "multimatch_grouped",
        lambda a, b, _: multimatch(a, b, grouping=Grouping()),
        "grouped by 45 degrees, 0.3 s, 100 px; NaN below 3 fixations",
        "Dewhurst et al. 2012",
        parts=MATCHES,
        needs=("size", "duration"),
        symmetric=False,
    ),
    Metric(
        "multimatch_padded",
        lambda a, b, _: multimatch(a, b, short="pad")[:, :4],
        "as visual-search code has it: paths below 3 fixations padded at (1, 1), no duration",
        "Yang et al. 2020, code",
        parts=MATCHES[:4],
        needs=("size",),
        symmetric=False,
    ),
    Metric(
        "sequence_score",
        lambda a, b, context: sequence_score(a, b, context.clusters),
        f"{LCS}; {REGIONS}",
        "Yang et al. 2020",
        within_image=True,
    ),
    Metric(
        "sequence_score_time",
        lambda a, b, context: sequence_score(a, b, context.clusters, bin_s=0.05),
        f"{LCS}, labels repeated every 50 ms; {REGIONS}",
        "Mondal et al. 2023",
        needs=("duration",),
        within_image=True,
    ),
    Metric(
        "fed",
        lambda a, b, context: fixation_edit_distance(a, b, context.clusters),
        f"Levenshtein distance; {REGIONS}",
        "Mondal et al. 2023",
        best="low",
        within_image=True,
    ),
    Metric(
        "fed_time",
        lambda a, b, context: fixation_edit_distance(a, b, context.clusters, bin_s=0.05),
        f"Levenshtein distance, labels repeated every 50 ms; {REGIONS}",
        "Mondal et al. 2023",
        best="low",
        needs=("duration",),
        within_image=True,
    ),
    Metric(
        "semantic_sequence_score",
        lambda a, b, context: semantic_sequence_score(a, b, context.maps or {}),
        f"{LCS}; labels of the pixel fixated",
        "Yang et al. 2022",
        needs=("maps",),
        within_image=True,
    ),
    Metric(
        "semantic_fed",
        lambda a, b, context: semantic_edit_distance(a, b, context.maps or {}),
        "Levenshtein distance; labels of the pixel fixated",
        "Mondal et al. 2023",
        best="low",
        needs=("maps",),
        within_image=True,
    ),
    Metric(
        "object_sequence_score",
        lambda a, b, _: object_sequence_score(a, b),
        f"{LCS}; the fixated objects",
        "Fang et al. 2024 (OAT)",
        needs=("objects",),
        within_image=True,
    ),
    Metric(
        "object_edit_distance",
        lambda a, b, _: object_edit_distance(a, b),
        "Levenshtein distance; the fixated objects",
        "Fang et al. 2024 (OAT)",
        best="low",
        needs=("objects",),
        within_image=True,
    ),
    Metric(
        "sed",
        lambda a, b, _: string_edit_distance(a, b),
        "Levenshtein distance, 5 x 5 cells",
        "Brandt and Stark 1997",
        best="low",
        needs=("size",),
    ),
    *(
        Metric(
            f"tde_{k}",
            lambda a, b, _, k=k: time_delay_embedding(a, b, k=k),  # type: ignore[misc]
            f"mean distance of the prediction's {k}-point windows to the nearest human one",
            "Wang et al. 2011",
            best="low",
            in_pixels=True,
            symmetric=False,
        )
        for k in (1, 2, 3)
    ),
    Metric(
        "stde",
        lambda a, b, _: scaled_time_delay_embedding(a, b),
        "mean of exp(-TDE_k) over all k, coordinates over max(width, height)",
        "Wang et al. 2011; FixaTons",
        needs=("size",),
        symmetric=False,
    ),
    Metric("dtw", lambda a, b, _: dtw(a, b), WARP, "Berndt and Clifford 1994", best="low", in_pixels=True),
    Metric(
        "frechet",
        lambda a, b, _: frechet(a, b),
        "largest distance along the best monotone alignment (discrete)",
        "Eiter and Mannila 1994",
        best="low",
        in_pixels=True,
    ),
    Metric(
        "hausdorff",
        lambda a, b, _: hausdorff(a, b),
        "farthest distance to the nearest fixation of the other, either way",
        "Huttenlocher et al. 1993",
        best="low",
        in_pixels=True,
    ),
    Metric(
        "eyenalysis",
        lambda a, b, _: eyenalysis(a, b),
        "sum of nearest distances both ways / longer length",
        "Mathot et al. 2012",
        best="low",
        in_pixels=True,
    ),
    Metric(
        "recurrence",
        lambda a, b, context: recurrence(a, b, radius=context.radius),
        "radius 64 px, or 2 degrees where pixels per degree are known; lines of 2 points",
        "Anderson et al. 2015",
        parts=RECURRENCE,
        best="",
        symmetric=False,
    ),
    Metric(
        "length_error",
        lambda a, b, _: length_error(a, b).astype(np.float64),
        "difference of the numbers of fixations",
        "-",
        best="low",
    ),
)


def find_metrics(names: Sequence[str] | None = None) -> tuple[Metric, ...]:
    """Return metrics by name, all for ``None``.

    Raises:
        ConfigError: If one is not known.
    """
    known = {metric.name: metric for metric in METRICS}
    if names is None:
        return METRICS
    for name in names:
        if name not in known:
            raise ConfigError(f"Unknown metric {name!r}.{suggest(name, known)} All: saccade list metrics")
    return tuple(known[name] for name in dict.fromkeys(names))
