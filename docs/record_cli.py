"""Write docs/cli.md: run every command on generated pictures and record what the screen shows.

python docs/record_cli.py             # the whole page
python docs/record_cli.py gaze merge  # these sections; the others stay as they are
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from skimage import data

from saccade.apps.cli import COMMANDS, build_parser
from saccade.apps.completion import parser_places
from saccade.datasets import save_scenes, search_scenes
from saccade.gaze import Scanpath, ScanpathSet, write_scanpaths
from saccade.mil import create_model
from saccade.vlm.evaluation import POPE_SETS, build_pope, read_coco_objects, sample_pope_images

PAGE = Path(__file__).with_name("cli.md")
COLUMNS = 100
LONGEST = 24  # lines of a recorded screen
INTRODUCTION = """# Command line

Written by `python docs/record_cli.py`, which runs the commands below, one after the other, in a folder with `photos/`
(two classes of small crops from pictures that scikit-image ships), `mixed/` (one of them, and a file that is no
picture), `slides/` (a stained tissue of scikit-image on glass, as two small pyramids) with
`acmil.pt` (random weights), `human.csv` and `predicted.csv`
(simulated scanpaths), `search/` (drawn scenes with the boxes of their objects) with `viewers.csv` (simulated viewers),
and `llava/` (a tiny model with random weights) with `questions.jsonl`. Long screens are cut at `...`; times are those
of the machine that recorded the page.

