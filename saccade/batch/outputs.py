"""Arrays with one row per item, collected in a crash-proof journal and completed into HDF5, zarr or npy."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from saccade.batch.tables import atomic_path, remove
from saccade.errors import ConfigError, ShapeError, require

__all__ = ["ARRAY_EXTENSIONS", "ArrayOutput"]

ARRAY_EXTENSIONS = (".h5", ".hdf5", ".npy", ".zarr")
BLOCK_BYTES = 8 << 20  # rows are copied from the journal to the final file in pieces of this size
DIGEST_BYTES = 16


class ArrayOutput:
    """An array file with one row per finished item, in order of item id.

    While the run lasts, rows are appended to ``NAME.part``, each behind a digest of its item's id, so that the journal
    explains itself after a SIGKILL at any point. HDF5 and zarr files hold the array under ``dataset`` and the item ids
    under ``paths``; an ``.npy`` file holds the array alone, its rows in the order of ``items.jsonl``.

    Args:
        path: Final file; the extension chooses the format.
        dataset: Name of the array inside HDF5 and zarr files.
        attributes: Plain values stored beside it.

    Raises:
        ConfigError: If the extension is none of ``ARRAY_EXTENSIONS``.
        MissingDependencyError: If zarr is asked for and not installed.
    """

    def __init__(self, path: Path, *, dataset: str, attributes: Mapping[str, str | int | float] | None = None) -> None:
        if path.suffix.lower() not in ARRAY_EXTENSIONS:
            raise ConfigError(f"Array file {path.name!r} must end in one of {' '.join(ARRAY_EXTENSIONS)}.")
        if path.suffix.lower() == ".zarr":
            require("zarr", extra="zarr", purpose="Writing .zarr arrays")
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.dataset = dataset
        self.attributes = dict(attributes or {})
        self.stream: BinaryIO | None = None
        self.record: np.dtype[Any] | None = None

    def resume(self, ids: Sequence[str]) -> set[str]:
        """Open the journal of an earlier run and return the ids whose rows are safe.

        Args:
            ids: Sorted ids that the earlier run recorded as done.
        """
        if not self.part.exists() and self.path.exists():
            self.reopen(ids)
        records = self.records()
        if records is None:
            self.part.unlink(missing_ok=True)
            return set()
        with self.part.open("r+b") as stream:  # a row cut off by a kill must not shift those behind it
            stream.truncate(self.header_size() + records.nbytes)
        present = {bytes(digest) for digest in records["id"]}
        return {identifier for identifier in ids if digest_of(identifier) in present}

    def discard(self) -> None:
        """Remove what an earlier run left."""
        self.part.unlink(missing_ok=True)
        remove(self.path)

    def append(self, identifier: str, row: NDArray[Any]) -> None:
        """Append one row; the caller records the item as done afterwards.

        Raises:
            ShapeError: If its shape or dtype differs from the rows before.
        """
        if self.record is None:
            self.record = record_type(row.shape, row.dtype)
        if self.record["row"] != np.dtype((row.dtype, row.shape)):
            raise ShapeError(f"Rows of {self.path.name} are {self.record['row']}, got {row.dtype} {row.shape}.")
        if self.stream is None:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.stream = self.part.open("ab")
            if self.stream.tell() == 0:
                header = json.dumps({"shape": row.shape, "dtype": row.dtype.str}) + "\n"
                self.stream.write(header.encode())
        self.stream.write(digest_of(identifier) + np.ascontiguousarray(row).tobytes())

    def flush(self) -> None:
        """Hand appended rows to the operating system, where they survive the end of this process."""
        if self.stream is not None:
            self.stream.flush()

    def close(self) -> None:
        """Close the journal; it stays for a later run to go on with."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def finish(self, ids: Sequence[str]) -> None:
        """Write the final file and remove the journal.

        Args:
            ids: Sorted ids of all finished items.
        """
        self.close()
        records = self.records()
        if records is None:  # nothing succeeded; the file still says that the run is complete
            self.part.unlink(missing_ok=True)
            self.write(np.zeros((0, 0), np.float32), [], [])
            return
        rows = {bytes(digest): index for index, digest in enumerate(records["id"])}  # the last row of an id counts
        self.write(records["row"], [rows[digest_of(identifier)] for identifier in ids], ids)
        self.part.unlink()

    def write(self, rows: NDArray[Any], order: Sequence[int], ids: Sequence[str]) -> None:
        """Write ``rows[order]`` in pieces, so that memory does not grow with the number of items."""
        shape = (len(order), *rows.shape[1:])
        step = max(1, BLOCK_BYTES // max(1, rows.itemsize * int(np.prod(rows.shape[1:]))))
        with atomic_path(self.path) as temporary:
            if self.path.suffix.lower() == ".npy":
                array = np.lib.format.open_memmap(temporary, mode="w+", dtype=rows.dtype, shape=shape)
                for start in range(0, len(order), step):
                    array[start : start + step] = rows[order[start : start + step]]
                array.flush()
                return
            with open_container(temporary, "w") as container:
                chunks = (min(step, len(order)), *shape[1:]) if order else None
                array = create_array(container, self.dataset, shape=shape, dtype=rows.dtype, chunks=chunks)
                for start in range(0, len(order), step):
                    array[start : start + step] = rows[order[start : start + step]]
                names = create_array(container, "paths", shape=(len(ids),), dtype=str, chunks=None)
                names[:] = np.asarray(ids, dtype=object)
                container.attrs.update(self.attributes | {"dtype": str(rows.dtype)})

    def reopen(self, ids: Sequence[str]) -> None:
        """Turn a finished file back into a journal, so that items can be added to it."""
        if self.path.suffix.lower() == ".npy":
            rows, names = np.load(self.path, mmap_mode="r"), list(ids)
            self.copy_back(rows, names)
            return
        with open_container(self.path, "r") as container:
            self.copy_back(container[self.dataset], read_names(container))

    def copy_back(self, rows: Any, names: Sequence[str]) -> None:  # noqa: ANN401 - h5py, zarr or numpy array
        """Write the rows of a finished file into a new journal, atomically."""
        if rows.shape[0] != len(names):
            raise ConfigError(f"{self.path} does not belong to its items.jsonl. Pass --overwrite to start again.")
        temporary = self.part.with_name(self.part.name + ".tmp")
        self.part, final = temporary, self.part
        for index, name in enumerate(names):
            self.append(name, np.asarray(rows[index]))
        self.close()
        self.part = final
        if temporary.exists():
            os.replace(temporary, final)  # noqa: PTH105 - the atomic rename is the point

    def records(self) -> NDArray[Any] | None:
        """Map the complete records of the journal; ``None`` if there are none."""
        try:
            with self.part.open("rb") as stream:
                header = json.loads(stream.readline())
                start = stream.tell()
        except (OSError, ValueError):
            return None
        self.record = record_type(tuple(header["shape"]), np.dtype(header["dtype"]))
        count = (self.part.stat().st_size - start) // self.record.itemsize
        if count == 0:
            return None
        return np.memmap(self.part, dtype=self.record, mode="r", offset=start, shape=(count,))

    def header_size(self) -> int:
        """Return the size of the journal's first line in bytes."""
        with self.part.open("rb") as stream:
            return len(stream.readline())


def digest_of(identifier: str) -> bytes:
    """Return the key of an item in a journal."""
    return hashlib.blake2b(identifier.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def record_type(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of one journal record."""
    return np.dtype([("id", np.dtype(f"V{DIGEST_BYTES}")), ("row", dtype, shape)])


@contextmanager
def open_container(path: Path, mode: Literal["r", "w"]) -> Iterator[Any]:
    """Open an HDF5 file or a zarr group; what is used of both has the same names."""
    if path.suffix.lower() == ".zarr":
        zarr = require("zarr", extra="zarr", purpose="Reading and writing .zarr arrays")
        with warnings.catch_warnings():
            # zarr warns that its own string type may change; only the item ids are stored in it.
            warnings.simplefilter("ignore")
            yield zarr.open_group(path, mode=mode)
    else:
        import h5py

        with h5py.File(path, mode) as file:
            yield file


def create_array(container: Any, name: str, *, shape: tuple[int, ...], dtype: Any, chunks: Any) -> Any:  # noqa: ANN401
    """Create an array of numbers, or of strings (``dtype=str``), in an HDF5 file or a zarr group."""
    if hasattr(container, "create_array"):
        return container.create_array(name, shape=shape, dtype=dtype, chunks=chunks or "auto")
    import h5py

    kind = h5py.string_dtype() if dtype is str else dtype
    return container.create_dataset(name, shape=shape, dtype=kind, chunks=chunks)


def read_names(container: Any) -> list[str]:  # noqa: ANN401 - h5py.File or a zarr group
    """Return the item ids stored beside an array."""
    return [name.decode() if isinstance(name, bytes) else str(name) for name in container["paths"][:]]
