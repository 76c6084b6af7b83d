"""Whole slides: reading tiles, `embed`, heatmaps, training steps of ACMIL, batches of small bags.

Real slides are those in ``../shared``; without them their cases are left out, which is said. One thread, except where
the name of a case says otherwise.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import timm
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.harness import compare, save
from benchmarks.literal_acmil import literal_ga_loss, literal_mha_loss
from saccade.batch import BatchOptions
from saccade.mil import (
    Slide,
    TileOptions,
    create_model,
    draw_heatmap,
    extract,
    find_tissue,
    make_grid,
    normalize_scores,
    tile_map,
    wrap_model,
)

SLIDES = Path(__file__).resolve().parents[2] / "shared" / "data" / "slides"
CMU, JPEG2000 = SLIDES / "cmu-1-small-region.svs", SLIDES / "tcga-cr-7395-01a-01-ts1.svs"
BAG, FEATURES = 100_000, 1024
Case = dict[str, object]


def tile_reads(name: str, path: Path) -> Case:
    """Read every native tile of level 0 in order, the file opened anew each time, so that no cache is warm."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        side, (height, width) = page.tilewidth, page.shape[:2]
    corners = [(x, y) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]

    def direct() -> None:
        with Slide(path, backend="tiff") as slide:
            for x, y in corners:
                slide.read(x, y, side, side)

    def peer() -> None:
        with openslide.OpenSlide(path) as slide:
            for x, y in corners:
                np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"))

    case = f"read {len(corners)} native tiles of {side} px, {name}"
    return compare(case, {"saccade": direct, "openslide": peer}, work=len(corners), unit="tiles", repeats=5)


def write_jpeg(path: Path, side: int = 4096) -> Path:
    """Write a tiled JPEG TIFF of smooth noise with the quality and colour subsampling that scanners use."""
    import cv2
    import tifffile

    noise = np.random.default_rng(0).normal(180, 40, (side // 8, side // 8, 3))
    pixels = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    tags = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 70},
        subsampling=(2, 2),
        metadata=None,
        **tags,
    )
    return path


