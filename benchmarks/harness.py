"""Ours beside a peer: alternating calls in one process, medians, ratios, peak memory, JSON with the machine."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from saccade.apps.measure import machine, measure_alternating

RESULTS = Path(__file__).parent / "results"


def compare(
    case: str,
    functions: dict[str, Callable[[], object]],
    *,
    work: int = 1,
    unit: str = "calls",
    repeats: int = 7,
    warmup: int = 1,
    cpu_time: bool = False,
) -> dict[str, object]:
    """Time functions that do the same work and print one row for each.

    Args:
        case: What is compared.
        functions: Ours first, then its peers.
        work: Units of work in one call.
        unit: Plural noun of the units.
        repeats: Timed calls of each.
        warmup: Untimed calls of each beforehand.
        cpu_time: Count seconds of the CPU instead of those of the wall, commands that are run included: for one thread
            on a machine that is not idle.

    Returns:
        Timings by name, and the time of each peer as a multiple of ours (above 1: ours is faster).
    """
    clock = cpu_seconds if cpu_time else time.perf_counter
    timings = measure_alternating(functions, repeats=repeats, warmup=warmup, clock=clock)
    ours = next(iter(timings.values())).median_ms
    print(f"{case}{' (CPU time)' if cpu_time else ''}")
    rows = {}
    for name, timing in timings.items():
        speed = work / timing.median_ms * 1000
        ratio = timing.median_ms / ours
        rows[name] = asdict(timing) | {f"{unit}_per_s": speed, "time_over_ours": ratio}
        print(
            f"  {name:<28}{timing.median_ms:>11.1f} ms +- {timing.spread_ms:<8.1f}{speed:>9.1f} {unit}/s"
            f"{timing.peak_mib:>9.1f} MiB   {ratio:.2f} x ours"
        )
    return {"case": case, "work": work, "unit": unit, "clock": "cpu" if cpu_time else "wall", "rows": rows}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def save(name: str, cases: list[dict[str, object]]) -> None:
    """Write the results of one benchmark, with what they depend on, to ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")
    print(f"-> {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
