"""``saccade gaze convert``: scanpaths from one file format to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.apps.gaze_options import add_reading_options, note, read_paths, size
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.gaze import ScanpathSet

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="scanpaths; several files become one")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="its extension, or --to, chooses the format")
    parser.add_argument("--to", metavar="NAME", help="format to write; names as for --format")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_reading_options(parser)
    raw = parser.add_argument_group(
        "raw samples", "CSV of time (ms), x, y (px); needs --size and the extra pymovements"
    )
    raw.add_argument("--samples", choices=["ivt", "idt"], help="find fixations by velocity or by dispersion")
    raw.add_argument("--screen-cm", type=size, metavar="WxH", help="size of the screen in cm, e.g. 38x30.2")
    raw.add_argument("--distance-cm", type=float, metavar="CM", help="from the eye to the screen")
    raw.add_argument("--rate-hz", type=float, metavar="HZ", help="samples per second")
    raw.add_argument("--threshold", type=float, metavar="N", help="deg/s (ivt, default 20) or deg (idt, default 1)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.gaze import write_scanpaths
    from saccade.gaze.formats import find_format

    out = Path(args.out)
    find_format(out, args.to, writing=True)
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists; --overwrite replaces it.")
    read = read_raw if args.samples else read_paths
    first, *others = [read(file, args) for file in args.files]
    paths = first.concatenate(*others) if others else first
    write_scanpaths(paths, out, format=args.to)
    note(f"{out}: {paths!r}", args)
    return 0


def read_raw(path: str, args: argparse.Namespace) -> ScanpathSet:
    """Find the fixations in a file of raw samples."""
    from saccade.gaze.formats import Screen, read_samples

    if None in (args.size, args.screen_cm, args.distance_cm, args.rate_hz):
        raise ConfigError("--samples needs --size (of the screen in px), --screen-cm, --distance-cm and --rate-hz.")
    screen = Screen(args.size, args.screen_cm, args.distance_cm, args.rate_hz)
    return read_samples(path, screen, method=args.samples, threshold=args.threshold)
