"""The files of a robustness suite as batches, one folder after the other, decoded by one pool of processes."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saccade.datasets.corruptions import CORRUPTIONS, corrupt
from saccade.datasets.images import read_image
from saccade.datasets.robustness_suites import Part, Suite
from saccade.errors import DataError
from saccade.vision_backbones.inference import Batch, Collate, end_quietly, normalised

__all__ = ["Sample", "SuiteBatch", "read_clip", "suite_batches"]


@dataclass(frozen=True)
class Sample:
    """One file: an image or a clip.

    Args:
        path: The file.
        name: Path below the part's folder, for messages and for the random state.
        label: Column that is right.
        part: What it belongs to.
    """

    path: Path
    name: str
    label: int
    part: Part


@dataclass(frozen=True)
class SuiteBatch:
    """Files of one part, decoded.

    Args:
        part: What all of them belong to.
        samples: The files.
        batch: Their images ``(B, 3, Y, X)``, slots beyond them black; or the frames of one clip.
        is_last: Whether the part ends here.
    """

    part: Part
    samples: Sequence[Sample]
    batch: Batch
    is_last: bool


class Feed:
    """Cuts parts into lists of samples, listing one part at a time; remembers those on their way through the loader."""

    def __init__(self, suite: Suite, parts: Sequence[Part], batch_size: int) -> None:
        self.suite = suite
        self.parts = parts
        self.batch_size = batch_size
        self.sent: deque[tuple[list[Sample], bool]] = deque()

    def __iter__(self) -> Iterator[list[Sample]]:
        for part in self.parts:
            files = self.suite.files(part)
            for start in range(0, len(files), self.batch_size):
                chunk = files[start : start + self.batch_size]
                samples = [Sample(path, path.relative_to(part.folder).as_posix(), label, part) for path, label in chunk]
                self.sent.append((samples, start + self.batch_size >= len(files)))
                yield samples


class SuiteFiles(Dataset[tuple[int, Tensor | DataError]]):
    """Images ``(3, Y, X)`` or frames of clips ``(F, 3, Y, X)``, uint8, by sample; or why there are none.

    Args:
        data_config: timm's description of the preprocessing.
        seed: Of corruptions made on the fly; an image's also depends on its name, the corruption and the severity, so
            that it is the same in any order and process.
        least_frames: Frames that a clip needs.
    """

    def __init__(self, data_config: Mapping[str, Any], seed: int, least_frames: int) -> None:
        # use_prefetcher: ends in uint8; crop_pct 1: files that have their final size are neither enlarged nor cropped
        self.ordinary: Callable[..., Any] = timm.data.create_transform(**data_config, use_prefetcher=True)
        whole = {**data_config, "crop_pct": 1.0}
        self.as_they_are: Callable[..., Any] = timm.data.create_transform(**whole, use_prefetcher=True)
        self.seed = seed
        self.least_frames = least_frames

    def __getitem__(self, sample: Sample) -> tuple[int, Tensor | DataError]:
        try:
            if sample.path.suffix.lower() == ".mp4":
                frames = read_clip(sample.path, self.least_frames)
                return sample.label, torch.stack(
                    [torch.as_tensor(self.as_they_are(Image.fromarray(f))) for f in frames]
                )
            return sample.label, self.image(sample)
        except DataError as error:
            return sample.label, error

    def image(self, sample: Sample) -> Tensor:
        """Return one image, corrupted if it is to be."""
        transform = self.as_they_are if sample.part.as_they_are else self.ordinary
        image = torch.as_tensor(transform(read_image(sample.path)))
        if not sample.part.on_the_fly:
            return image
        kind, severity = sample.part.kind, sample.part.severity
        name = sample.name.encode("utf-8", "surrogateescape")
        state = (self.seed, zlib.crc32(name), list(CORRUPTIONS).index(kind), severity)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        return torch.from_numpy(corrupt(pixels, kind, severity, np.random.default_rng(state))).permute(2, 0, 1)


def read_clip(path: Path, least: int) -> list[NDArray[Any]]:
    """Return the frames of a film, ``(Y, X, 3)`` RGB, uint8.

    Raises:
        DataError: With reason ``unreadable_clip`` if fewer than ``least`` frames can be decoded.
    """
    reader = cv2.VideoCapture(str(path))
    frames = []
    try:
        while True:
            is_there, frame = reader.read()
            if not is_there:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        reader.release()
    if len(frames) < least:
        raise DataError(f"{len(frames)} frames can be decoded, {least} are needed", reason="unreadable_clip")
    return frames


def collate_clip(samples: list[tuple[int, Tensor | DataError]]) -> tuple[list[int], dict[int, DataError], Tensor]:
    """Hand on the frames of one clip in place of a batch."""
    ((label, frames),) = samples
    if isinstance(frames, DataError):
        return [label], {0: frames}, torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return [label], {}, frames


def suite_batches(
    suite: Suite,
    parts: Sequence[Part],
    data_config: Mapping[str, Any],
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    seed: int,
    least_frames: int,
) -> Iterator[SuiteBatch]:
    """Decode the files of parts in the background and yield them part by part, in batches of one shape.

    Args:
        suite: Where the files are.
        parts: Those of its parts that are to be read.
        data_config: timm's description of the preprocessing.
        batch_size: Slots per batch; clips come one at a time.
        num_workers: Decoding processes; 0 decodes in this process.
        device: Where the batches go.
        seed: Of corruptions made on the fly.
        least_frames: Frames that a clip needs; one with fewer is an error in its batch.
    """
    clips = suite.name == "imagenet-p"
    feed = Feed(suite, parts, 1 if clips else batch_size)
    loader: DataLoader[Any] = DataLoader(
        SuiteFiles(data_config, seed, least_frames),
        batch_sampler=feed,  # samples instead of positions
        num_workers=num_workers,
        collate_fn=collate_clip if clips else Collate(batch_size, data_config["input_size"]),
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    for batch in normalised(loader, data_config, device):
        samples, is_last = feed.sent.popleft()
        yield SuiteBatch(samples[0].part, samples, batch, is_last)


def start_worker(worker: int) -> None:
    """Set up a decoding process: one thread of OpenCV, since there is a process per core."""
    cv2.setNumThreads(0)
    end_quietly(worker)
