"""``Run``: items in, one journal, complete files out, whatever happens in between.

The journal ``items.jsonl`` is the truth: one line per item, appended and flushed as soon as the item is finished; the
last line of an id counts. Tables and arrays are derived from it when the run ends, under a temporary name that is
renamed into place, so a file that exists is complete. A second run with equal settings goes on where the first stopped.
"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from numpy.typing import NDArray

from saccade import __version__
from saccade.batch.environment import versions
from saccade.batch.items import Item
from saccade.batch.options import BatchOptions
from saccade.batch.outputs import ArrayOutput
from saccade.batch.progress import Reporter
from saccade.batch.tables import atomic_path, check_table_path, remove, write_json, write_table
from saccade.errors import ConfigError, DataError

__all__ = ["Run", "RunFiles", "RunSummary", "read_entries", "table_rows"]

Entry = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its manifest and its journal.

    Args:
        out: The output as the user named it.
        shard: ``""`` or ``"shard2of3"``.
        is_folder: Whether the output is a folder with files inside, rather than a file (or a zarr store).
    """

    out: Path
    shard: str
    is_folder: bool

    @classmethod
    def of(cls, out: str | Path, options: BatchOptions) -> RunFiles:
        """Derive the names from ``--out`` and ``--shard``."""
        path = Path(out)
        shard = f"shard{options.shard_index}of{options.shard_count}" if options.shard_count > 1 else ""
        exists_as_folder = path.is_dir() and path.suffix.lower() != ".zarr"
        return cls(path, shard, str(out).endswith("/") or exists_as_folder or not path.suffix)

    def beside(self, name: str) -> Path:
        """Return the path of ``run.json`` and the like: inside the folder, or beside the file."""
        stem, suffix = name.split(".", 1)
        parts = [stem, self.shard, suffix] if self.is_folder else [self.out.stem, self.shard, stem, suffix]
        parent = self.out if self.is_folder else self.out.parent
        return parent / ".".join(part for part in parts if part)

    def data(self, path: Path) -> Path:
        """Return the name of a data file of this shard, e.g. ``features.shard2of3.h5``."""
        return path.with_name(f"{path.stem}.{self.shard}{path.suffix}") if self.shard else path

    @property
    def manifest(self) -> Path:
        """``run.json``."""
        return self.beside("run.json")

    @property
    def journal(self) -> Path:
        """``items.jsonl``."""
        return self.beside("items.jsonl")


@dataclass(frozen=True)
class RunSummary:
    """What became of a run.

    Args:
        status: ``"done"``, or ``"planned"`` after a dry run.
        out: The output as the user named it.
        total: Items of this run (after limit and shard).
        done: Items finished, those of earlier runs included.
        failed: Items that failed.
        resumed: Items that an earlier run had finished.
        seconds: Duration of this run.
        details: The journal that lists every item.
    """

    status: str
    out: str
    total: int
    done: int
    failed: int
    resumed: int
    seconds: float
    details: str

    @property
    def exit_code(self) -> int:
        """0 all done, 1 everything failed, 3 some failed."""
        if self.failed == 0:
            return 0
        return 1 if self.done == 0 else 3


