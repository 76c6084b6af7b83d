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

    A window is of kind ``k`` if its position is its tap ``K - 1 - k``: ``K // 2`` in the middle of the map.

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
        kind: Kind of each position's window, ``(count, size)``.
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
    """One kernel size on a map.

    Args:
        kernel: K, taps along either side of a window.
        height: H, at least K.
        width: W, at least K.
        device: Where the indices are needed.
    """

    def __init__(self, kernel: int, height: int, width: int, device: torch.device) -> None:
        self.kernel = kernel
        self.rows, self.columns = Axis(height, kernel, device), Axis(width, kernel, device)
        tap = torch.arange(kernel, device=device)
        self.tap_offset = (tap[:, None] * self.columns.span + tap).flatten()
        self.covered = self.rows.span * self.columns.span

    def tile_rows(self) -> Iterator[TileRow]:
        """Yield the rows of tiles, from the top of the map."""
        return (TileRow(self, row) for row in range(self.rows.count))


class TileRow:
    """One row of tiles; every method takes some maps ``n`` at once, channels last: ``(n, H, W, c)``, any strides.

    Attributes:
        index: Where each tap of each position lies in what its tile covers, ``(tiles, positions, taps)``.
        kinds: Kind of window of each row of positions; only one away from the border, where all are equal.
        kind: Number of each position's kind of window among all, ``(tiles * positions,)``.
    """

    def __init__(self, windows: Windows, row: int) -> None:
        rows, columns = windows.rows, windows.columns
        self.windows, self.size, self.span, self.columns = windows, rows.size, rows.span, columns
        self.top, self.first = row * rows.size, rows.first[row]
        start = rows.offset[row][:, None] * columns.span + columns.offset[:, None]
        self.index = start.flatten(1).unsqueeze(-1) + windows.tap_offset
        kinds = rows.kind[row]
        self.kinds = kinds[:1] if bool((kinds == kinds[0]).all()) else kinds
        self.kind = (kinds[:, None] * windows.kernel + columns.kind[:, None]).flatten()

    def chunks(self, groups: int) -> Iterator[slice]:
        """Yield slices of groups whose weights fit in a block."""
        step = max(1, BLOCK // (self.index.numel() + self.index[..., 0].numel() * self.windows.covered))
        return (slice(first, first + step) for first in range(0, groups, step))

    def cut(self, image: Tensor) -> Tensor:
        """Cut the tiles out of ``(n, H, W, c)``: ``(n, tiles * positions, c)``, zero beyond the map."""
        rows = image[:, self.top : self.top + self.size]
        missing = [self.columns.count * self.columns.size - rows.shape[2], self.size - rows.shape[1]]
        if any(missing):
            rows = F.pad(rows, [0, 0, 0, missing[0], 0, missing[1]])
        tiles: Tensor = rows.unflatten(2, (self.columns.count, self.columns.size)).transpose(1, 2)
        return tiles.flatten(1, 3)

    def paste(self, tiles: Tensor, image: Tensor, *, add: bool = False) -> None:
        """Write tiles ``(n, tiles * positions, c)`` back into ``(n, H, W, c)``, or add them."""
        target = image[:, self.top : self.top + self.size]
        rows = tiles.unflatten(1, (self.columns.count, self.size, self.columns.size)).transpose(1, 2).flatten(2, 3)
        source = rows[:, : target.shape[1], : target.shape[2]]
        _ = target.add_(source) if add else target.copy_(source)

    def separate(self, tiles: Tensor) -> Tensor:
        """Make each of the tiles ``(n, tiles * positions, c)`` a matrix, ``(n * tiles, positions, c)``."""
        matrices: Tensor = tiles.unflatten(1, (self.columns.count, -1)).flatten(0, 1)
        return matrices

    def unite(self, matrices: Tensor) -> Tensor:
        """Undo :meth:`separate`."""
        tiles: Tensor = matrices.unflatten(0, (-1, self.columns.count)).flatten(1, 2)
        return tiles

    def cover(self, image: Tensor) -> Tensor:
        """Return the values that the windows of each tile cover, ``(n * tiles, covered, d)``."""
        rows = image[:, self.first : self.first + self.span]
        tiles = [rows[:, :, first : first + self.columns.span] for first in self.columns.first]
        return torch.stack(tiles, 1).flatten(2, 3).flatten(0, 1)

    def add_cover(self, tiles: Tensor, image: Tensor) -> None:
        """Add to a map what belongs to the covered values, tile by tile: the transpose of :meth:`cover`."""
        tiles = tiles.unflatten(0, (-1, self.columns.count)).unflatten(2, (self.span, -1))
        rows = image[:, self.first : self.first + self.span]
        for i, first in enumerate(self.columns.first):
            rows[:, :, first : first + self.columns.span] += tiles[:, i]

    def weights(self, queries: Tensor, kernels: Tensor, biases: Tensor) -> Tensor:
        """Return the softmax over the taps of ``queries . kernels + biases``, ``(n, tiles * positions, taps)``.

        Args:
            queries: ``(n, tiles * positions, c)``.
            kernels: ``(n, taps, c)``.
            biases: By kind of window, ``(n, K, K, K, K)``.
        """
        logits = biases.flatten(1, 2).flatten(2).index_select(1, self.kind)
        return torch.softmax(logits.baddbmm_(queries, kernels.transpose(1, 2)), -1)

    def spread(self, weights: Tensor) -> Tensor:
        """Put the weights of each position where its window lies: ``(n * tiles, positions, covered)``."""
        weights = weights.unflatten(1, (self.columns.count, -1))
        wide = weights.new_zeros(*weights.shape[:3], self.windows.covered)
        return wide.scatter_(3, self.index.expand(weights.shape), weights).flatten(0, 1)

    def collect(self, wide: Tensor) -> Tensor:
        """Take the windows out of ``(n * tiles, positions, covered)``: ``(n, tiles * positions, taps)``."""
        wide = wide.unflatten(0, (-1, self.columns.count))
        return wide.gather(3, self.index.expand(*wide.shape[:3], -1)).flatten(1, 2)

    def add_biases(self, grad_logits: Tensor, grad_biases: Tensor) -> None:
        """Add the gradient of the logits ``(n, tiles * positions, taps)`` to that of the biases by kind of window."""
        kernel = self.windows.kernel
        grads = grad_logits.unflatten(1, (self.columns.count, self.size, -1))
        columns = F.one_hot(self.columns.kind.flatten(), kernel).to(grads.dtype).T.expand(grads.shape[0], -1, -1)
        for i, kind in enumerate(self.kinds.tolist()):
            rows = grads.sum(2) if len(self.kinds) == 1 else grads[:, :, i]
            grad_biases[:, kind] += torch.bmm(columns, rows.flatten(1, 2)).view(-1, kernel, kernel, kernel)
