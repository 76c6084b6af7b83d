"""Alternating repeats, statistics, and peak memory that is really the peak."""

import json

import torch

from saccade.apps.measure import machine, measure_alternating, peak_memory

MIB = 2**20


def test_functions_take_turns():
    calls = []
    timings = measure_alternating({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab" + "ab"  # warm-up, timed calls, one more of each for the memory
    assert list(timings) == ["a", "b"]
    assert all(timing.runs == 3 and timing.median_ms >= 0 and timing.spread_ms >= 0 for timing in timings.values())


def test_any_clock_will_do():
    readings = iter([0.0, 1.0, 10.0, 12.0, 20.0, 26.0])
    timing = measure_alternating({"a": lambda: None}, repeats=3, warmup=0, clock=lambda: next(readings))["a"]
    assert timing.median_ms == 2000  # of 1, 2 and 6 seconds


def test_peak_memory_counts_what_is_held_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.zeros(MIB)  # 4 MiB each, released at once

    def together():
        return [torch.zeros(MIB) for _ in range(3)]

    assert peak_memory(one_after_the_other) == 4 * MIB
    assert peak_memory(together) == 12 * MIB
    assert peak_memory(lambda: None) == 0


def test_peak_memory_sees_temporaries_inside_a_kernel():
    x = torch.ones(MIB)
    assert peak_memory(lambda: torch.nn.functional.gelu(x).sum()) >= 4 * MIB


def test_machine_is_json():
    assert json.loads(json.dumps(machine()))["versions"].keys() >= {"python", "saccade", "torch"}
