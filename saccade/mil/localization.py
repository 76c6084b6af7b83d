"""How well attention finds a lesion: outlines that are known, against the tiles a model looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, DataError, ShapeError
from saccade.mil.tissue import Polygon, Tissue, rasterize

__all__ = ["Localization", "lesion_localization", "lesion_shares"]

PIXELS_PER_TILE = 16  # of the mask that outlines are drawn on


@dataclass(frozen=True)
class Localization:
    """Agreement of scores with a lesion on one slide.

    Args:
        average_precision: Area under the precision-recall curve of the tiles' area ranked by score.
        lesion_share: Of the area of the tiles: what a random ranking has as average precision.
        iou: Area of the lesion in chosen tiles, over the area that is lesion or in chosen tiles.
        random_iou: What as many tiles chosen at random have, in place of the areas their expectations.
        chosen: Number of tiles whose score is above the threshold.
        threshold: In multiples of the mean score.
        n_tiles: Number of tiles.
    """

    average_precision: float
    lesion_share: float
    iou: float
    random_iou: float
    chosen: int
    threshold: float
    n_tiles: int


def lesion_shares(
    coords: NDArray[Any], tile_size: float | tuple[float, float], polygons: Sequence[Polygon]
) -> NDArray[np.float64]:
    """Return the share of each tile that lies inside outlines.

    Args:
        coords: ``(N, 2)``, x and y of the top-left corners in level-0 pixels.
        tile_size: Of a tile in level-0 pixels, one number or width and height.
        polygons: In level-0 pixels; drawn on a mask of 16 pixels a tile.

    Returns:
        ``(N,)``, 0 to 1.

    Raises:
        ShapeError: If coordinates are not ``(N, 2)``.
    """
    places = np.asarray(coords)
    if places.ndim != 2 or places.shape[1] != 2:
        raise ShapeError(f"coords must be (N, 2), got {places.shape}.")
    if len(places) == 0:
        return np.zeros(0)
    width, height = tile_size if isinstance(tile_size, tuple) else (tile_size, tile_size)
    scale_x, scale_y = width / PIXELS_PER_TILE, height / PIXELS_PER_TILE
    columns, rows = (np.ceil(places.max(0) / (scale_x, scale_y)).astype(int) + PIXELS_PER_TILE).tolist()
    mask = rasterize(tuple(polygons), (rows, columns), scale_x, scale_y)
    return Tissue(mask, scale_x, scale_y).coverage(places, width, height)


def lesion_localization(scores: NDArray[Any], shares: NDArray[Any], *, threshold: float = 1.0) -> Localization:
    """Compare scores of tiles with the lesion in them.

    Area counts, not tiles: a tile of which a third is lesion is a third of a hit and two thirds of a false alarm, so
    that no least share has to be chosen.

    Args:
        scores: ``(N,)``, not negative, such as a bag's attention.
        shares: ``(N,)``, of each tile that is lesion; see :func:`lesion_shares`.
        threshold: A tile is chosen if its score is more than this many times the mean; 1 is an attention of 1 / N.

    Raises:
        ConfigError: If the threshold is negative.
        DataError: If no tile holds any lesion, or a score is negative or not finite; the reasons are ``"no_lesion"``
            and ``"bad_scores"``.
        ShapeError: If the two differ in shape.

    Source:
        Average precision as in scikit-learn, with areas as weights. Attention above 1 / N is how CLAM (Lu et al. 2021)
        binarises heatmaps.
    """
    from sklearn.metrics import average_precision_score

    values, lesion = np.asarray(scores, np.float64), np.asarray(shares, np.float64)
    if values.ndim != 1 or values.shape != lesion.shape:
        raise ShapeError(f"scores and shares must be (N,) both, got {values.shape} and {lesion.shape}.")
    if threshold < 0:
        raise ConfigError(f"threshold must be at least 0 times the mean, got {threshold}.")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise DataError("scores must be finite and not negative, as attention is.", reason="bad_scores")
    if not lesion.sum() > 0:
        raise DataError("no tile holds any lesion, so there is nothing to find on this slide.", reason="no_lesion")
    chosen = values > threshold * values.mean()
    count, total, found = int(chosen.sum()), lesion.sum(), lesion[chosen].sum()
    by_chance = total * count / len(values)
    weights = np.concatenate([lesion, 1 - lesion])
    truth = np.repeat([1, 0], len(values))
    return Localization(
        average_precision=float(average_precision_score(truth, np.tile(values, 2), sample_weight=weights)),
        lesion_share=float(lesion.mean()),
        iou=float(found / (count + total - found)),
        random_iou=float(by_chance / (count + total - by_chance)),
        chosen=count,
        threshold=threshold,
        n_tiles=len(values),
    )
