"""From what the user typed to a sorted list of items: files, folders, globs, ``@list.txt``, ``-``."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from saccade.errors import ConfigError

__all__ = ["IMAGE_EXTENSIONS", "Item", "find_items"]

IMAGE_EXTENSIONS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".jp2",
        ".avif",
    }
)


@dataclass(frozen=True, order=True)
class Item:
    """One thing to work on.

    Args:
        id: Unique within a run, stable between runs, with ``/`` as separator: the path relative to the input folder
            if one folder was given, else the path as typed.
        path: Where the file is.
    """

    id: str
    path: Path


def find_items(
    inputs: str | Path | Sequence[str | Path], *, extensions: Iterable[str], kind: str = "images"
) -> list[Item]:
    """Resolve inputs to items, sorted by id, each file once.

    Folders are searched recursively, links followed, names beginning with a dot passed over. Only files with one of
    ``extensions`` are taken from folders and globs; a file named explicitly is taken whatever its name. A file named in
    a list that does not exist stays in the result, so that it is reported as failed and the others are done.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` (one path per line, ``#`` starts a comment line) or ``-`` (such a
            list on standard input).
        extensions: Lower-case suffixes with the dot.
        kind: Plural noun for messages.

    Raises:
        ConfigError: If an input does not exist, or nothing was found.
    """
    typed = [str(inputs)] if isinstance(inputs, str | Path) else [str(entry) for entry in inputs]
    suffixes = frozenset(extensions)
    single_folder = len(typed) == 1 and Path(typed[0]).is_dir()
    found: dict[str, Item] = {}
    seen: set[str] = set()
    for text in typed:
        for path in expand(text, suffixes):
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            name = path.relative_to(typed[0]) if single_folder else path
            identifier = name.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            found[identifier] = Item(identifier, path)
    if not found:
        raise ConfigError(
            f"No {kind} found in {', '.join(typed)}. Looked for files ending in {' '.join(sorted(suffixes))}; "
            "a file named explicitly is taken whatever its name."
        )
    return sorted(found.values())


def expand(text: str, suffixes: frozenset[str]) -> Iterator[Path]:
    """Yield the files that one typed input stands for."""
    if text == "-":
        yield from listed(sys.stdin.read().splitlines(), suffixes)
    elif text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the list of inputs {text[1:]!r}: {error}.") from error
        yield from listed(lines, suffixes)
    elif Path(text).is_dir():
        yield from walk(Path(text), suffixes)
    elif Path(text).exists():
        yield Path(text)
    elif glob.has_magic(text):
        for match in sorted(glob.glob(text, recursive=True)):  # noqa: PTH207 - Path.glob refuses absolute patterns
            if Path(match).is_file() and Path(match).suffix.lower() in suffixes:
                yield Path(match)
    else:
        raise ConfigError(f"Input {text!r} does not exist (working directory: {Path.cwd()}).")


def listed(lines: Iterable[str], suffixes: frozenset[str]) -> Iterator[Path]:
    """Yield the files named in a list, folders in it expanded."""
    for line in lines:
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if Path(name).is_dir():
            yield from walk(Path(name), suffixes)
        else:
            yield Path(name)


def walk(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """Yield files below a folder, following links but entering no folder twice."""
    entered: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(root, name)
