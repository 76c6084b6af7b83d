"""The demo's whole slides: a drawn cohort from scanner files to ACMIL and ABMIL, and whether they find the lesion."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from saccade.apps.demo_report import Session, table
from saccade.apps.run_folder import latest_run

if TYPE_CHECKING:
    from saccade.mil.localization import Localization

__all__ = ["show"]

SLIDES = 40
SHOWN = 3
MODELS = {"acmil_ga": "ACMIL", "abmil": "ABMIL"}
OUTLINE = (0, 90, 20)


def show(session: Session) -> tuple[str, dict[str, str]]:
    """Run it in the current folder; return the finding and what the report's page is filled with."""
    print(f"drawing {SLIDES} slides", flush=True)
    draw_cohort(range(SLIDES))
    session.call("saccade slides run cohort/ -o out/ --mpp 0.5 --tile-px 64 -m stain-texture --progress none")
    session.call("saccade slides split labels.csv -o splits/ --folds 3 --group patient --stratify label")
    for name in MODELS:
        session.call(
            f"saccade slides train out/ --labels labels.csv --split splits/fold0.csv --model {name} --standardize "
            f"--epochs 20 --lr 1e-3 --name {name} -q"
        )
        session.call(f"saccade test runs/{name}")
        session.call(
            f"saccade slides predict out/ -m runs/{name} -o {name}.csv --attention out/attention/{name} --progress none"
        )
    held_out = [row["slide"] for row in read_rows(Path("splits/fold0.csv")) if row["split"] == "test"]
    positive = [key for key in sorted(held_out) if lesion_of(key).exists()]
    shown = positive[:: max(1, len(positive) // SHOWN)][:SHOWN]
    for name in MODELS:
        chosen = " ".join(f"--slide {key}" for key in shown)
        session.call(f"saccade slides heatmap out/ -m runs/{name} {chosen} --progress none")
    for key in shown:
        draw_beside(key)
    found = {name: [compare_with_lesion(key, name) for key in positive] for name in MODELS}
    values = {
        "slides": str(SLIDES),
        "held_out": str(len(held_out)),
        "positive": str(len(positive)),
        "example": shown[0],
    }
    values["pictures"] = "\n".join(
        f'<p>{key}</p><img class="wide" src="slides/{key}.png" alt="the lesion and both heatmaps">' for key in shown
    )
    result = (
        f"AUROC on {len(held_out)} slides not seen in training: "
        + ", ".join(f"{title} {read_intervals(name)['slide', 'auroc'][0]:.2f}" for name, title in MODELS.items())
        + "; lesion found with average precision "
        + ", ".join(f"{title} {mean_of(found[name], 'average_precision'):.2f}" for name, title in MODELS.items())
        + f", by chance {mean_of(found['abmil'], 'lesion_share'):.2f}."
    )
    return result, values | tables(positive, found)


def tables(positive: Sequence[str], found: Mapping[str, Sequence[Localization]]) -> dict[str, str]:
    """Return the tables of the report."""
    scores = []
    for name, title in MODELS.items():
        intervals = read_intervals(name)
        curves = [intervals[level, "auroc"] for level in ("slide", "patient")]
        cells = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in curves]
        scores.append([title, *cells, intervals["slide", "balanced_acc"][0]])
    columns = ("average_precision", "lesion_share", "iou", "random_iou")
    means = [[title, *(mean_of(found[name], column) for column in columns)] for name, title in MODELS.items()]
    each = [
        [
            key,
            ours[0].n_tiles,
            ours[0].lesion_share,
            *(value for one in ours for value in (one.average_precision, one.iou)),
        ]
        for key, *ours in zip(positive, *(found[name] for name in MODELS), strict=True)
    ]
    pairs = [f"{title} {what}" for title in MODELS.values() for what in ("average precision", "IoU")]
    return {
        "classification": table(["", "AUROC (95 %)", "by patient (95 %)", "balanced accuracy"], scores),
        "finding": table(["", "average precision", "random order", "IoU", "as many random tiles"], means),
        "each": table(["slide", "tiles", "lesion share", *pairs], each),
    }


def draw_cohort(indices: Sequence[int]) -> None:
    """Write ``cohort/ID.tif``, ``lesions/ID.geojson`` of those that have one, and ``labels.csv``."""
    from saccade.batch import write_table
    from saccade.datasets.drawn_slides import COARSE, draw_slide, save_slide
    from saccade.mil.geojson import write_polygons
    from saccade.mil.tissue import polygons_of

    for name in ("cohort", "lesions"):
        Path(name).mkdir()

    def draw(index: int) -> dict[str, str]:
        slide = draw_slide(index)
        save_slide(slide, Path("cohort", f"{slide.name}.tif"))
        if slide.lesion.any():
            write_polygons(lesion_of(slide.name), polygons_of(slide.lesion, COARSE, COARSE))
        return {"slide": slide.name, "patient": slide.patient, "label": slide.label}

    with ThreadPoolExecutor(2) as pool:
        write_table(Path("labels.csv"), list(pool.map(draw, indices)))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_intervals(name: str) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Return value and interval of a model's metrics, by level and metric."""
    return {
        (row["level"], row["metric"]): (float(row["value"]), float(row["low"]), float(row["high"]))
        for row in read_rows(latest_run(name) / "test" / "intervals.csv")
    }


def lesion_of(key: str) -> Path:
    """Return where the outlines of a slide's lesion are, if it has one."""
    return Path("lesions", f"{key}.geojson")


def compare_with_lesion(key: str, name: str) -> Localization:
    """Compare a model's attention with the lesion of a slide."""
    from saccade.mil import lesion_localization, lesion_shares, load_scores
    from saccade.mil.geojson import read_polygons

    scores = load_scores(Path("out/attention", name, f"{key}.h5"))
    shares = lesion_shares(scores.coords, scores.tile_size, read_polygons(lesion_of(key)))
    return lesion_localization(scores.maps["attention"], shares)


def mean_of(found: Sequence[Localization], column: str) -> float:
    """Return the mean of a measure over slides."""
    return fmean(asdict(one)[column] for one in found)


def draw_beside(key: str) -> None:
    """Write ``ID.png``: the slide and the heatmap of each model, with the outline of the lesion."""
    import numpy as np
    from PIL import Image

    from saccade.mil import Slide
    from saccade.mil.geojson import read_polygons
    from saccade.mil.heatmap_figures import side_by_side
    from saccade.mil.tissue import draw_outlines, overview

    polygons = read_polygons(lesion_of(key))
    maps = {name: np.array(Image.open(Path("out/heatmaps", name, f"{key}.png")).convert("RGB")) for name in MODELS}
    with Slide(Path("cohort", f"{key}.tif")) as slide:
        scale = max(1.0, slide.width / next(iter(maps.values())).shape[1])
        pictures = {"the lesion": overview(slide, scale)} | {MODELS[name]: picture for name, picture in maps.items()}
    drawn = {title: draw_outlines(picture, polygons, scale, OUTLINE, 8) for title, picture in pictures.items()}
    Image.fromarray(side_by_side(drawn, height=360)).save(f"{key}.png")
