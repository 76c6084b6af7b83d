"""The folder that an analysis ends in: tables, pictures, and a page that shows both."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade import __version__
from saccade.batch import atomic_path
from saccade.batch.tables import remove, write_json, write_table
from saccade.vision_backbones.analysis.layers import AttentionLayer
from saccade.vision_backbones.analysis.patterns import STATISTICS, PatternMaps, PatternSummary
from saccade.vision_backbones.analysis.plots import (
    draw_clusters,
    draw_distances,
    draw_heads,
    draw_importance,
    draw_layers,
    words,
)
from saccade.vision_backbones.analysis.tables import correlations, head_rows, hop_rows, layer_rows, metrics_of, trends

__all__ = ["AnalysisReport", "write_analysis"]

Row = dict[str, Any]
SHOWN_HEADS = 20
OPTIONAL = {"correlations", "importance", "clusters", "nearest", "head_patterns"}

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention of $model</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
img { max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: 2px 10px 2px 0; text-align: right; border-bottom: 1px solid #eee; }
td:first-child, th:first-child, td.text { text-align: left; }
p.note { color: #555; }
</style>
</head>
<body>
<h1>Attention of $model</h1>
<p>$facts</p>
$notes
$sections
<p class="note">saccade $version. The same figures as tables: $files.</p>
</body>
</html>
""")


@dataclass(frozen=True)
class AnalysisReport:
    """What there is to report.

    Args:
        model: Name of the model.
        settings: What the results depend on.
        layers: The layers.
        columns: Names of the figures.
        means: Their means over images, ``(T, F)``.
        images: How many.
        accuracy: Share of them that the model classifies right; ``None`` without true labels.
        notes: What a reader has to know.
        patterns: The maps that were clustered, with the ids of their images; ``None`` without.
        summary: Their clusters.
    """

    model: str
    settings: Mapping[str, Any]
    layers: Sequence[AttentionLayer]
    columns: Sequence[str]
    means: NDArray[np.float64]
    images: int
    accuracy: float | None
    notes: Sequence[str]
    patterns: tuple[PatternMaps, Sequence[str]] | None = None
    summary: PatternSummary | None = None


def write_analysis(report: AnalysisReport, folder: Path) -> Path:
    """Write tables, pictures, ``summary.json`` and ``report.html``; return the page.

    Args:
        report: What there is to report.
        folder: Where to.
    """
    heads = head_rows(report.layers, report.columns, report.means)
    layers, hops = layer_rows(report.layers, heads), hop_rows(report.layers, report.columns, report.means)
    agreement = correlations(heads)
    tables = {"heads": heads, "layers": layers, "hops": hops}
    figures = {"layers": draw_layers(heads, layers), "distances": draw_distances(hops)}
    if metrics_of(heads):
        tables["correlations"] = agreement
        figures["importance"] = draw_importance(heads)
    content: dict[str, Any] = {
        "saccade_version": __version__,
        "model": report.model,
        **report.settings,
        "images": report.images,
        "accuracy": report.accuracy,
        "notes": list(report.notes),
        "trend_per_layer": trends(layers),
        "correlations": agreement,
        "layers": layers,
    }
    if report.summary is not None and report.patterns is not None:
        maps, names = report.patterns
        clusters = cluster_rows(report.summary)
        tables["clusters"], tables["nearest"] = clusters, nearest_rows(report.summary, maps, names, heads)
        tables["head_patterns"] = [
            {"layer": row["layer"], "head": row["head"]}
            | {f"cluster_{i}": share for i, share in enumerate(shares.tolist())}
            for row, shares in zip(heads, report.summary.head_shares, strict=True)
        ]
        figures["clusters"] = draw_clusters(maps, report.summary.clusters)
        figures["head_patterns"] = draw_heads(heads, report.summary)
        content["patterns"] = {
            "maps": len(maps.maps),
            "images": len(names),
            "autoencoder_error": report.summary.error,
            "silhouette": report.summary.silhouette,
            "clusters": clusters,
        }
    for name in OPTIONAL - tables.keys() - figures.keys():  # of an earlier report
        remove(folder / f"{name}.csv")
        remove(folder / f"{name}.png")
    for name, rows in tables.items():
        write_table(folder / f"{name}.csv", finite(rows), list(dict.fromkeys(key for row in rows for key in row)))
    for name, figure in figures.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110)
    write_json(folder / "summary.json", finite(content))
    page = folder / "report.html"
    with atomic_path(page) as temporary:
        temporary.write_text(make_page(report, heads, layers, agreement, list(tables)), encoding="utf-8")
    return page


