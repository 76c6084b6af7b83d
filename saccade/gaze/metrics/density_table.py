"""Predicted densities scored at the fixations that came next, beside a density that knows nothing of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saccade.errors import ConfigError, DataError
from saccade.gaze.metrics.evaluate import bootstrap
from saccade.gaze.metrics.saliency import auc, auc_trapezoid, fixation_density, information_gain, nss
from saccade.gaze.scanpath import Scanpath, ScanpathSet
from saccade.gaze.validation import outside_image

__all__ = ["DensityFiles", "DensityScore", "density_table"]

Floats = NDArray[np.float64]
Densities = Callable[[Scanpath], Floats | None]
BASELINE_SIGMA = 24 / 512  # of the map's width, as HAT's at 512 x 320


@dataclass(frozen=True)
class DensityScore:
    """One measure of densities.

    Args:
        name: ``"information_gain"`` (bits per fixation over the baseline), ``"nss"``, ``"nss_unbiased"`` (HAT's cNSS),
            ``"auc"`` (pysaliency's) or ``"auc_trapezoid"`` (HAT's cAUC).
        mean: Over all fixations but the first of each path, which is given.
        low: Lower end of the 95 % bootstrap interval, over images.
        high: Upper end.
        n: Fixations.
        baseline: The same of the baseline density.
    """

    name: str
    mean: float
    low: float
    high: float
    n: int
    baseline: float


@dataclass(frozen=True)
class DensityFiles:
    """Densities in ``.npy`` files of a folder.

    A path takes the first of ``IMAGE.TASK.SUBJECT.npy``, ``IMAGE.SUBJECT.npy``, ``IMAGE.TASK.npy`` and ``IMAGE.npy``
    that exists, the image without its extension.

    Args:
        folder: Where they are.

    Raises:
        ConfigError: If there is none.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not any(self.folder.glob("*.npy")):
            raise ConfigError(f"{self.folder} has no .npy file of densities.")

    def __call__(self, path: Scanpath) -> Floats | None:
        """Return the densities for a path, ``None`` if there is no file."""
        image, task = Path(path.image).stem, path.task or ""
        for name in (f"{image}.{task}.{path.subject}", f"{image}.{path.subject}", f"{image}.{task}", image):
            file = self.folder / f"{name}.npy"
            if file.is_file():
                return np.asarray(np.load(file), np.float64)
        return None


def density_table(
    human: ScanpathSet,
    densities: Densities,
    *,
    baseline: ScanpathSet | None = None,
    sigma: float | None = None,
    seed: int = 0,
) -> list[DensityScore]:
    """Score densities at human fixations.

    Args:
        human: Paths with image sizes, all fixations inside their image.
        densities: Gives for a path ``(H, W)``, the same for all its fixations, or ``(F, H, W)`` conditional on history:
            map k is the density of fixation k + 1 after the k before it, one for each of the F fixations (the first is
            not scored) or for all but the first. Each map sums to 1; its size may differ from the image's. ``None``:
            the path is left out.
        baseline: Recordings whose fixations make the baseline, e.g. those of training; ``None``: the other images of
            ``human``. Of the same task where there are any; first fixations do not count.
        sigma: Blur of the baseline in px of the map; ``None``: 24/512 of its width.
        seed: Of the intervals.

    Raises:
        ConfigError: If no path has densities, or there is nothing to make a baseline of.
        DataError: If densities do not fit a path, or a fixation lies outside its image.
    """
    sizes = human.sizes()
    outside = outside_image(human)
    if outside.any():
        first = int(outside.argmax())
        wrong = "outside the image, where a density is not defined; off_image='clip' or 'drop' reads it otherwise"
        human.places.fail(int(human.path_index[first]), "x, y", wrong, "off_image", first)
    scores: list[Floats] = []
    owners: list[str] = []
    known: dict[tuple[str, str | None, tuple[int, int]], Floats] = {}
    for number, path in enumerate(human):
        found = densities(path)
        if found is None or len(path) < 2:
            continue
        maps = conditional(found, path)
        height, width = maps.shape[1:]
        at = np.stack([path.x, path.y], -1)[1:, None] * ([width, height] / sizes[number])
        key = (path.image, path.task, (width, height))
        if key not in known:
            known[key] = image_free_density(human if baseline is None else baseline, baseline is None, key, sigma)
        base = np.broadcast_to(known[key], maps.shape)
        scores.append(np.stack([measures(maps, base, at), measures(base, base, at)], -1))
        owners += [path.image] * len(maps)
    if not scores:
        raise ConfigError("No path of two fixations has densities: files are named after image, task and subject.")
    values = np.concatenate(scores)
    low, high = bootstrap(values[..., 0], np.array(owners, object), seed)
    means = values.mean(0)
    return [
        DensityScore(name, float(means[i, 0]), float(low[i]), float(high[i]), len(values), float(means[i, 1]))
        for i, name in enumerate(("information_gain", "nss", "nss_unbiased", "auc", "auc_trapezoid"))
    ]


def conditional(found: Floats, path: Scanpath) -> Floats:
    """Return a map for each fixation but the first, ``(n - 1, H, W)``."""
    following = len(path) - 1
    if found.ndim == 2:
        return np.broadcast_to(found, (following, *found.shape))
    if found.ndim != 3 or len(found) not in (following, following + 1):
        message = f"a path of {len(path)} fixations takes densities (H, W), ({following}, H, W) or ({len(path)}, H, W)"
        raise DataError(f"{path!r}: {message}, got {found.shape}.", reason="bad_densities")
    return found[len(found) - following :]


def measures(maps: Floats, base: Floats, at: Floats) -> Floats:
    """Return the five measures of each fixation, ``(F, 5)``."""
    return np.stack(
        [
            information_gain(maps, base, at),
            nss(maps, at),
            nss(maps, at, unbiased=True),
            auc(maps, at),
            auc_trapezoid(maps, at),
        ],
        -1,
    )


def image_free_density(
    paths: ScanpathSet, leave_out: bool, key: tuple[str, str | None, tuple[int, int]], sigma: float | None
) -> Floats:
    """Return the density of fixations on other images, ``(H, W)``."""
    image, task, size = key
    others = paths.filter(lambda path: path.image != image) if leave_out else paths
    same = others.filter(lambda path: path.task == task)
    chosen = same if len(same) else others
    later = np.ones(len(chosen.x), bool)
    later[chosen.offsets[:-1]] = False
    if not later.any():
        message = "a second fixation on another image is needed for the baseline; give --baseline"
        raise ConfigError(f"Densities on {image!r}: {message}.")
    scale = np.repeat(np.array(size) / chosen.sizes(), chosen.lengths, axis=0)
    places = (np.stack([chosen.x, chosen.y], -1) * scale)[later]
    return fixation_density(places, size=size, sigma=BASELINE_SIGMA * size[0] if sigma is None else sigma)
