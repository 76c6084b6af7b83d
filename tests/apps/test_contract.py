"""Every command keeps the same contract; adding one to COMMANDS puts it under these tests."""

import importlib
import re
import shlex

import pytest

from saccade.apps.cli import COMMANDS, Command, build_parser, main, overview
from tests.helpers import run_cli


def passes_unknown(command: Command) -> bool:
    """Tell whether options that the command's parser does not know reach the command."""
    return getattr(importlib.import_module(f"saccade.apps.{command.module}"), "PASSES_UNKNOWN", False)


every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def arguments_of(line: str) -> list[str]:
    """Return the words after ``saccade`` of an example, without what the shell around it takes."""
    call = re.search(r"\bsaccade ([^)>|]*)", line)
    assert call, line
    return shlex.split(call[1])


def parse(line: str) -> None:
    """Parse an example as the dispatcher would, up to running it."""
    name, *arguments = arguments_of(line)
    command = next(command for command in COMMANDS if command.name == name)
    _, unknown = build_parser(command).parse_known_args(arguments)
    assert not unknown or passes_unknown(command), f"{line}: {unknown}"


@every_command
def test_help_ends_with_two_examples_that_parse(command, capsys):
    assert main([command.name, "--help"]) == 0
    shown = capsys.readouterr().out
    examples = importlib.import_module(f"saccade.apps.{command.module}").EXAMPLES[command.name]
    assert len(examples) == 2
    assert shown.endswith("Examples:\n  " + "\n  ".join(examples) + "\n")
    for line in examples:
        parse(line)


def test_examples_of_the_overview_parse():
    lines = overview().partition("Examples:\n")[2].splitlines()
    assert len(lines) == 2
    for line in lines:
        parse(line)


@every_command
def test_every_option_is_explained(command):
    for parser in all_parsers(build_parser(command)):
        for action in parser._actions:
            assert action.help or action.choices, f"{parser.prog} {action.option_strings or action.dest}"


@every_command
def test_long_options_use_hyphens(command):
    for parser in all_parsers(build_parser(command)):
        for action in parser._actions:
            assert not any("_" in name for name in action.option_strings), action.option_strings


@every_command
def test_options_are_not_abbreviated(command):
    assert not any(parser.allow_abbrev for parser in all_parsers(build_parser(command)))


@pytest.mark.parametrize(
    "command",
    # those that hand options on to Lightning import it first
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if passes_unknown(c) else []) for c in COMMANDS],
)
def test_unknown_option_is_a_usage_error(command):
    done = run_cli(command.name, "--no-such-option", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"saccade {command.name}" in done.stderr
    assert "Traceback" not in done.stderr


def all_parsers(parser):
    """Walk a parser and its sub-parsers."""
    yield parser
    for action in parser._actions:
        for child in getattr(action, "choices", None) or ():
            if isinstance(action.choices, dict):
                yield from all_parsers(action.choices[child])
