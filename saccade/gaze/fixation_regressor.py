"""A small baseline for images without objects: all fixations of a path regressed at once from the image.

In the manner of Gazeformer: learned queries, one per fixation, read the image's features; each gives a Gaussian of
place and of duration, and the probability that the path has ended before it.

Source: Mondal et al., "Gazeformer: Scalable, Effective and Fast Prediction of Goal-Directed Human Attention", CVPR
2023; written from the paper's idea, with a network of its own and without language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from saccade.attention import attention
from saccade.errors import ConfigError, DataError
from saccade.gaze.oat_layers import Decoder, Encoder
from saccade.gaze.oat_position import sinusoid_sequence
from saccade.gaze.scanpath import Scanpath, ScanpathSet

__all__ = ["FixationRegressor", "RegressedFixations", "fit_fixation_regressor"]

CELLS = 8  # along each side of the feature map
LEAST_SCALE = 0.01  # of the image's side: about the accuracy of an eye tracker


@dataclass(frozen=True)
class RegressedFixations:
    """Distributions of the L fixations of paths on B images.

    Args:
        mean: Place in shares of width and height, and log duration in seconds, ``(B, L, 3)``.
        scale: Standard deviations of these, ``(B, L, 3)``.
        end: Logit that the path has ended before each fixation, ``(B, L)``; that of the first is ignored.
    """

    mean: Tensor
    scale: Tensor
    end: Tensor

    def nll(self, target: Tensor, lengths: Tensor, *, with_duration: bool) -> Tensor:
        """Return the negative log-likelihood of paths in nats, ``(B,)``, places in shares of the image.

        Args:
            target: ``(B, L, 3)`` as ``mean``; anything behind the end.
            lengths: ``(B,)``, from 1 to L; a path of L fixations has no end.
            with_duration: Whether durations count.
        """
        steps = torch.arange(self.mean.shape[1], device=target.device)
        there = steps < lengths[:, None]
        density = torch.distributions.Normal(self.mean, self.scale).log_prob(target)
        places = (density if with_duration else density[..., :2]).sum(-1)
        going_on = torch.where(steps > 0, F.logsigmoid(-self.end), 0.0)
        ended = torch.where(steps == lengths[:, None], F.logsigmoid(self.end), 0.0)
        return -(torch.where(there, places + going_on, 0.0) + ended).sum(-1)


class FixationRegressor(nn.Module):
    """Regresses fixations from an image.

    Args:
        width: Numbers per token.
        heads: Attention heads.
        longest: Most fixations of a path L.
        size: Height and width in pixels to which images are resized, a multiple of 8.

    Raises:
        ConfigError: If a number does not fit.
    """

    def __init__(self, width: int = 64, heads: int = 4, longest: int = 16, size: int = 64) -> None:
        super().__init__()
        if size % CELLS or longest < 1 or width % heads:
            raise ConfigError("size must be a multiple of 8, width one of heads, longest at least 1.")
        self.longest, self.size = longest, size
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, 2, 2), nn.ReLU(), nn.Conv2d(width // 2, width, 3, 2, 1), nn.ReLU()
        )
        line = sinusoid_sequence(CELLS, width // 2)
        grid = [line[:, None].expand(-1, CELLS, -1), line.expand(CELLS, -1, -1)]
        self.place = nn.Parameter(torch.cat(grid, -1).flatten(0, 1).clone())
        sizes = (width, heads, 2 * width, 0.0)
        self.encoder, self.decoder = Encoder(1, sizes), Decoder(2, sizes)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.register_buffer("queries", sinusoid_sequence(longest, width), persistent=False)
        self.query_offset = nn.Parameter(torch.zeros(longest, width))
        self.pointer, self.pointed = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 7)
        middle = (torch.arange(CELLS) + 0.5) / CELLS
        self.register_buffer("cells", torch.cartesian_prod(middle, middle).flip(-1), persistent=False)  # x, y

    queries: Tensor
    cells: Tensor

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Return images as ``(B, 3, size, size)``, values from -1 to 1, whatever their shape."""
        resized = [np.asarray(image.convert("RGB").resize((self.size, self.size))) for image in images]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def forward(self, images: Tensor) -> RegressedFixations:
        """Regress the fixations on prepared images ``(B, 3, size, size)``."""
        maps = F.adaptive_avg_pool2d(self.stem(images), CELLS).flatten(2).transpose(1, 2)
        memory = self.encoder(maps + self.place, None)
        queries = (self.queries + self.query_offset).expand(len(images), 1, -1, -1)
        states = self.decoder(queries, self.decoder.keys(memory), None)
        # a place is the mean of the cells attended to, and learned much sooner than a number would be
        cells = self.cells.expand(len(images), 1, -1, -1)
        place = attention(self.pointer(states), self.pointed(memory)[:, None], cells)[:, 0]
        out = self.head(states)[:, 0]
        offset = out[..., :2].tanh() / CELLS
        mean = torch.cat([place + offset, out[..., 2:3] - 1.4], -1)  # log 0.25 s
        return RegressedFixations(mean, F.softplus(out[..., 3:6] - 1.5) + LEAST_SCALE, out[..., 6])

    @torch.no_grad()
    def sample(
        self, images: Sequence[Image.Image], num_paths: int, *, names: Sequence[str], seed: int = 0
    ) -> ScanpathSet:
        """Draw paths on images, fixations inside them, with durations.

        Args:
            images: RGB.
            num_paths: Paths per image.
            names: Of the images.
            seed: Equal seeds give equal paths.
        """
        found = self(self.prepare(images))
        generator = torch.Generator().manual_seed(seed)
        shape = (num_paths, *found.mean.shape)
        drawn = found.mean + found.scale * torch.randn(shape, generator=generator)
        ends = torch.rand(shape[:-1], generator=generator) < found.end.sigmoid()
        ends[..., 0] = False
        lengths = torch.where(ends.any(-1), ends.int().argmax(-1), self.longest)
        records = []
        for number, (image, name) in enumerate(zip(images, names, strict=True)):
            for repeat in range(num_paths):
                path = drawn[repeat, number, : int(lengths[repeat, number])].double().numpy()
                records.append(
                    Scanpath(
                        image=name,
                        x=path[:, 0].clip(0, 1) * (image.width - 1),
                        y=path[:, 1].clip(0, 1) * (image.height - 1),
                        duration=np.exp(path[:, 2].clip(-4, 2)),
                        subject="model",
                        sample=repeat,
                        width=float(image.width),
                        height=float(image.height),
                    )
                )
        return ScanpathSet.from_paths(records)


