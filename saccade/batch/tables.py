"""Tables and small files, written so that a file that exists is a file that is complete."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saccade.errors import ConfigError, require

__all__ = ["TABLE_EXTENSIONS", "atomic_path", "check_table_path", "remove", "write_json", "write_table"]

TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it into place if the block succeeds.

    The temporary name keeps the extension, which many writers look at. After an exception it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if path.is_dir():  # a folder (zarr) cannot be replaced in one step
            remove(path)
        os.replace(temporary, path)  # noqa: PTH105 - the atomic rename is the point
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write one JSON document atomically, indented, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_table_path(path: Path) -> None:
    """Raise early if a table of this name could not be written.

    Raises:
        ConfigError: If the extension is none of ``TABLE_EXTENSIONS``.
        MissingDependencyError: If Parquet is asked for without pyarrow.
    """
    if path.suffix.lower() not in TABLE_EXTENSIONS:
        raise ConfigError(f"Table {path.name!r} must end in one of {' '.join(TABLE_EXTENSIONS)}.")
    if path.suffix.lower() == ".parquet":
        require("pyarrow", extra="parquet", purpose="Writing .parquet tables")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as a table, atomically; the extension chooses the format.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` (a list of objects) or ``.parquet``.
        rows: Plain values by column name. A missing value is an empty cell, or null.
        columns: Column order; ``None`` takes it from the rows.

    Raises:
        ConfigError: If the extension is not known.
        MissingDependencyError: If Parquet is asked for without pyarrow.
    """
    check_table_path(path)
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else list(columns)
    kind = path.suffix.lower()
    with atomic_path(path) as temporary:
        if kind in (".csv", ".tsv"):
            with temporary.open("w", encoding="utf-8", newline="") as stream:
                delimiter = "," if kind == ".csv" else "\t"
                writer = csv.DictWriter(stream, names, restval="", delimiter=delimiter, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            return
        complete = [{name: row.get(name) for name in names} for row in rows]
        if kind == ".parquet":
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.table({name: [row[name] for row in complete] for name in names})
            pyarrow.parquet.write_table(table, temporary)
        elif kind == ".jsonl":
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in complete]
            temporary.write_text("".join(lines), encoding="utf-8")
        else:
            temporary.write_text(json.dumps(complete, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
