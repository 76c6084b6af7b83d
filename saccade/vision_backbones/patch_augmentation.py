"""Augmentation of the patches of an image one by one, so that a transformer sees disturbed tokens beside clean ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import ShapeError

__all__ = ["patch_wise_augmentation"]

PROBABILITY = 0.1  # of each of the three changes, for each patch
NOISE = 0.01  # standard deviation, in units of the normalised image
SMALLEST_CROP = 0.85  # share of a patch's area


def patch_wise_augmentation(
    images: Tensor, low: Tensor, high: Tensor, *, patch_size: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Change each patch of normalised images by chance: a crop of it scaled up again, Gaussian noise, a flip.

    Each of the three happens to a patch with probability 0.1: a square of 0.85 to 1 of its area, at a random place,
    resized bilinearly to the patch; noise with standard deviation 0.01; left and right exchanged.

    Args:
        images: ``(B, C, Y, X)``, floating point; Y and X are multiples of ``patch_size``.
        low: ``(C,)``, the normalised value of black; results are clamped to it.
        high: ``(C,)``, the normalised value of white.
        patch_size: Side of a patch in pixels.
        generator: Source of the random numbers, on the device of the images; ``None`` means torch's own.

    Returns:
        A new tensor like ``images``.

    Raises:
        ShapeError: If the images do not consist of whole patches.

    Source:
        Mao et al., "Towards Robust Vision Transformer", CVPR 2022 (arXiv:2105.07926), section on patch-wise
        augmentation, with the constants of its official code (vtddggg/Robust-Vision-Transformer at commit b72613f).
    """
    if images.ndim != 4 or images.shape[2] % patch_size != 0 or images.shape[3] % patch_size != 0:
        raise ShapeError(
            f"images must be (B, C, Y, X) with sides that are multiples of {patch_size}; got {tuple(images.shape)}."
        )
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(-1, channels, patch_size, patch_size).clone()

    def chosen() -> Tensor:
        draw = torch.rand(len(patches), generator=generator, device=images.device)
        return (draw < PROBABILITY).nonzero().squeeze(1)

    cropped = chosen()
    uniform = torch.rand(3, len(cropped), generator=generator, device=images.device)
    side = (SMALLEST_CROP + (1 - SMALLEST_CROP) * uniform[0]).sqrt()
    centre = (2 * uniform[1:] - 1) * (1 - side)  # in -1..1, where the patch's edges are
    crops = torch.zeros(len(cropped), 2, 3, device=images.device)
    crops[:, 0, 0] = crops[:, 1, 1] = side
    crops[:, :, 2] = centre.T
    where = F.affine_grid(crops, [len(cropped), channels, patch_size, patch_size], align_corners=False)
    taken = patches[cropped]
    patches[cropped] = F.grid_sample(taken, where.to(taken.dtype), padding_mode="border", align_corners=False)

    noisy = chosen()
    shape = (len(noisy), channels, patch_size, patch_size)
    patches[noisy] += NOISE * torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)

    flipped = chosen()
    patches[flipped] = patches[flipped].flip(3)

    whole = patches.reshape(batch, rows, columns, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    limits = [limit.to(images).view(1, -1, 1, 1) for limit in (low, high)]
    return whole.reshape(images.shape).clamp(*limits)
