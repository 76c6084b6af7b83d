"""Batch inference on image files: ``classify`` and ``embed``.

Decoding runs in worker processes beside the model. An image that cannot be read leaves an empty slot in its batch and a
failed row in the results, never another image's numbers. Every batch has the same shape, so that a result does not
depend on which other images are in the batch, on resuming or on sharding.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from saccade import __version__
from saccade.attention import use_backend
from saccade.batch import (
    IMAGE_EXTENSIONS,
    ArrayOutput,
    BatchOptions,
    Item,
    Run,
    RunSummary,
    find_items,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from saccade.datasets.images import read_image
from saccade.errors import ConfigError, DataError
from saccade.vision_backbones.loading import ModelSource, load_model

__all__ = [
    "Batch",
    "Collate",
    "Forward",
    "PreparedModel",
    "Session",
    "classify",
    "embed",
    "end_quietly",
    "image_batches",
    "normalised",
]

PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Batch:
    """One batch of decoded images.

    Args:
        indices: Position of each item in the list that was given.
        errors: Why an item could not be read, by slot.
        images: Normalised images, ``(B, 3, Y, X)`` float32 on the compute device; black in slots of failed items and
            behind the last item.
        seconds: Time since the batch before, per item.
    """

    indices: list[int]
    errors: dict[int, DataError]
    images: Tensor
    seconds: float


class ImageFiles(Dataset[tuple[int, Tensor | DataError]]):
    """Decoded and cropped images as ``(3, Y, X)`` uint8, or the reason why there is none."""

    def __init__(self, paths: Sequence[Path], data_config: Mapping[str, Any]) -> None:
        self.paths = [str(path) for path in paths]
        # use_prefetcher: ends in uint8, so that workers hand over a quarter of the bytes; normalised on the device
        self.transform: Callable[..., Any] = timm.data.create_transform(**data_config, use_prefetcher=True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | DataError]:
        try:
            return index, torch.as_tensor(self.transform(read_image(self.paths[index])))
        except DataError as error:
            return index, error


class Collate:
    """Puts images into the slots of a batch of fixed shape."""

    def __init__(self, batch_size: int, input_size: Sequence[int]) -> None:
        self.shape = (batch_size, *input_size)

    def __call__(self, samples: list[tuple[int, Tensor | DataError]]) -> tuple[list[int], dict[int, DataError], Tensor]:
        """Return the indices, the errors by slot, and the images ``(B, 3, Y, X)``, uint8."""
        images = torch.zeros(self.shape, dtype=torch.uint8)
        errors = {}
        for slot, (_, image) in enumerate(samples):
            if isinstance(image, DataError):
                errors[slot] = image
            else:
                images[slot] = image
        return [index for index, _ in samples], errors, images


def image_batches(
    paths: Sequence[Path], data_config: Mapping[str, Any], *, batch_size: int, num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """Decode images in the background and yield normalised batches of one shape, in the order given.

    Args:
        paths: Image files.
        data_config: timm's description of the preprocessing.
        batch_size: Slots per batch.
        num_workers: Decoding processes; 0 decodes in this process.
        device: Where the batches go.
    """
    loader: DataLoader[Any] = DataLoader(
        ImageFiles(paths, data_config),
        batch_size=batch_size,
        num_workers=min(num_workers, -(-len(paths) // batch_size)),
        collate_fn=Collate(batch_size, data_config["input_size"]),
        pin_memory=device.type == "cuda",
        worker_init_fn=end_quietly,
    )
    yield from normalised(loader, data_config, device)


def normalised(loader: DataLoader[Any], data_config: Mapping[str, Any], device: torch.device) -> Iterator[Batch]:
    """Yield what a loader with ``Collate`` gives, on the device and with mean and standard deviation of the model."""
    mean = torch.tensor(data_config["mean"], device=device).view(1, -1, 1, 1) * 255
    std = torch.tensor(data_config["std"], device=device).view(1, -1, 1, 1) * 255
    last = time.monotonic()
    for indices, errors, images in loader:
        normalised = images.to(device, non_blocking=True).float().sub_(mean).div_(std)
        now = time.monotonic()
        yield Batch(indices, errors, normalised, (now - last) / len(indices))
        last = now


def end_quietly(worker: int) -> None:
    """Say nothing in a decoding process when its parent, interrupted, leaves while a batch is handed over.

    The thread of ``multiprocessing`` that hands it over would print a traceback.
    """
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (EOFError, ConnectionError)):
            report(kind, error, trace)

    sys.excepthook = hook


class Forward:
    """Runs a model on batches; halves the batch when memory runs out, and says so once."""

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.function = function
        self.autocast = dtype != torch.float32
        self.device = device
        self.dtype = dtype
        self.chunk: int | None = None
        self.say: Callable[[str], None] = lambda line: None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the model's output, float32 on the CPU."""
        while True:
            try:
                with torch.autocast(self.device.type, self.dtype) if self.autocast else nullcontext():
                    parts = images.split(self.chunk or len(images))
                    return torch.cat([self.function(part).float().cpu() for part in parts])
            except torch.OutOfMemoryError:
                size = self.chunk or len(images)
                if size == 1:
                    raise
                self.chunk = size // 2
                torch.cuda.empty_cache()
                self.say(f"out of memory with {size} images at a time; going on with {self.chunk}")


