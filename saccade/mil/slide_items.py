"""Which slides a run is about: files, folders and lists become items with unique ids."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saccade.batch import Item, find_items
from saccade.errors import ConfigError

__all__ = ["SLIDE_EXTENSIONS", "SlideItem", "find_slides", "read_slide_list"]

SLIDE_EXTENSIONS = (
    ".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .dcm .czi .avs .img".split()  # noqa: SIM905
)


@dataclass(frozen=True, order=True)
class SlideItem(Item):
    """One slide to work on.

    Args:
        id: Unique name: the file's stem.
        path: The file.
        mpp: Its resolution where the list says it.
    """

    mpp: float | None = None


def find_slides(inputs: str | Path | Sequence[str | Path], *, list_file: str | Path | None = None) -> list[SlideItem]:
    """Resolve inputs to slides, sorted by id.

    Ids are file stems (``.ome.tif`` counts as one extension). Equal stems get their folder's name in front, or a
    number.
    All files of one DICOM series in a folder are one slide, named after the first.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``. PNG and JPEG are slides only when named.
        list_file: CSV with a column ``slide`` (path or id) and, if need be, ``mpp``: only these slides, in any order.

    Raises:
        ConfigError: If nothing is found, or the list names a slide twice or one that is not there.
    """
    found = find_items(inputs, extensions=SLIDE_EXTENSIONS, kind="slides")
    paths = one_per_series([item.path for item in found])
    named = unique_ids(paths)
    if list_file is None:
        return sorted(SlideItem(key, path) for key, path in named.items())
    rows = read_slide_list(list_file)
    by_name = {name: key for key, path in named.items() for name in (key, path.name, path.as_posix())}
    chosen: dict[str, SlideItem] = {}
    for number, row in enumerate(rows, start=2):
        key = by_name.get(row["slide"]) or by_name.get(Path(row["slide"]).name)
        place = f"{list_file}, line {number}"
        if key is None:
            raise ConfigError(f"{place}: slide {row['slide']!r} is not among the inputs.")
        if key in chosen:
            raise ConfigError(f"{place}: slide {key!r} is listed twice.")
        chosen[key] = SlideItem(key, named[key], parse_mpp(row.get("mpp"), place))
    return sorted(chosen.values())


def read_slide_list(path: str | Path) -> list[dict[str, str]]:
    """Read a CSV of slides; its column may be called ``slide``, ``slide_id``, ``wsi`` or ``path``.

    Returns:
        Rows with the key ``slide`` and the other columns as they are.

    Raises:
        ConfigError: If there is no such column, or no row.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        column = next((name for name in ("slide", "slide_id", "wsi", "path") if name in columns), None)
        if column is None:
            raise ConfigError(f"{path} has no column 'slide' (nor slide_id, wsi, path); it has {', '.join(columns)}.")
        rows = [{**row, "slide": (row[column] or "").strip()} for row in reader]
    rows = [row for row in rows if row["slide"]]
    if not rows:
        raise ConfigError(f"{path} lists no slides.")
    return rows


def parse_mpp(text: str | None, place: str) -> float | None:
    """Return the resolution in a cell of a list."""
    if not (text or "").strip():
        return None
    try:
        value = float(str(text).replace(",", "."))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{place}: mpp must be a positive number, got {text!r}.")
    return value


def one_per_series(paths: Sequence[Path]) -> list[Path]:
    """Keep one file of each DICOM series in a folder; files that do not open stay, to be reported."""
    import openslide

    kept: list[Path] = []
    seen: set[tuple[Path, str]] = set()
    for path in sorted(paths):
        if path.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(path) as slide:
                    identity = slide.properties.get(openslide.PROPERTY_NAME_QUICKHASH1, path.name)
            except openslide.OpenSlideError:
                identity = path.name
            if (path.parent, identity) in seen:
                continue
            seen.add((path.parent, identity))
        kept.append(path)
    return kept


def unique_ids(paths: Sequence[Path]) -> dict[str, Path]:
    """Name slides by their stems, made unique."""
    count = Counter(stem(path) for path in paths)
    named: dict[str, Path] = {}
    for path in paths:
        name = stem(path) if count[stem(path)] == 1 else f"{path.resolve().parent.name}-{stem(path)}"
        number = 2
        while name in named:
            name, number = f"{name.rsplit('~', 1)[0]}~{number}", number + 1
        named[name] = path
    return named


def stem(path: Path) -> str:
    """Return the name without its extension."""
    name = path.stem
    return name[:-4] if name.lower().endswith((".ome",)) else name
