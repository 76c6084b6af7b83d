"""From logits to the columns of a prediction table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["top_classes"]


def top_classes(logits: Tensor, names: Sequence[str], topk: int) -> dict[str, Any]:
    """Return ``label_1, index_1, prob_1, label_2, ...`` by falling probability.

    Args:
        logits: Of one image, ``(K,)``.
        names: Names by class index.
        topk: Classes listed, >= 1; all if there are fewer. Equal ones are listed by index.
    """
    probabilities = logits.double().softmax(0)
    row: dict[str, Any] = {}
    for rank, index in enumerate(probabilities.argsort(descending=True, stable=True)[:topk].tolist(), start=1):
        row[f"label_{rank}"] = names[index]
        row[f"index_{rank}"] = index
        row[f"prob_{rank}"] = round(probabilities[index].item(), 6)
    return row
