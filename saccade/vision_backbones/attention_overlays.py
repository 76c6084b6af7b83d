"""Batch maps of where a model looks: ``attend`` writes one picture per image file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from saccade import __version__
from saccade.batch import IMAGE_EXTENSIONS, ArrayOutput, BatchOptions, Item, Run, RunSummary, atomic_path
from saccade.datasets.images import read_image
from saccade.errors import ConfigError, DataError, suggest
from saccade.vision_backbones.inference import Session
from saccade.vision_backbones.loading import LoadedModel, ModelSource
from saccade.vision_backbones.map_methods import MapMethod, choose_method
from saccade.vision_backbones.overlay import Legend, draw_overlay, view_of
from saccade.vision_backbones.panel_overlay import draw_panels
from saccade.vision_backbones.places import CENTRE, locate

__all__ = ["attend"]

OF_A_PLACE = ("routes", "kernels")


def attend(
    inputs: str | Path | Sequence[str | Path],
    *,
    model: str | ModelSource,
    out: str | Path,
    method: str = "auto",
    layer: str | None = None,
    class_name: str | int | None = None,
    heads: str = "mean",
    at: tuple[float, float] | None = None,
    alpha: float = 0.5,
    maps: str | Path | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Draw where a model looks, over each photograph, as ``OUT/SAME/SUB-FOLDERS/NAME.png``.

    Methods, the first of the first three that fits the model being ``"auto"``:

    - ``"rollout"``: attention rollout, for vision transformers in which every layer attends to all patches.
    - ``"last-layer"``: the last attention of other models; what the class token attends to, or, without one, how much
      attention each position receives on average. Swin windows are put back in their places.
    - ``"cam"``: the logit that the classifier gives to each position, for models that classify the average of their
      last features (the class activation map, bias included); otherwise the first principal component of the features,
      then named ``eigencam``. No gradients.
    - ``"routes"``: which regions the region around one place reads under bi-level routing (BiFormer), and how much of
      its attention goes to each.
    - ``"kernels"``: the small and the large kernel that one place makes from context (OverLoCK), where their taps lie.

    The method used is in ``items.jsonl``, in the picture and in its PNG text, with the top class and its probability.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``; see ``saccade.batch.find_items``.
        model: Model name or checkpoint, or a ``ModelSource`` with weights and preprocessing.
        out: Folder for the pictures. Inside an input folder it is not searched for inputs.
        method: ``"auto"``, ``"rollout"``, ``"last-layer"``, ``"cam"``, ``"routes"`` or ``"kernels"``.
        layer: Module to read, by its name in ``model.named_modules()``: the last attention (or context mixing) in it,
            or with ``"cam"`` its output; ``None`` means the last.
        class_name: Class to map with ``"cam"``, by name or index; ``None`` means the top class of each image.
        heads: ``"mean"`` or ``"max"`` over attention heads (or groups of kernels), or the number of one.
        at: The place ``(x, y)`` for ``"routes"`` and ``"kernels"``: pixels of the upright photograph, as integers, or
            shares of its sides; ``None`` means the middle. An image whose model crop leaves it out fails.
        alpha: Opacity of the map, 0..1.
        maps: Array file for the maps as the method gives them, ``maps`` ``(N, gy, gx)`` float32 and ``paths``;
            ``(N, 2, gy, gx)``, small kernel first, of ``"kernels"``.
        options: Device, batches, resume, screen.

    Returns:
        Counts of the run.

    Raises:
        ConfigError: If inputs, model, method or options cannot be used, the method does not fit the model, or ``out``
            holds another run or the inputs themselves.
        CheckpointError: If weights do not fit.
        MissingResourceError: If device or weights are not on this machine.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha must be between 0 and 1, got {alpha}.")
    if at is not None and method not in OF_A_PLACE:
        raise ConfigError(f"a place (--at) is for the methods {' and '.join(OF_A_PLACE)}; got method {method!r}.")
    folder = Path(out)
    if folder.suffix.lower() in IMAGE_EXTENSIONS:
        raise ConfigError(f"out must be a folder, got {folder}; pictures are named after the images.")
    session = Session(inputs, model, options)
    session.items = outside(session.items, inputs, folder)
    names = overlay_names(session.items)
    loaded = session.loaded
    index = None if class_name is None else class_index(loaded, class_name)
    chosen = choose_method(
        loaded.model,
        input_size=loaded.data_config["input_size"],
        method=method,
        layer=layer,
        class_index=index,
        heads=heads,
    )
    facts = {"method": chosen.name, "layer": chosen.layer}
    settings = session.settings | facts | {"heads": heads, "class": index, "alpha": alpha}
    place = CENTRE if at is None else at
    if chosen.reader is not None:
        settings["at"] = list(place)
    arrays = {}
    if maps is not None:
        settings["maps"] = Path(maps).name
        arrays["maps"] = ArrayOutput(Path(maps), dataset="maps", attributes=session.attributes | facts)
    run = session.run("attend", out=f"{folder}/", settings=settings, arrays=arrays)
    run.title += f"  {chosen.name}"
    check_targets(run, session.items, folder, names)
    forget_missing(run, folder, names)

    def function(images: Tensor) -> Tensor:
        logits, values = chosen.run(images)
        return torch.cat([logits, values.flatten(1)], dim=1)  # one row per image, taken apart again by `save`

    def save(item: Item, row: Tensor, seconds: float) -> None:
        count = math.prod(chosen.shape)
        known = top_class(loaded, row[:-count], index) | facts
        values = row[-count:].view(chosen.shape)
        try:
            if not values.isfinite().all():
                raise DataError("the model's map of it is not finite", reason="not_finite")
            photograph = read_image(item.path)
            view = view_of(photograph, loaded.data_config)
            if chosen.reader is None:
                kept = values.numpy()
                picture = draw_overlay(view, kept, legend(chosen, known, kept), alpha=alpha)
            else:
                seen_at = locate(place, photograph.size, loaded.data_config)
                panels = chosen.reader.panels(values, seen_at)
                kept = np.stack([panel.values for panel in panels]) if len(panels) > 1 else panels[0].values
                picture = draw_panels(view, panels, class_title(known), seen_at, alpha=alpha)
                known["query"] = list(panels[0].query[::-1])
        except DataError as error:
            run.fail(item, error, seconds=seconds)
            return
        save_png(picture, folder / names[item.id], {"model": loaded.name, "weights": loaded.weights} | known)
        extra = {"maps": np.ascontiguousarray(kept)} if arrays else None
        run.done(item, seconds=seconds, row={"overlay": names[item.id]} | known, arrays=extra)

    return session.process(run, function, save)


def outside(items: list[Item], inputs: str | Path | Sequence[str | Path], folder: Path) -> list[Item]:
    """Leave out pictures of an earlier run, where the output folder lies inside an input folder.

    Raises:
        ConfigError: If an input folder is the output folder, or inside it.
    """
    target = folder.resolve()
    typed = [inputs] if isinstance(inputs, str | Path) else inputs
    folders = [Path(entry).resolve() for entry in typed if Path(entry).is_dir()]
    if any(entry.is_relative_to(target) for entry in folders):
        raise ConfigError(f"{folder} holds the inputs; choose another --out, such as {folder / 'overlays'}/.")
    if not any(target.is_relative_to(entry) for entry in folders):
        return items
    return [item for item in items if not item.path.resolve().is_relative_to(target)]


def overlay_names(items: Sequence[Item]) -> dict[str, str]:
    """Name the pictures by item id: the id with ``.png`` for its extension, or behind it where two would be equal.

    Where ids lead out of the working directory (absolute, or with ``..``), the folder that all have in common is left
    out, so that pictures always lie below the output folder.

    Raises:
        ConfigError: If two names are still equal.
    """
    inside = {item.id: PurePosixPath(item.id) for item in items}
    if any(path.is_absolute() or ".." in path.parts for path in inside.values()):
        whole = {key: PurePosixPath(os.path.abspath(key)) for key in inside}  # noqa: PTH100 - links are not followed
        common = os.path.commonpath([path.parent for path in whole.values()])
        inside = {key: path.relative_to(common) for key, path in whole.items()}
    count = Counter(path.with_suffix(".png") for path in inside.values())
    names = {
        key: str(path.with_suffix(".png") if count[path.with_suffix(".png")] == 1 else f"{path}.png")
        for key, path in inside.items()
    }
    if len(set(names.values())) < len(names):
        twice = next(name for name, number in Counter(names.values()).items() if number > 1)
        both = " and ".join(key for key, name in names.items() if name == twice)
        raise ConfigError(f"{both} would both be drawn as {twice}; run them into different folders.")
    return names


def check_targets(run: Run, items: Sequence[Item], folder: Path, names: Mapping[str, str]) -> None:
    """Raise if a picture would replace an input, or a file that no run of saccade has written."""
    inputs = {item.path.resolve() for item in items}
    continued = run.options.overwrite or run.files.manifest.exists()
    for item in run.items:
        target = folder / names[item.id]
        if target.resolve() in inputs:
            raise ConfigError(f"{target} is an input and would be replaced by a picture. Choose another --out.")
        if target.exists() and not continued:
            raise ConfigError(
                f"{target} exists and no {run.files.manifest.name} says that saccade wrote it. "
                "Choose another --out, or pass --overwrite to replace it."
            )


def forget_missing(run: Run, folder: Path, names: Mapping[str, str]) -> None:
    """Count items as still to do whose picture has gone."""
    gone = {item.id for item in run.items if item.id in run.finished and not (folder / names[item.id]).exists()}
    run.finished -= gone
    run.resumed -= len(gone)


def class_index(loaded: LoadedModel, name: str | int) -> int:
    """Find a class by its name or index.

    Raises:
        ConfigError: If there is no such class.
    """
    names = loaded.class_names or []
    count = int(getattr(loaded.model, "num_classes", 0) or 0)
    if isinstance(name, str) and name in names:
        return names.index(name)
    if str(name).isdecimal() and int(name) < count:
        return int(name)
    raise ConfigError(f"The model has no class {name!r} among its {count:,}.{suggest(str(name), names)}")


def top_class(loaded: LoadedModel, logits: Tensor, mapped: int | None) -> dict[str, Any]:
    """Return the columns that say what the model takes the image for, and which class was asked for."""
    if len(logits) == 0:
        return {}
    names = loaded.class_names or [f"class {index}" for index in range(len(logits))]
    probabilities = logits.double().softmax(0)
    best = int(probabilities.argmax())
    row = {"label": names[best], "index": best, "prob": round(float(probabilities[best]), 6)}
    return row if mapped is None else row | {"mapped_label": names[mapped], "mapped_index": mapped}


def class_title(known: Mapping[str, Any]) -> str:
    """Return the top class and its probability in words, empty if there are no classes."""
    return f"{known['label']}  {known['prob']:.1%}" if "label" in known else ""


def legend(method: MapMethod, known: Mapping[str, Any], values: NDArray[np.float32]) -> Legend:
    """Say in words what the picture shows."""
    title = class_title(known)
    if method.name == "cam":
        mapped = known.get("mapped_label", known["label"])
        return Legend(title, f"class activation: logit of {mapped}", f"{values.min():.2g}", f"{values.max():.2g}")
    if method.name == "eigencam":
        return Legend(title, f"eigencam: main pattern of {method.layer}", "low", "high")
    what = {"rollout": "attention rollout over", "last-layer": "attention of"}[method.name]
    mean = max(float(values.mean()), 1e-12)
    return Legend(
        title, f"{what} {method.layer}", f"{values.min() / mean:.2g} x mean", f"{values.max() / mean:.2g} x mean"
    )


def save_png(picture: Image.Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a PNG file with facts as text chunks, atomically."""
    text = PngInfo()
    for key, value in {"Software": f"saccade {__version__}", **facts}.items():
        text.add_text(key, str(value))
    with atomic_path(path) as temporary:
        picture.save(temporary, pnginfo=text, compress_level=4)  # three times as fast as 6, one per cent larger
