"""Where the images of a robustness suite lie, by class: ImageNet-C, -P, -A, -R, -Sketch, -V2, or any folder to corrupt.

A suite is a list of folders to evaluate, each with the folder of every class. Classes are found by name (WordNet id),
never by counting folders, so an incomplete download cannot shift labels; it is refused, and what is missing is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from timm.data import ImageNetInfo

from saccade.batch import IMAGE_EXTENSIONS
from saccade.datasets.corruptions import CORRUPTIONS, GROUPS, SEVERITIES
from saccade.errors import ConfigError, suggest

__all__ = [
    "NOISE_PERTURBATIONS",
    "PERTURBATIONS",
    "SUITES",
    "Part",
    "Suite",
    "choose_corruptions",
    "find_suite",
    "imagenet_classes",
]

SUITES = ("imagenet-c", "imagenet-p", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "corruptions")
SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
CLIP_EXTENSIONS = frozenset({".mp4"})
NOISE_PERTURBATIONS = ("gaussian_noise", "shot_noise", "speckle_noise")
PERTURBATIONS = (  # the ten that means are taken over
    "gaussian_noise",
    "shot_noise",
    "motion_blur",
    "zoom_blur",
    "snow",
    "brightness",
    "translate",
    "rotate",
    "tilt",
    "scale",
)
NAMED = 12  # missing folders listed in a message


@dataclass(frozen=True)
class Part:
    """One folder of a suite: a corruption at a severity, a perturbation, or the whole of a suite that has one folder.

    Args:
        id: Unique in the suite, e.g. ``"fog/3"``, ``"tilt"``, ``"clean"``, ``"imagenet-a"``.
        folder: Where the class folders are.
        kind: Corruption or perturbation, ``"clean"``, or the suite's name.
        severity: 1 to 5, or 0 where there is none.
        on_the_fly: Whether the images are clean and the corruption is still to be made.
        as_they_are: Whether images are meant to be seen uncropped: those of ImageNet-C and -P have their final size.
    """

    id: str
    folder: Path
    kind: str
    severity: int = 0
    on_the_fly: bool = False
    as_they_are: bool = False


@dataclass(frozen=True)
class Suite:
    """A suite as it was found.

    Args:
        name: One of ``SUITES``.
        parts: Folders to evaluate, in order.
        columns: The model's outputs that compete, ascending; a label counts them.
        class_folders: Name of each column's folder.
        counts: Number of files by part and column.
        left_out: Class folders that the model does not know; not evaluated.
        extensions: Of the files that count, lower case.
    """

    name: str
    parts: tuple[Part, ...]
    columns: tuple[int, ...]
    class_folders: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    left_out: tuple[str, ...]
    extensions: frozenset[str]

    def files(self, part: Part) -> list[tuple[Path, int]]:
        """Return the files of a part with their labels, by class, then by name."""
        return [
            (part.folder / name, label)
            for label, folder in enumerate(self.class_folders)
            for name in list_files(part.folder / folder, folder, self.extensions)
        ]

    @property
    def has_all_of_imagenet(self) -> bool:
        """Whether the classes that compete are ImageNet's thousand, so that AlexNet's errors on them apply."""
        return set(self.class_folders) == set(imagenet_classes())

    def size(self, part: Part) -> int:
        """Return the number of files of a part."""
        return sum(self.counts[part.id])


def imagenet_classes() -> list[str]:
    """Return the WordNet ids of ImageNet's thousand classes, in the order of a classifier's outputs."""
    return list(ImageNetInfo("imagenet-1k").label_names())


def choose_corruptions(names: Sequence[str] | None) -> list[str]:
    """Expand groups and check names; ``None`` means all.

    Raises:
        ConfigError: If a name is neither a corruption nor a group.
    """
    chosen: set[str] = set()
    for name in CORRUPTIONS if names is None else names:
        if name not in CORRUPTIONS and name not in GROUPS:
            known = [*GROUPS, *CORRUPTIONS]
            raise ConfigError(f"Unknown corruption {name!r}.{suggest(name, known)} All: {', '.join(known)}.")
        chosen.update(GROUPS.get(name, [name]))
    return [name for name in CORRUPTIONS if name in chosen]


def find_suite(
    name: str,
    roots: Sequence[Path],
    *,
    classes: Sequence[str],
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    difficulty: int = 1,
    clean: Path | None = None,
) -> Suite:
    """Find the folders of a suite and check that all are there.

    Layouts, with WordNet ids as class folders unless said otherwise:

    - ``imagenet-c``: ``ROOT/CORRUPTION/SEVERITY/CLASS/*``; corruptions may lie in several roots, or in group folders
      (``ROOT/noise/gaussian_noise``), as the five archives unpack. The extra four are taken if they are there.
    - ``imagenet-p``: ``ROOT/PERTURBATION/CLASS/*.mp4``; noise of difficulty 2 or 3 in ``PERTURBATION_2`` or ``_3``.
    - ``imagenet-a``, ``imagenet-r``, ``imagenet-sketch``: ``ROOT/CLASS/*``.
    - ``imagenet-v2``: ``ROOT/0`` to ``ROOT/999``, by number of the class.
    - ``corruptions``: ``ROOT/CLASS/*``, clean images in folders named after the model's classes.

    Where the model knows some of ImageNet's classes only, the folders of the others are left out.

    Args:
        name: One of ``SUITES``.
        roots: Folders; several for ``imagenet-c`` and ``-p``.
        classes: The model's class names in the order of its outputs; WordNet ids but for ``corruptions``.
        corruptions: Which corruptions or groups, for ``imagenet-c`` and ``corruptions``; ``None`` means all.
        severities: Which severities, likewise.
        difficulty: Of ``imagenet-p``, 1 to 3.
        clean: Class folders of clean images, for ``imagenet-c``.

    Raises:
        ConfigError: If a folder is missing or empty, or holds fewer files than its like in other parts; names them.
    """
    for root in [*roots, *([clean] if clean is not None else [])]:
        if not root.is_dir():
            raise ConfigError(f"{root} is not a folder (working directory: {Path.cwd()}).")
    if name not in ("imagenet-c", "imagenet-p") and len(roots) != 1:
        raise ConfigError(f"{name} takes one folder, got {len(roots)}.")
    folders = class_folders(name, classes)
    if name == "imagenet-c":
        parts = corruption_parts(roots, choose_corruptions(corruptions), severities, optional=corruptions is None)
        parts = [*([Part("clean", clean, "clean")] if clean is not None else []), *parts]
    elif name == "imagenet-p":
        parts = perturbation_parts(roots, difficulty)
    elif name == "corruptions":
        chosen = choose_corruptions(corruptions)
        made = [Part(f"{kind}/{s}", roots[0], kind, s, on_the_fly=True) for kind in chosen for s in severities]
        parts = [Part("clean", roots[0], "clean"), *made]
    else:
        parts = [Part(name, roots[0], name)]
    extensions = CLIP_EXTENSIONS if name == "imagenet-p" else IMAGE_EXTENSIONS
    counts = count_files(parts, list(folders), extensions)
    present = {entry for part in parts for entry in subfolders(part.folder)}
    left_out = tuple(sorted(present - folders.keys()))
    if name == "corruptions" and (left_out or not present):
        split = next((word for word in ("test", "val") if word in left_out), None)
        hint = f" Did you mean {roots[0] / split}?" if split is not None else ""
        raise ConfigError(
            f"{roots[0]} must hold a folder for each class. Not among the model's classes: "
            f"{listed(left_out) or 'no folder at all'}.{hint} Its classes: {listed(classes)}."
        )
    # A folder of one's own may lack a class; labels go by name all the same.
    check_complete(
        name, parts, [folder in present or name != "corruptions" for folder in folders], list(folders), counts
    )
    return Suite(name, tuple(parts), tuple(folders.values()), tuple(folders), counts, left_out, extensions)


def class_folders(name: str, classes: Sequence[str]) -> dict[str, int]:
    """Return the folder of each class that a suite and the model share, with the model's output, ascending.

    Raises:
        ConfigError: If they share none.
    """
    position = {word: index for index, word in enumerate(classes)}
    if name == "corruptions":
        return position
    whole = imagenet_classes()
    in_suite = whole
    if name in SUBSETS:
        in_suite = (files("timm") / "data" / "_info" / SUBSETS[name]).read_text(encoding="utf-8").split()
    shared = [word for word in in_suite if word in position]
    if not shared:
        raise ConfigError(
            f"The model shares no class with {name}, whose classes are WordNet ids such as {in_suite[0]}; "
            f"the model's are {listed(classes)}."
        )
    number = {word: str(index) for index, word in enumerate(whole)}
    folder = {word: number[word] if name == "imagenet-v2" else word for word in shared}
    return {folder[word]: position[word] for word in sorted(shared, key=position.__getitem__)}


def corruption_parts(
    roots: Sequence[Path], names: Sequence[str], severities: Sequence[int], *, optional: bool
) -> list[Part]:
    """Return the parts of ImageNet-C; the four extra corruptions need not be there if they were not asked for by name.

    Raises:
        ConfigError: If a folder is missing.
    """
    parts, missing = [], []
    for name in names:
        folder = first_folder([root / place for root in roots for place in (name, *(f"{g}/{name}" for g in GROUPS))])
        if folder is None and optional and name in GROUPS["extra"]:
            continue
        for severity in severities:
            if folder is None or not (folder / str(severity)).is_dir():
                missing.append(f"{name}/{severity}")
            else:
                parts.append(Part(f"{name}/{severity}", folder / str(severity), name, severity, as_they_are=True))
    if missing:
        raise incomplete("imagenet-c", missing, "Corruptions that you do have are chosen with --corruptions.")
    return parts


def perturbation_parts(roots: Sequence[Path], difficulty: int) -> list[Part]:
    """Return the parts of ImageNet-P.

    Raises:
        ConfigError: If one of the ten perturbations is missing, or the difficulty is none.
    """
    if difficulty not in (1, 2, 3):
        raise ConfigError(f"difficulty must be 1, 2 or 3, got {difficulty}.")
    parts, missing = [], []
    for name in PERTURBATIONS:
        stored = f"{name}_{difficulty}" if difficulty > 1 and name in NOISE_PERTURBATIONS else name
        folder = first_folder([root / stored for root in roots])
        if folder is None:
            missing.append(stored)
        else:
            parts.append(Part(name, folder, name, as_they_are=True))
    if missing:
        raise incomplete("imagenet-p", missing)
    return parts


def first_folder(candidates: Sequence[Path]) -> Path | None:
    """Return the first folder that exists."""
    return next((path for path in candidates if path.is_dir()), None)


def count_files(
    parts: Sequence[Part], folders: Sequence[str], extensions: frozenset[str]
) -> dict[str, tuple[int, ...]]:
    """Count the files of each class, by part; each folder on disk is read once."""
    by_folder: dict[Path, tuple[int, ...]] = {}
    for part in parts:
        if part.folder not in by_folder:
            by_folder[part.folder] = tuple(
                sum(1 for _ in list_files(part.folder / folder, "", extensions)) for folder in folders
            )
    return {part.id: by_folder[part.folder] for part in parts}


def check_complete(
    name: str,
    parts: Sequence[Part],
    needed: Sequence[bool],
    folders: Sequence[str],
    counts: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise if a needed class folder is missing or empty, or holds fewer files than under another corruption."""
    missing: dict[str, None] = {}
    for index, folder in enumerate(folders):
        most = max((counts[part.id][index] for part in parts if name == "imagenet-c" and part.as_they_are), default=1)
        for part in parts:
            count = counts[part.id][index]
            if count == 0 and needed[index]:
                missing[str(part.folder / folder)] = None
            elif part.as_they_are and 0 < count < most:
                missing[f"{part.folder / folder} ({count} of {most} files)"] = None
    if missing:
        raise incomplete(name, list(missing))


def incomplete(name: str, missing: Sequence[str], hint: str = "") -> ConfigError:
    """Return the error that names what a download lacks."""
    text = f"{name} is incomplete, {len(missing):,} folders are missing or not whole: {listed(missing)}."
    return ConfigError(
        f"{text} Labels go by folder name, so nothing was shifted; complete the download. {hint}".strip()
    )


def listed(names: Sequence[str]) -> str:
    """Join names for a message, the first few of many."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, hidden ones left out."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def list_files(folder: Path, prefix: str, extensions: frozenset[str]) -> Iterator[str]:
    """Yield the names of the files in a folder and below, sorted, behind ``prefix/``; none if there is no folder."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as found:
        entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
    for name, is_folder in entries:
        if name.startswith("."):
            continue
        if is_folder:
            yield from list_files(folder / name, f"{prefix}/{name}", extensions)
        elif os.path.splitext(name)[1].lower() in extensions:  # noqa: PTH122 - millions of names
            yield f"{prefix}/{name}"
