"""Maps against fixations: log-likelihoods in bits, NSS, AUC and their forms in the literature, map against map.

A map that predicts the next fixation from the history gives the conditional metrics: one map and one fixation per row.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saccade.errors import ConfigError, DataError

__all__ = [
    "auc",
    "auc_shuffled",
    "auc_trapezoid",
    "correlation",
    "fixation_density",
    "information_gain",
    "kl_divergence",
    "nss",
    "similarity",
]

Floats = NDArray[np.float64]
EPSILON = 2.2204e-16  # of the literature's code, the float64 step at 1


def values_at(maps: ArrayLike, fixations: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Return maps ``(B, H, W)``, fixations ``(B, F, 2)`` and the maps' values there ``(B, F)``, NaN where padded."""
    grids = np.asarray(maps, np.float64)
    where = np.asarray(fixations, np.float64)
    if grids.ndim != 3 or where.ndim != 3 or where.shape[::2] != (len(grids), 2):
        raise ConfigError(f"Maps are (B, H, W) and fixations (B, F, 2), got {grids.shape} and {where.shape}.")
    if not np.isfinite(grids).all():
        raise DataError("A map holds NaN or infinite values.", reason="not_finite")
    known = ~(np.isnan(where[..., 0]) | np.isnan(where[..., 1]))
    whole = np.where(known[..., None], where, 0).astype(np.int64)
    height, width = grids.shape[1:]
    if (whole < 0).any() or (whole[..., 0] >= width).any() or (whole[..., 1] >= height).any():
        raise DataError(f"A fixation lies outside its map of {width} x {height}.", reason="off_image")
    rows = np.arange(len(grids))[:, None]
    return grids, where, np.where(known, grids[rows, whole[..., 1], whole[..., 0]], np.nan)


def mean_known(values: Floats) -> Floats:
    """Return means over the last axis without NaN, NaN where nothing is left."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means: Floats = np.where(known, values, 0).sum(-1) / known.sum(-1)
    return means


def information_gain(maps: ArrayLike, baseline: ArrayLike, fixations: ArrayLike) -> Floats:
    """Mean of ``log2(p + e) - log2(base + e)`` at the fixations, in bits per fixation (Kuemmerer et al. 2015).

    Args:
        maps: ``(B, H, W)`` densities that sum to 1.
        baseline: ``(B, H, W)`` densities of what is known without the image, e.g. of the task's training fixations.
        fixations: ``(B, F, 2)`` x, y in px of the map, NaN padded; cut to whole numbers.

    Returns:
        ``(B,)`` bits; ``e`` is 2.2204e-16.

    Raises:
        ConfigError: If the shapes do not fit.
        DataError: If a fixation lies outside, or a map is negative or not finite.

    Warns:
        UserWarning: If a map does not sum to 1; it is taken as it is.
    """
    grids, _, at_model = values_at(maps, fixations)
    base, _, at_base = values_at(baseline, fixations)
    for name, grid in (("map", grids), ("baseline", base)):
        if (grid < 0).any():
            raise DataError(f"A {name} has negative values, down to {grid.min():g}.", reason="not_a_density")
        total = grid.sum((1, 2))
        off = np.abs(total - 1) > 1e-3
        if off.any():
            number = int(off.argmax())
            message = (
                f"{int(off.sum())} of {len(total)} {name}s do not sum to 1, e.g. number {number}: {total[number]:g}."
            )
            warnings.warn(f"{message} Their bits are not comparable.", stacklevel=2)
    return mean_known(np.log2(at_model + EPSILON) - np.log2(at_base + EPSILON))


def fixation_density(fixations: ArrayLike, *, size: tuple[int, int], sigma: float) -> Floats:
    """Return the density of fixations, counts blurred by a Gaussian: the usual baseline of the information gain.

    Args:
        fixations: ``(F, 2)`` x, y in px of the map, cut to whole numbers; those outside are left out.
        size: Width and height of the map in px.
        sigma: Of the Gaussian, px; 24 at 512 x 320 in HAT. What it spreads beyond the border is mirrored.

    Returns:
        ``(H, W)``, sum 1.

    Raises:
        DataError: If no fixation lies inside.
    """
    from scipy.ndimage import gaussian_filter

    width, height = size
    x, y = np.floor(np.asarray(fixations, np.float64)).T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if not inside.any():
        raise DataError(f"None of {len(inside)} fixations lies inside {width} x {height}.", reason="off_image")
    counts = np.zeros((height, width))
    np.add.at(counts, (y[inside].astype(np.int64), x[inside].astype(np.int64)), 1.0)
    blurred: Floats = density(gaussian_filter(counts, sigma)[None])[0]
    return blurred


def spread(grids: Floats, *, unbiased: bool) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each map; 0 for one that is constant up to rounding."""
    mean = grids.mean((1, 2))
    deviation = grids.std((1, 2), ddof=1 if unbiased else 0)
    constant = deviation <= 1e-12 * np.abs(grids).max((1, 2))
    return mean, np.where(constant, 0.0, deviation)


