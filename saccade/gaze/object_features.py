"""Features of objects by any image encoder, and of a target described in words by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.batch import IMAGE_EXTENSIONS, find_items
from saccade.datasets.images import read_image
from saccade.errors import ConfigError, DataError, require, suggest
from saccade.gaze.crops import cut_crops
from saccade.gaze.object_boxes import BoxSource

__all__ = ["EncodedObjects", "FeatureFile", "ObjectEncoder", "clip_text_features", "encode_objects"]

CROPS_AT_ONCE = 64


class ObjectEncoder:
    """Crops each object, runs an encoder over the crops.

    Args:
        function: From normalised crops ``(M, 3, H, W)`` to features ``(M, F)``, e.g. a timm model without classifier.
        data_config: timm's description of its preprocessing: ``input_size``, ``mean``, ``std``.
        name: What the encoder is called; models remember it.
        device: Where it runs.

    Example:
        >>> config = {"input_size": (3, 8, 8), "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
        >>> encoder = ObjectEncoder(lambda crops: crops.mean((2, 3)), config)
        >>> encoder(Image.new("RGB", (40, 30), (255, 0, 0)), torch.tensor([[0., 0., 10., 10.]]))
        tensor([[1., 0., 0.]])
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        data_config: Mapping[str, Any],
        name: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.function, self.name, self.device = function, name, device
        height, width = data_config["input_size"][-2:]
        self.size = (int(height), int(width))
        self.mean, self.std = (
            torch.tensor(data_config[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std")
        )

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: Tensor) -> Tensor:
        """Return the features of the boxes ``(N, 4)`` of an image, ``(N, F)`` float32 on the CPU.

        Raises:
            DataError: If a box lies outside the image.
        """
        crops = cut_crops(image, boxes, self.size)
        parts = []
        for part in crops.split(CROPS_AT_ONCE):
            normalised = (part.to(self.device) - self.mean) / self.std
            parts.append(self.function(normalised).float().cpu())
        return torch.cat(parts).clone()


class FeatureFile:
    """Features that were computed beforehand: HDF5 with a group per image that holds ``boxes`` and ``features``.

    Args:
        path: Written by :meth:`write`.

    Raises:
        ConfigError: If the file is not one of these.
    """

    def __init__(self, path: str | Path) -> None:
        import h5py

        self.path = Path(path)
        try:
            with h5py.File(self.path, "r") as file:
                self.encoder = str(file.attrs["encoder"])
                self.images = sorted(file["images"])
        except (OSError, KeyError) as error:
            raise ConfigError(f"{self.path} is no file of object features ({error}).") from error

    def __call__(self, image: str, boxes: Tensor) -> Tensor:
        """Return the features ``(N, F)`` of an image.

        Raises:
            DataError: If the file lacks the image, or has other boxes for it.
        """
        import h5py

        key = group_name(image)
        with h5py.File(self.path, "r") as file:
            if key not in file["images"]:
                raise DataError(
                    f"{self.path} has no features of {image!r}.{suggest(image, self.images)}", reason="no_features"
                )
            group = file["images"][key]
            stored, features = group["boxes"][()], group["features"][()]
        if stored.shape != tuple(boxes.shape) or not np.allclose(stored, boxes.numpy(), atol=0.5):
            raise DataError(f"{self.path} has features of other boxes of {image!r}.", reason="other_boxes")
        return torch.from_numpy(features)

    @staticmethod
    def write(path: str | Path, features: Mapping[str, tuple[Tensor, Tensor]], *, encoder: str) -> None:
        """Write boxes ``(N, 4)`` and features ``(N, F)`` by image name, atomically."""
        import h5py

        from saccade.batch.tables import atomic_path

        with atomic_path(Path(path)) as temporary, h5py.File(temporary, "w") as file:
            file.attrs["encoder"] = encoder
            images = file.create_group("images")
            for name, (boxes, values) in features.items():
                group = images.create_group(group_name(name))
                group["boxes"], group["features"] = boxes.float().numpy(), values.float().numpy()


@dataclass(frozen=True)
class EncodedObjects:
    """Counts of what :func:`encode_objects` wrote."""

    images: int
    objects: int
    width: int


def encode_objects(
    inputs: str | Path | Sequence[str | Path],
    *,
    boxes: BoxSource,
    encoder: ObjectEncoder,
    out: str | Path,
    overwrite: bool = False,
) -> EncodedObjects:
    """Write the features of all objects in image files, for training.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``; see ``saccade.batch.find_items``.
        boxes: Where the objects are.
        encoder: The encoder.
        out: ``*.h5``, a :class:`FeatureFile`.
        overwrite: Replace ``out`` if it exists.

    Raises:
        ConfigError: If inputs or ``out`` cannot be used.
        DataError: If an image or its boxes cannot be used; nothing is written then.
    """
    if Path(out).suffix.lower() not in (".h5", ".hdf5"):
        raise ConfigError(f"Object features are written as .h5, got {Path(out).name!r}.")
    if Path(out).exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another name, or replace it with --overwrite.")
    features = {}
    for item in find_items(inputs, extensions=IMAGE_EXTENSIONS):
        image = read_image(item.path)
        found = boxes(item.id, image).boxes
        features[item.id] = (found, encoder(image, found))
    FeatureFile.write(out, features, encoder=encoder.name)
    width = next(iter(features.values()))[1].shape[1]
    return EncodedObjects(len(features), sum(len(found) for found, _ in features.values()), width)


def group_name(image: str) -> str:
    """Return an image's name as one level of an HDF5 file."""
    return image.replace("/", "\\")


def clip_text_features(name: str, texts: list[str], *, weights: str | None = None) -> Tensor:
    """Embed descriptions of targets with the text tower of an open_clip model, ``(len(texts), F)``, unit length.

    Args:
        name: ``open_clip:MODEL[/TAG]`` as for the image encoder.
        texts: E.g. ``["a mug"]``.
        weights: State dict of the whole model, where no tag names one.

    Raises:
        ConfigError: If the name is not open_clip's, or there are no weights.
        MissingDependencyError: If open_clip is not installed.
    """
    if not name.startswith("open_clip:"):
        raise ConfigError(f"A target in words needs an open_clip encoder, the model was trained with {name!r}.")
    open_clip = require("open_clip", purpose="Describing a target in words")
    model_name, _, tag = name.removeprefix("open_clip:").partition("/")
    if model_name not in open_clip.list_models():
        raise ConfigError(f"Unknown open_clip model {model_name!r}.{suggest(model_name, open_clip.list_models())}")
    if not tag and weights is None:
        raise ConfigError(f"{name!r} names no weights: add a tag, e.g. {name}/openai, or pass a file.")
    model = open_clip.create_model(model_name, pretrained=weights or tag).eval()
    with torch.inference_mode():
        features: Tensor = model.encode_text(open_clip.get_tokenizer(model_name)(texts), normalize=True)
    return features.float().clone()
