"""``saccade config``: list, show, copy and check shipped configs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from saccade.apps.screen import table_lines
from saccade.apps.shipped import config_path, list_configs
from saccade.errors import ConfigError, suggest

__all__ = ["EXAMPLES", "add_arguments", "add_list_arguments", "print_configs", "run"]

EXAMPLES = {
    "config": [
        "saccade config ls",
        "saccade config cp image/finetune my.yaml",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|show|cp|check")
    add_list_arguments(actions.add_parser("ls", help="names and what they are for"))
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", metavar="NAME", help="shipped name or file")
    copy = actions.add_parser("cp", help="copy one to edit it")
    copy.add_argument("name", metavar="NAME", help="shipped name")
    copy.add_argument("file", metavar="FILE", help="the copy")
    copy.add_argument("--force", action="store_true", help="replace FILE if it exists")
    check = actions.add_parser("check", help="parse it and build what it describes, without data")
    check.add_argument("name", metavar="FILE", help="file or shipped name")


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``config ls`` and ``list configs``."""
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="e.g. 'image/*' (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    actions: dict[str, Callable[[argparse.Namespace], None]]
    actions = {"ls": print_configs, "show": show_config, "cp": copy_config, "check": check}
    actions[args.action](args)
    return 0


def print_configs(args: argparse.Namespace) -> None:
    """Print names and first lines of the shipped configs.

    Raises:
        ConfigError: If none matches.
    """
    names = list_configs()
    rows = [(name, summary(config_path(name))) for name in names if fnmatchcase(name, args.pattern)]
    if not rows:
        raise ConfigError(f"No config matches {args.pattern!r}.{suggest(args.pattern.strip('*'), names)}")
    if args.json:
        print(json.dumps([{"name": name, "summary": text} for name, text in rows], indent=1))
        return
    print("\n".join(table_lines([("NAME", "WHAT IT IS"), *rows])))


def summary(path: Path) -> str:
    """Return the opening comment line of a config."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()


def show_config(args: argparse.Namespace) -> None:
    """Print one config."""
    print(config_path(args.name).read_text(encoding="utf-8"), end="")


def copy_config(args: argparse.Namespace) -> None:
    """Copy one config.

    Raises:
        ConfigError: If the target exists and ``--force`` is not given, or cannot be written.
    """
    source, target = config_path(args.name), Path(args.file)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not args.force:
        raise ConfigError(f"{target} exists; choose another name, or replace it with --force.")
    try:
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from error
    print(f"{args.name} -> {target}", file=sys.stderr)


def check(args: argparse.Namespace) -> None:
    """Check one config."""
    path = config_path(args.name)  # before anything heavy is imported
    from saccade.apps.lightning_cli import check_config
    from saccade.apps.quiet import training_screen

    with training_screen(argparse.Namespace(quiet=False, progress="none")):
        check_config(path)
    print(f"{args.name}: ok")
