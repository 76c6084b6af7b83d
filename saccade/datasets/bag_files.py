"""Bag files: features and coordinates of a slide's tiles, ours, CLAM's, TRIDENT's, ACMIL's and others'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from saccade import __version__
from saccade.batch.tables import atomic_path
from saccade.errors import ConfigError, DataError

__all__ = ["Bag", "find_bags", "load_bag", "load_bags", "save_bag", "save_clam", "save_trident"]

EXTENSIONS = (".h5", ".hdf5", ".pt", ".npy", ".npz", ".zarr")
MOST_BYTES = 64 << 30  # of one array in a file: more is a damaged or hostile header
ROWS_PER_CHUNK = 1024
Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Bag:
    """The tiles of one slide.

    Args:
        features: ``(N, D)``, float16 or float32.
        coords: ``(N, 2)`` int64, x and y of the top-left corners in level-0 pixels; ``None`` if the file has none.
        attributes: What the file says about them.
        label: Class index, where the file has one (ACMIL).
    """

    features: NDArray[Any]
    coords: NDArray[np.int64] | None = None
    attributes: Attributes = field(default_factory=dict)
    label: int | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 2:
            raise DataError(f"features must be (N, D), got {self.features.shape}.", reason="bad_bag")
        if self.coords is not None and self.coords.shape != (len(self.features), 2):
            raise DataError(
                f"coords must be ({len(self.features)}, 2) as there are features, got {self.coords.shape}.",
                reason="bad_bag",
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def tile_size_level0(self) -> float | None:
        """Side of a tile in level-0 pixels, if the file says so in one of the known ways."""
        for name in ("tile_size_level0", "patch_size_level0"):
            if name in self.attributes:
                return float(self.attributes[name])
        if "patch_size" in self.attributes and "patch_level" in self.attributes:
            return float(self.attributes["patch_size"]) * float(self.attributes.get("downsample", 1.0))
        return None


def save_bag(path: str | Path, bag: Bag) -> None:
    """Write a bag as HDF5 that TRIDENT's and CLAM's readers open as well; the file appears complete or not at all.

    ``features`` ``(N, D)`` and ``coords`` ``(N, 2)`` int64; attributes on the file and on both arrays.

    Args:
        path: ``*.h5``.
        bag: With coordinates or without.
    """
    count, width = bag.features.shape
    attributes = {**bag.attributes, "saccade_version": __version__, "complete": 1}
    with atomic_path(Path(path)) as temporary, h5py.File(temporary, "w") as file:
        chunks = (max(1, min(count, ROWS_PER_CHUNK)), max(1, width))
        arrays = [
            file.create_dataset("features", data=bag.features, chunks=chunks, maxshape=(None, max(1, width)))
            if width
            else file.create_dataset("features", data=bag.features)
        ]
        if bag.coords is not None:
            arrays.append(file.create_dataset("coords", data=bag.coords, chunks=(chunks[0], 2), maxshape=(None, 2)))
        for place in (file, *arrays):
            for name, value in attributes.items():
                place.attrs[name] = value


def save_clam(folder: str | Path, slide_id: str, bag: Bag) -> None:
    """Write a bag as CLAM does: ``h5_files/ID.h5`` and ``pt_files/ID.pt``, float32.

    Args:
        folder: CLAM's feature folder.
        slide_id: Name of the files.
        bag: With coordinates.
    """
    features = np.ascontiguousarray(bag.features, np.float32)
    with atomic_path(Path(folder) / "h5_files" / f"{slide_id}.h5") as temporary, h5py.File(temporary, "w") as file:
        rows = max(1, min(32, len(bag)))
        width = max(1, features.shape[1])
        file.create_dataset("features", data=features, chunks=(rows, width), maxshape=(None, width))
        if bag.coords is not None:
            coords = bag.coords.astype(np.int32)
            file.create_dataset("coords", data=coords, chunks=(rows, 2), maxshape=(None, 2))
    with atomic_path(Path(folder) / "pt_files" / f"{slide_id}.pt") as temporary:
        torch.save(torch.from_numpy(features), temporary)


def save_trident(folder: str | Path, slide_id: str, bag: Bag, encoder: str) -> None:
    """Write a bag as TRIDENT does: ``features_ENCODER/ID.h5``, float32, chunks of one row.

    Args:
        folder: TRIDENT's ``<mag>x_<size>px_<overlap>px_overlap`` folder.
        slide_id: Name of the file.
        bag: With coordinates; its attributes go on ``coords``.
        encoder: Name of the encoder.
    """
    target = Path(folder) / f"features_{encoder}"
    names = {"name": slide_id, "savetodir": str(target)}
    features = np.ascontiguousarray(bag.features, np.float32)
    width = max(1, features.shape[1])
    with atomic_path(target / f"{slide_id}.h5") as temporary, h5py.File(temporary, "w") as file:
        array = file.create_dataset("features", data=features, chunks=(1, width), maxshape=(None, width))
        array.attrs.update({"encoder": encoder, **names})
        if bag.coords is not None:
            array = file.create_dataset("coords", data=bag.coords, chunks=(1, 2), maxshape=(None, 2))
            array.attrs.update({**bag.attributes, **names})


def load_bag(path: str | Path) -> Bag:
    """Read a bag from a file of any known layout.

    - ours, CLAM's ``h5_files`` and TRIDENT's: ``features`` and ``coords``; a file with ``coords`` alone (patches) is an
      error that says so; an empty slide may hold ``(0,)``;
    - ``.pt`` of CLAM, slideflow and others: one tensor, read with ``weights_only=True``; slideflow's
      ``ID.index.npz`` beside it brings coordinates;
    - ``.npy`` of torchmil: features; ``.npz`` with ``features`` (and ``coords``);
    - ``.zarr`` with the arrays of ours.

    Args:
        path: The file.

    Raises:
        ConfigError: If it does not exist or has another extension.
        DataError: If it is damaged, too large to be true, or holds no features; ``reason="bad_bag"``.
    """
    file = Path(path)
    if not file.exists():
        raise ConfigError(f"Bag {str(path)!r} does not exist.")
    readers = {".pt": read_torch, ".npy": read_numpy, ".npz": read_numpy, ".zarr": read_zarr}
    if file.suffix not in EXTENSIONS:
        raise ConfigError(f"Bag {file.name!r} must end in one of {' '.join(EXTENSIONS)}.")
    try:
        return readers.get(file.suffix, read_hdf5)(file)
    except DataError as error:
        raise DataError(f"{file}: {error}", reason=error.reason) from error
    except Exception as error:  # h5py, zipfile, pickle and NumPy raise their own kinds on damaged files
        raise DataError(
            f"{file} cannot be read as a bag ({type(error).__name__}: {error}).", reason="bad_bag"
        ) from error


def read_hdf5(path: Path) -> Bag:
    """Read ours, CLAM's or TRIDENT's file."""
    with h5py.File(path, "r") as file:
        if "features" not in file:
            has = (
                "coordinates alone: it is a patch file, features are computed from it"
                if "coords" in file
                else "no features"
            )
            raise DataError(f"it holds {has}.", reason="bad_bag")
        return read_group(file, "features")


def read_group(group: h5py.Group, name: str) -> Bag:
    """Read features and coordinates of a file or of a group in it."""
    features = read_array(group, name)
    coords = read_array(group, "coords") if "coords" in group else None
    attributes = plain(group.attrs) | plain(group[name].attrs)
    if coords is not None:
        attributes |= plain(group["coords"].attrs)
    if features.ndim == 1 and features.size == 0:  # TRIDENT's slide without tissue
        features = features.reshape(0, 0)
    label = attributes.get("label")
    return Bag(
        features,
        None if coords is None else coords.reshape(-1, 2).astype(np.int64),
        attributes,
        int(label) if isinstance(label, int | float) else None,
    )


def read_array(group: h5py.Group, name: str) -> NDArray[Any]:
    """Read an array that lies in this very file, and whose size is credible."""
    link = group.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
        raise DataError(f"{name!r} is a link to another place, which is not followed.", reason="bad_bag")
    array = group[name]
    if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "fiu":
        raise DataError(f"{name!r} is no array of numbers.", reason="bad_bag")
    if array.external or array.is_virtual:
        raise DataError(f"{name!r} has its numbers in other files, which are not read.", reason="bad_bag")
    if array.nbytes > MOST_BYTES:
        raise DataError(f"{name!r} claims {array.shape}, {array.nbytes >> 30} GiB.", reason="bad_bag")
    values: NDArray[Any] = array[()]
    if values.dtype.kind == "f" and values.dtype.itemsize not in (2, 4):
        values = values.astype(np.float32)
    return values


def plain(attributes: Any) -> dict[str, Any]:  # noqa: ANN401 - h5py is untyped
    """Return attributes that are single plain values; a pair of equal downsamples counts as one."""
    result: dict[str, Any] = {}
    for name, value in attributes.items():
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str | int | float | bool) and value != "None":
            result[str(name)] = value
    return result


def read_torch(path: Path) -> Bag:
    """Read a tensor of CLAM or slideflow, with slideflow's index if it is there."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        content = content.get("features")
    if not isinstance(content, torch.Tensor):
        raise DataError("it holds no tensor of features.", reason="bad_bag")
    index = path.with_name(f"{path.stem}.index.npz")
    coords = None
    if index.exists():
        with np.load(index, allow_pickle=False) as arrays:
            coords = arrays["arr_0"][:, :2].astype(np.int64)
    features = content.float() if content.dtype not in (torch.float16, torch.float32) else content
    return Bag(features.numpy(), coords)


