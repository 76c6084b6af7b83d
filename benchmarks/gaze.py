"""Scanpath metrics over all pairs at once, beside plain Python dynamic programmes and the MultiMatch package.

Plain Python comes in two forms. ``loops over a numpy table`` fills ``table[i, j]`` cell by cell, pair after pair: the
ordinary programme, as the code of IRL, HAT and OAT and the ScanMatch port have it; the target of 50 x is meant against
it. ``loops over two lists`` keeps two rows of Python floats, the best that loops can do. FED is measured on given
labels, and once more with the regions looked up, which the loops get for nothing. The table of OSIE is measured where
the recordings are in ``../shared``; everything else is generated. All times are processor time in one thread.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import multimatch_gaze
import numpy as np

from benchmarks.harness import compare, save
from saccade.gaze import Scanpath, ScanpathSet, multimatch
from saccade.gaze import metrics as gm

OSIE = Path(__file__).resolve().parents[2] / "shared" / "data" / "gaze" / "osie" / "osie_fixations.json"
WIDTH, HEIGHT = 800, 600
PAIRS = 6300  # of viewers of OSIE's 60 images


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


def alignment_in_rows(a: list, b: list, score: Callable, gap: float) -> float:
    """Needleman-Wunsch in two rows of lists."""
    last = [gap * j for j in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        row = [gap * i]
        for j, y in enumerate(b):
            row.append(max(last[j] + score(x, y), last[j + 1] + gap, row[j] + gap))
        last = row
    return last[-1]


def alignment_in_table(a: list, b: list, score: Callable, gap: float) -> float:
    """Needleman-Wunsch in a numpy table."""
    table = np.zeros((len(a) + 1, len(b) + 1))
    table[:, 0], table[0] = gap * np.arange(len(a) + 1), gap * np.arange(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            match = table[i - 1, j - 1] + score(a[i - 1], b[j - 1])
            table[i, j] = max(match, table[i - 1, j] + gap, table[i, j - 1] + gap)
    return table[-1, -1]


def edits_in_rows(a: list, b: list) -> int:
    """Levenshtein in two rows of lists."""
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
        last = row
    return last[-1]


def edits_in_table(a: list, b: list) -> float:
    """Levenshtein in a numpy table."""
    return -alignment_in_table(a, b, lambda x, y: -float(x != y), -1.0)


def dtw_in_rows(a: list, b: list) -> float:
    """Dynamic time warping in two rows of lists."""
    last = [0.0] + [math.inf] * len(b)
    for x in a:
        row = [math.inf]
        for j, y in enumerate(b):
            row.append(math.dist(x, y) + min(last[j], last[j + 1], row[j]))
        last = row
    return last[-1]


def dtw_in_table(a: list, b: list) -> float:
    """Dynamic time warping in a numpy table."""
    table = np.full((len(a) + 1, len(b) + 1), np.inf)
    table[0, 0] = 0.0
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            best = min(table[i - 1, j - 1], table[i - 1, j], table[i, j - 1])
            table[i, j] = math.dist(a[i - 1], b[j - 1]) + best
    return table[-1, -1]


def scanmatch_with(align: Callable) -> Callable[[Scanpath, Scanpath], float]:
    """ScanMatch of one pair, 16 x 12 cells, threshold 3.5, by an alignment."""

    def scanmatch(a: Scanpath, b: Scanpath) -> float:
        cells = [[(int(x * 16 / WIDTH), int(y * 12 / HEIGHT)) for x, y in zip(p.x, p.y, strict=True)] for p in (a, b)]
        return align(*cells, lambda x, y: 3.5 - math.dist(x, y), 0.0) / (3.5 * max(map(len, cells)))

    return scanmatch


def sed_with(edits: Callable) -> Callable[[Scanpath, Scanpath], float]:
    """Edit distance of 5 x 5 cells of one pair."""

    def sed(a: Scanpath, b: Scanpath) -> float:
        return edits(*([int(x) // 160 + 5 * (int(y) // 120) for x, y in zip(p.x, p.y, strict=True)] for p in (a, b)))

    return sed


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
    cuts = [[*zip(s.offsets[:-1], s.offsets[1:], strict=True)] for s in (first, second)]
    labels = [clusters.label(s).values[0].tolist() for s in (first, second)]
    named = [replace(s, objects=np.array(flat, np.int64)) for s, flat in zip((first, second), labels, strict=True)]
    strings = [*zip(*([flat[i:j] for i, j in cut] for flat, cut in zip(labels, cuts, strict=True)), strict=True)]
    points = [tuple([*zip(p.x.tolist(), p.y.tolist(), strict=True)] for p in pair) for pair in singles]
    metrics = {
        "ScanMatch": (
            lambda: gm.scanmatch(first, second),
            singles,
            scanmatch_with(alignment_in_table),
            scanmatch_with(alignment_in_rows),
        ),
        "FED": (
            lambda: gm.object_edit_distance(*named),
            strings,
            edits_in_table,
            edits_in_rows,
        ),
        "SED": (
            lambda: gm.string_edit_distance(first, second),
            singles,
            sed_with(edits_in_table),
            sed_with(edits_in_rows),
        ),
        "DTW": (lambda: gm.dtw(first, second), points, dtw_in_table, dtw_in_rows),
    }
    cases = []
    for name, (ours, inputs, table, rows) in metrics.items():
        functions = {
            "saccade": ours,
            "loops over a numpy table": lambda one=table, inputs=inputs: [one(a, b) for a, b in inputs],
            "loops over two lists": lambda one=rows, inputs=inputs: [one(a, b) for a, b in inputs],
        }
        if name == "FED":
            functions["saccade, regions looked up"] = lambda: gm.fixation_edit_distance(first, second, clusters)
        for function in functions.values():
            check(ours(), function())
        case = f"{name}, {PAIRS} pairs of 5 to 24 fixations, equal values"
        cases.append(compare(case, functions, work=PAIRS, unit="pairs", repeats=3, warmup=0, cpu_time=True))
        save("gaze", cases)  # what is measured stays if the next case is cut off
    for length in (10, 100, 300):
        count = 20 if length < 300 else 2
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
        cases.append(compare(case, functions, work=count, unit="pairs", repeats=3, warmup=0, cpu_time=True))
        save("gaze", cases)
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
            functions, work=12600, unit="pairs", repeats=2, warmup=0, cpu_time=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
