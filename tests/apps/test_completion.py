"""The completion scripts: valid, small, and they complete."""

import shlex
import shutil
import subprocess

import pytest

from tests.helpers import run_cli

SHELLS = ("bash", "zsh", "fish")
ASK = {
    # bash: call the registered function as readline does; an empty answer lets readline offer files
    "bash": "COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _saccade; "
    "printf '%s\\n' \"${{COMPREPLY[@]}}\"",
    # zsh: the completion system is not loaded in a script; its two commands that the function calls just print
    "zsh": "words=({words}); CURRENT=${{#words}}; compadd() {{ shift; print -l -- $@ }}; _files() {{ : }}; _saccade",
    "fish": "complete -C {line}",
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        done = run_cli("completion", shell)
        assert (done.returncode, done.stderr) == (0, "")
        (folder / shell).write_text(done.stdout)
    return folder


def shell_or_skip(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    return path


def complete(scripts, shell: str, *words: str) -> list[str]:
    """Return what the shell offers for the last word."""
    program = shell_or_skip(shell)
    line = " ".join(words)
    quoted = " ".join(shlex.quote(word) for word in words)
    source = f"compdef() {{ : }}; source {scripts / shell}" if shell == "zsh" else f"source {scripts / shell}"
    asked = ASK[shell].format(words=quoted, line=shlex.quote(line))
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run([program, *flags, "-c", f"{source}; {asked}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    offered = [answer.split("\t")[0] for answer in done.stdout.split("\n") if answer]
    return [answer for answer in offered if answer.startswith(words[-1])]


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_valid_and_small(scripts, shell):
    assert (scripts / shell).stat().st_size < 100_000
    subprocess.run([shell_or_skip(shell), "-n", scripts / shell], check=True)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cl"], ["classify"]),
        (["classify", "--to"], ["--topk"]),
        (["classify", "photos", "--precision", ""], ["auto", "fp32", "bf16", "fp16"]),
        (["list", "mo"], ["models"]),
        (["list", "models", "--pre"], ["--pretrained-only"]),
        (["config", ""], ["ls", "show", "cp", "check"]),
        (["completion", "z"], ["zsh"]),
        (["--ver"], ["--version"]),
    ],
)
def test_words_and_options(scripts, shell, words, expected):
    assert sorted(complete(scripts, shell, "saccade", *words)) == sorted(expected)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_files_are_left_to_the_shell(scripts, shell):
    assert complete(scripts, shell, "saccade", "classify", "") == []
    assert complete(scripts, shell, "saccade", "classify", "--weights", "") == []


def test_bash_splits_at_the_equals_sign(scripts):
    assert complete(scripts, "bash", "saccade", "embed", "--pool", "=", "to") == ["token"]


def test_fish_offers_files(scripts, tmp_path, monkeypatch):
    (tmp_path / "photo.png").touch()
    monkeypatch.chdir(tmp_path)
    assert complete(scripts, "fish", "saccade", "classify", "ph") == ["photo.png"]


def test_unknown_shell():
    done = run_cli("completion", "tcsh")
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid choice: 'tcsh'" in done.stderr
