"""``saccade gaze plot``: scanpaths, heat maps and animations over an image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.apps.gaze_options import noted
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.gaze.scanpath import ScanpathSet

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("image", metavar="IMAGE", help="the picture")
    parser.add_argument("--scanpath", required=True, metavar="FILE", help="paths in any format, e.g. of gaze predict")
    parser.add_argument("--truth", metavar="FILE", help="human paths, drawn beside them")
    parser.add_argument(
        "-o", "--out", required=True, metavar="FILE", help="*.png or *.jpg; *.gif and *.mp4 animate the first path"
    )
    parser.add_argument("--name", metavar="IMAGE", help="what the files call the image (default: its file name)")
    parser.add_argument("--task", metavar="TASK", help="only paths with this task")
    parser.add_argument("--subject", metavar="NAME", help="only paths of this viewer")
    parser.add_argument("--heatmap", action="store_true", help="where the fixations are, in place of the paths")
    parser.add_argument(
        "--sigma-px", type=float, metavar="PX", help="blur of the heat map (default: 1/30 of the image)"
    )
    parser.add_argument("--boxes", metavar="FILE", help="also outline the objects of this table")
    parser.add_argument(
        "--speed", type=float, default=1.0, metavar="F", help="of an animation (default: 1, as recorded)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    from PIL import Image

    from saccade.batch import atomic_path
    from saccade.datasets import read_image
    from saccade.gaze.object_boxes import read_boxes
    from saccade.gaze.plotting import ANIMATIONS, animate_scanpath, draw_heatmap, draw_scanpaths

    out = Path(args.out)
    kind = out.suffix.lower()
    if kind not in (".png", ".jpg", ".jpeg", *ANIMATIONS):
        raise ConfigError(f"A picture ends in .png, .jpg, .gif or .mp4, got {out.name!r}.")
    image = read_image(args.image)
    name = args.name or Path(args.image).name
    panels = [
        (title, chosen(args, file, name)) for title, file in (("human", args.truth), ("paths", args.scanpath)) if file
    ]
    if len(panels) > 1:
        panels[1] = ("model", panels[1][1])
    if kind in ANIMATIONS:
        animate_scanpath(image, panels[-1][1][0], out, speed=args.speed)
    else:
        if args.heatmap:
            maps = [draw_heatmap(image, paths, sigma=args.sigma_px) for _, paths in panels]
            picture = Image.new("RGB", (sum(part.width for part in maps), image.height))
            for number, part in enumerate(maps):
                picture.paste(part, (number * image.width, 0))
        else:
            boxes = None if args.boxes is None else read_boxes(args.boxes)(name, image).boxes.double().numpy()
            picture = draw_scanpaths(image, panels, boxes=boxes)
        with atomic_path(out) as temporary:
            picture.save(temporary)
    counts = ", ".join(f"{len(paths)} {title}" for title, paths in panels)
    print(f"{out}: {name}, {counts}")
    return 0


def chosen(args: argparse.Namespace, file: str, name: str) -> ScanpathSet:
    """Return the paths of a file that are to be drawn.

    Raises:
        ConfigError: If there is none.
    """
    from saccade.gaze.formats import read_scanpaths

    with noted(quiet=False):
        paths = read_scanpaths(file)
    names = {image for image in paths.image if image == name or Path(image).name == Path(name).name}
    kept = paths.filter(image=names)
    if args.task is not None:
        kept = kept.filter(task=args.task)
    if args.subject is not None:
        kept = kept.filter(subject=args.subject)
    if not len(kept):
        known = ", ".join(list(dict.fromkeys(paths.image))[:5])
        raise ConfigError(f"{file} has no such path on {name!r}; its images are {known}, ... Use --name.")
    return kept
