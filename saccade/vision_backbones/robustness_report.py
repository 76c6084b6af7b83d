"""What a robustness run writes: metrics as JSON and CSV, tables for a paper, a plot."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade import __version__
from saccade.batch import atomic_path, write_table
from saccade.batch.tables import write_json
from saccade.datasets.corruptions import CORRUPTIONS, GROUPS, SEVERITIES
from saccade.datasets.robustness_suites import PERTURBATIONS
from saccade.errors import ConfigError
from saccade.vision_backbones.robustness_metrics import (
    COUNTED,
    corruption_error,
    corruption_metrics,
    relative_corruption_error,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "read_reference", "write_report"]

SHORT = {
    "gaussian_noise": "Gauss.",
    "shot_noise": "Shot",
    "impulse_noise": "Impulse",
    "speckle_noise": "Speckle",
    "defocus_blur": "Defocus",
    "glass_blur": "Glass",
    "motion_blur": "Motion",
    "zoom_blur": "Zoom",
    "gaussian_blur": "Gauss. blur",
    "brightness": "Bright.",
    "elastic_transform": "Elastic",
    "jpeg_compression": "JPEG",
}
RECREATED = (
    "The corruptions were made on the fly, frost with generated textures: these figures are not comparable with those "
    "on the JPEG files of ImageNet-C."
)


class Report:
    """Metrics of one run, derived from the rows of its parts.

    Args:
        suite: Name of the suite.
        model: Name of the model.
        settings: What the results depend on.
        rows: A row per finished part: ``kind``, ``severity``, and counts of right images or means over clips.
        reference: ImageNet-P values to divide by: ``flip_probability`` and ``top5_distance`` by perturbation.
    """

    def __init__(
        self,
        suite: str,
        model: str,
        settings: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        reference: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.suite = suite
        self.model = model
        self.settings = settings
        self.rows = rows
        self.reference = reference
        self.alexnet = settings.get("all_of_imagenet", False)  # AlexNet's errors apply
        self.clean = next((top1(row) for row in rows if row["kind"] == "clean"), None)
        self.accuracy: dict[str, dict[int, float]] = {}
        for name in CORRUPTIONS:
            by_severity = {row["severity"]: top1(row) for row in rows if row["kind"] == name and "correct" in row}
            if by_severity:
                self.accuracy[name] = dict(sorted(by_severity.items()))

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        notes = [RECREATED] if self.suite == "corruptions" else []
        bad = sum(row["bad_files"] for row in self.rows)
        return notes + ([f"{bad} files could not be read and count in no figure."] if bad else [])

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metrics by exact name; the unit is in the name."""
        if self.suite == "imagenet-p":
            return self.perturbation_metrics()
        if self.suite in ("imagenet-c", "corruptions"):
            metrics = corruption_metrics(self.accuracy, self.clean, alexnet=self.alexnet)
            if self.suite == "corruptions":  # said in the name, too: see RECREATED
                metrics = {name.replace("mCE_", "mCE_recreated_"): value for name, value in metrics.items()}
            return metrics
        word = self.suite.replace("-", "_")
        metrics = {}
        for row in self.rows:
            metrics[f"{word}_top1_percent"] = 100 * top1(row)
            if self.settings["classes"] > 5:
                metrics[f"{word}_top5_percent"] = 100 * row["correct_top5"] / row["files"]
        return metrics

    def perturbation_metrics(self) -> dict[str, float]:
        """Return the means over the ten perturbations, and those divided by the reference where there is one."""
        by_kind = {row["kind"]: row for row in self.rows}
        if not by_kind.keys() >= set(PERTURBATIONS):
            return {}
        rows = [by_kind[name] for name in PERTURBATIONS]
        metrics = {
            "mean_flip_probability_percent": 100 * mean(row["flip_probability"] for row in rows),
            "mean_top5_distance": mean(row["top5_distance"] for row in rows),
            "mean_zipf_distance": mean(row["zipf_distance"] for row in rows),
        }
        if self.reference is not None:
            for name, value in (("mFR_percent", "flip_probability"), ("mT5D_percent", "top5_distance")):
                metrics[name] = 100 * mean(row[value] / self.reference[row["kind"]][value] for row in rows)
        return metrics

    def details(self) -> dict[str, Any]:
        """Return the figures of each corruption or perturbation."""
        if self.suite == "imagenet-p":
            return {row["kind"]: {name: row[name] for name in row if name != "unreadable"} for row in self.rows}
        found: dict[str, Any] = {}
        for name, by_severity in self.accuracy.items():
            percent = {str(severity): 100 * value for severity, value in by_severity.items()}
            entry = {
                "group": CORRUPTIONS[name].group,
                "top1_percent": percent,
                "mean_top1_percent": mean(percent.values()),
            }
            if self.alexnet and name in COUNTED and len(by_severity) == len(SEVERITIES):
                errors = [1 - by_severity[severity] for severity in SEVERITIES]
                entry["CE_percent"] = 100 * corruption_error(name, errors)
                if self.clean is not None:
                    entry["relative_CE_percent"] = 100 * relative_corruption_error(name, errors, 1 - self.clean)
            found[name] = entry
        return found

    def table(self) -> tuple[str, list[tuple[str, str, str]]]:
        """Return a caption, and the columns of a paper's table: group, heading, value."""
        details = self.details()
        if self.suite == "imagenet-p":
            columns = [("", metric_heading(name), f"{value:.1f}") for name, value in self.metrics.items()]
            ten = [
                ("Flip probability (%)", short(kind), f"{100 * row['flip_probability']:.1f}")
                for kind, row in details.items()
            ]
            return "ImageNet-P. Means are over the ten perturbations.", columns + ten
        if not details:
            return self.suite, [("", metric_heading(name), f"{value:.1f}") for name, value in self.metrics.items()]
        shown = ("clean", "mCE", "relative_mCE", "mean", "retention")
        columns = [
            ("", metric_heading(name), f"{value:.1f}") for name, value in self.metrics.items() if name.startswith(shown)
        ]
        with_alexnet = all("CE_percent" in details.get(name, ()) for name in COUNTED)
        key, what = (
            ("CE_percent", "CE (%), AlexNet = 100") if with_alexnet else ("mean_top1_percent", "top-1 accuracy (%)")
        )
        columns += [
            (CORRUPTIONS[name].group.capitalize(), short(name), f"{entry[key]:.1f}")
            for name, entry in details.items()
            if key in entry
        ]
        title = {"imagenet-c": "ImageNet-C"}.get(self.suite, "Corruptions made on the fly")
        return " ".join([f"{title}. By corruption: {what}, mean over severities.", *self.notes]), columns


