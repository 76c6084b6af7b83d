"""The options that every batch function takes, checked once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from saccade.errors import ConfigError

__all__ = ["BatchOptions"]


@dataclass(frozen=True)
class BatchOptions:
    """How a batch run computes, resumes and reports.

    Args:
        device: ``"auto"`` (cuda, then mps, then cpu) or a torch device name; a named device that is absent is an error.
        precision: ``"auto"`` (bf16 on GPUs that have it, else fp32), ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        attention_backend: Backend of saccade's own attention operators.
        batch_size: Items per forward pass, >= 1. Halved when memory runs out.
        num_workers: Decoding processes; ``None`` means ``min(4, cores)``, 0 decodes in this process.
        seed: Seed of Python, NumPy and torch.
        deterministic: Allow only deterministic torch algorithms.
        limit: Only the first ``limit`` items of the sorted list.
        shard: ``"I/N"``: every N-th item starting at the I-th (1-based).
        overwrite: Discard an earlier run in the same place instead of continuing it.
        on_error: ``"skip"`` goes on after a bad item, ``"stop"`` ends the run there.
        dry_run: Resolve and report everything, write nothing.
        progress: ``"auto"``, ``"bar"``, ``"plain"`` or ``"none"``; written to standard error.
        log_file: File to which the screen's lines are appended.
        color: Allow colour on a terminal.

    Raises:
        ConfigError: If a value is out of range.
    """

    device: str = "auto"
    precision: str = "auto"
    attention_backend: str = "auto"
    batch_size: int = 32
    num_workers: int | None = None
    seed: int = 0
    deterministic: bool = False
    limit: int | None = None
    shard: str | None = None
    overwrite: bool = False
    on_error: str = "skip"
    dry_run: bool = False
    progress: str = "none"
    log_file: str | Path | None = None
    color: bool = True
    shard_index: int = field(init=False, default=1)
    shard_count: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"num_workers must be 0 or more, got {self.num_workers}.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}.")
        choices = {
            "precision": ("auto", "fp32", "bf16", "fp16"),
            "attention_backend": ("auto", "sdpa", "triton", "reference"),
            "on_error": ("skip", "stop"),
            "progress": ("auto", "bar", "plain", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.shard is not None:
            match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
            if not match or not 1 <= int(match[1]) <= int(match[2]):
                raise ConfigError(f"shard must be I/N with 1 <= I <= N, e.g. 2/3, got {self.shard!r}.")
            object.__setattr__(self, "shard_index", int(match[1]))
            object.__setattr__(self, "shard_count", int(match[2]))

    @property
    def workers(self) -> int:
        """Number of decoding processes to start."""
        return min(4, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
