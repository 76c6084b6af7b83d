"""From figures per image and head to the tables of a report: heads, layers, distances, agreement of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from saccade.vision_backbones.analysis.layers import AttentionLayer
from saccade.vision_backbones.analysis.measurement import SPREAD
from saccade.vision_backbones.analysis.profile import pattern_label
from saccade.vision_backbones.analysis.pruning import PRUNING_METRICS

__all__ = ["IMPORTANCE_METRICS", "correlations", "head_rows", "hop_rows", "layer_rows", "trends"]

IMPORTANCE_METRICS = (*PRUNING_METRICS, "first_order")
Row = dict[str, Any]


def head_rows(layers: Sequence[AttentionLayer], columns: Sequence[str], means: NDArray[np.floating[Any]]) -> list[Row]:
    """Return a row per head: its label, figures, importance and ranks; rank 1 is the most important.

    Args:
        layers: The layers.
        columns: Names of the figures, from :class:`saccade.vision_backbones.analysis.HeadMeasurement`.
        means: Their means over images, ``(T, F)``. ``first_order`` is the mean ``gate_gradient`` without its sign.
    """
    rows: list[Row] = []
    for index, layer in enumerate(layers):
        for head in range(layer.num_heads):
            found = {name: float(value) for name, value in zip(columns, means[len(rows)], strict=True)}
            label = pattern_label(
                hop0=found["mass_by_hop_0"],
                within2=sum(found[f"mass_by_hop_{k}"] for k in range(min(3, max(layer.grid)))),
                largest_column=found["largest_column"],
                entropy_share=found["entropy_share"],
            )
            row: Row = {"layer": index, "name": layer.name, "head": head, "pattern": label}
            row |= {name: found[name] for name in SPREAD}
            if "gate_gradient" in found:
                row |= {name: found[name] for name in PRUNING_METRICS}
                row["first_order"] = abs(found["gate_gradient"])
            rows.append(row)
    for name in metrics_of(rows):
        for row, rank in zip(rows, ranks([row[name] for row in rows]), strict=True):
            row[f"{name}_rank"] = rank
        for index in range(len(layers)):
            own = [row for row in rows if row["layer"] == index]
            for row, rank in zip(own, ranks([row[name] for row in own]), strict=True):
                row[f"{name}_rank_in_layer"] = rank
    return rows


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Return the metrics of importance that were measured."""
    return [name for name in IMPORTANCE_METRICS if name in rows[0] and not np.isnan(rows[0][name])]


def ranks(values: Sequence[float]) -> list[int]:
    """Return ranks from 1 for the largest; equal values share the best."""
    return [int(rank) for rank in stats.rankdata([-value for value in values], method="min")]


def layer_rows(layers: Sequence[AttentionLayer], heads: Sequence[Row]) -> list[Row]:
    """Return a row per layer: mean and standard deviation (of a population) over its heads of every figure."""
    rows = []
    for index, layer in enumerate(layers):
        own = [row for row in heads if row["layer"] == index]
        row: Row = {"layer": index, "name": layer.name, "heads": layer.num_heads}
        row |= {"grid": f"{layer.grid[0]}x{layer.grid[1]}", "prefix_tokens": layer.prefix_tokens}
        row["diversification"] = own[0]["diversification"]
        for name in (*SPREAD[:-1], *metrics_of(heads)):
            values = [head[name] for head in own]
            row |= {f"{name}_mean": float(np.mean(values)), f"{name}_std": float(np.std(values))}
        rows.append(row)
    return rows


def trends(rows: Sequence[Row]) -> Mapping[str, float]:
    """Return the change per layer of each figure's mean, a least-squares line over layers; empty for one layer."""
    if len(rows) < 2:
        return {}
    depth = np.arange(len(rows))
    names = {"diversification": "diversification"} | {name: f"{name}_mean" for name in SPREAD[:-1]}
    return {name: float(np.polyfit(depth, [row[key] for row in rows], 1)[0]) for name, key in names.items()}


def hop_rows(layers: Sequence[AttentionLayer], columns: Sequence[str], means: NDArray[np.floating[Any]]) -> list[Row]:
    """Return a row per head and hop: attention at that distance, in all and per neighbour."""
    place = {name: i for i, name in enumerate(columns)}
    rows: list[Row] = []
    position = 0
    for index, layer in enumerate(layers):
        for head in range(layer.num_heads):
            for k in range(max(layer.grid)):
                row: Row = {"layer": index, "head": head, "hop": k}
                for name in ("mass_by_hop", "mean_per_neighbour_by_hop"):
                    row[name.removesuffix("_by_hop")] = float(means[position, place[f"{name}_{k}"]])
                rows.append(row)
            position += 1
    return rows


def correlations(heads: Sequence[Row]) -> list[Row]:
    """Return Spearman's correlation over all heads between the metrics of importance, a row per pair.

    It is NaN where a metric is the same for all heads.
    """
    names = metrics_of(heads)
    rows = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            one, other = ([row[name] for row in heads] for name in (first, second))
            varies = len(set(one)) > 1 and len(set(other)) > 1
            value = float(stats.spearmanr(one, other).statistic) if varies else float("nan")
            rows.append({"first": first, "second": second, "spearman": value})
    return rows