def read_numpy(path: Path) -> Bag:
    """Read an array of torchmil, or a file with several arrays."""
    with path.open("rb") as stream:
        content = np.load(stream, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return Bag(content.astype(content.dtype if content.dtype in (np.float16, np.float32) else np.float32))
        if "features" not in content:
            raise DataError(f"it holds {', '.join(content.files)}, no 'features'.", reason="bad_bag")
        coords = content["coords"].astype(np.int64) if "coords" in content else None
        return Bag(content["features"], coords)


def read_zarr(path: Path) -> Bag:
    """Read a zarr group with the arrays of ours."""
    import zarr

    group = zarr.open_group(path, mode="r")
    coords = np.asarray(group["coords"], np.int64) if "coords" in group else None
    return Bag(np.asarray(group["features"]), coords, plain(group.attrs))


def load_bags(path: str | Path) -> dict[str, Bag]:
    """Read ACMIL's one HDF5 file of a data set: a group for each slide, with ``feat``, ``coords`` and a label.

    Raises:
        DataError: If a group holds no features.
    """
    with h5py.File(path, "r") as file:
        return {name: read_group(group, "feat") for name, group in file.items() if isinstance(group, h5py.Group)}


def find_bags(folder: str | Path) -> dict[str, Path]:
    """Return the bag files below a folder by slide id, which is the file's stem.

    Args:
        folder: Searched recursively; run folders of CLAM are read through their ``pt_files`` or ``h5_files``.

    Raises:
        ConfigError: If there are none, or two files have one id.
    """
    root = Path(folder)
    paths = sorted(p for p in root.rglob("*") if p.suffix in EXTENSIONS and not p.name.startswith("."))
    paths = [p for p in paths if not p.name.endswith(".index.npz") and not any(q.suffix == ".zarr" for q in p.parents)]
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.stem, path)
        if other is not path and {other.parent.name, path.parent.name} != {"h5_files", "pt_files"}:
            raise ConfigError(f"{other} and {path} are both bags of slide {path.stem!r}; give one folder of features.")
    if not found:
        raise ConfigError(f"No bags below {folder}: looked for files ending in {' '.join(EXTENSIONS)}.")
    return found
