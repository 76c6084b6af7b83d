"""Scanpath metrics over all pairs at once, beside plain Python dynamic programmes and the MultiMatch package.

The table of OSIE is measured where the recordings are in ``../shared``; everything else is generated.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import multimatch_gaze
import numpy as np

from benchmarks.harness import compare, save
from saccade.gaze import Scanpath, ScanpathSet, multimatch
from saccade.gaze import metrics as gm

OSIE = Path(__file__).resolve().parents[2] / "shared" / "data" / "gaze" / "osie" / "osie_fixations.json"
WIDTH, HEIGHT = 800, 600
PAIRS = 2000


def paths(count: int, shortest: int, longest: int, seed: int) -> ScanpathSet:
    """Random paths, positions in tenths of a pixel as trackers export them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count)
    total = int(lengths.sum())
    return ScanpathSet.from_columns(
        lengths,
        rng.uniform(0, WIDTH - 1, total).round(1),
        rng.uniform(0, HEIGHT - 1, total).round(1),
        duration=rng.uniform(0.05, 0.5, total).round(3),
        image="image",
        sample=range(count),
        width=WIDTH,
        height=HEIGHT,
    )


def plain_alignment(a: list, b: list, score: Callable, gap: float) -> float:
    """Needleman-Wunsch on lists, two rows."""
    last = [gap * j for j in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        row = [gap * i]
        for j, y in enumerate(b):
            row.append(max(last[j] + score(x, y), last[j + 1] + gap, row[j] + gap))
        last = row
    return last[-1]


def plain_edit_distance(a: list, b: list) -> int:
    """Levenshtein on lists, two rows."""
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
        last = row
    return last[-1]


def plain_dtw(a: list, b: list) -> float:
    """Dynamic time warping on lists, two rows."""
    last = [0.0] + [math.inf] * len(b)
    for x in a:
        row = [math.inf]
        for j, y in enumerate(b):
            row.append(math.dist(x, y) + min(last[j], last[j + 1], row[j]))
        last = row
    return last[-1]


def plain_scanmatch(a: Scanpath, b: Scanpath) -> float:
    """ScanMatch of one pair, 16 x 12 cells, threshold 3.5."""
    cells = [[(int(x * 16 / WIDTH), int(y * 12 / HEIGHT)) for x, y in zip(p.x, p.y, strict=True)] for p in (a, b)]
    return plain_alignment(*cells, lambda x, y: 3.5 - math.dist(x, y), 0.0) / (3.5 * max(map(len, cells)))


def plain_sed(a: Scanpath, b: Scanpath) -> int:
    """Edit distance of 5 x 5 cells."""
    cells = [[int(x) // 160 + 5 * (int(y) // 120) for x, y in zip(p.x, p.y, strict=True)] for p in (a, b)]
    return plain_edit_distance(*cells)


def packaged(path: Scanpath) -> np.ndarray:
    """The structured array that the MultiMatch package takes."""
    fields = [("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")]
    return np.array([*zip(path.x, path.y, path.duration, strict=True)], dtype=fields)


def check(ours: np.ndarray, theirs: list) -> None:
    """Equal values, or stop."""
    difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    assert difference < 1e-6, difference


def main() -> None:
    """Run and save."""
    first, second = paths(PAIRS, 5, 24, 0), paths(PAIRS, 5, 24, 1)
    singles = list(zip(first, second, strict=True))
    clusters = gm.fit_clusters(first[:30])
    labels = [sequences.tolist() for sequences in (clusters.label(first).values[0], clusters.label(second).values[0])]
    strings = [
        [flat[start:stop] for start, stop in zip(s.offsets[:-1], s.offsets[1:], strict=True)]
        for flat, s in zip(labels, (first, second), strict=True)
    ]
    points = [[[*zip(p.x.tolist(), p.y.tolist(), strict=True)] for p in s] for s in (first, second)]
    metrics = {
        "ScanMatch": (
            lambda: gm.scanmatch(first, second),
            lambda: [plain_scanmatch(a, b) for a, b in singles],
        ),
        "FED": (
            lambda: gm.fixation_edit_distance(first, second, clusters),
            lambda: [plain_edit_distance(a, b) for a, b in zip(*strings, strict=True)],
        ),
        "SED": (
            lambda: gm.string_edit_distance(first, second),
            lambda: [plain_sed(a, b) for a, b in singles],
        ),
        "DTW": (
            lambda: gm.dtw(first, second),
            lambda: [plain_dtw(a, b) for a, b in zip(*points, strict=True)],
        ),
    }
    cases = []
    for name, (ours, plain) in metrics.items():
        check(ours(), plain())
        case = f"{name}, {PAIRS} pairs of 5 to 24 fixations, equal values"
        cases.append(compare(case, {"saccade": ours, "plain Python": plain}, work=PAIRS, unit="pairs", repeats=5))
    for length in (10, 100, 300):
        count = 20 if length < 300 else 4
        a, b = paths(count, length, length, 2), paths(count, length, length, 3)
        tables = [(packaged(p), packaged(q)) for p, q in zip(a, b, strict=True)]

        def package(tables: list = tables) -> list:
            return [multimatch_gaze.docomparison(p, q, screensize=[WIDTH, HEIGHT]) for p, q in tables]

        functions = {
            "saccade": lambda a=a, b=b: multimatch(a, b),
            "saccade, one pair at a time": lambda a=a, b=b: [multimatch(p, q)[0] for p, q in zip(a, b, strict=True)],
            "multimatch-gaze": package,
        }
        for function in functions.values():
            check(multimatch(a, b), function())
        case = f"MultiMatch, {count} pairs of {length} fixations, equal values"
        cases.append(compare(case, functions, work=count, unit="pairs", repeats=3))
    if OSIE.is_file():
        cases.append(osie_table())
    save("gaze", cases)


def osie_table() -> dict[str, object]:
    """The whole table of OSIE: all pairs of viewers of all images, agreement, chance and intervals, in one command."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/pairs.csv"
        command = [sys.executable, "-m", "saccade.apps.cli", "gaze", "metrics", str(OSIE), "-o", out, "-q"]

        def run() -> None:
            subprocess.run(command, check=True, capture_output=True)

        functions = {"saccade gaze metrics": run}
        return compare(
            "every metric of OSIE: 12600 ordered pairs of viewers, and as many of random and of other images' paths",
            functions, work=12600, unit="pairs", repeats=3, warmup=0,
        )  # fmt: skip


if __name__ == "__main__":
    main()