Results go to standard output, everything else to standard error. Exit codes: 0 all done; 1 the run failed; 2 usage or
configuration; 3 finished, some items failed; 4 something is missing on this machine; 130 interrupted.
"""
# Command: what it is for, and the calls to record. In the order in which they can run: later ones use earlier results.
SCREENS = {
    "fit": (
        "Trains a model with Lightning. Every run gets a folder of its own, `runs/NAME/YYYYmmdd-HHMMSS/`, with config, "
        "checkpoints, metrics and log. Any setting of trainer, model and data can be given as `--SECTION.KEY VALUE`.",
        [
            "saccade fit -c image/finetune --model.backbone test_efficientnet --data.img_size 64 --data.root photos/ "
            "--epochs 6 --lr 0.01 --name pets"
        ],
    ),
    "validate": ("Evaluates a checkpoint on the validation split.", ["saccade validate runs/pets"]),
    "test": (
        "Evaluates a checkpoint on the test split; config and data come from the checkpoint unless given anew.",
        ["saccade test runs/pets --data.root photos/"],
    ),
    "predict": (
        "Predicts with a checkpoint through Lightning, on several devices or nodes. On one machine `classify` does the "
        "same and copes with broken files and interruptions.",
        ["saccade predict runs/pets --data.root photos/ -o predicted.csv --topk 1"],
    ),
    "classify": (
        "Class probabilities of images, one row per file. A file that cannot be read becomes a row with the reason, "
        "and the exit code is 3. Run again after an interruption: finished files are not done twice.",
        ["saccade classify mixed/ -m runs/pets -o classes.csv --topk 1", "cat classes.csv"],
    ),
    "embed": (
        "Feature vectors of images.",
        [
            "saccade embed photos/ -m runs/pets -o features.h5 --shard 1/2",
            "saccade embed photos/ -m runs/pets -o features.h5 --shard 2/2",
        ],
    ),
    "attend": (
        "Pictures of where a model looks, or with `--method routes` and `--method kernels` of what one place reads.",
        [
            "saccade attend mixed/ -m runs/pets -o overlays/",
            "saccade attend mixed/33.png -m biformer_tiny --random-weights -o routes/ --method routes --at 20,70",
        ],
    ),
    "analyze": (
        "What the attention heads of a vision transformer do, and what each is worth: a [report](analyze.md) with "
        "tables and pictures. The model in this screen has random weights.",
        ["saccade analyze mixed/ -m test_vit --random-weights --img-size 64 -o report/"],
    ),
    "robustness": (
        "Accuracy of a classifier under corruption and shift: ImageNet-C, -P, -A, -R, -Sketch, -V2, or corruptions "
        "made on the fly of any folder of images. Folders that a download lacks are named, never skipped.",
        [
            "saccade robustness photos/test -m runs/pets -o corrupted/ --suite corruptions "
            "--corruptions blur,fog --severities 1,5"
        ],
    ),
    "slides": (
        "Whole slides to bags of features. Each slide gets contours that QuPath opens, a preview, tile "
        "coordinates and a bag; a slide that cannot be read becomes a failed item, and the exit code is 3.",
        [
            "saccade slides info slides/",
            "saccade slides run slides/ -o bags/ --mpp 0.5 --tile-px 128 -m stain-texture",
            "saccade slides split cases.csv -o splits/ --folds 2 --stratify label",
            "saccade slides heatmap bags/ -m acmil.pt --geojson",
            "ls bags/heatmaps/acmil",
        ],
    ),
    "merge": ("Unites the outputs of `--shard` runs.", ["saccade merge features.h5"]),
    "vlm": (
        "Multimodal models of Hugging Face under interventions on their attention; see [decoding](vlm.md). The model "
        "in these screens has random weights and answers with noise. A picture that cannot be read becomes a failed "
        "row, and the exit code is 3. The answers that `evaluate` scores here were drawn at random, right more often "
        "in the second file; see [evaluation](vlm-evaluation.md).",
        [
            "saccade vlm generate -m local-dir:llava --jsonl questions.jsonl --image-folder mixed/ -o answers.jsonl "
            "--intervention vhr --max-new-tokens 8",
            "saccade vlm attend -m local-dir:llava --image mixed/33.png --prompt 'Describe the image.' -o looks/ "
            "--intervention vhr --max-new-tokens 8",
            "saccade vlm calibrate -m local-dir:llava --jsonl questions.jsonl --image-folder mixed/ --limit 1",
            "saccade vlm questions pope --data pope/ --build instances.json --num-images 50 -o pope.jsonl",
            "saccade vlm evaluate pope --data pope/ --answers greedy.jsonl var.jsonl -o scores.json",
        ],
    ),
    "gaze": (
        "Scanpaths: scores beside human agreement and chance, conversion between file formats, honest splits. Scores "
        "go to standard output, what they mean and what is unusual about the data to standard error.",
        [
            "saccade gaze metrics --pred predicted.csv --truth human.csv -o pairs.csv "
            "--metrics scanmatch,multimatch,sequence_score,dtw",
            "saccade gaze metrics human.csv -q",
            "saccade gaze convert human.csv -o human.h5",
            "saccade gaze split human.csv --by image -o parts/",
            "saccade fit -c gaze/oat --data.generated_scenes 60 --epochs 3 --name search",
            "saccade gaze predict search/ -m runs/search --boxes search/boxes.csv --queries search/queries.csv "
            "--samples 3 -o paths.csv",
            "saccade gaze plot search/scene-0001.png --scanpath paths.csv --truth viewers.csv -o beside.png",
            "saccade gaze features search/ --boxes search/boxes.csv --encoder test_resnet --random-weights "
            "-o objects.h5",
        ],
    ),
    "list": (
        "What there is. `VERIFIED` says what tests compare with the official code: `golden` outputs, `grad` gradients, "
        "`keys` checkpoint keys; nothing for timm's own models. Their sizes are those of timm 1.0.31.",
        ["saccade list models 'vit_tiny*'", "saccade list ops", "saccade list metrics", "saccade list configs"],
    ),
    "config": (
        "Shipped configs, to use by name (`-c image/finetune`) or to copy and edit.",
        [
            "saccade config cp image/finetune my.yaml",
            "saccade config check my.yaml",
            "saccade config show image/finetune",
        ],
    ),
    "bench": (
        "Times attention operators, with every result checked against the literal form, and models.",
        ["saccade bench attention --shapes 1x2x64x32", "saccade bench model test_resnet --img-size 64"],
    ),
    "doctor": (
        "Checks this installation by doing a little of everything, without network. With `--json` the keys are "
        "`profile`, `checks` (each with `name`, `status`, `message`, `fix`, `seconds`), `passed`, `warnings` and "
        "`failed`.",
        ["saccade doctor --profile wsi"],
    ),
    "convert": (
        "Rewrites a checkpoint as safetensors under the model's own key names: official names are translated, every "
        "key must be accounted for. Nothing in the file is run.",
        ["saccade convert runs/pets -o pets.safetensors"],
    ),
    "demo": (
        "Shows what the parts do on data that is generated or comes with the installation, offline, and writes "
        "`report.html`: a table of the parts with their times, then pictures, figures and the commands of each.",
        ["saccade demo decoding -o demo/"],
    ),
    "completion": (
        "Prints a completion script; it is static, so a key press starts no Python.",
        ["saccade completion bash | head -n 3"],
    ),
}


def main(names: list[str]) -> None:
    """Write the page, or the named sections of it."""
    recorded = dict(re.findall(r"^(## (?:\S+)\n)(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL))
    sections = [INTRODUCTION]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder)
        write_slides(folder)
        write_scanpaths_of(folder)
        write_search(folder)
        write_questions(folder)
        write_pope(folder)
        for command in COMMANDS:
            heading = f"## {command.name}\n"
            if names and command.name not in names:
                sections.append(heading + recorded[heading].removesuffix("\n"))
                continue
            text, calls = SCREENS[command.name]
            sections.append(f"{heading}\n{text}\n")
            sections += [screen(call, folder, LONGEST) for call in calls]
            for place in parser_places(build_parser(command), command.name):
                sections.append(screen(f"saccade {place.path.strip()} --help", folder, None))
    PAGE.write_text("\n".join(sections), encoding="utf-8")


def write_pictures(folder: Path) -> None:
    """Write ``photos/`` with two classes, split into train, val and test, and ``mixed/`` with a broken file."""
    for name, picture in (("cat", data.chelsea()), ("coffee", data.coffee())):
        for index in range(40):
            split = "train" if index < 24 else "val" if index < 32 else "test"
            place = folder / "photos" / split / name
            place.mkdir(parents=True, exist_ok=True)
            top, left = 20 + 37 * index % 150, 60 + 53 * index % 250
            Image.fromarray(picture[top : top + 96, left : left + 96]).save(place / f"{index:02d}.png")
    (folder / "mixed").mkdir()
    shutil.copy(folder / "photos/test/cat/33.png", folder / "mixed/33.png")
    (folder / "mixed/broken.jpg").write_bytes(b"no picture")


def write_slides(folder: Path) -> None:
    """Write ``slides/`` with two pyramids of stained tissue on glass; the second does not say its resolution."""
    tissue = data.immunohistochemistry()
    (folder / "slides").mkdir()
    lines = [f"s{index},{'normal' if index % 2 else 'tumour'},p{index // 2}" for index in range(16)]
    (folder / "cases.csv").write_text("\n".join(["slide,label,patient", *lines]) + "\n", encoding="utf-8")
    for name, tags in (("case.tif", {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}), ("unknown.tif", {})):
        glass = np.full((1024, 1280, 3), 243, np.uint8)
        glass[256:768, 384:896] = tissue
        with tifffile.TiffWriter(folder / "slides" / name) as writer:
            for level, step in enumerate((1, 4)):
                writer.write(
                    glass[::step, ::step],
                    tile=(256, 256),
                    compression="jpeg",
                    subfiletype=1 if level else 0,
                    metadata=None,
                    **tags,
                )
    torch.manual_seed(0)
    torch.save(create_model("acmil_ga", feature_dim=57, num_classes=2).state_dict(), folder / "acmil.pt")


def write_scanpaths_of(folder: Path) -> None:
    """Write ``human.csv``, four viewers drawn to a place of each of ten images, and ``predicted.csv``, five samples."""
    rng = np.random.default_rng(0)
    places = rng.uniform(100, 500, (10, 2))
    for name, subjects, samples, spread in (("human", ["1", "2", "3", "4"], 1, 60), ("predicted", ["model"], 5, 90)):
        paths = []
        for image, place in enumerate(places):
            for subject in subjects:
                for sample in range(samples):
                    steps = int(rng.integers(4, 10))
                    x, y = np.clip(place + rng.normal(0, spread, (steps, 2)), 0, 599).round(1).T
                    duration = rng.integers(80, 400, steps) / 1000
                    paths.append(
                        Scanpath(f"{image}.jpg", x, y, duration, subject, sample=sample, width=800, height=600)
                    )
        write_scanpaths(ScanpathSet.from_paths(paths), folder / f"{name}.csv")


def write_search(folder: Path) -> None:
    """Write ``search/``, drawn scenes with their boxes, and ``viewers.csv``, two simulated viewers."""
    scenes, paths = search_scenes(3, viewers=2)
    save_scenes(scenes, folder / "search")
    write_scanpaths(paths, folder / "viewers.csv")


def write_questions(folder: Path) -> None:
    """Write ``questions.jsonl`` about the pictures in ``mixed/``, and ``llava/``, a tiny model with random weights."""
    sys.path.insert(0, str(PAGE.parents[1]))
    from tests.vlm.tiny_folder import write_tiny_llava

    write_tiny_llava(folder / "llava")
    rows = [("cat", "33.png", "Describe the image."), ("second", "broken.jpg", "Is there a dog?")]
    lines = [f'{{"id": "{key}", "image": "{image}", "prompt": "{prompt}"}}\n' for key, image, prompt in rows]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


def write_pope(folder: Path) -> None:
    """Write ``instances.json`` of 60 images, ``pope/``, and drawn answers to it, ``greedy.jsonl`` and ``var.jsonl``."""
    names = ("dog", "cat", "car", "bus", "tv", "bed", "cup", "kite")
    generator = np.random.default_rng(0)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(60)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": int(c)} for i in range(60) for c in generator.permutation(8)[:3]
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    images = sample_pope_images(read_coco_objects(folder / "instances.json"), 50)
    rows = [question.row() for split in POPE_SETS for question in build_pope(images, split)]
    for file, method, wrong in (("greedy.jsonl", "none", 0.25), ("var.jsonl", "var", 0.15)):
        with (folder / file).open("w", encoding="utf-8") as lines:
            for row, at_random in zip(rows, generator.random(len(rows)) < wrong, strict=True):
                answer = "Yes, there is." if at_random else row["label"].capitalize()
                lines.write(json.dumps({**row, "answer": answer, "intervention": method}) + "\n")


def screen(call: str, folder: Path, longest: int | None) -> str:
    """Run a shell command and return it with its screen as a block."""
    env = {**os.environ, "COLUMNS": str(COLUMNS), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(call, shell=True, cwd=folder, env=env, stdout=-1, stderr=-2, text=True, check=False)
    lines = [line.rstrip() for line in done.stdout.replace(str(folder), "~").splitlines()]
    if longest is not None and len(lines) > longest:
        lines = [*lines[: longest - 1], "..."]
    if done.returncode not in (0, 3):  # 3: a screen that shows what becomes of a broken file
        sys.exit(f"{call!r} ended with exit code {done.returncode}; the page stays as it was.\n{done.stdout}")
    if done.returncode:
        lines.append(f"(exit {done.returncode})")
    return "```text\n" + "\n".join([f"$ {call}", *lines]) + "\n```\n"


if __name__ == "__main__":
    main(sys.argv[1:])
