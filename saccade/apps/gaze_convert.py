"""``saccade gaze convert``: scanpaths from one file format to another."""

from __future__ import annotations

import argparse
from pathlib import Path

from saccade.apps.gaze_options import add_reading_options, note, read_paths
from saccade.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="scanpaths; several files become one")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="its extension, or --to, chooses the format")
    parser.add_argument("--to", metavar="NAME", help="format to write; names as for --format")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_reading_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.gaze import write_scanpaths
    from saccade.gaze.formats import find_format

    out = Path(args.out)
    find_format(out, args.to, writing=True)
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists; --overwrite replaces it.")
    first, *others = [read_paths(file, args) for file in args.files]
    paths = first.concatenate(*others) if others else first
    write_scanpaths(paths, out, format=args.to)
    note(f"{out}: {paths!r}", args)
    return 0
