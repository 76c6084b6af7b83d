"""The demo's images: train, test, classify a folder with broken files, embed, look."""

from __future__ import annotations

import csv
import html
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.apps.demo_report import Session
from saccade.apps.run_folder import latest_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

__all__ = ["show"]

TRAIN, VAL, INBOX, WIDE = range(1000), range(1000, 1200), range(1200, 1216), range(1216, 1225)
SCENE_PX, WIDE_PX, ZOOM = 48, 80, 4


def show(session: Session) -> tuple[str, dict[str, str]]:
    """Run it in the current folder; return the finding and what the report's page is filled with."""
    from saccade.apps.demo_data import Scenes

    scenes = Scenes(seed=0)
    scenes.write(Path("scenes/train"), TRAIN, SCENE_PX, by_class=True)
    scenes.write(Path("scenes/val"), VAL, SCENE_PX, by_class=True)
    scenes.write(Path("inbox"), INBOX, SCENE_PX, by_class=False)
    scenes.write(Path("wide"), WIDE, WIDE_PX, by_class=False, zoom=ZOOM)
    broken = next(Path("inbox").iterdir()).read_bytes()
    Path("inbox/broken.png").write_bytes(broken[: len(broken) // 2])
    Path("inbox/empty.jpg").touch()

    session.call("saccade fit -c image/demo --name demo")
    folder = latest_run("demo")
    model = f"{folder}/checkpoints/last.ckpt"
    session.call(f"saccade test {folder}")
    session.call(f"saccade classify inbox/ -m {model} -o predictions.csv --topk 3", expect=3)
    session.call(f"saccade embed scenes/val/ -m {model} -o features.h5")
    session.call(f"saccade attend wide/ -m {model} --img-size {WIDE_PX} -o overlays/")
    draw(folder)
    accuracy = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["last"]["val/acc"]
    values = {"train_images": f"{len(TRAIN):,}", "scene_px": str(SCENE_PX), "wide_px": str(WIDE_PX)}
    result = f"Accuracy on {len(VAL)} pictures not seen in training: {accuracy:.3f}."
    return result, {**values, "predictions": prediction_rows(Path("predictions.csv"))}


def draw(folder: Path) -> None:
    """Draw the pictures."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_training(axes[0], folder / "metrics.csv")
    draw_features(axes[1], Path("features.h5"))
    figure.savefig("training.png", dpi=110)
    plt.close(figure)
    contact_sheet(sorted(Path("overlays").glob("*.png"))).save("overlays.png")
    confusion = next(folder.rglob("confusion_matrix.png"), None)
    if confusion is not None:
        shutil.copy(confusion, "confusion_matrix.png")


def prediction_rows(path: Path) -> str:
    """Return a row of the report for each picture, with the picture."""
    cells = ("path", "status", "label_1", "prob_1", "error")
    with path.open(encoding="utf-8", newline="") as stream:
        return "\n".join(
            f'<tr class="{row["status"]}"><td><img src="images/inbox/{row["path"]}" alt=""></td>'
            + "".join(f"<td>{html.escape(row[name])}</td>" for name in cells)
            + "</tr>"
            for row in csv.DictReader(stream)
        )


def contact_sheet(paths: list[Path]) -> Image.Image:
    """Put pictures of one size side by side, three in a row."""
    from PIL import Image, ImageOps

    pictures = [Image.open(path).convert("RGB") for path in paths]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (3 * width, -(-len(pictures) // 3) * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(ImageOps.pad(picture, (width, height)), (index % 3 * width, index // 3 * height))
    return sheet


def draw_training(axes: Axes, path: Path) -> None:
    """Draw accuracy over epochs."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for name in ("train/acc", "val/acc"):
        points = [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title="Accuracy while training", xlabel="epoch", ylim=(0, 1))
    axes.legend()


def draw_features(axes: Axes, path: Path) -> None:
    """Draw the features of the validation pictures in two dimensions."""
    import h5py
    from sklearn.decomposition import PCA

    with h5py.File(path) as file:
        features, names = file["features"][:], [name.decode() for name in file["paths"][:]]
    digits = [int(name.split("/")[0]) for name in names]
    x, y = PCA(n_components=2, random_state=0).fit_transform(features).T
    dots = axes.scatter(x, y, c=digits, cmap="tab10", s=14)
    axes.set(title="Features of the validation pictures (PCA)", xticks=[], yticks=[])
    axes.figure.colorbar(dots, ax=axes, ticks=range(10), label="digit")
