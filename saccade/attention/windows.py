"""Square windows of positions on a map, computed over tiles: a banded matrix of weights times the values of a tile.

The window of a position is centred on it, and shifted at the border until it lies inside the map. The windows of a tile
of positions overlap, so together they cover few values: 20 x 20 for 8 x 8 positions and 13 x 13 taps. With each
position's weights spread to where its window lies in there, filtering is one matrix product for each tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Windows"]

TILE = 8  # rows and columns of a tile of positions
BLOCK = 1 << 19  # weights held at a time: 2 MiB in float32, so that a block stays in the cache


class Axis:
    """Tiles along one side of a map, and the windows of the positions in them.

    Args:
        length: Positions along the side, at least ``kernel``.
        kernel: Taps of a window.
        device: Where the indices are needed.

    Attributes:
        size: Positions of a tile.
        count: Tiles; the last may reach beyond the map.
        span: Values that the windows of a tile cover.
        first: First covered value of each tile.
        offset: Where the window of each position begins in what its tile covers, ``(count, size)``.
        kind: Kind of each position's window (see :func:`window_biases`), ``(count, size)``.
    """

    def __init__(self, length: int, kernel: int, device: torch.device) -> None:
        self.count = -(-length // TILE)
        self.size = -(-length // self.count)
        self.span = min(self.size + kernel - 1, length)
        position = torch.arange(self.count * self.size, device=device)
        start = (position - kernel // 2).clamp(0, length - kernel)
        first = (position[:: self.size] - kernel // 2).clamp(0, length - self.span)
        self.first: list[int] = first.tolist()
        self.offset = start.view(self.count, -1) - first[:, None]
        self.kind = (start - position + kernel - 1).clamp(min=0).view(self.count, -1)


class Windows:
    """One kernel size on a map, walked by rows of tiles; every method takes some groups ``n`` of one sample.

    Args:
        biases: ``(G, K, K, K, K)``, see :func:`window_biases`.
        height: H.
        width: W.
    """

    def __init__(self, biases: Tensor, height: int, width: int) -> None:
        self.taps = biases.shape[-1] ** 2
        self.rows = Axis(height, biases.shape[-1], biases.device)
        self.columns = Axis(width, biases.shape[-1], biases.device)
        tap = torch.arange(biases.shape[-1], device=biases.device)
        self.tap_offset = (tap[:, None] * self.columns.span + tap).flatten()
        self.positions = self.rows.size * self.columns.size  # of a tile
        self.covered = self.rows.span * self.columns.span

    def blocks(self, batch: int, groups: int) -> Iterator[tuple[int, slice, int]]:
        """Yield sample, groups and row of tiles of each block."""
        weights = self.columns.count * self.positions * (self.taps + self.covered)
        step = max(1, BLOCK // weights)
        for sample in range(batch):
            for group in range(0, groups, step):
                for row in range(self.rows.count):
                    yield sample, slice(group, group + step), row

    def cut(self, image: Tensor, row: int) -> Tensor:
        """Cut ``(n, c, H, W)`` into the tiles of a row, ``(n, c, tiles, rows, columns)``, zero beyond the map."""
        rows = image[:, :, row * self.rows.size : (row + 1) * self.rows.size]
        missing = [self.columns.count * self.columns.size - rows.shape[3], self.rows.size - rows.shape[2]]
        if any(missing):
            rows = F.pad(rows, [0, missing[0], 0, missing[1]])
        tiles: Tensor = rows.unflatten(3, (self.columns.count, self.columns.size))
        return tiles.transpose(2, 3)

    def paste(self, tiles: Tensor, image: Tensor, row: int, *, add: bool = False) -> None:
        """Write tiles ``(n, c, tiles, rows, columns)`` back into ``(n, c, H, W)``, or add them."""
        target = image[:, :, row * self.rows.size : (row + 1) * self.rows.size]
        source = tiles.transpose(2, 3).flatten(3)[:, :, : target.shape[2], : target.shape[3]]
        _ = target.add_(source) if add else target.copy_(source)

    def cover(self, image: Tensor, row: int) -> Tensor:
        """Return what the windows of each tile of a row cover, ``(n * tiles, d, covered)``."""
        rows = image[:, :, self.rows.first[row] : self.rows.first[row] + self.rows.span]
        tiles = [rows[..., first : first + self.columns.span] for first in self.columns.first]
        return torch.stack(tiles, 1).flatten(0, 1).flatten(2)

    def add_cover(self, tiles: Tensor, image: Tensor, row: int) -> None:
        """Add to a map what belongs to the covered values, tile by tile: the transpose of :meth:`cover`."""
        tiles = tiles.unflatten(0, (-1, self.columns.count)).unflatten(3, (self.rows.span, -1))
        rows = image[:, :, self.rows.first[row] : self.rows.first[row] + self.rows.span]
        for i, first in enumerate(self.columns.first):
            rows[..., first : first + self.columns.span] += tiles[:, i]

    def index(self, row: int) -> Tensor:
        """Return where each tap of each position lies in what its tile covers, ``(tiles, positions, taps)``."""
        start = self.rows.offset[row][:, None] * self.columns.span + self.columns.offset[:, None]
        return start.flatten(1).unsqueeze(-1) + self.tap_offset

    def weights(self, queries: Tensor, kernels: Tensor, biases: Tensor, row: int) -> Tensor:
        """Return the kernels of the positions of a row of tiles, ``(n, tiles * positions, taps)``.

        Args:
            queries: ``(n, c, tiles * positions)``.
            kernels: ``(n, taps, c)``.
            biases: ``(n, K, K, K, K)``.
            row: Which row of tiles.
        """
        logits = torch.bmm(queries.transpose(1, 2), kernels.transpose(1, 2))
        kinds = self.row_kinds(row)
        bias = biases[:, kinds][:, :, self.columns.kind].flatten(4).transpose(1, 2)  # (n, tiles, rows, columns, taps)
        logits.unflatten(1, (self.columns.count, self.rows.size, -1)).add_(bias)
        return torch.softmax(logits, -1)

    def row_kinds(self, row: int) -> Tensor:
        """Return the kinds of window of the rows in a row of tiles; one away from the border, where all are equal."""
        kinds = self.rows.kind[row]
        return kinds[:1] if bool((kinds == kinds[0]).all()) else kinds

    def spread(self, weights: Tensor, row: int) -> Tensor:
        """Put each kernel where its window lies in what the tile covers: ``(n * tiles, positions, covered)``."""
        weights = weights.unflatten(1, (self.columns.count, -1))
        index = self.index(row).expand(weights.shape)
        wide = weights.new_zeros(*weights.shape[:3], self.covered)
        return wide.scatter_(3, index, weights).flatten(0, 1)

    def collect(self, wide: Tensor, row: int) -> Tensor:
        """Take the windows out of ``(n * tiles, positions, covered)``: ``(n, tiles * positions, taps)``."""
        wide = wide.unflatten(0, (-1, self.columns.count))
        index = self.index(row).expand(*wide.shape[:3], -1)
        return wide.gather(3, index).flatten(1, 2)

    def add_biases(self, grad_logits: Tensor, grad_biases: Tensor, row: int) -> None:
        """Add the gradient of the logits ``(n, tiles * positions, taps)`` to that of the biases by kind of window."""
        kernel = grad_biases.shape[-1]
        grads = grad_logits.view(-1, self.columns.count, self.rows.size, self.columns.size, self.taps)
        columns = F.one_hot(self.columns.kind.flatten(), kernel).to(grads.dtype).T.expand(grads.shape[0], -1, -1)
        kinds = self.row_kinds(row).tolist()
        for i, kind in enumerate(kinds):
            rows = grads.sum(2) if len(kinds) == 1 else grads[:, :, i]
            grad_biases[:, kind] += torch.bmm(columns, rows.flatten(1, 2)).view(-1, kernel, kernel, kernel)
