"""Samplers that make training repeatable and distributed evaluation exact."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import DistributedSampler

from saccade.errors import ConfigError

__all__ = ["EvaluationSampler", "TrainingSampler", "world"]

# Both are DistributedSamplers, also in a single process: Lightning then calls `set_epoch` and does not wrap them in
# its own sampler, which would pad the last batch with duplicates.


def world() -> tuple[int, int]:
    """Return (number of processes, own rank), (1, 0) outside distributed runs."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class TrainingSampler(DistributedSampler[Any]):
    """Shuffles per epoch and hands a seed to each sample.

    Order and seeds depend on ``seed``, epoch and sample alone: not on the number of workers, nor on whether the run was
    interrupted. Ranks get equally many samples; the last ones repeat the first if need be.

    Args:
        dataset: What is sampled; takes ``(index, seed)`` as key.
        replicas: Number of processes.
        rank: This process, from 0.
        seed: Seed of the run.
        epoch: Epoch to begin with, counted from 0.
        skip: Samples of that epoch that this process has already used.
    """

    def __init__(self, dataset: Sized, replicas: int, rank: int, *, seed: int, epoch: int = 0, skip: int = 0) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.set_epoch(epoch)
        self.skip = skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield ``(index, seed)``."""
        skip, self.skip = self.skip, 0
        for index in islice(super().__iter__(), skip, None):
            state = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)
            yield index, int(state[0])


class EvaluationSampler(DistributedSampler[Any]):
    """Each sample exactly once over all ranks, in order, nothing padded.

    Args:
        dataset: What is sampled.
        replicas: Number of processes.
        rank: This process, from 0.

    Raises:
        ConfigError: If some rank would get nothing, which would leave the others waiting for it.
    """

    def __init__(self, dataset: Sized, replicas: int, rank: int) -> None:
        if len(dataset) < replicas:
            raise ConfigError(f"{len(dataset)} samples cannot be shared by {replicas} processes; use fewer devices.")
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, len(dataset), replicas)

    def __iter__(self) -> Iterator[int]:
        """Yield every ``num_replicas``-th index, beginning with the rank."""
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
