"""Corruptions against the usual way to make them, with scikit-image, SciPy or a loop over pixels; results agree.

One photograph of 224 x 224 pixels, severity 3, one process. Peers do the same arithmetic; what is drawn at random is
drawn before, for both.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import data
from skimage.color import hsv2rgb, rgb2hsv
from skimage.filters import gaussian

from benchmarks.harness import compare, save
from saccade.datasets.corruptions import CORRUPTIONS

SEVERITY = 3
Peer = Callable[..., NDArray]


def gaussian_blur(image: NDArray, sigma: float) -> NDArray:
    """Blur with scikit-image."""
    return 255 * gaussian(image / 255, sigma, channel_axis=-1, mode="nearest")


def glass_blur(image: NDArray, constant: tuple[float, int, int], offsets: NDArray) -> NDArray:
    """Exchange pixels in a loop over the array."""
    sigma, reach, _ = constant
    shuffled = gaussian_blur(image, sigma).astype(np.uint8)
    height, width = image.shape[:2]
    for sweep in offsets:
        for row, y in enumerate(range(height - reach, reach, -1)):
            for column, x in enumerate(range(width - reach, reach, -1)):
                down, right = sweep[row, column]
                kept = shuffled[y, x].copy()
                shuffled[y, x] = shuffled[y + down, x + right]
                shuffled[y + down, x + right] = kept
    return gaussian_blur(shuffled, sigma)


def zoom_blur(image: NDArray, factors: NDArray) -> NDArray:
    """Enlarge with SciPy."""
    source = image.astype(np.float32)
    height, width = image.shape[:2]
    total = source.copy()
    for factor in factors:
        rows, columns = (int(np.ceil(length / factor)) for length in (height, width))
        top, left = (height - rows) // 2, (width - columns) // 2
        large = ndimage.zoom(source[top : top + rows, left : left + columns], (factor, factor, 1), order=1)
        total += large[:height, :width]
    return total / (len(factors) + 1)


def elastic_transform(image: NDArray, strength: float, raw_x: NDArray, raw_y: NDArray) -> NDArray:
    """Smooth with scikit-image, look up with SciPy."""
    height, width = image.shape[:2]
    sigma = (0.01 * height, 0.01 * width)
    right, down = (strength * gaussian(raw, sigma, mode="reflect", truncate=3) for raw in (raw_x, raw_y))
    y, x, channel = np.mgrid[:height, :width, :3].astype(float)
    places = [y + down[..., None], x + right[..., None], channel]
    return ndimage.map_coordinates(image.astype(np.float32), places, order=1, mode="reflect")


def brightness(image: NDArray, amount: float) -> NDArray:
    """Go to HSV and back with scikit-image."""
    hsv = rgb2hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    return 255 * hsv2rgb(hsv)


def saturate(image: NDArray, constant: tuple[float, float]) -> NDArray:
    """Go to HSV and back with scikit-image."""
    hsv = rgb2hsv(image / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * constant[0] + constant[1], 0, 1)
    return 255 * hsv2rgb(hsv)


PEERS: dict[str, Peer] = {
    "gaussian_blur": gaussian_blur,
    "glass_blur": glass_blur,
    "zoom_blur": zoom_blur,
    "elastic_transform": elastic_transform,
    "brightness": brightness,
    "saturate": saturate,
}


def grey_levels(peer: Peer, *arguments: object) -> NDArray:
    """Return what a peer computes as uint8."""
    return np.clip(peer(*arguments), 0, 255).astype(np.uint8)


def main() -> None:
    """Check that both agree within a grey level, run and save."""
    image = np.asarray(Image.fromarray(data.astronaut()).resize((224, 224), Image.Resampling.LANCZOS))
    cases = []
    for name, peer in PEERS.items():
        corruption = CORRUPTIONS[name]
        constant = corruption.constants[SEVERITY - 1]
        draws = corruption.draw(image, constant, np.random.default_rng(0)) if corruption.draw else ()
        ours = partial(corruption.apply, image, SEVERITY, *draws)
        theirs = partial(grey_levels, peer, image, constant, *draws)
        worst = np.abs(ours().astype(int) - theirs()).max()
        if worst > 1:
            raise SystemExit(f"{name}: ours and the peer differ by {worst} grey levels")
        case = f"{name}, severity {SEVERITY}, 224 x 224, equal within {worst} grey levels"
        cases.append(compare(case, {"saccade": ours, "scikit-image, SciPy, loop": theirs}, work=1, unit="images"))
    save("corruptions", cases)


if __name__ == "__main__":
    main()
