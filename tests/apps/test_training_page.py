"""docs/training.md: its commands parse, its options exist, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from saccade.apps.cli import COMMANDS, build_parser, join_values
from saccade.apps.config_errors import check_names, setting_of_option, split_options

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def parsed(line):
    """Return what a command's parser makes of a line, and the options that it leaves to Lightning."""
    name, *words = shlex.split(line)
    command = next(command for command in COMMANDS if command.name == name)
    return build_parser(command).parse_known_args(join_values(words))


@pytest.mark.parametrize("line", re.findall(r"saccade ((?:fit|test|predict) [^`\n#]+)", PAGE))
def test_commands_parse(line):
    parsed(line)


def test_options_exist():
    import saccade.apps.lightning_cli  # noqa: F401 - makes the classes known

    chosen = {}
    check_names([setting_of_option("--model=ImageClassifier"), setting_of_option("--data=ImageFolderData")], chosen)
    groups = [text for text in re.findall(r"`(--(?:model|data|trainer)\.[^`]+)`", PAGE) if "KEY" not in text]
    assert len(groups) > 10
    for text in groups:
        for option in split_options(shlex.split(text.removesuffix("..."))):
            if "my_project" not in option:
                check_names([setting_of_option(option)], chosen)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*val_dataloader.*")
def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    assert names["model"].trainer.global_step == 4
