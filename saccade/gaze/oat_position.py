"""Positions of objects for OAT: the distance-based table, its continuous form, and the sinusoids it was compared with.

A position is ``(row, column, flag)`` in cells of the layout; the flag is 1 for the target. An encoding puts a code of
the row, of the column and of the flag side by side and cuts the result to the width asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import ConfigError, ShapeError

__all__ = [
    "NOWHERE",
    "DistancePosition",
    "PositionEncoding",
    "SinusoidPosition",
    "TablePosition",
    "build_position",
    "distance_gram",
    "distance_loss",
    "distance_table",
    "sinusoid_grid",
    "sinusoid_sequence",
]

PositionEncoding = Literal["distance", "table", "original", "exp1", "exp2", "linear"]
NOWHERE = 1e4  # a row or column far outside every table: its code is zero
ZERO_ROWS = 4  # that the official model appends to its table
GRID = (3, 11, 2)  # rows, columns and flags of the official sinusoid tables


def distance_gram(rows: int, sigma: float) -> Tensor:
    """Return the cosines that the codes of a row of cells shall have: ``exp(-(i - j)^2 / (2 sigma^2))``.

    Args:
        rows: Number of cells R.
        sigma: Width of the Gaussian in cells.

    Returns:
        ``(R, R)``, float64.
    """
    place = torch.arange(rows, dtype=torch.float64, device="cpu")  # whatever the default device is
    return torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))


def distance_loss(table: Tensor, sigma: float) -> Tensor:
    """Compute what the official table is trained for: cosines that fall with distance, and equal norms.

    Args:
        table: Codes ``(R, P)``.
        sigma: Width of the Gaussian in cells.

    Returns:
        ``[sum_ij (cos(W_i, W_j) - G_ij)^2 + mean_i (|W_i| - mean |W|)^2] / (R (R - 1))``, a scalar.

    Source:
        HKUST-NISL/oat_eccv24, offline optimisation of the position table.
    """
    rows = len(table)
    norms = table.norm(dim=1)
    unit = table / norms[:, None]
    gram = distance_gram(rows, sigma).to(table)
    loss: Tensor = (((unit @ unit.T - gram) ** 2).sum() + ((norms - norms.mean()) ** 2).mean()) / (rows * (rows - 1))
    return loss


@lru_cache(maxsize=32)
@torch.inference_mode(mode=False)  # kept, and used in training later
def gram_root(rows: int, sigma: float, power: float) -> Tensor:
    """Return ``G^power`` of :func:`distance_gram`, float64."""
    values, vectors = torch.linalg.eigh(distance_gram(rows, sigma))
    if values[0] <= 0:
        raise ConfigError(f"{rows} positions with sigma {sigma} have no exact codes; choose a smaller sigma.")
    root: Tensor = (vectors * values**power) @ vectors.T
    return root


def distance_table(rows: int, columns: int, *, sigma: float = 2.0, radius: float | None = None) -> Tensor:
    """Return the minimum of :func:`distance_loss` in closed form: ``radius G^(1/2)``, padded with zeros.

    Args:
        rows: Number of cells R.
        columns: Numbers per code P, at least R.
        sigma: Width of the Gaussian in cells.
        radius: Norm of every code; ``None`` means ``P ** 0.5``, that of a normal start.

    Returns:
        ``(R, P)``, float32.

    Raises:
        ConfigError: If P < R, or the Gaussian is so wide that float64 cannot tell the cells apart.

    Example:
        >>> round(distance_loss(distance_table(6, 8), 2.0).item(), 9)
        0.0
    """
    check_columns(rows, columns)
    scale = columns**0.5 if radius is None else radius
    return F.pad(scale * gram_root(rows, sigma, 0.5), (0, columns - rows)).float()


def check_columns(rows: int, columns: int) -> None:
    """Raise unless codes of ``columns`` numbers can be exact for ``rows`` positions."""
    if columns < rows:
        raise ConfigError(
            f"Codes of {columns} numbers cannot be exact for {rows} positions: "
            f"choose position_rows <= {columns}, or a wider model."
        )


class TablePosition(nn.Module):
    """Codes looked up in a stored table, as the official model does.

    Coordinates are truncated toward zero; one behind the table has the code zero.

    Args:
        table: ``(R, P)``; serves rows, columns and flag.
        width: Length of an encoding, at most 3 P.

    Source:
        OAT (ECCV 2024), oat_eccv24; the four zero rows are the code's own.
    """

    table: Tensor

    def __init__(self, table: Tensor, width: int) -> None:
        super().__init__()
        if 3 * table.shape[1] < width:
            raise ConfigError(
                f"A position table with {table.shape[1]} columns gives {3 * table.shape[1]} numbers, "
                f"the model needs {width}."
            )
        self.register_buffer("table", table)
        self.width = width

    def forward(self, position: Tensor) -> Tensor:
        """Encode ``(..., 3)`` as ``(..., width)``, dtype of the table."""
        padded = F.pad(self.table, (0, 0, 0, ZERO_ROWS))
        index = position.trunc().clamp(0, len(padded) - 1).long()
        return padded[index].flatten(-2)[..., : self.width]


class DistancePosition(nn.Module):
    """The distance-based codes in closed form, for any real coordinates.

    ``phi(u) = radius k(u, grid) G^(-1/2)`` with ``k(u, g) = exp(-(u - g)^2 / (2 sigma^2))`` equals
    :func:`distance_table` at whole numbers and keeps the cosines between them to 1e-5. The similarity of two positions
    is the sum of a Gaussian of their rows and one of their columns. Outside ``0 .. rows - 1`` codes fall to zero.

    Args:
        width: Length of an encoding.
        rows: Number of cells along the longer side that codes are exact for, at most a third of the width.
        sigma: Width of the Gaussian in cells.
        radius: Norm of a code; ``None`` means the square root of its length.

    Raises:
        ConfigError: If the width is too small for so many rows.

    Source:
        Closed form of the official optimisation; the continuous form is ours.
    """

    def __init__(self, width: int, rows: int, sigma: float = 2.0, radius: float | None = None) -> None:
        super().__init__()
        self.width, self.rows, self.sigma = width, rows, sigma
        self.columns = -(-width // 3)
        check_columns(rows, width - 2 * self.columns)
        self.radius = self.columns**0.5 if radius is None else radius
        gram_root(rows, sigma, -0.5)

    def forward(self, position: Tensor) -> Tensor:
        """Encode ``(..., 3)`` as ``(..., width)``, float32; computed in float64, as the inverse root is large."""
        exact = position.cpu().double() if position.device.type == "mps" else position.double()
        grid = torch.arange(self.rows, dtype=torch.float64, device=exact.device)
        kernel = torch.exp(-((exact[..., None] - grid) ** 2) / (2 * self.sigma**2))
        codes = self.radius * kernel @ gram_root(self.rows, self.sigma, -0.5).to(exact.device)
        padded = F.pad(codes, (0, self.columns - self.rows)).flatten(-2)
        return padded[..., : self.width].float().to(position.device)

    def table(self) -> Tensor:
        """Return the codes of whole numbers, ``(rows, ceil(width / 3))``, for :class:`TablePosition`."""
        return distance_table(self.rows, self.columns, sigma=self.sigma, radius=self.radius)


class SinusoidPosition(nn.Module):
    """Sines and cosines of row, column and flag on the fixed 3 x 11 layout of the official ablations.

    Args:
        width: Length of an encoding.
        kind: Frequencies; see :func:`sinusoid_grid`.
        alpha: Their parameter.
    """

    def __init__(self, width: int, kind: str, alpha: float = 0.9) -> None:
        super().__init__()
        self.width = width
        self.grid: Tensor
        self.register_buffer("grid", sinusoid_grid(kind, width, alpha), persistent=False)

    def forward(self, position: Tensor) -> Tensor:
        """Encode ``(..., 3)`` as ``(..., width)``; outside the layout, zero."""
        padded = F.pad(self.grid, (0, 0, 0, 0, 0, 1, 0, 1))
        row, column, flag = position.trunc().long().unbind(-1)
        return padded[row.clamp(0, GRID[0]), column.clamp(0, GRID[1]), flag]


def sinusoid_grid(kind: str, width: int, alpha: float = 0.9) -> Tensor:
    """Return sinusoidal codes of rows, columns and flag, ``(3, 11, 2, width)``, float32.

    Each axis has c = 2 ceil(width / 6) channels, sine and cosine in turn, of frequency ``10000^(-2k / c)``
    (``"original"``), ``(2k)^alpha / c`` (``"exp1"``), ``(2k / c)^alpha`` (``"exp2"``) or ``2 k alpha / c``
    (``"linear"``); the three stand side by side, cut to ``width``.

    Raises:
        ConfigError: If the kind is unknown.
    """
    channels = -(-width // 6) * 2
    even = torch.arange(0, channels, 2, dtype=torch.float32)
    frequencies = {
        "original": 10000.0 ** -(even / channels),
        "exp1": even**alpha / channels,
        "exp2": (even / channels) ** alpha,
        "linear": even * alpha / channels,
    }
    if kind not in frequencies:
        raise ConfigError(f"Unknown sinusoid {kind!r}; use one of {', '.join(frequencies)}.")
    codes = []
    for axis, length in enumerate(GRID):
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequencies[kind]
        code = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        shape = [length if other == axis else 1 for other in range(3)]
        codes.append(code.view(*shape, channels).expand(*GRID, channels))
    return torch.cat(codes, -1)[..., :width]


def sinusoid_sequence(length: int, width: int) -> Tensor:
    """Return the usual code of a place in a sequence: ``sin(t 10000^(-2k / E))`` and its cosine in turn.

    Args:
        length: Places T.
        width: Numbers per code E.

    Returns:
        ``(T, E)``, float32.

    Source:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5.
    """
    even = torch.arange(0, width, 2, dtype=torch.float32)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * 10000.0 ** -(even / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def build_position(kind: PositionEncoding, width: int, rows: int, columns: int, sigma: float) -> nn.Module:
    """Return the encoding of a name.

    Args:
        kind: ``"distance"`` (closed form, any coordinates), ``"table"`` (zeros, to be loaded) or a sinusoid.
        width: Length of an encoding.
        rows: Cells along the longer side.
        columns: Numbers per code of a table.
        sigma: Width of the Gaussian in cells.
    """
    if kind == "distance":
        return DistancePosition(width, rows, sigma)
    if kind == "table":
        return TablePosition(torch.zeros(rows, columns), width)
    return SinusoidPosition(width, kind)


def check_inside(position: Tensor, limit: int) -> None:
    """Raise if an object stands outside the positions that a model has codes for, by more than half a cell.

    Raises:
        ShapeError: With the largest coordinate.
    """
    if position.numel() and float(position.max()) > limit - 0.5:
        raise ShapeError(
            f"An object stands at row or column {float(position.max()):.4g}, the model has codes for 0 to {limit - 1}: "
            "build it with a larger position_rows."
        )
