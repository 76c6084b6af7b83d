"""What ``saccade doctor`` checks. Each function does real work in an empty folder and says how it went.

A function that raises has failed; an ImportError means that a package is missing.
"""

from __future__ import annotations

import csv
import json
import locale
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "Result",
    "check_accelerator",
    "check_arrays",
    "check_attention",
    "check_clustering",
    "check_disk",
    "check_encoding",
    "check_images",
    "check_model",
    "check_open_clip",
    "check_opencv",
    "check_openslide",
    "check_parquet",
    "check_plots",
    "check_tables",
    "check_tiff",
    "check_tools",
    "check_transformers",
    "check_versions",
    "check_workers",
    "check_zarr",
]

AGREEMENT = 1e-5  # float32 attention of standard normal inputs, any backend against the literal form
LOW_DISK_GIB = 2.0
ROWS = [{"path": "a, b/ö.png", "prob_1": 0.25}, {"path": 'say "c".png', "prob_1": 1.0}]


@dataclass(frozen=True)
class Result:
    """Outcome of one check.

    Args:
        status: ``"PASS"``, ``"WARN"`` or ``"FAIL"``.
        message: What was found, one line.
        fix: Command or advice that mends it; empty if nothing is wrong.
    """

    status: str
    message: str
    fix: str = ""


def ok(message: str) -> Result:
    """Return a PASS."""
    return Result("PASS", message)


def expect(condition: bool, message: str) -> None:
    """Raise ``RuntimeError`` unless the condition holds."""
    if not condition:
        raise RuntimeError(message)


def check_versions(folder: Path) -> Result:
    """Compare what is installed with the bounds that saccade declares."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("saccade") or []]
    except metadata.PackageNotFoundError:
        return Result("WARN", "saccade runs from a folder; declared versions cannot be compared", "pip install -e .")
    broken: dict[str, str] = {}
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            broken[f"{requirement.name} is not installed"] = f"'{requirement.name}{requirement.specifier}'"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wanted = f"'{requirement.name}{requirement.specifier}'"
            broken[f"{requirement.name} {version} is not {requirement.specifier}"] = wanted
    if broken:
        return Result("FAIL", "; ".join(broken), f"pip install {' '.join(broken.values())}")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "timm"))
    return ok(f"python {platform.python_version()}, {shown}; every package within its bounds")


def check_accelerator(folder: Path) -> Result:
    """Look for a CUDA device and Triton, and run a product on it."""
    import torch

    if not torch.cuda.is_available():
        return Result("WARN", "no CUDA device: Triton kernels will not be used")
    device = torch.cuda.get_device_properties(0)
    product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    expect(product.eq(64).all().item() is True, "a matrix product on the GPU is wrong")
    described = f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB"
    try:
        import triton
    except ImportError:
        return Result("WARN", f"{described}; triton is missing: its kernels will not be used", "pip install triton")
    return ok(f"{described}, triton {triton.__version__}")


def check_attention(folder: Path) -> Result:
    """Run every backend of every attention operator and compare it with the literal form."""
    import torch

    from saccade.attention import explain, operators

    device = "cuda" if torch.cuda.is_available() else "cpu"
    worst, names = 0.0, set()
    for operator in operators():
        arguments = operator.example((2, 4, 33, 16), torch.float32, device, 0)
        expected = operator.function(*arguments, backend="reference")
        for row in explain(operator.function, *arguments).rows:
            if not (row.ok and row.automatic):
                continue
            got = operator.function(*arguments, backend=row.backend)
            pairs = [(got, expected)] if isinstance(got, torch.Tensor) else zip(got, expected, strict=True)
            difference = max((a - b).abs().max().item() for a, b in pairs if a is not None)
            worst = max(worst, difference)
            names.add(row.backend)
            expect(difference < AGREEMENT, f"{operator.name}: {row.backend} differs from the reference by {difference}")
    return ok(f"attention: {', '.join(sorted(names))} agree on {device} (max {worst:.1e})")


def check_model(folder: Path) -> Result:
    """Run a small timm model forward."""
    import torch

    from saccade.vision_backbones import create_model

    model = create_model("test_vit", num_classes=5).eval()
    with torch.inference_mode():
        logits = model(torch.zeros(2, 3, 160, 160))
    expect(logits.shape == (2, 5) and bool(logits.isfinite().all()), f"test_vit returned {tuple(logits.shape)}")
    return ok("timm: a small vision transformer runs")


def check_images(folder: Path) -> Result:
    """Write and decode a PNG and a JPEG."""
    import numpy as np
    from PIL import Image

    from saccade.datasets.images import read_image

    ramp = np.add.outer(np.arange(64), np.arange(48))[..., None] * np.array([1, 2, 0])
    pixels = ramp.astype(np.uint8)
    for name, tolerance in (("a.png", 0), ("a.jpg", 12)):
        Image.fromarray(pixels).save(folder / name, quality=95, subsampling=0)
        got = np.asarray(read_image(folder / name)).astype(int)
        difference = np.abs(got - pixels).max()
        expect(difference <= tolerance, f"{name} decodes {difference} levels off")
    return ok("images: PNG and JPEG are decoded")


def check_workers(folder: Path) -> Result:
    """Pass a batch from another process, which needs shared memory."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(8.0)[:, None].expand(8, 1 << 18))
    sums = [batch[0][:, 0].sum().item() for batch in DataLoader(data, batch_size=4, num_workers=1)]
    expect(sums == [6.0, 22.0], f"a decoding process returned wrong numbers: {sums}")
    return ok("decoding processes: batches arrive through shared memory")