def classify(
    inputs: str | Path | Sequence[str | Path],
    *,
    model: str | ModelSource,
    out: str | Path,
    topk: int = 5,
    logits: str | Path | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Classify image files and write one row per file.

    Columns: ``path``, ``status``, then ``label_1, index_1, prob_1, ...`` by falling probability, then ``error``. A file
    that cannot be read has status ``failed`` and the reason.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``; see ``saccade.batch.find_items``.
        model: Model name or checkpoint, or a ``ModelSource`` with weights and preprocessing.
        out: Table: ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet``.
        topk: Classes per row, >= 1; all classes if there are fewer.
        logits: Array file for all logits, ``(N, K)`` float32.
        options: Device, batches, resume, screen.

    Returns:
        Counts of the run.

    Raises:
        ConfigError: If inputs, model or options cannot be used, or ``out`` holds another run.
        CheckpointError: If weights do not fit.
        MissingResourceError: If device or weights are not on this machine.
    """
    if topk < 1:
        raise ConfigError(f"topk must be at least 1, got {topk}.")
    session = Session(inputs, model, options)
    network = session.loaded.model
    count = getattr(network, "num_classes", 0)
    if not count:
        raise ConfigError(
            f"Model {session.loaded.name!r} has no classifier; use `saccade embed`, or weights that include one."
        )
    names = session.loaded.class_names or [str(index) for index in range(count)]
    settings = session.settings | {"topk": topk}
    arrays = {}
    if logits is not None:
        settings["logits"] = Path(logits).name
        arrays["logits"] = ArrayOutput(Path(logits), dataset="logits", attributes=session.attributes)
    run = session.run("classify", out=out, settings=settings, table=Path(out), arrays=arrays)

    def row(values: Tensor) -> dict[str, Any]:
        probabilities = values.double().softmax(0)
        best = probabilities.argsort(descending=True, stable=True)[:topk].tolist()
        return {
            key: value
            for rank, index in enumerate(best, start=1)
            for key, value in (
                (f"label_{rank}", names[index]),
                (f"index_{rank}", index),
                (f"prob_{rank}", round(probabilities[index].item(), 6)),
            )
        }

    def save(item: Item, values: Tensor, seconds: float) -> None:
        extra = {"logits": values.numpy()} if logits is not None else None
        run.done(item, seconds=seconds, row=row(values), arrays=extra)

    return session.process(run, network, save)


def embed(
    inputs: str | Path | Sequence[str | Path],
    *,
    model: str | ModelSource,
    out: str | Path,
    layer: str | None = None,
    pool: str | None = None,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Write one feature vector (or map) per image file.

    Args:
        inputs: Files, folders, globs, ``@list.txt`` or ``-``; see ``saccade.batch.find_items``.
        model: Model name or checkpoint, or a ``ModelSource`` with weights and preprocessing.
        out: ``.h5`` with ``features`` ``(N, D)`` and ``paths``, or ``.zarr``, or ``.npy``.
        layer: Module whose output is taken, by its name in ``model.named_modules()``; ``None`` means the last features.
        pool: ``"avg"`` over patches or positions, ``"token"`` (class token), ``"none"`` (everything), or ``None``: what
            the model's classifier would see.
        options: Device, batches, resume, screen.

    Returns:
        Counts of the run.

    Raises:
        ConfigError: If inputs, model, layer, pool or options cannot be used, or ``out`` holds another run.
        CheckpointError: If weights do not fit.
        MissingResourceError: If device or weights are not on this machine.
    """
    from saccade.vision_backbones.features import feature_function

    session = Session(inputs, model, options)
    settings = session.settings | {"layer": layer, "pool": pool}
    attributes = session.attributes | {"layer": layer or "", "pool": pool or "model"}
    arrays = {"features": ArrayOutput(Path(out), dataset="features", attributes=attributes)}
    function = feature_function(session.loaded.model, layer=layer, pool=pool)
    run = session.run("embed", out=out, settings=settings, arrays=arrays)

    def save(item: Item, values: Tensor, seconds: float) -> None:
        run.done(item, seconds=seconds, arrays={"features": np.ascontiguousarray(values.numpy())})

    return session.process(run, function, save)


class PreparedModel:
    """A model with its device and precision, seeded, and what is to be recorded of them."""

    def __init__(self, model: str | ModelSource, options: BatchOptions | None) -> None:
        self.options = options or BatchOptions()
        self.device = resolve_device(self.options.device)
        self.dtype = resolve_precision(self.options.precision, self.device)
        seed_everything(self.options.seed, deterministic=self.options.deterministic)
        self.loaded = load_model(model, seed=self.options.seed)
        self.settings: dict[str, Any] = {
            "model": self.loaded.name,
            "weights": self.loaded.weights,
            "preprocess": self.loaded.data_config,
            "precision": PRECISION_NAMES[self.dtype],
            "attention_backend": self.options.attention_backend,
            "seed": self.options.seed if self.loaded.weights == "random" else None,
        }

    @property
    def attributes(self) -> dict[str, str | int | float]:
        """Attributes of array files."""
        return {
            "saccade_version": __version__,
            "model": self.loaded.name,
            "weights": self.loaded.weights,
            "preprocess": json.dumps(self.loaded.data_config),
        }

    @property
    def title(self) -> str:
        """What the header says beside the command."""
        millions = self.loaded.num_parameters / 1e6
        return f"{self.loaded.name} ({millions:.1f} M)  {self.device} {self.settings['precision']}"


class Session(PreparedModel):
    """What ``classify`` and ``embed`` share: items, model, device and the loop over batches."""

    def __init__(
        self, inputs: str | Path | Sequence[str | Path], model: str | ModelSource, options: BatchOptions | None
    ) -> None:
        self.items = find_items(inputs, extensions=IMAGE_EXTENSIONS)  # before any model is built
        super().__init__(model, options)

    def run(
        self,
        command: str,
        *,
        out: str | Path,
        settings: Mapping[str, Any],
        table: Path | None = None,
        arrays: Mapping[str, ArrayOutput] | None = None,
    ) -> Run:
        """Open the batch run."""
        return Run(
            command,
            items=self.items,
            out=out,
            settings=settings,
            options=self.options,
            table=table,
            arrays=arrays,
            title=self.title,
        )

    def process(
        self, run: Run, function: nn.Module | Callable[[Tensor], Tensor], save: Callable[[Item, Tensor, float], None]
    ) -> RunSummary:
        """Run the model over all pending items."""
        self.loaded.model.to(self.device)
        forward = Forward(function, self.device, self.dtype)
        with run, use_backend(self.options.attention_backend):
            forward.say = run.reporter.say
            pending = run.pending
            if self.options.dry_run or not pending:
                return run.summary
            batches = image_batches(
                [item.path for item in pending],
                self.loaded.data_config,
                batch_size=min(self.options.batch_size, len(self.items)),
                num_workers=self.options.workers,
                device=self.device,
            )
            for batch in batches:
                outputs = forward(batch.images) if len(batch.errors) < len(batch.indices) else None
                for slot, index in enumerate(batch.indices):
                    if slot in batch.errors:
                        run.fail(pending[index], batch.errors[slot], seconds=batch.seconds)
                    elif outputs is not None:
                        save(pending[index], outputs[slot], batch.seconds)
        return run.summary