def embedding() -> Case:
    """Embed a slide with a small encoder and two readers, and do all that readers do once more, in one thread."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    config = timm.data.resolve_model_data_config(model)
    encoder = wrap_model(model, name="vit_small", data_config=config, weights="random", pool=model)
    tiles = TileOptions(mpp=1.0, tile_px=224)  # half the slide's resolution, and no pyramid: every tile is resized
    with Slide(CMU) as slide:
        grid = make_grid(slide, find_tissue(slide), tiles)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in encoder.normalization)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            options = BatchOptions(num_workers=2, batch_size=16)  # the slide has 16 tiles
            extract(CMU, out=folder, encoder=encoder, tiles=tiles, options=options)

    def reading() -> None:
        with Slide(CMU) as slide:
            for image in grid.images(slide):
                (torch.from_numpy(image).movedim(-1, 0).float() / 255 - mean) / std

    case = (
        f"embed {len(grid)} tiles of CMU-1-Small-Region, ViT-S/16, 2 readers, 2 threads; beside reading in one thread"
    )
    functions = {"embed": whole, "read, resize, transform": reading}
    result = compare(case, functions, work=len(grid), unit="tiles", repeats=3)
    share = result["rows"]["read, resize, transform"]["time_over_ours"]
    print(f"  reading takes at most {share:.1%} of the wall time, were nothing of it beside the encoder")
    return {**result, "share_of_reading": share}


def heatmaps(count: int = 100_000) -> list[Case]:
    """Turn scores into a picture of a slide of 100,000 x 80,000 pixels; beside a loop over tiles."""
    side = 256
    columns = 100_000 // side
    index = np.arange(count)
    coords = np.stack([index % columns, index // columns], 1) * side
    scores, size = np.random.default_rng(0).normal(size=count), (100_000, 80_000)
    background = np.full((2500, 3125, 3), 240, np.uint8)

    def ours() -> NDArray[np.float64]:
        return tile_map(normalize_scores(scores), coords, side, size, downsample=32).values

    def loop() -> NDArray[np.float64]:
        values = rankdata(scores) / count
        total, number = np.zeros((2500, 3125)), np.zeros((2500, 3125))
        for value, (x, y) in zip(values, coords // 32, strict=True):
            total[y : y + 8, x : x + 8] += value
            number[y : y + 8, x : x + 8] += 1
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    np.testing.assert_allclose(ours(), loop(), atol=1e-9)

    def picture() -> object:
        heatmap = tile_map(normalize_scores(scores), coords, side, size, downsample=32)
        return draw_heatmap(heatmap, background, limits=(0.0, 1.0))

    functions = {"saccade": ours, "loop over tiles": loop}
    return [
        compare(f"map of {count:,} tiles on 3125 x 2500 pixels", functions, work=count, unit="tiles", repeats=5),
        compare(f"the same, coloured and blended over a thumbnail, {count:,} tiles", {"saccade": picture}, repeats=5),
    ]


def training_step(name: str, literal: Callable[..., torch.Tensor], repeats: int) -> Case:
    """Train one step on a large bag; both forms get the same weights, noise and label, and must give equal losses."""
    torch.manual_seed(0)
    model = create_model(name, feature_dim=FEATURES, num_classes=2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the only random draw that cannot be given
    model.train()
    bag, target = torch.randn(1, BAG, FEATURES), torch.tensor([1])
    rows = (model.branches, model.num_heads) if name == "acmil_mha" else (model.branches,)
    noise = torch.rand(1, *rows, model.mask_top)

    def ours() -> float:
        model.zero_grad()
        loss = model.loss(model(bag, noise=noise), target)["loss"]
        loss.backward()
        return float(loss.detach())

    def peer() -> float:
        model.zero_grad()
        loss = literal(model, bag[0], target, noise[0])
        loss.backward()
        return float(loss.detach())

    assert abs(ours() - peer()) < 1e-4, (ours(), peer())
    case = f"{name}: training step, one bag of {BAG:,} x {FEATURES}"
    result = compare(case, {"saccade": ours, "literal": peer}, unit="steps", repeats=repeats, warmup=0)
    peaks = [row["peak_mib"] for row in result["rows"].values()]
    print(f"  memory: {peaks[0] / peaks[1]:.2f} of the literal form's")
    return {**result, "memory_share": peaks[0] / peaks[1]}


def small_bags(count: int = 256, instances: int = 8, width: int = 166, hidden: int = 64) -> Case:
    """Evaluate many small bags in one batch, and one by one."""
    torch.manual_seed(0)
    model = create_model("acmil_ga", feature_dim=width, num_classes=2, hidden_dim=hidden, attention_dim=hidden).eval()
    bags, mask = torch.randn(count, instances, width), torch.ones(count, instances, dtype=torch.bool)

    @torch.inference_mode()
    def batch() -> torch.Tensor:
        return model(bags, mask).logits

    @torch.inference_mode()
    def one_by_one() -> torch.Tensor:
        return torch.cat([model(bag[None]).logits for bag in bags])

    torch.testing.assert_close(batch(), one_by_one())
    case = f"evaluate {count} bags of {instances} instances, {width} -> {hidden}"
    return compare(case, {"one batch": batch, "one by one": one_by_one}, work=count, unit="bags", repeats=15, warmup=3)


def main() -> None:
    """Run and save."""
    torch.set_num_threads(1)
    started = time.monotonic()
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        cases.append(tile_reads("JPEG of quality 70, 4:2:0", write_jpeg(Path(folder) / "jpeg.tif")))
    if CMU.exists():
        cases.append(tile_reads("CMU-1-Small-Region", CMU))
        cases.append(tile_reads("JPEG 2000 (TCGA)", JPEG2000))
        torch.set_num_threads(2)
        cases.append(embedding())
        torch.set_num_threads(1)
    else:
        print(f"no slides in {SLIDES}: reading and embedding real slides is left out")
    cases += heatmaps()
    cases.append(small_bags())
    cases.append(training_step("acmil_ga", literal_ga_loss, 3))
    cases.append(training_step("acmil_mha", literal_mha_loss, 2))
    save("slides", cases)
    print(f"in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