def check_tables(folder: Path) -> Result:
    """Write and read the table formats that need no extra."""
    from saccade.batch import write_table

    for kind in ("csv", "tsv", "jsonl", "json"):
        write_table(folder / f"t.{kind}", ROWS)
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / f"t.{kind}").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter=delimiter))
        expect([row["path"] for row in rows] == [row["path"] for row in ROWS], f".{kind} comes back changed")
    lines = (folder / "t.jsonl").read_text(encoding="utf-8").splitlines()
    expect([json.loads(line) for line in lines] == ROWS, ".jsonl comes back changed")
    expect(json.loads((folder / "t.json").read_text(encoding="utf-8")) == ROWS, ".json comes back changed")
    return ok("tables: csv, tsv, jsonl, json")


def check_parquet(folder: Path) -> Result:
    """Write and read a Parquet table."""
    import pyarrow.parquet

    from saccade.batch import write_table

    write_table(folder / "t.parquet", ROWS)
    expect(pyarrow.parquet.read_table(folder / "t.parquet").to_pylist() == ROWS, ".parquet comes back changed")
    return ok("tables: parquet")


def check_arrays(folder: Path) -> Result:
    """Write and read features as HDF5 and npy."""
    import h5py
    import numpy as np

    rows = write_features(folder / "f.h5")
    with h5py.File(folder / "f.h5") as file:
        expect(np.array_equal(file["features"][:], rows), ".h5 comes back changed")
    write_features(folder / "f.npy")
    expect(np.array_equal(np.load(folder / "f.npy"), rows), ".npy comes back changed")
    return ok("arrays: h5, npy")


def check_zarr(folder: Path) -> Result:
    """Write and read features as zarr."""
    import numpy as np
    import zarr

    rows = write_features(folder / "f.zarr")
    stored: Any = zarr.open_group(folder / "f.zarr", mode="r")["features"]
    expect(np.array_equal(stored[:], rows), ".zarr comes back changed")
    return ok("arrays: zarr")


def write_features(path: Path) -> Any:  # noqa: ANN401 - a numpy array
    """Write two feature vectors as ``saccade embed`` does and return them."""
    import numpy as np

    from saccade.batch import ArrayOutput

    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    output = ArrayOutput(path, dataset="features")
    for name, row in zip("ab", rows, strict=True):
        output.append(name, row)
    output.finish(["a", "b"])
    return rows


