"""``saccade COMMAND``: finds the command, imports it alone, runs it, turns errors into exit codes.

Exit codes: 0 all done; 1 the run failed; 2 usage or configuration; 3 finished, some items failed;
4 something missing on this machine; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saccade import __version__
from saccade.errors import (
    BackendError,
    ConfigError,
    MissingDependencyError,
    MissingResourceError,
    SaccadeError,
    suggest,
)

__all__ = ["COMMANDS", "Command", "build_parser", "main"]


@dataclass(frozen=True)
class Command:
    """One command: a module of ``saccade.apps`` with ``add_arguments(parser)``, ``run(args) -> int``, ``EXAMPLES``.

    A module with ``PASSES_UNKNOWN = True`` gets options that its parser does not know as ``args.unknown``.
    """

    name: str
    group: str
    summary: str
    module: str


COMMANDS: tuple[Command, ...] = (
    Command("fit", "Train and evaluate", "train a model (Lightning)", "fit"),
    Command("validate", "Train and evaluate", "evaluate a checkpoint on the validation split", "evaluate"),
    Command("test", "Train and evaluate", "evaluate a checkpoint on the test split", "evaluate"),
    Command("predict", "Train and evaluate", "predict with a checkpoint on several devices or nodes", "evaluate"),
    Command("classify", "Run on your files", "class probabilities of images, as a table", "classify"),
    Command("embed", "Run on your files", "feature vectors of images, as HDF5, npy or zarr", "embed"),
    Command("attend", "Run on your files", "pictures of where a model looks", "attend"),
    Command("analyze", "Run on your files", "what attention heads do, and what each is worth: a report", "analyze"),
    Command(
        "robustness", "Run on your files", "accuracy under corruption and shift (ImageNet-C, -P, -A, ...)", "robustness"
    ),
    Command("slides", "Run on your files", "whole slides: tissue, tiles, features, training, prediction", "slides"),
    Command("merge", "Run on your files", "unite the outputs of --shard runs", "merge"),
    Command("vlm", "Language and vision", "multimodal models under interventions: generate, attend, evaluate", "vlm"),
    Command("gaze", "Gaze", "scanpaths: metrics, conversion, splits", "gaze"),
    Command("list", "Catalogue", "models, operators, metrics, configs", "list_command"),
    Command("config", "Configs", "list, show, copy and check shipped configs", "config"),
    Command("bench", "Tools", "time attention operators and models", "bench"),
    Command("doctor", "Tools", "check this installation", "doctor"),
    Command("convert", "Tools", "turn an official checkpoint into a saccade one", "convert"),
    Command("demo", "Tools", "see it work offline in a few minutes", "demo"),
    Command("completion", "Tools", "print a shell completion script", "completion"),
)


def overview() -> str:
    """Return the text of ``saccade --help``."""
    lines = ["usage: saccade [--version] [--help] COMMAND ...", ""]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        lines.append(f"{group}:")
        lines += [f"  {c.name:<11}{c.summary}" for c in COMMANDS if c.group == group]
        lines.append("")
    lines += [
        "saccade COMMAND --help shows the options of one command and two examples.",
        "",
        "Examples:",
        "  saccade demo slides -o demo/",
        "  saccade list models 'convnext*'",
    ]
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """A parser that takes options in full only, its sub-parsers too: a new option never changes what a script means."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's own
        super().__init__(**{"allow_abbrev": False, **settings})


def build_parser(command: Command) -> argparse.ArgumentParser:
    """Return the parser of one command; imports that command's module, and nothing heavy."""
    module = importlib.import_module(f"saccade.apps.{command.module}")
    parser = Parser(
        prog=f"saccade {command.name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="Examples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLES[command.name]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.set_defaults(command=command.name, run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: Arguments without the program name; ``None`` means ``sys.argv[1:]``.
    """
    # Threads of OpenMP spin for milliseconds while they wait; where decoding processes or other programs want the same
    # cores, that makes training many times slower. Read when torch is imported, which no command has done yet.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"saccade {__version__}")
        return 0
    name, *rest = arguments
    command = next((c for c in COMMANDS if c.name == name), None)
    if command is None:
        known = [c.name for c in COMMANDS]
        print(f"saccade: unknown command {name!r}.{suggest(name, known)} All commands: saccade --help", file=sys.stderr)
        return 2
    outer, sys.argv = sys.argv, [sys.argv[0], *arguments]  # what runs record as their command
    show_traceback = "-vv" in rest or os.environ.get("SACCADE_TRACEBACK", "") not in ("", "0")
    try:
        return dispatch(command, rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone (`saccade list models | head`); no more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SaccadeError as error:
        if show_traceback:
            raise
        print(f"saccade {name}: {error}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:  # the system refuses: no such folder, no permission, disk full
        if show_traceback or error.strerror is None:
            raise
        place = f": {error.filename}" if error.filename is not None else ""
        print(f"saccade {name}: {error.strerror}{place}", file=sys.stderr)
        return 1
    finally:
        sys.argv = outer


def dispatch(command: Command, arguments: list[str]) -> int:
    """Parse the arguments of one command and run it; argparse's own exits become return values."""
    parser = build_parser(command)
    module = importlib.import_module(f"saccade.apps.{command.module}")
    try:
        passes_unknown = getattr(module, "PASSES_UNKNOWN", False)
        args, unknown = parser.parse_known_args(join_values(arguments) if passes_unknown else arguments)
        if passes_unknown:
            args.unknown = unknown
        elif unknown:
            close = suggest(unknown[0].partition("=")[0], parser._option_string_actions)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}.{close}")
    except SystemExit as stop:
        return int(stop.code or 0)
    code: int = args.run(args)
    return code


def join_values(arguments: Sequence[str]) -> list[str]:
    """Write ``--model.lr 0.1`` as ``--model.lr=0.1``: argparse would take the value of an unknown option for a CKPT."""
    joined: list[str] = []
    for argument in arguments:
        option = joined[-1] if joined else ""
        dotted = re.fullmatch(r"--(model|data|[\w-]+[._][\w.+]+)", option) and option != "--print_config"
        if dotted and (not argument.startswith("-") or argument[1:2].isdigit()):
            joined[-1] = f"{option}={argument}"
        else:
            joined.append(argument)
    return joined


def exit_code(error: SaccadeError) -> int:
    """Return the exit code for an error that ended a command."""
    if isinstance(error, MissingDependencyError | MissingResourceError | BackendError):
        return 4
    return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    raise SystemExit(main())
