"""``saccade demo``: see it work offline, with data that ships with the installation."""

from __future__ import annotations

import argparse
import contextlib
import csv
import html
import json
import shlex
import shutil
import time
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from saccade.errors import ConfigError, SaccadeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {"demo": ["saccade demo -o demo/", "saccade demo classify -o demo/ --overwrite"]}
TRAIN, VAL, INBOX, WIDE = range(1000), range(1000, 1200), range(1200, 1216), range(1216, 1225)
SCENE_PX, WIDE_PX, ZOOM = 48, 80, 4
MARKER = "made-by-saccade-demo.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("part", nargs="?", choices=["classify"], default="classify", help="default: classify")
    parser.add_argument("-o", "--out", default="demo/", metavar="FOLDER", help="default: demo/")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that holds other things")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()):
        if not (args.overwrite or (out / MARKER).exists()):
            raise ConfigError(f"{out} holds other things. Choose another --out, or pass --overwrite to replace it.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("saccade demo replaces this folder when it runs again.\n", encoding="utf-8")
    start = time.monotonic()
    print(f"$ cd {shlex.quote(str(out))}   # everything below happens there", flush=True)
    with contextlib.chdir(out):
        classify_demo()
    print(f"demo finished in {time.monotonic() - start:.0f} s: open {out / 'report.html'}")
    return 0


def call(line: str, *, expect: int = 0) -> str:
    """Print a command as the user would type it, run it, and return the line."""
    from saccade.apps.cli import main

    print(f"$ {line}", flush=True)
    code = main(shlex.split(line)[1:])
    if code != expect:
        raise SaccadeError(f"`{line}` ended with exit code {code}, expected {expect}.")
    return line


def classify_demo() -> None:
    """Train, test, classify a folder with broken files, embed, look, and report."""
    from saccade.apps.demo_data import Scenes

    scenes = Scenes(seed=0)
    scenes.write(Path("scenes/train"), TRAIN, SCENE_PX, by_class=True)
    scenes.write(Path("scenes/val"), VAL, SCENE_PX, by_class=True)
    scenes.write(Path("inbox"), INBOX, SCENE_PX, by_class=False)
    scenes.write(Path("wide"), WIDE, WIDE_PX, by_class=False, zoom=ZOOM)
    broken = next(Path("inbox").iterdir()).read_bytes()
    Path("inbox/broken.png").write_bytes(broken[: len(broken) // 2])
    Path("inbox/empty.jpg").touch()

    lines = [call("saccade fit -c image/demo --name demo")]
    folder = Path("runs/demo", Path("runs/demo/latest").read_text(encoding="utf-8").strip())
    model = f"{folder}/checkpoints/last.ckpt"
    lines += [
        call(f"saccade test {folder}"),
        call(f"saccade classify inbox/ -m {model} -o predictions.csv --topk 3", expect=3),
        call(f"saccade embed scenes/val/ -m {model} -o features.h5"),
        call(f"saccade attend wide/ -m {model} --img-size {WIDE_PX} -o overlays/"),
    ]
    report(folder, lines)


def report(folder: Path, lines: list[str]) -> None:
    """Draw the pictures and write ``report.html``."""
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
    with Path("predictions.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    accuracy = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["last"]["val/acc"]
    result = f"Accuracy on {len(VAL)} pictures not seen in training: {accuracy:.3f}."
    Path("report.html").write_text(page(lines, rows, result), encoding="utf-8")


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


def page(lines: list[str], rows: list[dict[str, str]], result: str) -> str:
    """Return the report."""
    template = resources.files("saccade.apps").joinpath("demo_report.html").read_text(encoding="utf-8")
    cells = ("path", "status", "label_1", "prob_1", "error")
    return Template(template).substitute(
        train_images=f"{len(TRAIN):,}",
        scene_px=SCENE_PX,
        wide_px=WIDE_PX,
        commands=html.escape("\n".join(f"$ {line}" for line in lines)),
        result=html.escape(result),
        rows="\n".join(
            f'<tr class="{row["status"]}"><td><img src="inbox/{row["path"]}" alt=""></td>'
            + "".join(f"<td>{html.escape(row[name])}</td>" for name in cells)
            + "</tr>"
            for row in rows
        ),
    )
