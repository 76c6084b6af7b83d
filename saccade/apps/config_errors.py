"""Mistakes in configs and options, each in one line: where, what, and did you mean.

jsonargparse finds them too, but reports them in many lines, without file and line and without the name that was meant.
Names are therefore checked before it runs, and its messages about values are shortened.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from saccade.errors import ConfigError, suggest

__all__ = [
    "LINKED",
    "Chosen",
    "Setting",
    "check_names",
    "explain",
    "setting_of_option",
    "settings_of_file",
    "settings_of_text",
    "split_options",
]

TOP = ("data", "model", "seed_everything", "trainer")
BASES: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
FLAGS = ("--help", "--print_config")
CLASS_KEYS = ("class_path", "dict_kwargs", "init_args")
LINKED = ("num_classes", "class_names", "data_config")  # arguments of the model that are taken from the data

Chosen = dict[tuple[str, ...], type | None]


@dataclass(frozen=True)
class Setting:
    """One key that somebody set.

    Args:
        key: Where it goes, e.g. ``("model", "init_args", "lr")``.
        value: The text given; ``None`` for a mapping.
        source: For messages, e.g. ``"my.yaml, line 7"`` or ``"option --model.lr"``.
    """

    key: tuple[str, ...]
    value: str | None
    source: str


def settings_of_file(path: Path) -> list[Setting]:
    """Read the keys of a YAML config with their lines.

    Raises:
        ConfigError: If the file cannot be read or is no YAML mapping.
    """
    try:
        return settings_of_text(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Config {str(path)!r} cannot be read: {error}.") from error


def settings_of_text(text: str, origin: str) -> list[Setting]:
    """Read the keys of a YAML text with their lines; ``origin`` names it in messages.

    Raises:
        ConfigError: If it is no YAML mapping.
    """
    try:
        root = yaml.compose(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{origin}, line {line}: not valid YAML: {error.problem}.") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{origin}, line 1: expected a mapping with the keys {', '.join(TOP)}.")
    return list(walk(root, (), origin))


def walk(node: yaml.MappingNode, parents: tuple[str, ...], origin: str) -> Iterator[Setting]:
    """Yield the settings below a YAML mapping, outer ones first."""
    for key, value in node.value:
        name = (*parents, str(key.value))
        text = value.value if isinstance(value, yaml.ScalarNode) else None
        yield Setting(name, text, f"{origin}, line {key.start_mark.line + 1}")
        if isinstance(value, yaml.MappingNode):
            yield from walk(value, name, origin)


def split_options(options: list[str]) -> list[str]:
    """Write options with their values as one word each: ``--model.lr 0.1`` becomes ``--model.lr=0.1``.

    Raises:
        ConfigError: If something is neither an option nor the value of one.
    """
    words: list[str] = []
    rest = list(options)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"Unexpected argument {word!r}.")
        if "=" not in word and word not in FLAGS and rest and not rest[0].startswith("--"):
            word = f"{word}={rest.pop(0)}"
        words.append(word)
    return words


def setting_of_option(word: str) -> Setting | None:
    """Read the key of an option such as ``--model.lr=0.1``; ``None`` if it asks for help or for the config."""
    option, _, value = word.partition("=")
    if option in FLAGS or option.endswith(".help"):
        return None
    return Setting(tuple(option.removeprefix("--").removesuffix("+").split(".")), value, f"option {option}")


def check_names(settings: list[Setting], chosen: Chosen) -> list[str]:
    """Raise for the first key or class that does not exist.

    Args:
        settings: Of one source, in their order.
        chosen: Classes named so far, by key without ``init_args``; those of this source are added.

    Returns:
        Keys at which this source puts another class in the place of an earlier source's.

    Raises:
        ConfigError: Naming the source, the name and close ones.
    """
    earlier = dict(chosen)
    for setting in settings:
        *parents, name = setting.key
        parent = tuple(part for part in parents if part != "init_args")
        if name in CLASS_KEYS and parent:
            place = parent
        else:
            check_key(setting, parent, name, chosen)
            place = (*parent, name)
        base = class_of_setting(place, chosen)
        if base is not None and setting.value and name != "init_args":
            chosen[place] = find_class(setting, setting.value, base)
    return [".".join(place) for place, cls in chosen.items() if place in earlier and earlier[place] is not cls]


def check_key(setting: Setting, parent: tuple[str, ...], name: str, chosen: Chosen) -> None:
    """Raise unless ``name`` may stand below ``parent``."""
    if parent == ("model",) and name in LINKED:
        raise ConfigError(f"{setting.source}: model.{name} is taken from the data; leave it out.")
    known = known_names(parent, chosen)
    if known is not None and name not in known:
        where = f" of {'.'.join(parent)}" if parent else ""
        hint = suggest(name, known) or f" Known: {', '.join(sorted(known))}."
        raise ConfigError(f"{setting.source}: unknown key {name!r}{where}.{hint}")


def known_names(parent: tuple[str, ...], chosen: Chosen) -> set[str] | None:
    """Return the names that may stand below a key, ``None`` if anything may."""
    if not parent:
        return set(TOP)
    owner: Any = Trainer if parent == ("trainer",) else chosen.get(parent)
    if owner is None and len(parent) > 1 and (kind := annotation(parent, chosen)) is not None:
        owner = next((part for part in flatten(kind) if dataclasses.is_dataclass(part)), None)
    if owner is None:
        return None
    parameters = inspect.signature(owner).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def class_of_setting(place: tuple[str, ...], chosen: Chosen) -> type | None:
    """Return the base of the class that is named at a key, ``None`` if no class is."""
    if len(place) == 1:
        return BASES.get(place[0])
    kind = annotation(place, chosen)
    parts = list(flatten(kind)) if kind is not None else []
    return next((base for base in (Optimizer, LRScheduler) if base in parts), None)


def annotation(place: tuple[str, ...], chosen: Chosen) -> Any:  # noqa: ANN401 - any type form
    """Return the annotation of the argument at a key, ``None`` if its class is not known."""
    owner: Any = chosen.get(place[:-1])
    if owner is None:
        return None
    return typing.get_type_hints(owner.__init__).get(place[-1])


def flatten(kind: Any) -> Iterator[Any]:  # noqa: ANN401 - any type form
    """Yield a type and all types inside it: members of unions, results (not arguments) of callables."""
    if not isinstance(kind, list):
        yield kind
        for part in typing.get_args(kind):
            yield from flatten(part)


def find_class(setting: Setting, name: str, base: type) -> type | None:
    """Find a class by short name or dotted path.

    Returns:
        The class; ``None`` if it is a function that makes one, or a file that jsonargparse reads.

    Raises:
        ConfigError: If there is none.
    """
    if name.endswith((".yaml", ".yml", ".json")) or name in ("null", "None", "~", ""):
        return None
    classes = {cls.__name__: cls for cls in reversed(list(subclasses(base)))}
    if "." not in name:
        if name in classes:
            return classes[name]
    else:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            pass
        else:
            return found if isinstance(found, type) else None
    ours = [known for known, cls in classes.items() if cls.__module__.startswith(("saccade.", "torch.optim."))]
    raise ConfigError(
        f"{setting.source}: unknown {base.__name__} class {name!r}.{suggest(name.rpartition('.')[2], ours)} "
        f"Known: {', '.join(sorted(ours))}."
    )


def subclasses(base: type) -> Iterator[type]:
    """Yield all imported subclasses of a class that can be built."""
    children: list[type] = base.__subclasses__()
    for cls in children:
        if not inspect.isabstract(cls):
            yield cls
        yield from subclasses(cls)


def explain(message: str, settings: list[Setting]) -> str:
    """Shorten a message of jsonargparse to one line that begins with the place of the mistake.

    Args:
        message: Its text.
        settings: What was set, to find the place.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if not keys:
        return message.splitlines()[0] if message else "invalid configuration"
    key = ".".join(keys)
    inner = message[message.rindex('Parser key "') :]
    if required := re.search(r'arguments are required: (.+)|Key "(.+)" is required', inner):
        name = f"{key}.{required[1] or required[2]}"  # the second form is that of older versions
        return f"{name} is required: pass --{name} VALUE."
    path = tuple(key.split("."))
    sources = [s.source for s in settings if tuple(part for part in s.key if part != "init_args") == path]
    wanted = [plain_type(kind) for kind in re.findall(r"Expected a (.+?)(?:\. Got value.*)?$", inner, re.MULTILINE)]
    wanted = [kind for kind in dict.fromkeys(wanted) if kind]
    given = re.search(r"(?:Got|Given) value: (.*)", inner)
    place = key if not sources else sources[-1] if sources[-1].startswith("option") else f"{sources[-1]}: {key}"
    got = f", got {given[1].split('. Got value')[0]}" if given else ""
    return f"{place}: expected {' or '.join(wanted) or 'another value'}{got}."


def plain_type(kind: str) -> str:
    """Turn a type as jsonargparse prints it into words; null and paths of classes, often allowed, become empty."""
    if literal := re.match(r"typing\.Literal\[(.+)\]", kind):
        return f"one of {literal[1]}"
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return "" if "path" in name or name == "NoneType" else name