def check_plots(folder: Path) -> Result:
    """Draw a PNG without a display."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1])
    figure.savefig(folder / "p.png")
    with Image.open(folder / "p.png") as image:
        expect(image.size == (100, 50), f"the picture has {image.size} pixels, expected (100, 50)")
    return ok("plots: matplotlib draws without a display")


def check_disk(folder: Path) -> Result:
    """Look at the free space here and where temporary files go."""
    free = {place: shutil.disk_usage(place).free / 2**30 for place in (Path.cwd(), folder.parent)}
    text = ", ".join(f"{size:.1f} GiB free in {place}" for place, size in free.items())
    if min(free.values()) < LOW_DISK_GIB:
        return Result("WARN", f"little disk space: {text}", "free some, or set TMPDIR to a larger disk")
    return ok(text)


def check_encoding(folder: Path) -> Result:
    """Write and list a file whose name is not ASCII."""
    encoding = locale.getpreferredencoding(False)
    try:
        (folder / "ö犬.txt").write_text("x", encoding="utf-8")
        listed = [path.name for path in folder.iterdir()]
    except UnicodeEncodeError:
        listed = []
    if listed != ["ö犬.txt"]:
        return Result("WARN", f"file names with letters beyond ASCII fail ({encoding})", "export PYTHONUTF8=1")
    return ok(f"file names beyond ASCII work ({encoding})")


def check_opencv(folder: Path) -> Result:
    """Find the outline of a square."""
    import cv2
    import numpy as np

    mask = np.zeros((64, 64), np.uint8)
    mask[10:31, 20:41] = 1
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    expect([cv2.contourArea(contour) for contour in contours] == [400.0], "the outline of a square is wrong")
    return ok(f"opencv {cv2.__version__} finds outlines")


def check_openslide(folder: Path) -> Result:
    """Write a slide pyramid and read pixels, levels and resolution from it."""
    import numpy as np
    import openslide
    import tifffile

    pixels = np.zeros((1024, 768, 3), np.uint8)
    pixels[512:, 256:] = (200, 40, 90)
    options: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(folder / "slide.tif") as file:
        file.write(pixels, resolution=(20000, 20000), **options)  # pixels per centimetre: 0.5 um/px
        file.write(pixels[::2, ::2], resolution=(10000, 10000), subfiletype=1, **options)
    with openslide.OpenSlide(folder / "slide.tif") as slide:
        mpp = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
        expect(slide.level_dimensions == ((768, 1024), (384, 512)), f"levels are {slide.level_dimensions}")
        expect(abs(mpp - 0.5) < 1e-6, f"resolution is {mpp} um/px, expected 0.5")
        got = np.asarray(slide.read_region((512, 768), 1, (100, 100)).convert("RGB"))
        expect(bool((got == (200, 40, 90)).all()), f"a region reads as {got[0, 0]}, expected (200, 40, 90)")
        corner = slide.read_region((0, 0), 0, (1, 1)).convert("RGB").getpixel((0, 0))
        expect(corner == (0, 0, 0), f"the corner reads as {corner}, expected (0, 0, 0)")
    return ok(f"openslide {openslide.__library_version__} opens a generated pyramid (2 levels, 0.5 um/px)")


def check_tiff(folder: Path) -> Result:
    """Write and read JPEG-compressed TIFF tiles."""
    import imagecodecs
    import numpy as np
    import tifffile

    pixels = np.full((256, 256, 3), (120, 60, 180), np.uint8)
    tifffile.imwrite(folder / "t.tif", pixels, tile=(128, 128), photometric="rgb", compression="jpeg")
    difference = np.abs(tifffile.imread(folder / "t.tif").astype(int) - pixels).max()
    expect(difference < 6, f"a flat picture comes back {difference} levels off")
    return ok(f"tifffile {tifffile.__version__} with imagecodecs {imagecodecs.__version__}: JPEG tiles")


def check_clustering(folder: Path) -> Result:
    """Find two groups of points."""
    import numpy as np
    from sklearn.cluster import MeanShift

    points = np.array([[0, 0], [1, 0], [0, 1], [50, 50], [51, 50]], float)
    labels = MeanShift(bandwidth=5).fit_predict(points)
    expect(len(set(labels[:3])) == 1 and len(set(labels)) == 2, f"two groups of points are labelled {labels}")
    return ok("scikit-learn groups fixations")


def check_transformers(folder: Path) -> Result:
    """Build a tiny language model and generate from it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, __version__

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    tokens = model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    expect(tokens.shape == (1, 6), f"three new tokens were asked for, the answer is {tuple(tokens.shape)}")
    return ok(f"transformers {__version__} builds a small language model and generates")


def check_open_clip(folder: Path) -> Result:
    """Build a tiny image tower and run it."""
    import open_clip
    import torch

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    with torch.inference_mode():
        features = model.encode_image(torch.zeros(1, 3, 32, 32))
    expect(features.shape == (1, 8), f"the image tower returned {tuple(features.shape)}, expected (1, 8)")
    return ok(f"open_clip {open_clip.__version__} builds a small image tower")


def check_tools(folder: Path) -> Result:
    """Run the developers' tools."""
    found = []
    for name in ("pytest", "ruff", "mypy"):
        done = subprocess.run([sys.executable, "-m", name, "--version"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ImportError(f"python -m {name} does not run", name=name)
        found.append((done.stdout or done.stderr).split("(")[0].strip())
    return ok(", ".join(found))