def top1(row: Mapping[str, Any]) -> float:
    """Return the share of right images of a part."""
    return float(row["correct"] / row["files"])


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    listed = list(values)
    return sum(listed) / len(listed)


def short(name: str) -> str:
    """Return a heading for a corruption."""
    return SHORT.get(name, name.replace("_", " ").capitalize())


def metric_heading(name: str) -> str:
    """Return a heading for a metric: its name in words, with the unit."""
    words = name.removesuffix("_percent").replace("_", " ").replace("mCE recreated", "mCE (recreated)")
    words = re.sub(r"imagenet (\w+)", lambda match: f"ImageNet-{match[1].capitalize()}", words)
    words = re.sub(r"top([15])", r"top-\1", words)
    heading = words if re.match(r"m[A-Z]", words) else words[0].upper() + words[1:]
    return heading + (" (%)" if name.endswith("_percent") else "")


def read_reference(path: Path) -> dict[str, dict[str, float]]:
    """Read the ImageNet-P values of the model that mFR and mT5D divide by.

    Args:
        path: CSV table with the columns ``kind``, ``flip_probability`` (0..1), ``top5_distance``; others are ignored.

    Raises:
        ConfigError: If a column or one of the ten perturbations is missing, or a value is no positive number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = {row.get("kind"): row for row in csv.DictReader(stream)}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the reference table {path}: {error}.") from error
    values: dict[str, dict[str, float]] = {}
    for kind in PERTURBATIONS:
        try:
            row = rows[kind]
            values[kind] = {name: float(row[name]) for name in ("flip_probability", "top5_distance")}
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} needs the columns kind, flip_probability and top5_distance, with a row of numbers for each of "
                f"{', '.join(PERTURBATIONS)}; {kind} is wrong or missing."
            ) from error
        if not 0 < values[kind]["flip_probability"] <= 1 or values[kind]["top5_distance"] <= 0:
            raise ConfigError(
                f"{path}, {kind}: a flip probability lies between 0 and 1, a distance above 0: {values[kind]}."
            )
    return values


def write_report(report: Report, folder: Path) -> None:
    """Write ``metrics.json``, ``metrics.csv``, ``table.md``, ``table.tex`` and ``plot.png`` into a folder."""
    content = {
        "saccade_version": __version__,
        "model": report.model,
        **report.settings,
        "files": sum(row["files"] for row in report.rows),
        "bad_files": sum(row["bad_files"] for row in report.rows),
        "metrics": rounded(report.metrics),
        "by_kind": rounded(report.details()),
        "notes": report.notes,
    }
    write_json(folder / "metrics.json", content)
    write_table(
        folder / "metrics.csv",
        [{"metric": name, "value": value} for name, value in rounded(report.metrics).items()],
        ["metric", "value"],
    )
    caption, columns = report.table()
    for name, text in (
        ("table.md", markdown(report.model, caption, columns)),
        ("table.tex", latex(report.model, caption, columns)),
    ):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if report.rows:
        with atomic_path(folder / "plot.png") as temporary:
            draw(report).savefig(temporary, dpi=150)


def rounded(value: Any) -> Any:  # noqa: ANN401 - nested numbers
    """Return numbers, in mappings too, without what floating point adds behind the tenth digit."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return round(value, 10) if isinstance(value, float) else value


