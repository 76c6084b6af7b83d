"""``saccade gaze split``: parts that share no image, target or viewer."""

from __future__ import annotations

import argparse
from pathlib import Path

from saccade.apps.gaze_options import add_reading_options, note, read_paths
from saccade.apps.options import comma_list
from saccade.apps.screen import table_lines
from saccade.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="FILE", help="scanpaths")
    parser.add_argument(
        "-o", "--out", required=True, metavar="PATH", help="a file with a column split, or a folder for a file per part"
    )
    parser.add_argument(
        "--by",
        type=comma_list,
        default=["image"],
        metavar="UNIT,...",
        help="image, target, subject: no two parts share one; of several, paths on which they differ are left out; "
        "trial protects nothing (default: image)",
    )
    parser.add_argument(
        "--fractions",
        default="0.8,0.1,0.1",
        metavar="F,F,F",
        help="of the units: train, val, test (default: 0.8,0.1,0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_reading_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.gaze import find_leaks, split_scanpaths, write_scanpaths

    out = Path(args.out)
    is_file = bool(out.suffix)
    targets = [out] if is_file else [out / f"{name}.csv" for name in ("train", "val", "test")]
    for target in targets:
        if target.exists() and not args.overwrite:
            raise ConfigError(f"{target} exists; --overwrite replaces it.")
    paths = read_paths(args.file, args)
    parts = split_scanpaths(paths, by=args.by, fractions=fractions(args.fractions), seed=args.seed)
    for notice in find_leaks(parts):
        note(f"note: {notice.message}", args)
    some = [part for part in parts.values() if len(part)]
    lost = len(paths) - sum(map(len, some))
    if lost:
        note(f"note: {lost} paths are left out, on which {' and '.join(args.by)} differ.", args)
    if is_file:
        write_scanpaths(some[0].concatenate(*some[1:]), out)
    else:
        for target, part in zip(targets, parts.values(), strict=True):
            write_scanpaths(part, target)
    rows = [["PART", "PATHS", "FIXATIONS", "IMAGES", "TARGETS", "SUBJECTS"]]
    for name, part in parts.items():
        counts = [len(part), len(part.x), *(len(set(part.column(c)) - {None}) for c in ("image", "task", "subject"))]
        rows.append([name, *(f"{count:,}" for count in counts)])
    print("\n".join(table_lines(rows)))
    return 0


def fractions(text: str) -> tuple[float, float, float]:
    """Parse three numbers.

    Raises:
        ConfigError: If it is not three numbers.
    """
    try:
        train, val, test = (float(part) for part in comma_list(text))
    except ValueError:
        raise ConfigError(f"--fractions are three numbers like 0.8,0.1,0.1, got {text!r}.") from None
    return train, val, test