def nss(maps: ArrayLike, fixations: ArrayLike, *, unbiased: bool = False) -> Floats:
    """Normalised scanpath saliency (Peters et al. 2005): mean of the standardised map at the fixations.

    Args:
        maps: ``(B, H, W)``.
        fixations: ``(B, F, 2)`` x, y in px of the map, NaN padded; cut to whole numbers.
        unbiased: Standard deviation with n - 1 (HAT's cNSS) in place of n (pysaliency).

    Returns:
        ``(B,)``; 0 for a constant map.

    Raises:
        ConfigError: If the shapes do not fit.
        DataError: If a fixation lies outside or a map is not finite.
    """
    grids, _, at = values_at(maps, fixations)
    mean, deviation = spread(grids, unbiased=unbiased)
    flat = deviation == 0
    standard = (at - mean[:, None]) / np.where(flat, 1.0, deviation)[:, None]
    return np.where(flat, 0.0, mean_known(standard))


def auc(maps: ArrayLike, fixations: ArrayLike, *, exclude_fixated: bool = False) -> Floats:
    """Area under the curve against all pixels: mean share of pixels below a fixation's value, half of equal ones.

    Maps, fixations and errors as of :func:`nss`. ``exclude_fixated`` compares with the pixels that no fixation is on,
    rather than with all.

    Returns:
        ``(B,)``, 0.5 for a constant map.
    """
    grids, where, at = values_at(maps, fixations)
    result = np.empty(len(grids))
    for number, grid in enumerate(grids):
        known = ~np.isnan(at[number])
        others = np.ones(grid.shape, bool)
        if exclude_fixated:
            columns, rows = where[number][known].astype(np.int64).T
            others[rows, columns] = False
        result[number] = rank_area(at[number][known], grid[others])
    return result


def rank_area(positives: Floats, negatives: Floats) -> float:
    """Return the probability that a positive exceeds a negative, half for equal ones (Mann and Whitney)."""
    if not positives.size or not negatives.size:
        return float("nan")
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    upto = np.searchsorted(ordered, positives, side="right")
    return float((below + upto).mean() / (2 * len(ordered)))


def auc_shuffled(maps: ArrayLike, fixations: ArrayLike, others: ArrayLike) -> Floats:
    """Shuffled AUC (Zhang et al. 2008): against the values at fixations of other images, which takes out centre bias.

    Maps, fixations and errors as of :func:`nss`; ``others`` are fixations of other images ``(B, G, 2)``, in px of this
    map, NaN padded.

    Returns:
        ``(B,)``, 0.5 for a constant map.
    """
    grids, _, at = values_at(maps, fixations)
    _, _, elsewhere = values_at(grids, others)
    return np.array(
        [rank_area(a[~np.isnan(a)], b[~np.isnan(b)]) for a, b in zip(at, elsewhere, strict=True)], np.float64
    )


