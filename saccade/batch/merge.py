"""Unite the outputs of ``--shard 1/N`` ... ``N/N`` into what one run would have written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saccade.batch.options import BatchOptions
from saccade.batch.outputs import ARRAY_EXTENSIONS, ArrayOutput, open_container, read_names
from saccade.batch.run import Entry, RunFiles, RunSummary, read_entries, table_rows
from saccade.batch.tables import TABLE_EXTENSIONS, atomic_path, write_json, write_table
from saccade.errors import ConfigError

__all__ = ["merge_shards"]

SHARD_NAME = re.compile(r"(?P<stem>.+)\.shard(?P<index>\d+)of(?P<count>\d+)(?P<suffix>\.[^.]+)")


@dataclass(frozen=True)
class Shards:
    """A complete set of shard outputs; ``paths[i]`` belongs to shard ``i + 1`` and a folder stands for itself."""

    base: Path
    paths: list[Path]

    def files(self, out: Path) -> list[RunFiles]:
        """Return manifest and journal names of every shard of ``out``."""
        count = len(self.paths)
        return [RunFiles.of(out, BatchOptions(shard=f"{i}/{count}")) for i in range(1, count + 1)]


def merge_shards(
    inputs: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    writers: Mapping[str, Callable[[Mapping[str, Entry], Path], None]] | None = None,
) -> RunSummary:
    """Unite the outputs of all shards of one run.

    Args:
        inputs: The name that the unsharded output would have (``predictions.csv``, ``features.h5``, ``overlays/``), or
            all shard files of it. Tables, arrays and folders of per-item files are understood.
        out: United output; ``None`` means the unsharded name.
        writers: By command, what writes other outputs, from the united entries of the journals.

    Returns:
        The summary of the united run.

    Raises:
        ConfigError: If shards are missing, unfinished, or come from runs with different settings.
    """
    typed = [Path(inputs)] if isinstance(inputs, str | Path) else [Path(entry) for entry in inputs]
    shards = find_shards(typed)
    target = shards.base if out is None else Path(out)
    files = shards.files(shards.base)
    manifests = [read_manifest(file.manifest) for file in files]
    if all(manifest is None for manifest in manifests) and shards.base.suffix.lower() in ARRAY_EXTENSIONS:
        # A second array of a run, such as --logits: its items are listed beside the run's main output.
        names = merge_arrays(shards.paths, target, [])
        return RunSummary("done", str(target), len(names), len(names), 0, 0, 0.0, str(target))
    settings = check_manifests(manifests, [file.manifest for file in files])
    journals = [read_entries(file.journal) for file in files]
    entries = dict(sorted((key, entry) for journal in journals for key, entry in journal.items()))
    writer = (writers or {}).get(settings["command"])
    if writer is not None:
        writer(entries, target)
    elif target.suffix.lower() in TABLE_EXTENSIONS:
        rows, columns = table_rows(entries)
        write_table(target, rows, columns)
    elif target.suffix.lower() in ARRAY_EXTENSIONS:
        merge_arrays(shards.paths, target, [done_ids(journal) for journal in journals])
    status = [entry["status"] for entry in entries.values()]
    merged = RunFiles.of(target, BatchOptions())
    with atomic_path(merged.journal) as temporary:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries.values()]
        temporary.write_text("".join(lines), encoding="utf-8")
    done, failed = status.count("done"), status.count("failed")
    counts = {"total": len(entries), "done": done, "failed": failed}
    write_json(merged.manifest, settings | {"shard": None, "counts": counts})
    return RunSummary("done", str(target), len(entries), done, failed, 0, 0.0, str(merged.journal))


def find_shards(typed: Sequence[Path]) -> Shards:
    """Find all shards of one output, or say which are missing."""
    matches = [SHARD_NAME.fullmatch(path.name) for path in typed]
    if len(typed) == 1 and matches[0] is None:
        base = typed[0]
        pattern, folder = (
            ("run.shard*of*.json", base) if base.is_dir() else (f"{base.stem}.shard*of*{base.suffix}", base.parent)
        )
        # The journal of a table in .jsonl has the pattern, too, and one dot more.
        found = sorted(path for path in folder.glob(pattern) if SHARD_NAME.fullmatch(path.name))
        if not found:
            raise ConfigError(f"No shards of {base} found; looked for {pattern} in {folder}/.")
        shards = find_shards(found)
        return Shards(base, shards.paths)
    by_index: dict[int, Path] = {}
    sets = set()
    for path, match in zip(typed, matches, strict=True):
        if match is None:
            raise ConfigError(f"{path} is not the output of a shard; those are named like predictions.shard1of3.csv.")
        sets.add((path.parent, match["stem"], match["suffix"], int(match["count"])))
        by_index[int(match["index"])] = path
    if len(sets) != 1:
        raise ConfigError(f"These are shards of {len(sets)} different outputs: {', '.join(map(str, typed))}.")
    parent, stem, suffix, count = sets.pop()
    missing = [f"{stem}.shard{index}of{count}{suffix}" for index in range(1, count + 1) if index not in by_index]
    if missing:
        raise ConfigError(f"Shards are missing: {', '.join(missing)}. Run them first.")
    return Shards(parent / (stem + suffix), [by_index[index] for index in range(1, count + 1)])


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read ``run.json``; ``None`` if there is none."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_manifests(manifests: Sequence[dict[str, Any] | None], paths: Sequence[Path]) -> dict[str, Any]:
    """Return the common manifest of finished shards with equal settings."""
    checked = []
    for manifest, path in zip(manifests, paths, strict=True):
        if manifest is None:
            raise ConfigError(f"{path} is missing, so the shard's settings are unknown.")
        if manifest["status"] != "done":
            raise ConfigError(f"{path} says {manifest['status']!r}: run that shard again to finish it.")
        checked.append(manifest)
    first = checked[0]
    for manifest, path in zip(checked, paths, strict=True):
        if manifest["settings"] != first["settings"] or manifest["command"] != first["command"]:
            raise ConfigError(f"{path} and {paths[0]} come from runs with different settings.")
    return first | {"start": min(m["start"] for m in checked), "end": max(m["end"] for m in checked)}


def merge_arrays(paths: Sequence[Path], target: Path, ids: Sequence[Sequence[str]]) -> list[str]:
    """Unite array files through one journal and return the sorted ids."""
    output: ArrayOutput | None = None
    names: list[str] = []
    for index, path in enumerate(paths):
        if path.suffix.lower() == ".npy":
            if not ids:
                raise ConfigError(
                    f"{path} has no run.json beside it, so its rows have no names; merge the main output."
                )
            output = output or fresh(ArrayOutput(target, dataset="features"))
            names += append_all(output, np.load(path, mmap_mode="r"), ids[index])
            continue
        with open_container(path, "r") as container:
            dataset = next(name for name in container if name != "paths")
            output = output or fresh(ArrayOutput(target, dataset=dataset, attributes=dict(container.attrs)))
            names += append_all(output, container[dataset], read_names(container))
    if output is not None:
        output.finish(sorted(names))
    return sorted(names)


def fresh(output: ArrayOutput) -> ArrayOutput:
    """Return the output without what an interrupted merge left."""
    output.part.unlink(missing_ok=True)
    return output


def append_all(output: ArrayOutput, rows: Any, names: Sequence[str]) -> list[str]:  # noqa: ANN401 - any array
    """Append the rows of one shard and return their names."""
    if rows.shape[0] != len(names):
        raise ConfigError(f"A shard of {output.path.name} has {rows.shape[0]} rows for {len(names)} items.")
    for index, name in enumerate(names):
        output.append(name, np.asarray(rows[index]))
    return list(names)


def done_ids(entries: dict[str, Entry]) -> list[str]:
    """Return the sorted ids of finished items."""
    return sorted(key for key, entry in entries.items() if entry["status"] == "done")
