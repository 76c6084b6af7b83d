"""A golden case: configuration, tensors of the official implementation, tolerance, and the comparison with ours.

A folder of golden data holds ``manifest.json`` with one row per case (``id`` AREA/CASE, ``runner``, ``file``,
``tolerance``), per area an ``index.json`` with configurations and notes, and the files. Tensors are named ``input.*``,
``state.*`` (official state-dict keys), ``output.*`` and ``grad.*`` (of what the gradient is taken).
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).resolve().parent / "data"
EMPTY_LSE = -1e30  # stands for -inf in stored log-sum-exps


def golden_dir() -> Path:
    """Folder in force: SACCADE_GOLDEN_DIR, or the copy kept beside this file."""
    return Path(os.environ.get("SACCADE_GOLDEN_DIR") or DATA)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the parsed manifest; raise if it has no row, a row without the needed words, or an id twice."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    rows = manifest["cases"]
    ids = [row["id"] for row in rows]
    if not rows or len(set(ids)) != len(ids) or any({"runner", "file", "tolerance"} - row.keys() for row in rows):
        raise ValueError(f"{path} needs at least one case, each with a unique id, runner, file and tolerance.")
    return manifest


def load_cases(folder: Path) -> list["Case"]:
    """Return the cases of a folder in the order of its manifest."""
    return [Case(row["id"], row, folder) for row in read_manifest(folder)["cases"]]


def is_entry_of(row: dict[str, Any], key: str, entry: Any) -> bool:
    """Whether an entry of an area's index, found under ``key``, describes a row; each area spells it another way."""
    if not isinstance(entry, dict):
        return False
    names = {Path(row["file"]).name, Path(row["file"]).stem, row["id"].partition("/")[2]}
    return bool(names & {key, *(str(entry.get(word)) for word in ("file", "case", "name", "logits"))})


def entries(index: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what may be case entries of an index, with their keys: its values, and the items of those."""
    for key, value in index.items():
        yield key, value
        if isinstance(value, list):
            yield from (("", item) for item in value)
        elif isinstance(value, dict):
            yield from value.items()


@dataclass
class Case:
    """One row of the manifest.

    Args:
        id: ``AREA/CASE``.
        row: The row as it stands.
        folder: Folder of the manifest.
    """

    id: str
    row: dict[str, Any]
    folder: Path
    compared: set[str] = field(default_factory=set)

    @property
    def area(self) -> str:
        """First part of the id; also the folder with the area's index."""
        return self.id.partition("/")[0]

    @property
    def path(self) -> Path:
        """The file that the row names, a safetensors or JSON file."""
        return self.folder / self.row["file"]

    @cached_property
    def entry(self) -> dict[str, Any]:
        """What the area's ``index.json`` says about this case, whatever that index looks like."""
        path = self.folder / self.area / "index.json"
        for key, entry in entries(json.loads(path.read_text(encoding="utf-8"))):
            if is_entry_of(self.row, key, entry):
                return entry
        raise LookupError(f"{path} has no entry for {self.id}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The entry's ``config``, or the entry itself where the index has no such level."""
        return self.entry.get("config", self.entry)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file; none if it is a JSON file."""
        return load_file(self.path) if self.path.suffix == ".safetensors" else {}

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors named ``PREFIX.*`` without the prefix."""
        start = prefix + "."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}

    def document(self) -> Any:
        """Return the parsed JSON file of the row: its ``json``, that of its entry in the index, or its ``file``."""
        name = self.row.get("json")
        if name is None:
            name = self.row["file"] if self.path.suffix == ".json" else f"{self.area}/{self.entry['json']}"
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def loss(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return the scalar whose gradients the attention area stores.

        ``sum_t cos(0.37 t + 0.11) y[t]`` over the flat index t of each output that the entry's ``loss_over`` names.
        """
        total = torch.zeros((), dtype=torch.float64)
        for name in self.entry["loss_over"]:
            flat = outputs[f"output.{name}"].double().flatten()
            total = total + (torch.cos(0.37 * torch.arange(flat.numel(), dtype=torch.float64) + 0.11) * flat).sum()
        return total

    def gradients(self, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``grad.NAME`` of :meth:`loss` for each of ``inputs``, e.g. ``{"input.q": query}``."""
        grads = torch.autograd.grad(self.loss(outputs), list(inputs.values()))
        return {f"grad.{name}": grad for name, grad in zip(inputs, grads, strict=True)}

    def expected(self) -> list[str]:
        """Return the names of the tensors to be reproduced: outputs and gradients, also those of a numbered part."""
        split = {name: name.split(".")[:2] for name in self.tensors}
        return [n for n, (head, *more) in split.items() if is_result(head) or (is_result(*more) and is_part(head))]

    def unchecked(self) -> list[str]:
        """Return the names of expected tensors that nothing was compared with."""
        return [name for name in self.expected() if name not in self.compared]

    def limit(self, name: str, expected: Tensor) -> Tensor:
        """Return the largest allowed difference of each element of an expected tensor.

        ``atol + rtol * max|expected|``; in areas whose tolerance is not split into ``out`` and ``grad``, element-wise.
        """
        tolerance = self.row["tolerance"]
        is_gradient = "grad" in name.split(".")[:2]
        if "out" in tolerance:
            tolerance = tolerance["grad" if is_gradient else "out"]
        elif is_gradient:
            tolerance = self.entry.get("grad_tolerance", tolerance)
        size = expected.abs()
        if tolerance.get("per") == "max":
            finite = size[size < -EMPTY_LSE]
            size = finite.max().expand_as(size) if finite.numel() else torch.zeros_like(size)
        return tolerance["atol"] + tolerance["rtol"] * size

    def compare(self, got: dict[str, Tensor]) -> None:
        """Compare tensors with those stored under the same names; integers must be equal.

        Raises:
            AssertionError: Names every tensor that differs, by how much and where.
        """
        failures = [message for name, tensor in got.items() if (message := self.difference(name, tensor))]
        self.compared |= got.keys()
        assert not failures, f"{self.id}: " + "; ".join(failures)

    def difference(self, name: str, got: Tensor) -> str:
        """Say how a tensor differs from the stored one, or return an empty string."""
        expected = self.tensors[name]
        if got.shape != expected.shape:
            return f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        if not expected.is_floating_point():
            wrong = int((got != expected).sum())
            return f"{name} differs in {wrong} of {expected.numel()} integers" if wrong else ""
        ours, theirs = (t.detach().double().clamp(min=EMPTY_LSE) for t in (got, expected))
        both_nan = ours.isnan() & theirs.isnan()  # NaN stands for "not defined"
        excess = (ours - theirs).abs() - self.limit(name, theirs.nan_to_num())
        wrong = ~(excess <= 0) & ~both_nan & (ours != theirs)
        if not wrong.any():
            return ""
        at = tuple(wrong.nonzero()[0].tolist())
        first = f"{float(ours[at]):.8g} for {float(theirs[at]):.8g} at {at}"
        return f"{name} differs in {int(wrong.sum())} of {expected.numel()} elements, e.g. {first}"


def is_result(word: str = "") -> bool:
    """Whether a part of a tensor's name marks it as something to reproduce."""
    return word in ("output", "grad")


def is_part(word: str) -> bool:
    """Whether a name's first part numbers one of several problems in a file, e.g. ``case0``."""
    return word not in ("input", "state")
