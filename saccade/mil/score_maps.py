"""Numbers of tiles by name: attention of a bag, of branches or classes, logits of tiles; and the files they lie in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from saccade.batch import atomic_path
from saccade.datasets.bag_files import Bag, plain, read_array
from saccade.errors import ConfigError, DataError, suggest

__all__ = ["ScoreMaps", "load_scores", "save_scores"]


@dataclass(frozen=True)
class ScoreMaps:
    """What a model says of each tile of one slide.

    Args:
        maps: ``(N,)`` each, by name: ``attention`` (of the bag, sums to 1), ``branch 1`` ... or ``class NAME``
            (attention of one), ``logit NAME`` (of the tile itself, where the model classifies tiles).
        coords: ``(N, 2)`` int64, top-left corners in level-0 pixels.
        attributes: Of the bag, and ``weights``: what computed the maps.
    """

    maps: dict[str, NDArray[np.float64]]
    coords: NDArray[np.int64]
    attributes: dict[str, Any]

    @property
    def tile_size(self) -> tuple[float, float]:
        """Width and height of a tile in level-0 pixels.

        Raises:
            DataError: If the file does not say it, with the reason ``"no_tile_size"``.
        """
        side = Bag(np.empty((len(self.coords), 0)), None, self.attributes).tile_size_level0
        if side is None:
            raise DataError(
                "the bag does not say how large its tiles are (attribute tile_size_level0, patch_size_level0, or "
                "patch_size and patch_level)",
                reason="no_tile_size",
            )
        return side, float(self.attributes.get("tile_size_level0_y", side))

    def choose(self, class_name: str | None = None, branch: int | None = None) -> str:
        """Return the name of the map for a class, a branch (from 1), or of the bag if neither is given.

        Raises:
            ConfigError: If there is no such map; it says which there are.
        """
        if class_name is None and branch is None:
            return "attention"
        wanted = [f"class {class_name}", f"logit {class_name}"] if branch is None else [f"branch {branch}"]
        found = next((name for name in wanted if name in self.maps), None)
        if found is None:
            hint = suggest(wanted[0], self.maps)
            raise ConfigError(f"this model has no map for {wanted[0]!r}.{hint} It has: {', '.join(self.maps)}.")
        return found

    def prefixed(self, prefix: str) -> dict[str, NDArray[np.float64]]:
        """Return the maps whose name begins with a word."""
        return {name: values for name, values in self.maps.items() if name.startswith(prefix)}


def save_scores(
    path: Path,
    *,
    attention: NDArray[Any],
    branches: NDArray[Any],
    branch_names: list[str],
    bag: Bag,
    weights: str,
    logits: NDArray[Any] | None = None,
    logit_names: list[str] | None = None,
) -> None:
    """Write ``ID.h5``.

    Args:
        path: The file; it appears complete or not at all.
        attention: ``(N,)``, of the bag: ``bag_attention``.
        branches: ``(N, M)``: ``attention``.
        branch_names: M names.
        bag: Coordinates and attributes are copied.
        weights: What computed it.
        logits: ``(N, C)``, of tiles: ``instance_logits``.
        logit_names: C names.
    """
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("attention", data=np.ascontiguousarray(branches))
        file.create_dataset("bag_attention", data=attention)
        if logits is not None:
            file.create_dataset("instance_logits", data=logits)
        if bag.coords is not None:
            file.create_dataset("coords", data=bag.coords)
        attributes = {**bag.attributes, "weights_of_model": weights, "branch_names": json.dumps(branch_names)}
        for name, value in {**attributes, "logit_names": json.dumps(logit_names or [])}.items():
            file.attrs[name] = value


def load_scores(path: str | Path) -> ScoreMaps:
    """Read what ``saccade slides predict --attention`` or ``heatmap`` wrote.

    Args:
        path: ``ID.h5``.

    Raises:
        DataError: If it is damaged or has no coordinates; ``reason`` is ``"bad_scores"`` or ``"no_coords"``.
    """
    try:
        with h5py.File(path, "r") as file:
            attributes = plain(file.attrs)
            columns = {name: read_array(file, name) for name in ("bag_attention", "attention")}
            if "instance_logits" in file:
                columns["instance_logits"] = read_array(file, "instance_logits")
            coords = read_array(file, "coords").reshape(-1, 2).astype(np.int64) if "coords" in file else None
            branch_names, logit_names = (
                list(map(str, json.loads(attributes.pop(key, "[]")))) for key in ("branch_names", "logit_names")
            )
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} holds no attention of tiles ({error}).", reason="bad_scores") from error
    if coords is None:
        raise DataError(f"{path} has no coordinates: the bag had none, so nothing can be drawn.", reason="no_coords")
    maps = {"attention": columns["bag_attention"]}
    if len(branch_names) > 1:
        maps |= dict(zip(branch_names, columns["attention"].T, strict=False))
    if "instance_logits" in columns:
        maps |= dict(zip((f"logit {name}" for name in logit_names), columns["instance_logits"].T, strict=False))
    if any(len(values) != len(coords) for values in maps.values()):
        raise DataError(f"{path}: scores and coordinates differ in number.", reason="bad_scores")
    return ScoreMaps({name: np.asarray(v, np.float64) for name, v in maps.items()}, coords, attributes)