def finite(value: Any) -> Any:  # noqa: ANN401 - nested rows
    """Return numbers rounded to nine digits, and nothing in place of NaN."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def cluster_rows(summary: PatternSummary) -> list[Row]:
    """Return a row per cluster."""
    total = sum(cluster.size for cluster in summary.clusters)
    return [
        {"cluster": index, "pattern": cluster.label, "maps": cluster.size, "share": cluster.size / total}
        | {name: cluster.statistics[name] for name in STATISTICS}
        for index, cluster in enumerate(summary.clusters)
    ]


def nearest_rows(summary: PatternSummary, maps: PatternMaps, names: Sequence[str], heads: Sequence[Row]) -> list[Row]:
    """Return a row per real map shown beside a centroid: whose it is."""
    rows = []
    for index, cluster in enumerate(summary.clusters):
        for position in cluster.nearest:
            head = heads[int(maps.head[position])]
            image = names[int(maps.image[position])]
            rows.append({"cluster": index, "image": image, "layer": head["layer"], "head": head["head"]})
    return rows


def make_page(
    report: AnalysisReport, heads: Sequence[Row], layers: Sequence[Row], agreement: Sequence[Row], tables: Sequence[str]
) -> str:
    """Return ``report.html``."""
    facts = [f"{len(report.layers)} layers, {len(heads)} heads", f"{report.images:,} images"]
    facts.append(f"weights {report.settings['weights']}")
    if report.accuracy is not None:
        facts.append(f"accuracy {report.accuracy:.1%}")
    sections = []
    metrics = metrics_of(heads)
    if metrics:
        first = "js_divergence" if "js_divergence" in metrics else metrics[0]
        best = sorted(heads, key=lambda row: row[f"{first}_rank"])[:SHOWN_HEADS]
        what = "zero" if report.settings["importance"] == "zero" else "its mean over the images"
        sections += [
            "<h2>Importance of heads</h2>",
            f"<p>Each head's output is replaced by {what}, one head at a time. Higher means that the answer changes "
            "more; negative drops mean that the model does better without the head.</p>",
            picture("importance"),
            f"<p>The {len(best)} heads that matter most by {html.escape(words(first))}:</p>",
            table(best, ["layer", "head", "pattern", *metrics]),
            "<p>Agreement of the metrics, Spearman's correlation over heads:</p>",
            table(
                [row | {key: words(row[key]) for key in ("first", "second")} for row in agreement],
                ["first", "second", "spearman"],
            ),
        ]
    sections += [
        "<h2>Over layers</h2>",
        "<p>A dot is a head, the line their mean, the band one standard deviation. Prefix tokens are class and "
        "register tokens; everything else is between patches. A head has a sink if one token gets more than 0.3 of its "
        "attention. Overfocusing is the attention diversification loss of the layer.</p>",
        picture("layers"),
        "<h2>Over distance</h2>",
        "<p>Hop 0 is the patch itself, hop 1 the ring of its neighbours, and so on.</p>",
        picture("distances"),
    ]
    if report.summary is not None and report.patterns is not None:
        sections += [
            "<h2>Patterns</h2>",
            f"<p>{len(report.patterns[0].maps):,} maps of {len(report.patterns[1])} images, compressed to 32 numbers "
            f"by an autoencoder (error {report.summary.error:.3f} of the variance) and clustered by k-means; the "
            "number of clusters has the best silhouette. Rows are queries, columns are keys, on a logarithmic scale."
            "</p>",
            table(cluster_rows(report.summary), ["cluster", "pattern", "maps", "share", *STATISTICS]),
            picture("clusters"),
            "<p>How the maps of each head divide among the clusters:</p>",
            picture("head_patterns"),
        ]
    sections += ["<h2>Layers</h2>", table(layers, [key for key in layers[0] if not key.endswith("_std")])]
    links = [f'<a href="{name}.csv">{name}.csv</a>' for name in ("images", *tables)]
    return PAGE.substitute(
        model=html.escape(report.model),
        facts=html.escape("; ".join(facts)) + ".",
        notes="\n".join(f'<p class="note">{html.escape(note)}</p>' for note in report.notes),
        sections="\n".join(sections),
        version=__version__,
        files=", ".join([*links, '<a href="summary.json">summary.json</a>']),
    )


def picture(name: str) -> str:
    """Return the tag of a picture that lies beside the page."""
    return f'<img src="{name}.png" alt="{html.escape(words(name))}">'


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return rows as an HTML table."""
    head = "".join(f"<th>{html.escape(words(name))}</th>" for name in columns)
    body = "\n".join("<tr>" + "".join(cell(row[name]) for name in columns) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def cell(value: object) -> str:
    """Return one cell."""
    if isinstance(value, float):
        return f"<td>{value:.4g}</td>" if math.isfinite(value) else "<td></td>"
    return f'<td class="text">{html.escape(value)}</td>' if isinstance(value, str) else f"<td>{value}</td>"
