"""``saccade classify`` against timm's own inference loop: same model, images, batch size and number of workers.

The loop is the one of timm's ``inference.py``: ``create_dataset``, ``create_loader`` with its prefetcher, softmax and
top-k per batch, results kept in memory. Both sides build the model inside the measured call; ours also writes the
journal and the table.
"""

import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from skimage import data

from benchmarks.harness import compare, save
from saccade.batch import BatchOptions
from saccade.vision_backbones import ModelSource, classify

IMAGES, BATCH, WORKERS = 192, 32, 2
MODELS = ("resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100")


def write_images(folder: Path) -> None:
    """Write JPEG photographs of 640 x 480 pixels, a size at which decoding matters."""
    sources = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    for index in range(IMAGES):
        photo = sources[index % len(sources)].rotate(index % 7, expand=False).resize((640, 480))
        photo.save(folder / f"{index:04d}.jpg", quality=90)


def timm_loop(name: str, folder: Path) -> list[list[float]]:
    """Classify a folder as timm's ``inference.py`` does."""
    model = timm.create_model(name).eval()
    config = timm.data.resolve_model_data_config(model)
    dataset = timm.data.create_dataset(name="", root=str(folder), split="validation", class_map="")
    loader = timm.data.create_loader(
        dataset, batch_size=BATCH, use_prefetcher=True, num_workers=WORKERS, device=torch.device("cpu"), **config
    )
    results = []
    with torch.no_grad():
        for images, _ in loader:
            probabilities, indices = model(images).softmax(-1).topk(5, dim=1)
            results += [[*p, *i] for p, i in zip(probabilities.tolist(), indices.tolist(), strict=True)]
    return results


def main() -> None:
    """Run and save."""
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images/one")  # timm's folder reader wants a class folder
        folder.mkdir(parents=True)
        write_images(folder)

        for name in MODELS:

            def ours(name: str = name) -> object:
                options = BatchOptions(batch_size=BATCH, num_workers=WORKERS, overwrite=True)
                source = ModelSource(name, random_weights=True)
                return classify(folder, model=source, out=Path(scratch, "p.csv"), options=options)

            def peer(name: str = name) -> object:
                return timm_loop(name, folder.parent)

            case = f"classify {IMAGES} JPEGs of 640x480, {name}, batch {BATCH}, {WORKERS} workers"
            cases.append(compare(case, {"saccade": ours, "timm": peer}, work=IMAGES, unit="images", repeats=5))
    save("classify", cases)


if __name__ == "__main__":
    main()
