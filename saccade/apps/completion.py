"""``saccade completion``: print a shell completion script.

The script is static: everything it knows is read from the parsers when it is printed, so a key press starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["EXAMPLES", "add_arguments", "completion_script", "run"]

EXAMPLES = {
    "completion": [
        'eval "$(saccade completion bash)"',
        "saccade completion fish > ~/.config/fish/completions/saccade.fish",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    print(completion_script(args.shell), end="")
    return 0


@dataclass(frozen=True)
class Option:
    """One option of a parser: its spellings, what it is for, whether a value follows, and which values there are."""

    names: tuple[str, ...]
    description: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass
class Place:
    """What can stand after ``saccade`` and some sub-commands.

    Args:
        path: The sub-commands, e.g. ``" list models"``; empty behind ``saccade``.
        words: Sub-commands or fixed values by description; without any, files are offered.
        options: The options.
    """

    path: str
    words: dict[str, str] = field(default_factory=dict)
    options: list[Option] = field(default_factory=list)


def completion_script(shell: str) -> str:
    """Return the completion script for ``"bash"``, ``"zsh"`` or ``"fish"``."""
    places = list(all_places())
    return {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[shell](places)


def all_places() -> Iterator[Place]:
    """Walk every command and sub-command."""
    from saccade.apps.cli import COMMANDS, build_parser

    flags = [Option((name,), text, False, ()) for name, text in (("--help", "all commands"), ("--version", "version"))]
    yield Place("", {command.name: command.summary for command in COMMANDS}, flags)
    for command in COMMANDS:
        yield from parser_places(build_parser(command), f" {command.name}")


def parser_places(parser: argparse.ArgumentParser, path: str) -> Iterator[Place]:
    """Walk a parser and its sub-parsers."""
    place = Place(path)
    nested: list[Place] = []
    for action in parser._actions:  # argparse has no public way to list what was declared
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            place.words |= {name: helps.get(name, "") for name in action.choices}
            for name, child in action.choices.items():
                nested += parser_places(child, f"{path} {name}")
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            takes_value = action.nargs not in (0, argparse.OPTIONAL)
            choices = tuple(map(str, action.choices or ()))
            place.options.append(Option(tuple(action.option_strings), action.help or "", takes_value, choices))
        else:
            place.words |= {str(choice): "" for choice in action.choices or ()}
    yield place
    yield from nested


def shell_cases(places: list[Place]) -> str:
    """Return the part that bash and zsh share: from ``$where``, ``$before`` and ``$current`` to ``$answers``.

    ``$where`` are the sub-commands so far, ``$before`` the word before the one to complete. Without ``$answers`` files
    are offered.
    """
    choices: dict[str, list[str]] = {}
    for place in places:
        for option in place.options:
            if option.takes_value:
                choices.setdefault(" ".join(option.choices), []).extend(f"{place.path} {n}" for n in option.names)
    lines = ['    case "$where $before" in']
    for answers, patterns in choices.items():
        lines.append(f"        {'|'.join(map(shlex.quote, patterns))}) answers={shlex.quote(answers)} ;;")
    lines.append('        *) case "$where:$current" in')
    for place in places:
        options = " ".join(name for option in place.options for name in option.names)
        lines.append(f"            {shlex.quote(place.path + ':-')}*) answers={shlex.quote(options)} ;;")
        if place.words:
            lines.append(
                f"            {shlex.quote(place.path + ':')}*) answers={shlex.quote(' '.join(place.words))} ;;"
            )
    lines += ["        esac ;;", "    esac"]
    return "\n".join(lines)


def known_paths(places: list[Place], separator: str) -> str:
    """Return every sub-command with what precedes it, quoted."""
    return separator.join(shlex.quote(place.path) for place in places if place.path)


def bash_script(places: list[Place]) -> str:
    """Return the script for bash."""
    return f"""# saccade completion for bash. In ~/.bashrc:  eval "$(saccade completion bash)"
_saccade() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} where="" answers="" index
    if [[ $current == "=" ]]; then current=""; fi # bash splits --option=value into three words
    if [[ $before == "=" ]]; then before=${{COMP_WORDS[COMP_CWORD - 2]}}; fi
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "$where ${{COMP_WORDS[index]}}" in
            {known_paths(places, "|")}) where+=" ${{COMP_WORDS[index]}}" ;;
        esac
    done
{shell_cases(places)}
    COMPREPLY=($(compgen -W "$answers" -- "$current"))
}}
complete -o bashdefault -o default -F _saccade saccade
"""


def zsh_script(places: list[Place]) -> str:
    """Return the script for zsh."""
    return f"""#compdef saccade
# saccade completion for zsh. In ~/.zshrc, after compinit:  eval "$(saccade completion zsh)"
_saccade() {{
    local current=${{words[CURRENT]}} before=${{words[CURRENT-1]}} where="" answers="" word
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$where $word" in
            {known_paths(places, "|")}) where+=" $word" ;;
        esac
    done
{shell_cases(places)}
    if [[ -n $answers ]]; then compadd -- ${{=answers}}; else _files; fi
}}
compdef _saccade saccade
"""


def fish_script(places: list[Place]) -> str:
    """Return the script for fish."""
    lines = [
        "# saccade completion for fish. To ~/.config/fish/completions/saccade.fish",
        "function __saccade_at",
        "    set -l where ''",
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$where $word"',
        f"            case {known_paths(places, ' ')}",
        '                set where "$where $word"',
        "        end",
        "    end",
        '    test "$where" = "$argv[1]"',
        "end",
    ]
    for place in places:
        start = f"complete -c saccade -n {fish_quote('__saccade_at ' + fish_quote(place.path))}"
        lines += [f"{start} -f -a {word} -d {fish_quote(text)}" for word, text in place.words.items()]
        for option in place.options:
            names = [f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names]
            value = f" -x -a {fish_quote(' '.join(option.choices))}" if option.choices else " -r" * option.takes_value
            lines.append(f"{start} {' '.join(names)}{value} -d {fish_quote(option.description)}")
    return "\n".join(lines) + "\n"


def fish_quote(text: str) -> str:
    """Quote one word for fish."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
