"""Reference pages that must name everything: docs/environment.md and docs/cli.md."""

import re
import shlex
from pathlib import Path

import pytest

from saccade.apps.cli import COMMANDS, build_parser
from saccade.apps.completion import parser_places

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*\b")


def test_every_environment_variable_is_documented():
    variable = re.compile(r"\b(?:SACCADE_[A-Z_]+|NO_COLOR|TRITON_INTERPRET)\b")
    page = set(variable.findall((ROOT / "docs" / "environment.md").read_text(encoding="utf-8")))
    sources = [
        path for folder in ("saccade", "tests") for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)
    ]
    read = {name for path in sources for name in variable.findall(path.read_text(encoding="utf-8"))}
    assert page == read


def section(name: str) -> str:
    """Return the section of one command."""
    found = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", CLI_PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no section for {name}; python docs/record_cli.py writes it"
    return found[1]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_on_the_page_is_current(command):
    blocks = re.findall(r"```text\n\$ saccade ([^\n]*) --help\n(.*?)```", section(command.name), re.DOTALL)
    places = {place.path.strip(): place for place in parser_places(build_parser(command), command.name)}
    assert [name for name, _ in blocks] == list(places)
    for name, text in blocks:
        declared = {spelling for option in places[name].options for spelling in option.names}
        assert declared <= set(OPTION.findall(text)), f"{name}; python docs/record_cli.py brings the page up to date"


def test_commands_on_the_page_parse():
    lines = re.findall(r"^\$ saccade (\S+)(.*)$", CLI_PAGE, re.MULTILINE)
    assert {name for name, _ in lines} >= {command.name for command in COMMANDS}
    for name, rest in lines:
        if rest.endswith("--help"):
            continue
        command = next(command for command in COMMANDS if command.name == name)
        arguments = shlex.split(re.split(r" [|>] ", rest)[0])
        build_parser(command).parse_known_args(arguments)


def test_every_command_has_a_recorded_screen():
    for command in COMMANDS:
        text = re.sub(r"```text\n\$ saccade [^\n]* --help\n.*?```", "", section(command.name), flags=re.DOTALL)
        assert re.search(rf"```text\n\$ saccade {command.name}.*?\n.+?```", text, re.DOTALL), command.name