def auc_trapezoid(maps: ArrayLike, fixations: ArrayLike) -> Floats:
    """AUC of HAT's cAUC: ``1 - f / 2``, f the share of other pixels at or above the fixation's value.

    One positive, trapezoids through (0, 0), (f, 1), (1, 1): a random map scores 0.75 on average, a constant one 0.5.
    Not comparable with :func:`auc`.

    Maps, fixations and errors as of :func:`nss`.

    Returns:
        ``(B,)``, the mean over fixations.
    """
    grids, _, at = values_at(maps, fixations)
    areas = np.full(at.shape, np.nan)
    for number, grid in enumerate(grids):
        ordered = np.sort(grid, axis=None)
        above = len(ordered) - np.searchsorted(ordered, at[number], side="left") - 1  # the fixation's own pixel
        areas[number] = np.where(np.isnan(at[number]), np.nan, 1 - above / max(len(ordered) - 1, 1) / 2)
    return mean_known(areas)


def map_pairs(maps: ArrayLike, empirical: ArrayLike) -> tuple[Floats, Floats]:
    """Return two stacks of maps of one shape."""
    ours, theirs = np.asarray(maps, np.float64), np.asarray(empirical, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 3:
        raise ConfigError(f"Both are (B, H, W), got {ours.shape} and {theirs.shape}.")
    return ours, theirs


def correlation(maps: ArrayLike, empirical: ArrayLike) -> Floats:
    """CC: Pearson correlation of map and map of fixations, ``(B,)``; 0 where one is constant.

    Args:
        maps: ``(B, H, W)``.
        empirical: ``(B, H, W)``, usually blurred fixations.

    Raises:
        ConfigError: If the shapes differ.
    """
    ours, theirs = map_pairs(maps, empirical)
    parts = []
    for grids in (ours, theirs):
        mean, deviation = spread(grids, unbiased=False)
        flat = (deviation == 0)[:, None, None]
        scale = np.where(flat, 1.0, deviation[:, None, None])
        parts.append(np.where(flat, 0.0, (grids - mean[:, None, None]) / scale))
    product: Floats = (parts[0] * parts[1]).mean((1, 2))
    return product


def similarity(maps: ArrayLike, empirical: ArrayLike) -> Floats:
    """SIM: sum of the smaller of the two values, maps normalised to sum 1 (Judd et al. 2012), ``(B,)``.

    Args:
        maps: ``(B, H, W)``, not negative.
        empirical: ``(B, H, W)``, not negative.

    Raises:
        ConfigError: If the shapes differ.
    """
    ours, theirs = (density(grids) for grids in map_pairs(maps, empirical))
    smaller: Floats = np.minimum(ours, theirs).sum((1, 2))
    return smaller


def density(grids: Floats) -> Floats:
    """Return maps divided by their sums."""
    normalised: Floats = grids / grids.sum((1, 2), keepdims=True)
    return normalised


def kl_divergence(maps: ArrayLike, empirical: ArrayLike, *, regularisation: str = "floor") -> Floats:
    """KL divergence of the map of fixations from the model's, in nats, ``(B,)``.

    Args:
        maps: ``(B, H, W)``, not negative.
        empirical: ``(B, H, W)``, not negative.
        regularisation: ``"floor"`` raises values to at least 1e-20 before the logarithm; ``"mit"`` is the MIT
            benchmark's ``sum q log(e + q / (p + e))`` with e = 2.2204e-16.

    Raises:
        ConfigError: If the shapes differ or the word is not known.
    """
    if regularisation not in ("floor", "mit"):
        raise ConfigError(f"regularisation is 'floor' or 'mit', got {regularisation!r}.")
    model, data = (density(grids) for grids in map_pairs(maps, empirical))
    if regularisation == "mit":
        terms = data * np.log(EPSILON + data / (model + EPSILON))
    else:
        model, data = (density(np.maximum(grids, 1e-20)) for grids in (model, data))
        terms = data * (np.log(data) - np.log(model))
    total: Floats = terms.sum((1, 2))
    return total
