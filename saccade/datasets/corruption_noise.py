"""Noise: Gaussian, shot, impulse, speckle."""

from __future__ import annotations

from numpy.random import Generator

from saccade.datasets.corruption_kernels import Image

__all__ = [
    "draw_gaussian_noise",
    "draw_impulse_noise",
    "draw_shot_noise",
    "gaussian_noise",
    "impulse_noise",
    "shot_noise",
    "speckle_noise",
]


def draw_gaussian_noise(image: Image, scale: float, generator: Generator) -> tuple[Image]:
    """Draw normal values of that standard deviation, one per value of the image."""
    return (generator.normal(scale=scale, size=image.shape),)


def gaussian_noise(image: Image, scale: float, noise: Image) -> Image:
    """Add noise."""
    noisy: Image = image + 255 * noise
    return noisy


def speckle_noise(image: Image, scale: float, noise: Image) -> Image:
    """Add noise in proportion to the image."""
    speckled: Image = image * (1 + noise)
    return speckled


def draw_shot_noise(image: Image, photons: float, generator: Generator) -> tuple[Image]:
    """Draw photon counts; white is ``photons`` on average."""
    return (generator.poisson(image / 255.0 * photons),)


def shot_noise(image: Image, photons: float, counts: Image) -> Image:
    """Show the counts as brightness."""
    return counts * (255.0 / photons)


def draw_impulse_noise(image: Image, amount: float, generator: Generator) -> tuple[Image, Image]:
    """Draw which values are lost, and which of those become white rather than black; each colour on its own."""
    return generator.random(image.shape) <= amount, generator.random(image.shape) <= 0.5


def impulse_noise(image: Image, amount: float, lost: Image, white: Image) -> Image:
    """Replace lost values by white or black."""
    noisy = image.copy()
    noisy[lost] = 255 * white[lost]
    return noisy
