"""Features of a tile without training: how it is stained, and how rough it is at several scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FEATURE_NAMES", "stain_texture"]

# Optical densities of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001).
STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
QUANTILES = (0.1, 0.5, 0.9)
SCALES = (1, 2, 4, 8)
CHANNELS = ("red", "green", "blue", "haematoxylin", "eosin", "dab")
ROUGH = ("grey", "haematoxylin")
FEATURE_NAMES: tuple[str, ...] = (
    *(f"{name}.{what}" for name in CHANNELS for what in ("mean", "std", *(f"q{int(100 * q)}" for q in QUANTILES))),
    "saturation.mean",
    "glass.share",
    "nuclei.share",
    *(f"{name}.{what}{s}" for name in ROUGH for s in SCALES for what in ("gradient", "contrast", "laplacian")),
)


def stain_texture(tiles: Tensor) -> Tensor:
    """Describe tiles by 57 numbers, each named in ``FEATURE_NAMES``.

    Mean, standard deviation and quantiles of the colours and of the densities of three stains; shares of glass and of
    nuclei; and at four scales the mean gradient, the contrast between neighbourhoods, and the mean Laplacian, of grey
    and of haematoxylin.

    Args:
        tiles: ``(B, 3, Y, X)``, RGB in 0..1, at least 16 pixels wide.

    Returns:
        ``(B, 57)`` float32.

    Source:
        Stain vectors: Ruifrok and Johnston, Analytical and Quantitative Cytology and Histology 2001.
    """
    tiles = tiles.float()
    vectors = F.normalize(torch.tensor(STAINS, device=tiles.device), dim=1)
    density = -torch.log((tiles * 255 + 1) / 256)
    stains = torch.einsum("bcyx,cs->bsyx", density, torch.linalg.inv(vectors))
    planes = torch.cat([tiles, stains], 1)  # (B, 6, Y, X)
    flat = planes.flatten(2)
    points = torch.tensor(QUANTILES, device=tiles.device)
    quantiles = flat[..., :: max(1, flat.shape[-1] // 4096)].quantile(points, dim=-1).movedim(0, -1)
    colours = torch.cat([flat.mean(-1)[..., None], flat.std(-1)[..., None], quantiles], -1).flatten(1)
    saturation = tiles.amax(1) - tiles.amin(1)
    glass = (saturation < 0.05) & (tiles.mean(1) > 0.8)
    shares = [saturation.mean((1, 2)), glass.float().mean((1, 2)), (stains[:, 0] > 0.5).float().mean((1, 2))]
    rough = torch.stack([tiles.mean(1), stains[:, 0]], 1)
    textures = torch.stack([texture(F.avg_pool2d(rough, scale)) for scale in SCALES], 2)  # (B, 2, scales, 3)
    return torch.cat([colours, torch.stack(shares, 1), textures.flatten(1)], 1)


def texture(planes: Tensor) -> Tensor:
    """Return mean gradient, contrast of 2 x 2 neighbourhoods and mean Laplacian of planes, ``(B, P, 3)``."""
    dx, dy = planes.diff(dim=-1).abs().mean((-2, -1)), planes.diff(dim=-2).abs().mean((-2, -1))
    contrast = F.avg_pool2d(planes, 2).std((-2, -1))
    inner = planes[..., 1:-1, 1:-1]
    around = planes[..., :-2, 1:-1] + planes[..., 2:, 1:-1] + planes[..., 1:-1, :-2] + planes[..., 1:-1, 2:]
    return torch.stack([dx + dy, contrast, (around - 4 * inner).abs().mean((-2, -1))], -1)