def path_tensors(
    paths: ScanpathSet, sizes: dict[str, tuple[int, int]], longest: int
) -> tuple[Tensor, Tensor, list[str]]:
    """Return targets ``(P, L, 3)``, lengths ``(P,)`` and image names of paths, cut to ``longest`` fixations."""
    target, lengths = torch.zeros(len(paths), longest, 3), torch.zeros(len(paths), dtype=torch.long)
    for number, path in enumerate(paths):
        count = min(len(path), longest)
        width, height = sizes[path.image]
        lengths[number] = count
        target[number, :count, 0] = torch.from_numpy(path.x[:count] / max(width - 1, 1)).float()
        target[number, :count, 1] = torch.from_numpy(path.y[:count] / max(height - 1, 1)).float()
        if path.duration is not None:
            target[number, :count, 2] = torch.from_numpy(np.log(np.maximum(path.duration[:count], 0.02))).float()
    return target, lengths, list(paths.image)


def fit_fixation_regressor(
    images: dict[str, Image.Image],
    paths: ScanpathSet,
    *,
    epochs: int = 30,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    model: FixationRegressor | None = None,
) -> tuple[FixationRegressor, list[float]]:
    """Train a regressor on human paths.

    Args:
        images: By name.
        paths: Paths on them, in px; longer ones than the model's longest are cut.
        epochs: Passes over the paths.
        batch_size: Paths per step.
        lr: Learning rate of Adam, down to 0 along half a cosine.
        seed: Of weights and order.
        model: Goes on with this one; ``None`` makes a small one.

    Returns:
        The model in evaluation mode, and the mean loss of each epoch in nats per path.

    Raises:
        DataError: If a path is on an image that is not given.
    """
    missing = sorted(set(paths.image) - images.keys())
    if missing:
        raise DataError(f"Paths are on {missing[0]!r}, which is not among the images.", reason="no_image")
    torch.manual_seed(seed)
    model = model or FixationRegressor(longest=int(min(32, paths.lengths.max())))
    names = list(images)
    prepared = model.prepare([images[name] for name in names])
    target, lengths, on = path_tensors(paths, {name: image.size for name, image in images.items()}, model.longest)
    index = torch.tensor([names.index(name) for name in on])
    timed = paths.duration is not None
    optimizer = torch.optim.Adam(model.train().parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(paths)).split(batch_size):
            loss = model(prepared[index[rows]]).nll(target[rows], lengths[rows], with_duration=timed).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        schedule.step()
        losses.append(total / len(paths))
    return model.eval(), losses
