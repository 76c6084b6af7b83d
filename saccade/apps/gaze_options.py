"""What the sub-commands of ``saccade gaze`` share: options of reading, and what a file's paths are like, said once."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.gaze import ScanpathSet

__all__ = ["add_reading_options", "note", "noted", "read_paths", "size"]


def size(text: str) -> tuple[float, float]:
    """Parse ``"1680x1050"``."""
    width, cross, height = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 1680x1050")
    return float(width), float(height)


def grid(text: str) -> tuple[int, int]:
    """Parse ``"6x14"``."""
    rows, cross, columns = text.partition("x")
    if not cross or not rows.isdigit() or not columns.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCOLUMNS, e.g. 6x14")
    return int(rows), int(columns)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how to read scanpaths."""
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--format",
        metavar="NAME",
        help="csv, hdf5, coco, osie, amazon, pysaliency, pymovements, multimatch, oat (default: by the file)",
    )
    group.add_argument("--size", type=size, metavar="WxH", help="image size in px, for formats without, e.g. 1680x1050")
    group.add_argument("--grid", type=grid, metavar="RxC", help="rows and columns of objects (amazon; default: 6x14)")
    group.add_argument(
        "--repeats",
        choices=["error", "number"],
        default="error",
        help="a second path of the same image, task and subject (default: error)",
    )
    group.add_argument(
        "--off-image",
        choices=["keep", "clip", "drop", "error"],
        default="keep",
        help="fixations outside their image (default: keep)",
    )
    group.add_argument("--allow-pickle", action="store_true", help="read a pickled file; plain values only are let in")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="-vv shows tracebacks")
    parser.add_argument("-q", "--quiet", action="store_true", help="no notes on standard error")


def read_paths(path: str, args: argparse.Namespace) -> ScanpathSet:
    """Read a file as the options say, and print what is unusual about it."""
    from saccade.gaze import read_scanpaths

    with noted(quiet=args.quiet):
        return read_scanpaths(
            path,
            format=args.format,
            size=args.size,
            grid=args.grid,
            repeats=args.repeats,
            off_image=args.off_image,
            allow_pickle=args.allow_pickle,
        )


@contextlib.contextmanager
def noted(*, quiet: bool) -> Iterator[None]:
    """Print what readers find unusual as lines on standard error, or nothing if quiet."""
    from saccade.gaze.validation import ScanpathWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ScanpathWarning)
        yield
    for warning in caught if not quiet else ():
        print(f"note: {warning.message}", file=sys.stderr)


def note(text: str, args: argparse.Namespace) -> None:
    """Print a line on standard error unless quiet."""
    if not args.quiet:
        print(text, file=sys.stderr)
