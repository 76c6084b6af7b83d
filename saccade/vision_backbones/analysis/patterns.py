"""The patterns that attention takes: maps compressed by a small autoencoder, clustered, and shown as cards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.analysis.layers import AttentionLayer, watch_layers
from saccade.vision_backbones.analysis.profile import attention_profile, pattern_label

__all__ = [
    "Cluster",
    "PatternAutoencoder",
    "PatternMaps",
    "PatternSummary",
    "collect_patterns",
    "summarise_patterns",
    "training_steps",
]

SIDE = 64
LATENT = 32
FLOOR = 0.01  # added before the logarithm; uniform attention is 1
CLUSTERS = range(4, 17)
NEAREST = 5
SILHOUETTE_SAMPLE = 2000
BATCH = 128
STATISTICS = ("hop0", "near", "largest_column", "concentration", "entropy", "entropy_share")


@dataclass(frozen=True)
class PatternMaps:
    """Attention maps of one size, with what was measured of each before it was resized.

    Args:
        maps: ``(M, 64, 64)`` float16: logarithm of 0.01 + attention in multiples of the uniform one.
        statistics: ``(M, 6)`` float32: attention at hop 0, at hops 1 and 2, largest column mean, that times the number
            of patches, entropy in nats, entropy over the largest possible.
        image: Position of the image, ``(M,)``.
        head: Position of the head among those of all layers, ``(M,)``.
    """

    maps: Tensor
    statistics: Tensor
    image: Tensor
    head: Tensor

    @staticmethod
    def join(parts: Sequence[PatternMaps]) -> PatternMaps:
        """Put maps together; positions of images are counted on."""
        images, start = [], 0
        for part in parts:
            images.append(part.image + start)
            start += int(part.image.max()) + 1
        return PatternMaps(
            torch.cat([part.maps for part in parts]),
            torch.cat([part.statistics for part in parts]),
            torch.cat(images),
            torch.cat([part.head for part in parts]),
        )


@torch.no_grad()
def collect_patterns(model: nn.Module, layers: Sequence[AttentionLayer], images: Tensor) -> PatternMaps:
    """Run a model and keep one map of 64 x 64 for each image, layer and head.

    Prefix tokens are left out and rows normalised again; maps are resized bilinearly, averaging where they shrink.

    Args:
        model: In evaluation mode, on the device of the images.
        layers: From :func:`saccade.vision_backbones.analysis.find_layers`.
        images: ``(B, C, Y, X)``.
    """
    maps: list[Tensor] = []
    statistics: list[Tensor] = []

    def keep(index: int, attention: Tensor) -> None:
        layer = layers[index]
        prefix, patches = layer.prefix_tokens, layer.grid[0] * layer.grid[1]
        profile = attention_profile(attention, layer.grid, prefix_tokens=prefix)
        inner = attention[:, :, prefix:, prefix:]
        mass = inner.sum(-1, keepdim=True)
        inner = inner / mass.masked_fill(mass == 0, 1.0) * patches
        small = F.interpolate(inner, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        maps.append((small.clamp(min=0) + FLOOR).log().cpu())
        figures = (
            profile.mass_by_hop[..., 0],
            profile.near_mass,
            profile.largest_column,
            profile.largest_column * patches,
            profile.entropy,
            profile.entropy_share,
        )
        statistics.append(torch.stack(figures, -1).float().cpu())

    with watch_layers(model, layers, keep):
        model(images)
    every, figures = torch.cat(maps, 1), torch.cat(statistics, 1)  # (B, T, ...)
    count, heads = every.shape[:2]
    return PatternMaps(
        every.flatten(0, 1).half(),
        figures.flatten(0, 1),
        torch.arange(count).repeat_interleave(heads),
        torch.arange(heads).repeat(count),
    )


class PatternAutoencoder(nn.Module):
    """Convolutional autoencoder of maps ``(M, 1, 64, 64)`` with 32 numbers in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),  # 16 x 16: at the full size convolutions would take most of the time
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, LATENT),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 32 * 16),
            nn.Unflatten(1, (32, 4, 4)),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps as they come out again."""
        out: Tensor = self.decoder(self.encoder(x))
        return out


@dataclass(frozen=True)
class Cluster:
    """One pattern.

    Args:
        size: Maps in it.
        label: A word, see :func:`saccade.vision_backbones.analysis.pattern_label`.
        statistics: Means over its maps, by the names of ``STATISTICS``.
        centroid: Decoded, ``(64, 64)``, on the scale of the maps.
        nearest: Positions of the up to 5 real maps next to the centroid.
    """

    size: int
    label: str
    statistics: dict[str, float]
    centroid: NDArray[np.float32]
    nearest: list[int]


@dataclass(frozen=True)
class PatternSummary:
    """The patterns of a model.

    Args:
        clusters: By falling size.
        assignment: Cluster of each map, ``(M,)``.
        silhouette: By number of clusters tried, -1..1; the largest was chosen.
        error: Mean squared error of the autoencoder on standardised maps, whose variance is 1.
        head_shares: How the maps of each head divide among the clusters, ``(T, clusters)``, rows sum to 1.
    """

    clusters: list[Cluster]
    assignment: NDArray[np.intp]
    silhouette: dict[int, float]
    error: float
    head_shares: NDArray[np.float64]


def summarise_patterns(
    patterns: PatternMaps,
    *,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> PatternSummary:
    """Train the autoencoder on maps, cluster what it makes of them, and describe the clusters.

    Args:
        patterns: From :func:`collect_patterns`.
        seed: Of weights, batches and clustering.
        steps: Of training, with batches of 128; ``None`` means :func:`training_steps`.
        device: Where the autoencoder is trained.
        advance: Called after each step.

    Raises:
        ConfigError: If there are fewer than 6 maps, or all are alike.
    """
    count = len(patterns.maps)
    if count <= min(CLUSTERS) + 1:
        raise ConfigError(f"{count} maps are too few to cluster; at least {min(CLUSTERS) + 2} are needed.")
    whole = patterns.maps.float()
    mean, std = whole.mean(), whole.std()
    if not std > 0:
        raise ConfigError("all attention maps are the same; there is nothing to cluster.")
    network, latents, error = train(
        (whole - mean) / std, seed, training_steps(count) if steps is None else steps, torch.device(device), advance
    )
    silhouette, fitted = choose_clusters(latents, seed)
    order = np.argsort(-np.bincount(fitted.labels_, minlength=fitted.n_clusters), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    assignment = rank[fitted.labels_]
    centres = torch.from_numpy(fitted.cluster_centers_[order]).float()
    with torch.no_grad():
        decoded = network.decoder(centres.to(device)).squeeze(1).cpu() * std + mean
    clusters = []
    for index, centre in enumerate(centres.numpy()):
        members = np.flatnonzero(assignment == index)
        distance = np.linalg.norm(latents[members] - centre, axis=1)
        means = patterns.statistics[members].double().mean(0).tolist()
        found = dict(zip(STATISTICS, means, strict=True))
        label = pattern_label(
            hop0=found["hop0"],
            within2=found["hop0"] + found["near"],
            largest_column=found["largest_column"],
            entropy_share=found["entropy_share"],
        )
        nearest = members[np.argsort(distance, kind="stable")[:NEAREST]].tolist()
        clusters.append(Cluster(len(members), label, found, decoded[index].numpy(), nearest))
    heads = patterns.head.numpy()
    shares = np.zeros((int(heads.max()) + 1, len(clusters)))
    np.add.at(shares, (heads, assignment), 1)
    return PatternSummary(clusters, assignment, silhouette, error, shares / shares.sum(1, keepdims=True))


def training_steps(maps: int) -> int:
    """Return how many steps to train on so many maps: twenty times through them, but 150 to 600 steps."""
    return min(600, max(150, 20 * math.ceil(maps / BATCH)))


def train(
    maps: Tensor, seed: int, steps: int, device: torch.device, advance: Callable[[], None]
) -> tuple[PatternAutoencoder, NDArray[np.float32], float]:
    """Train on standardised maps ``(M, 64, 64)``; return the network, the latents ``(M, 32)`` and the error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PatternAutoencoder().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    order = torch.zeros(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(maps), generator=generator)
        batch, order = maps[order[:BATCH]].unsqueeze(1).to(device), order[BATCH:]
        loss = F.mse_loss(network(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance()
    latents, error = [], 0.0
    with torch.no_grad():
        for batch in maps.split(BATCH):
            x = batch.unsqueeze(1).to(device)
            code = network.encoder(x)
            latents.append(code.cpu())
            error += float(F.mse_loss(network.decoder(code), x)) * len(batch) / len(maps)
    return network, torch.cat(latents).numpy(), error


def choose_clusters(latents: NDArray[np.float32], seed: int) -> tuple[dict[int, float], Any]:
    """Fit k-means for each number of clusters; return the silhouettes and the fit with the largest."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(latents.round(5), axis=0))
    sample = np.random.default_rng(seed).permutation(len(latents))[:SILHOUETTE_SAMPLE]
    silhouette: dict[int, float] = {}
    best, most = None, -math.inf
    for k in CLUSTERS:
        if k >= min(distinct, len(latents)):
            break
        fitted = KMeans(k, n_init=3, random_state=seed).fit(latents)
        labels = fitted.labels_[sample]
        if len(np.unique(labels)) < 2:  # the others have too few maps to be in the sample
            continue
        silhouette[k] = float(silhouette_score(latents[sample], labels))
        if silhouette[k] > most:
            best, most = fitted, silhouette[k]
    if best is None:
        raise ConfigError(f"{distinct} different maps are too few to cluster.")
    return silhouette, best
