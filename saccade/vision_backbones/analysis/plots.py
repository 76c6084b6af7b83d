"""The pictures of an analysis report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saccade.vision_backbones.analysis.patterns import Cluster, PatternMaps, PatternSummary
from saccade.vision_backbones.analysis.tables import metrics_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_clusters", "draw_distances", "draw_heads", "draw_importance", "draw_layers", "words"]

Row = dict[str, Any]
GAP = 4  # pixels between maps
WORDS = {
    "js_divergence": "Jensen-Shannon divergence (bits)",
    "first_order": "first-order estimate",
    "entropy_share": "entropy / largest possible",
    "mean_distance": "mean distance (patches)",
    "diversification": "overfocusing (ADL)",
    "largest_column": "largest column mean",
    "entropy": "entropy (nats)",
}


def words(name: str) -> str:
    """Return a figure's name as it stands in pictures and tables."""
    return WORDS.get(name, name.replace("_", " "))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that no window knows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_importance(heads: Sequence[Row]) -> Figure:
    """Draw a map of layers by heads for each metric of importance."""
    names = metrics_of(heads)
    layers = 1 + max(row["layer"] for row in heads)
    most = 1 + max(row["head"] for row in heads)
    figure = new_figure(2.1 + 2.4 * len(names), 1.6 + 0.24 * layers)
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for name, axis in zip(names, axes, strict=True):
        values = np.full((layers, most), np.nan)
        for row in heads:
            values[row["layer"], row["head"]] = row[name]
        top = float(np.nanmax(np.abs(values))) or 1.0
        signed = bool(np.nanmin(values) < 0)
        image = axis.imshow(
            values, aspect="auto", cmap="RdBu_r" if signed else "viridis", vmin=-top if signed else 0.0, vmax=top
        )
        axis.set_title(words(name), fontsize=9)
        axis.set_xlabel("head")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, shrink=0.9).ax.tick_params(labelsize=7)
    axes[0].set_ylabel("layer")
    return figure


def draw_layers(heads: Sequence[Row], layers: Sequence[Row]) -> Figure:
    """Draw every figure over layers: a dot per head, mean and standard deviation over heads."""
    names = ["prefix_mass", "entropy_share", "mean_distance", "sink_rate", "largest_column", "diversification"]
    figure = new_figure(10.5, 5.6)
    depth = np.array([row["layer"] for row in layers])
    for name, axis in zip(names, figure.subplots(2, 3).flat, strict=True):
        if name == "diversification":
            axis.plot(depth, [row[name] for row in layers], marker="o", color="C0")
        else:
            mean = np.array([row[f"{name}_mean"] for row in layers])
            std = np.array([row[f"{name}_std"] for row in layers])
            axis.fill_between(depth, mean - std, mean + std, alpha=0.2, color="C0", linewidth=0)
            axis.scatter([row["layer"] for row in heads], [row[name] for row in heads], s=9, color="0.5")
            axis.plot(depth, mean, color="C0", linewidth=2)
        axis.set_title(words(name), fontsize=10)
        top = max(row[name] for row in heads)
        axis.set_ylim(0, 1.1 * top if top > 0 else 1.0)
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_distances(hops: Sequence[Row]) -> Figure:
    """Draw attention by distance for each layer, mean over heads: in all, and per neighbour."""
    layers, most = 1 + max(row["layer"] for row in hops), 1 + max(row["hop"] for row in hops)
    figure = new_figure(10.5, 1.8 + 0.24 * layers)
    for name, axis in zip(("mass", "mean_per_neighbour"), figure.subplots(1, 2), strict=True):
        sums, counts = np.zeros((layers, most)), np.zeros((layers, most))
        for row in hops:
            sums[row["layer"], row["hop"]] += row[name]
            counts[row["layer"], row["hop"]] += 1
        values = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        if name == "mean_per_neighbour":
            values = np.log10(np.maximum(values, 1e-6))
        image = axis.imshow(values, aspect="auto", cmap="magma")
        axis.set_title("attention at a distance" if name == "mass" else "log10 of attention to one patch", fontsize=10)
        axis.set_xlabel("distance (hops)")
        axis.set_ylabel("layer")
        for side in (axis.xaxis, axis.yaxis):
            side.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis)
    return figure


def draw_clusters(patterns: PatternMaps, clusters: Sequence[Cluster]) -> Figure:
    """Draw a card per cluster: the decoded centroid, and the real maps next to it; each card has its own scale."""
    side = clusters[0].centroid.shape[0]
    step = side + GAP
    columns = 1 + max(len(cluster.nearest) for cluster in clusters)
    sheet = np.full((step * len(clusters) - GAP, step * columns - GAP), np.nan)
    for index, cluster in enumerate(clusters):
        shown = [cluster.centroid, *(patterns.maps[i].float().numpy() for i in cluster.nearest)]
        low, high = min(float(one.min()) for one in shown), max(float(one.max()) for one in shown)
        for column, one in enumerate(shown):
            place = slice(step * index, step * index + side), slice(step * column, step * column + side)
            sheet[place] = (one - low) / max(high - low, 1e-9)
    figure = new_figure(1.3 * columns + 1.4, 1.3 * len(clusters) + 0.5)
    axes = figure.subplots()
    axes.imshow(sheet, cmap="magma", interpolation="nearest")
    labels = [f"{i}: {cluster.label}\n{cluster.size:,} maps" for i, cluster in enumerate(clusters)]
    axes.set_yticks([step * i + side / 2 for i in range(len(clusters))], labels)
    axes.set_xticks([side / 2, step * (1 + columns) / 2], ["decoded centroid", "nearest maps"])
    axes.tick_params(length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_frame_on(False)
    return figure


def draw_heads(heads: Sequence[Row], summary: PatternSummary) -> Figure:
    """Draw a card per head: how its maps divide among the clusters, in their order."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    layers, most = 1 + max(row["layer"] for row in heads), 1 + max(row["head"] for row in heads)
    count = len(summary.clusters)
    colors: Any = colormaps["tab20"]
    figure = new_figure(max(6.4, 1.6 + 0.62 * most), 1.6 + 0.42 * layers)
    axes = figure.subplots()
    for row, shares in zip(heads, summary.head_shares, strict=True):
        left = row["head"] + 0.05 + 0.9 * np.arange(count) / count
        bars = axes.bar(left, -0.85 * shares, bottom=row["layer"] + 0.95, width=0.9 / count, align="edge")
        for i, bar in enumerate(bars):
            bar.set_color(colors(i))
        axes.plot([row["head"] + 0.05, row["head"] + 0.95], [row["layer"] + 0.95] * 2, color="0.7", linewidth=0.6)
    axes.set(xlim=(0, most), ylim=(layers, 0), xlabel="head", ylabel="layer")
    axes.set_xticks(np.arange(most) + 0.5, map(str, range(most)))
    axes.set_yticks(np.arange(layers) + 0.5, map(str, range(layers)))
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    patches = [Patch(color=colors(i), label=f"{i}: {cluster.label}") for i, cluster in enumerate(summary.clusters)]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return figure
