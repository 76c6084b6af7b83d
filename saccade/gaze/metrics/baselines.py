"""Chance: paths that know nothing of the image, for the scale of every score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saccade.gaze.objects import assign_objects
from saccade.gaze.scanpath import ScanpathSet

__all__ = ["other_images", "uniform_paths"]


def uniform_paths(human: ScanpathSet, *, seed: int = 0) -> ScanpathSet:
    """Return a path for each human one with its length and durations, fixations anywhere in the image alike.

    Args:
        human: P paths with image sizes.
        seed: Of the draws.

    Returns:
        P paths with the same image, task, subject and sample; objects by the boxes, where there are any.

    Raises:
        DataError: If an image size is not known.
    """
    size = np.repeat(human.sizes(), human.lengths, axis=0)
    place = np.random.default_rng(seed).random((len(human.x), 2)) * (size - 1)
    return moved(human, human, place)


def other_images(human: ScanpathSet, *, seed: int = 0) -> ScanpathSet:
    """Return for each human path another viewer's or the same one's path on another image, scaled to this image.

    What is left of a score is what all images share: the centre, the length of paths, habits.

    Args:
        human: P paths with image sizes.
        seed: Of the choice.

    Returns:
        P paths with the same image, task, subject and sample as ``human``.

    Raises:
        DataError: If an image size is not known, or there is one image only.
    """
    _, image = np.unique(human.image.astype(str), return_inverse=True)
    if len(human) and image.max() == 0:
        human.places.fail(0, "image", "all paths are of one image, so there is no other", "one_image")
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(human), len(human))
    while (same := image[chosen] == image).any():
        chosen[same] = rng.integers(0, len(human), int(same.sum()))
    size, own = human.sizes()[chosen], human.sizes()
    donor = human.take(chosen)
    scale = np.repeat(own / size, donor.lengths, axis=0)
    place = np.stack([donor.x, donor.y], -1) * scale
    return moved(human, donor, place)


def moved(human: ScanpathSet, donor: ScanpathSet, place: NDArray[np.float64]) -> ScanpathSet:
    """Return paths named as ``human`` with the donor's lengths and durations, at the given places ``(T, 2)``."""
    objects = None
    if donor.objects is not None:
        objects = donor.objects.copy()
        for number, boxes in enumerate(human.boxes):
            if boxes is not None:
                part = slice(donor.offsets[number], donor.offsets[number + 1])
                objects[part] = assign_objects(place[part, 0], place[part, 1], boxes)
    return ScanpathSet.from_columns(
        donor.lengths,
        *place.T,
        image=human.image,
        task=human.task,
        subject=human.subject,
        sample=human.sample,
        width=human.width,
        height=human.height,
        duration=donor.duration,
        objects=objects,
        boxes=human.boxes,
        target_box=human.target_box,
        target_object=human.target_object,
    )