class Run:
    """One batch run; use it as a context manager around the work on ``run.pending``.

    Args:
        command: Name for the manifest and the screen, e.g. ``"classify"``.
        items: All items, from ``find_items``.
        out: Output file or folder as the user named it.
        settings: Everything that results depend on, plain JSON values. Two runs with different settings never mix.
        options: Device, limits, shard, resume and screen options.
        table: Table with one row per item, or ``None``.
        arrays: Array files with one row per finished item, by the name used in ``done``.
        title: What the header says beside the command, e.g. model and device.
        unit: Plural noun of the items.

    Raises:
        ConfigError: If an earlier run in the same place had other settings, or a file there is not saccade's; nothing
            has been touched then.

    Example:
        >>> with Run("count", items=items, out="counts.csv", settings={}, table=Path("counts.csv")) as run:
        ...     for item in run.pending:
        ...         run.done(item, row={"bytes": item.path.stat().st_size})
        >>> run.summary.exit_code
        0
    """

    def __init__(
        self,
        command: str,
        *,
        items: Sequence[Item],
        out: str | Path,
        settings: Mapping[str, Any],
        options: BatchOptions | None = None,
        table: Path | None = None,
        arrays: Mapping[str, ArrayOutput] | None = None,
        title: str = "",
        unit: str = "images",
    ) -> None:
        self.command = command
        self.options = options or BatchOptions()
        self.out = out
        self.files = RunFiles.of(out, self.options)
        self.table = self.files.data(table) if table is not None else None
        self.arrays = dict(arrays or {})
        for array in self.arrays.values():
            array.path = self.files.data(array.path)
            array.part = array.path.with_name(array.path.name + ".part")
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.title = title
        self.unit = unit
        self.items = list(items)[: self.options.limit][self.options.shard_index - 1 :: self.options.shard_count]
        self.given = {item.id for item in items}
        if self.table is not None:
            check_table_path(self.table)
        self.entries = self.earlier_entries()
        self.finished = {key for key, entry in self.entries.items() if entry["status"] == "done"}
        self.resumed = len(self.finished & {item.id for item in self.items})
        self.stream: TextIO | None = None
        self.seconds = 0.0

    @property
    def pending(self) -> list[Item]:
        """Items still to do: new ones, and those that failed before."""
        return [item for item in self.items if item.id not in self.finished]

    @property
    def summary(self) -> RunSummary:
        """Counts of this run so far."""
        status = [self.entries[item.id]["status"] for item in self.items if item.id in self.entries]
        return RunSummary(
            status="planned" if self.options.dry_run else "done",
            out=str(self.out),
            total=len(self.items),
            done=status.count("done"),
            failed=0 if self.options.dry_run else status.count("failed"),
            resumed=self.resumed,
            seconds=round(self.seconds, 1),
            details=str(self.files.journal),
        )

    def earlier_entries(self) -> dict[str, Entry]:
        """Return the journal of an earlier run in the same place, after checking that it may be continued."""
        owned = [self.table] if self.table is not None else []
        owned += [array.path for array in self.arrays.values()]
        if self.options.overwrite:
            return {}
        if not self.files.manifest.exists():
            foreign = next((path for path in owned if path.exists()), None)
            if foreign is not None:
                raise ConfigError(
                    f"{foreign} exists and no {self.files.manifest.name} says that saccade wrote it. "
                    "Choose another --out, or pass --overwrite to replace it."
                )
            return {}
        try:
            earlier = json.loads(self.files.manifest.read_text(encoding="utf-8"))
            before, command = earlier["settings"], earlier["command"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.files.manifest} is not a run manifest ({error}). Pass --overwrite.") from error
        changes = [
            f"{key}: {before.get(key)!r} -> {self.settings.get(key)!r}"
            for key in sorted({*before, *self.settings})
            if before.get(key) != self.settings.get(key)
        ]
        if command != self.command:
            changes.insert(0, f"command: {command!r} -> {self.command!r}")
        entries = read_entries(self.files.journal)
        if changes and entries:
            raise ConfigError(
                f"{self.files.manifest} belongs to a run with other settings ({'; '.join(changes)}). "
                "Choose another --out, or pass --overwrite to discard the earlier run."
            )
        return entries

    def __enter__(self) -> Self:
        options = self.options
        self.started = time.monotonic()
        self.start_time = now()
        self.reporter = Reporter(options.progress, unit=self.unit, log_file=options.log_file, color=options.color)
        self.announce()
        if options.dry_run:
            return self
        self.files.manifest.parent.mkdir(parents=True, exist_ok=True)
        if options.overwrite:
            for path in (self.files.journal, self.files.manifest, *([self.table] if self.table else [])):
                remove(path)
        for array in self.arrays.values():
            if options.overwrite:
                array.discard()
            else:
                self.finished &= array.resume(sorted(self.finished))
        self.write_manifest("running")
        self.compact()
        self.stream = self.files.journal.open("a", encoding="utf-8")
        self.reporter.start(len(self.pending))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self.started
        self.reporter.stop()
        if self.stream is not None:
            self.stream.close()
            for array in self.arrays.values():
                array.close()
            if kind is None:
                self.finish()
            else:
                self.write_manifest("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed", str(error))
                self.reporter.say(f"stopped: {self.counts()}   run again to continue")
        self.reporter.__exit__(kind, error, trace)

    def done(
        self,
        item: Item,
        *,
        seconds: float = 0.0,
        row: Mapping[str, Any] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        reason: str = "",
    ) -> None:
        """Record a finished item; it survives the end of this process from here on.

        Args:
            item: The item.
            seconds: Time spent on it.
            row: Its columns in the table, besides ``path``, ``status`` and ``error``.
            arrays: Its row in each array file.
            reason: A word about a result that is complete but empty, e.g. ``"no_tissue"``.
        """
        for name, value in (arrays or {}).items():
            self.arrays[name].append(item.id, value)
            self.arrays[name].flush()
        self.record(item, "done", seconds=seconds, reason=reason, row=dict(row) if row is not None else None)
        self.finished.add(item.id)

    def fail(self, item: Item, error: Exception, *, seconds: float = 0.0) -> None:
        """Record a failed item with the reason; the run goes on unless ``on_error`` is ``"stop"``.

        Raises:
            DataError: If ``on_error`` is ``"stop"``.
        """
        reason = error.reason if isinstance(error, DataError) else type(error).__name__
        message = " ".join(str(error).split()) or type(error).__name__
        self.record(item, "failed", seconds=seconds, reason=reason, error=message)
        self.reporter.fail(item.id, message)
        if self.options.on_error == "stop":
            raise DataError(f"{item.id} failed ({message}) and --on-error is stop.", reason=reason) from error

    def record(self, item: Item, status: str, *, seconds: float, reason: str, error: str = "", row: Any = None) -> None:  # noqa: ANN401
        """Append one line to the journal."""
        entry: Entry = {
            "id": item.id,
            "path": item.path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
            "status": status,
            "reason": reason,
            "seconds": round(seconds, 4),
            "error": error,
        }
        if row is not None:
            entry["row"] = row
        self.entries[item.id] = entry
        if self.stream is None:
            raise RuntimeError("Run.done and Run.fail work inside `with run:` only, and not in a dry run.")
        self.stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.stream.flush()
        self.reporter.advance()

    def finish(self) -> None:
        """Derive the complete files from the journal, then say so."""
        ids = sorted(key for key, entry in self.entries.items() if entry["status"] == "done")
        for array in self.arrays.values():
            array.finish(ids)
        if self.table is not None:
            rows, columns = table_rows(self.entries)
            write_table(self.table, rows, columns)
        self.compact()
        self.write_manifest("done")
        self.reporter.say(self.counts())

    def compact(self) -> None:
        """Rewrite the journal with one line per item, sorted; drops what a kill left unfinished."""
        kept = {k: e for k, e in self.entries.items() if e["status"] != "done" or k in self.finished}
        self.entries = dict(sorted(kept.items()))
        with atomic_path(self.files.journal) as temporary:
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.entries.values()]
            temporary.write_text("".join(lines), encoding="utf-8")

    def write_manifest(self, status: str, error: str = "") -> None:
        """Write ``run.json``."""
        summary = self.summary
        content = {
            "saccade_version": __version__,
            "command": self.command,
            "command_line": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": self.settings,
            "shard": self.options.shard,
            "start": self.start_time,
            "end": None if status == "running" else now(),
            "status": status,
            "counts": {"total": summary.total, "done": summary.done, "failed": summary.failed},
            "host": platform.node(),
            "device": self.options.device,
            "batch_size": self.options.batch_size,
            "versions": versions(),
        }
        write_json(self.files.manifest, content | ({"error": error} if error else {}))

    def announce(self) -> None:
        """Print the header."""
        parts = ["saccade " + __version__, self.command, self.title]
        self.reporter.say("  ".join(part for part in parts if part))
        target = self.table if self.table is not None and not self.files.is_folder else self.out
        line = f"input {len(self.given):,} {self.unit}  ->  {target}"
        if len(self.items) != len(self.given):
            line += f"   this run: {len(self.items):,}"
        if self.resumed:
            line += f"   resume: {self.resumed:,} already done"
        self.reporter.say(line)
        gone = len([key for key in self.entries if key not in self.given])
        if gone:
            self.reporter.say(f"{gone:,} items of the earlier run are not among the inputs now; their results are kept")
        if self.options.dry_run:
            self.reporter.say(f"dry run: {len(self.pending):,} {self.unit} would be processed; nothing is written")

    def counts(self) -> str:
        """Return the footer."""
        summary = self.summary
        speed = self.reporter.finished / max(self.seconds, 1e-9)
        given = {item.id for item in self.items}
        empty = Counter(e["reason"] for key, e in self.entries.items() if key in given and e["status"] == "done")
        words = "".join(f"  {reason} {count:,}" for reason, count in sorted(empty.items()) if reason)
        line = f"done {summary.done:,}{words}  failed {summary.failed:,}  in {self.seconds:.1f} s"
        return f"{line}  ({speed:.3g} {self.unit}/s)   details: {self.files.journal}"


def read_entries(journal: Path) -> dict[str, Entry]:
    """Read a journal; a last line cut off by a kill is dropped.

    Raises:
        ConfigError: If any other line cannot be read.
    """
    if not journal.exists():
        return {}
    entries: dict[str, Entry] = {}
    lines = journal.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut off by a kill
        try:
            entry = json.loads(line)
            entries[entry["id"]] = entry
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{journal}, line {number} is not a journal entry ({error}). Pass --overwrite."
            ) from error
    return entries


def table_rows(entries: Mapping[str, Entry]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of the table, sorted by id, and its columns: path, status, the values, error."""
    values = list(dict.fromkeys(name for entry in entries.values() for name in entry.get("row", ())))
    rows = [
        {"path": key, "status": entry["status"], **entry.get("row", {}), "error": entry["error"]}
        for key, entry in sorted(entries.items())
    ]
    return rows, ["path", "status", *values, "error"]


def now() -> str:
    """Return the local time with its offset, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