def markdown(model: str, caption: str, columns: Sequence[tuple[str, str, str]]) -> str:
    """Return a table of one row for a README."""
    heads = ["Model", *(f"{group}: {head}" if group else head for group, head, _ in columns)]
    cells = [model, *(value for _, _, value in columns)]
    lines = [heads, ["---"] + ["---:"] * len(columns), cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption}\n"


def latex(model: str, caption: str, columns: Sequence[tuple[str, str, str]]) -> str:
    """Return a table of one row for a paper; needs the booktabs package."""
    groups: list[list[Any]] = []
    for group, _, _ in columns:
        if groups and groups[-1][0] == group:
            groups[-1][1] += 1
        else:
            groups.append([group, 1])
    over = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{escaped(group)}}}" for group, count in groups)
    heads = " & ".join(["Model", *(escaped(head) for _, head, _ in columns)])
    cells = " & ".join([escaped(model), *(value for _, _, value in columns)])
    lines = [
        r"\begin{table}",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        *([rf" & {over} \\"] if any(group for group, _ in groups) else []),
        rf"{heads} \\",
        r"\midrule",
        rf"{cells} \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, rf"\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def draw(report: Report) -> Figure:
    """Draw a radar of accuracy by corruption and severity, or bars."""
    import numpy as np
    from matplotlib.figure import Figure

    if len(report.accuracy) < 3:
        return draw_bars(report)
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    names = [name for group in GROUPS.values() for name in group if name in report.accuracy]
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    closed = [*angles, angles[0]]
    severities = sorted({severity for by in report.accuracy.values() for severity in by})
    for severity in severities:
        values = [100 * report.accuracy[name].get(severity, np.nan) for name in names]
        shade = str(0.85 - 0.14 * severity)
        axes.plot(closed, [*values, values[0]], color=shade, linewidth=1, label=f"severity {severity}")
    values = [100 * mean(report.accuracy[name].values()) for name in names]
    axes.plot(closed, [*values, values[0]], color="C0", linewidth=2, label="mean over severities")
    axes.fill(closed, [*values, values[0]], color="C0", alpha=0.15)
    if report.clean is not None:
        axes.plot(np.linspace(0, 2 * np.pi, 181), [100 * report.clean] * 181, color="C1", linestyle="--", label="clean")
    axes.set_xticks(angles, [short(name) for name in names])
    axes.set_ylim(0, 100)
    axes.tick_params(pad=7, labelsize=8)
    axes.grid(color="0.9")
    axes.spines["polar"].set_color("0.8")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_title(f"{report.model}\ntop-1 accuracy (%), {report.suite}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_bars(report: Report) -> Figure:
    """Draw a bar for each part: flip probability, or accuracy."""
    from matplotlib.figure import Figure

    if report.suite == "imagenet-p":
        bars = [(short(row["kind"]), 100 * row["flip_probability"]) for row in report.rows]
        label = "flip probability (%)"
    elif report.suite in ("imagenet-c", "corruptions"):
        named = [(short(row["kind"]), row["severity"], 100 * top1(row)) for row in report.rows]
        bars = [(f"{name} {severity or ''}".strip(), value) for name, severity, value in sorted(named)]
        label = "top-1 accuracy (%)"
    else:
        bars = [(metric_heading(name).removesuffix(" (%)"), value) for name, value in report.metrics.items()]
        label = "accuracy (%)"
    figure = Figure(figsize=(6.4, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh([name for name, _ in bars][::-1], [value for _, value in bars][::-1], color="C0")
    axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlim(0, 110 if "accuracy" in label else None)
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.set_title(f"{report.model}, {report.suite}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
