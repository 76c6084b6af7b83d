"""How saccade measures: alternating repeats, medians, peak memory, and the machine they belong to."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Timing", "machine", "measure_alternating", "peak_memory"]

MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """What repeated calls of one function cost.

    Args:
        median_ms: Median time of a call by the clock that was read, wall time as a rule, milliseconds.
        spread_ms: Distance between the first and the third quartile, milliseconds.
        runs: Number of timed calls.
        peak_mib: Most memory that torch held at once beyond what it held before the call; see :func:`peak_memory`.
    """

    median_ms: float
    spread_ms: float
    runs: int
    peak_mib: float


def measure_alternating(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 9,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time several functions in one process, in turn, so that slow phases of the machine hit all of them alike.

    Args:
        functions: What to call, by name; results are dropped.
        repeats: Timed calls of each, at least 2.
        warmup: Untimed calls of each beforehand (compilation, caches, memory pools).
        clock: Seconds; ``time.process_time`` counts those of the CPU instead, for one thread on a machine that others
            use too.

    Returns:
        One timing per name, in the order given.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function, clock))
    timings = {}
    for name, function in functions.items():
        first, _, third = statistics.quantiles(seconds[name], n=4, method="inclusive")
        median = statistics.median(seconds[name])
        timings[name] = Timing(1e3 * median, 1e3 * (third - first), repeats, peak_memory(function) / MIB)
    return timings


def timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the time of one call in seconds, the work queued on the GPU included."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    start = clock()
    function()
    wait()
    return clock() - start


def peak_memory(function: Callable[[], object]) -> int:
    """Return the most bytes that torch held at once during one call, beyond what it held before.

    On CUDA this is the caching allocator's own figure. On the CPU it is the peak of the running sum of the allocations
    and releases that torch's profiler records, those inside kernels included. Memory of other libraries and of worker
    processes is not counted.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first use; it reports the missing GPU as an error
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        function()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> dict[str, object]:
    """Return what a figure depends on: versions of the software, processor, threads, GPU. JSON types only."""
    import torch

    from saccade.batch.environment import versions

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "argv": sys.argv[1:],
    }


def processor() -> str:
    """Return the processor's name; Linux keeps it in ``/proc/cpuinfo`` where ``platform`` does not look."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
