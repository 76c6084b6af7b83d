"""What one place of a photograph does: the regions that it reads (BiFormer), the kernels that it makes (OverLoCK).

Both are read in one block while the model runs. A model is asked for all places at once, as a batch holds photographs
of any size; the place is chosen afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saccade.attention.reference import neighbours
from saccade.errors import ConfigError
from saccade.vision_backbones.attention_maps import check_head, merge_heads
from saccade.vision_backbones.bi_level_routing import BiLevelRoutingAttention, RaggedRoutingAttention
from saccade.vision_backbones.overlock_blocks import MixingBlock
from saccade.vision_backbones.routed_regions import region_reads

__all__ = ["Panel", "PointReader", "kernel_reader", "route_reader"]


@dataclass(frozen=True)
class Panel:
    """The map of one place, as cells over what the model sees.

    Args:
        values: ``(gy, gx)`` float32, 0 where a cell takes no part.
        used: Bool ``(gy, gx)``: cells that take part.
        rows: Edges of the rows of cells as shares of the height, ``gy + 1`` rising numbers.
        columns: The same of the width.
        query: Row and column of the cell that asks.
        low: What the darkest colour stands for.
        title: What it is, for a legend.
    """

    values: NDArray[np.float32]
    used: NDArray[np.bool_]
    rows: NDArray[np.float64]
    columns: NDArray[np.float64]
    query: tuple[int, int]
    low: float
    title: str


@dataclass(frozen=True)
class PointReader:
    """A way to read what places do in one block of a model.

    Args:
        layer: Name of the block or attention.
        grid: Rows and columns of cells.
        shape: Of the numbers per image.
        run: From images ``(B, 3, Y, X)`` to the model's output and numbers ``(B, *shape)`` for all places, float32.
        panels: From the numbers of one image and a place, ``(x, y)`` as shares of what the model sees, to its maps.
    """

    layer: str
    grid: tuple[int, int]
    shape: tuple[int, ...]
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    panels: Callable[[Tensor, tuple[float, float]], list[Panel]]


def route_reader(model: nn.Module, noise: Tensor, layer: str | None, heads: str) -> PointReader:
    """Read which regions a region attends to, and how much.

    Args:
        model: In evaluation mode.
        noise: An image of the size to come, ``(1, 3, Y, X)``.
        layer: A module; the last attention with routing inside it, or of the model if ``None``, is read.
        heads: ``"mean"``, ``"max"`` or the number of a head.

    Raises:
        ConfigError: If there is no attention with routing, or no such head.
    """
    known = (BiLevelRoutingAttention, RaggedRoutingAttention)
    name = last_inside(model, known, layer, "bi-level routing attention, as BiFormer does")
    attention: Any = model.get_submodule(name)
    check_head(heads, attention.num_heads, name)
    geometry: list[tuple[int, int]] = []  # of the map and of a region

    def read(x: Tensor) -> Tensor:
        reads = region_reads(attention, x)
        geometry[:] = [(x.shape[1], x.shape[2]), reads.region]
        shares = merge_heads(reads.shares, heads)
        return torch.stack([shares, reads.selected.to(shares.dtype)], 1)

    run = watched(model, name, read, before=True)
    count = run(noise)[1].shape[2]
    (height, width), region = geometry
    across = -(-width // region[1])
    if isinstance(attention, BiLevelRoutingAttention):
        across = attention.n_win
    grid = (count // across, across)
    rows, columns = (
        np.minimum(np.arange(cells + 1) * size / side, 1.0)
        for cells, size, side in ((grid[0], region[0], height), (grid[1], region[1], width))
    )

    def panels(values: Tensor, place: tuple[float, float]) -> list[Panel]:
        x, y = place
        row = int(np.searchsorted(rows, y, side="right")) - 1
        column = int(np.searchsorted(columns, x, side="right")) - 1
        shares, selected = values[:, row * across + column].view(2, *grid).numpy()
        title = f"{name}: what region ({column}, {row}) of {grid[1]} x {grid[0]} reads"
        return [Panel(shares, selected > 0, rows, columns, (row, column), 0.0, title)]

    return PointReader(name, grid, (2, count, count), run, panels)


def kernel_reader(model: nn.Module, noise: Tensor, layer: str | None, heads: str) -> PointReader:
    """Read the small and the large kernel that a position makes from context.

    Args:
        model: In evaluation mode.
        noise: An image of the size to come, ``(1, 3, Y, X)``.
        layer: A module; the last block with context mixing inside it, or of the model if ``None``, is read.
        heads: ``"mean"``, ``"max"`` or the number of a group.

    Raises:
        ConfigError: If there is no context mixing, or no such group.
    """
    name = last_inside(model, (MixingBlock,), layer, "context mixing, as OverLoCK does")
    block: Any = model.get_submodule(name)
    check_head(heads, block.rpb1.shape[0], name)
    sides: list[int] = []
    grids: list[tuple[int, int]] = []

    def read(z: Tensor) -> Tensor:
        kernels = block.kernels(z)
        sides[:] = [kernel.shape[2] for kernel in kernels]
        grids[:] = [(kernels.small.shape[4], kernels.small.shape[5])]
        merged = []
        for kernel in kernels:
            taps = kernel.flatten(4).flatten(2, 3).transpose(2, 3)  # (B, G, N, taps)
            merged.append(merge_heads(taps, heads))
        return torch.cat(merged, 2)

    run = watched(model, f"{name}.norm1", read, before=False)
    shape = tuple(run(noise)[1].shape[1:])
    grid, small = grids[0], sides[0]
    rows, columns = (np.arange(cells + 1) / cells for cells in grid)

    def panels(values: Tensor, place: tuple[float, float]) -> list[Panel]:
        column, row = (min(int(share * cells), cells - 1) for share, cells in zip(place, grid[::-1], strict=True))
        taps = values[row * grid[1] + column]
        result = []
        for size, weights in zip(sides, taps.split([small**2, len(taps) - small**2]), strict=True):
            down, along = (
                neighbours(cells, size, taps.device)[position]
                for cells, position in zip(grid, (row, column), strict=True)
            )
            whole, used = torch.zeros(grid), torch.zeros(grid, dtype=torch.bool)
            whole[down[:, None], along] = weights.view(size, size)
            used[down[:, None], along] = True
            title = f"{name}: {size} x {size} kernel at ({column}, {row}) of {grid[1]} x {grid[0]}"
            low = float(weights.min())
            result.append(Panel(whole.numpy(), used.numpy(), rows, columns, (row, column), low, title))
        return result

    return PointReader(name, grid, shape, run, panels)


def last_inside(model: nn.Module, kinds: tuple[type[nn.Module], ...], layer: str | None, what: str) -> str:
    """Return the name of the last module of some kinds inside a layer.

    Raises:
        ConfigError: If there is none, with the names of those that there are.
    """
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if not names:
        raise ConfigError(f"the model has no {what}.")
    inside = [name for name in names if layer is None or name == layer or name.startswith(f"{layer}.")]
    if not inside:
        raise ConfigError(f"layer {layer!r} has no {what}; these have: {', '.join(names)}.")
    return inside[-1]


def watched(
    model: nn.Module, name: str, read: Callable[[Tensor], Tensor], *, before: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function that runs the model, and what is read from the input or the output of one of its modules."""
    module = model.get_submodule(name)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        if before:
            handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(read(inputs[0])))
        else:
            handle = module.register_forward_hook(lambda module, inputs, output: seen.append(read(output)))
        try:
            output = model(images)
        finally:
            handle.remove()
        return output, seen[-1].float()

    return run
