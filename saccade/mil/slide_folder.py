"""What lies in an output folder of ``saccade slides``: which slides, and where their files are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saccade.batch.run import read_entries
from saccade.errors import ConfigError, DataError
from saccade.mil.slide import Slide
from saccade.mil.slide_items import find_slides

__all__ = ["SlideFolder", "feature_folder"]

JOURNALS = ("items.jsonl", "masks/items.jsonl", "tiles/*/items.jsonl", "features/*/*/items.jsonl")


def feature_folder(given: str | Path) -> Path:
    """Return the folder with bag files: the one given, or the only set of features below a folder of ``slides run``.

    Raises:
        ConfigError: If there are several.
    """
    below = sorted(path for path in Path(given).glob("features/*/*") if path.is_dir())
    if len(below) > 1:
        raise ConfigError(f"{given} holds several sets of features; name one: {', '.join(map(str, below))}.")
    return below[0] if below else Path(given)


@dataclass(frozen=True)
class SlideFolder:
    """An output folder of ``saccade slides``.

    Args:
        root: The folder.
        slides: Scanner files by slide id; those that have been moved away included.
    """

    root: Path
    slides: dict[str, Path]

    @classmethod
    def open(cls, root: str | Path, *, slides: str | Path | Sequence[str | Path] | None = None) -> SlideFolder:
        """Learn from the journals of earlier runs where the slides are.

        Args:
            root: The folder.
            slides: Where the slides are now, see :func:`saccade.mil.find_slides`; ``None`` means what the journals say.

        Raises:
            ConfigError: If there is no such folder, ``slides`` holds none, or a journal was tampered with.
        """
        folder = Path(root)
        if not folder.is_dir():
            raise ConfigError(f"Folder {str(root)!r} does not exist; `saccade slides run ... -o {root}` writes one.")
        if slides is not None:
            return cls(folder, {item.id: item.path for item in find_slides(slides)})
        journals = sorted(journal for pattern in JOURNALS for journal in folder.glob(pattern))
        entries = [entry for journal in journals for entry in read_entries(journal).values()]
        found = {entry["id"]: Path(entry["path"]) for entry in entries if entry["status"] == "done"}
        strange = next((key for key in found if Path(key).name != key), None)
        if strange is not None:  # ids become names of files
            raise ConfigError(f"A journal in {root} has the id {strange!r}, which is no name of a slide.")
        return cls(folder, found)

    def open_slide(self, key: str) -> Slide:
        """Open the scanner file of a slide.

        Raises:
            DataError: If it is not known or not there (``"no_slide"``), or cannot be read.
        """
        path = self.slides.get(key)
        if path is None or not path.is_file():
            where = "no run in this folder knows it" if path is None else f"{path} is not there"
            raise DataError(f"the scanner file of slide {key!r}: {where}; say --slides FOLDER", reason="no_slide")
        return Slide(path)

    def contours(self, key: str) -> Path:
        """Return where the contours of a slide's tissue are, if it has any."""
        return self.root / "masks" / f"{key}.geojson"

    def attention(self, name: str, key: str) -> Path:
        """Return where a model's attention for a slide is, if it has any."""
        return self.root / "attention" / name / f"{key}.h5"
