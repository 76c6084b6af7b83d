"""Which object a fixation is on."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["assign_objects"]


def assign_objects(
    x: ArrayLike, y: ArrayLike, boxes: ArrayLike, *, tolerance: float | None = None
) -> NDArray[np.int64]:
    """Return the object of each fixation: the containing box, else the nearest box edge, else -1.

    Of several boxes that contain a fixation the smallest counts. Edges belong to a box.

    Args:
        x: ``(T,)`` px.
        y: ``(T,)`` px.
        boxes: ``(N, 4)`` x1, y1, x2, y2 in px.
        tolerance: Largest distance in px to a box that does not contain the fixation; ``None`` sets no limit.
    """
    points = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], -1)[:, None]  # (T, 1, 2)
    corners = np.asarray(boxes, np.float64)
    outside = np.maximum(np.maximum(corners[:, :2] - points, points - corners[:, 2:]), 0)  # (T, N, 2)
    distance = np.hypot(outside[..., 0], outside[..., 1])
    area = np.broadcast_to(np.prod(corners[:, 2:] - corners[:, :2], -1), distance.shape)
    nearest = np.lexsort((area, distance))[:, 0]
    reached = np.take_along_axis(distance, nearest[:, None], 1)[:, 0] <= (np.inf if tolerance is None else tolerance)
    chosen: NDArray[np.int64] = np.where(reached, nearest, -1).astype(np.int64)
    return chosen
