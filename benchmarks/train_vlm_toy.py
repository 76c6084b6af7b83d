"""A small LLaVA that names what usually goes together, and what decoding interventions do about it.

The model (``benchmarks/toy_vlm.py``) is trained on drawn scenes in which the halves of a pair, fork and knife for
instance, nearly always come together, three seeds. It is tested on scenes where they come together half of the time:
plain decoding names partners that are not there. Each method's settings are chosen on calibration scenes, which are not
those of the test; then POPE's three question sets and CHAIR over descriptions are scored with ``saccade.vlm``.

Runs leave a folder per seed below ``runs/train_vlm_toy`` of the repository (or SACCADE_TRAIN_VLM_TOY); what is there is
not done again. The weights stay there. Test scenes are drawn anew for each seed, so that all images are independent
when the seeds are pooled.
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS
from benchmarks.toy_methods import Answers, Items, Method, answer, calibrate, candidates, choose, combined, measure
from benchmarks.toy_picture import draw_answers, draw_looks
from benchmarks.toy_vlm import Recipe, train_toy
from saccade.apps.measure import machine
from saccade.vlm import load_vlm
from saccade.vlm.evaluation import Measured, compare_runs, holm, score_run

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("SACCADE_TRAIN_VLM_TOY") or REPOSITORY / "runs" / "train_vlm_toy")
COMBINATIONS = ("VAR + VHR", "GIFT + VCD", "VHR + VCD")
BENCHMARKS = ("chair", "partners", "pope")
COLUMNS = {
    "CHAIRs": ("chair", "all", "CHAIRs"),
    "CHAIRi": ("chair", "all", "CHAIRi"),
    "recall": ("chair", "all", "recall"),
    "Len": ("chair", "all", "Len"),
    "partner": ("partners", "all", "partner"),
    "other": ("partners", "all", "other"),
    "random": ("pope", "random", "accuracy"),
    "popular": ("pope", "popular", "accuracy"),
    "advers.": ("pope", "adversarial", "accuracy"),
    "macro": ("pope", "macro", "accuracy"),
    "F1": ("pope", "macro", "f1"),
    "yes": ("pope", "macro", "yes_ratio"),
}
COMPARED = ("CHAIRs", "CHAIRi", "recall", "partner", "random", "advers.", "macro")


@dataclass(frozen=True)
class Study:
    """How much is done.

    Args:
        recipe: Of training.
        seeds: Of training.
        calibration: Scenes on which settings are chosen.
        test: Scenes on which methods are compared.
        part: Scenes after whose answers a run can be interrupted.
    """

    recipe: Recipe = field(default_factory=Recipe)
    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 16
    test: int = 160
    part: int = 40


def train(study: Study, seed: int, folder: Path) -> None:
    """Train a model, and note the outcome in ``training.json``, unless that is there."""
    path = folder / "training.json"
    if not path.exists():
        print(f"seed {seed}", flush=True)
        write(path, {"seed": seed, **train_toy(study.recipe, seed, folder)})


def evaluate(study: Study, seed: int, folder: Path) -> None:
    """Choose settings (``chosen.json``) and answer everything about the test scenes (``answers*.json``)."""
    parts = range(-(-study.test // study.part))
    if all((folder / f"answers{number}.json").exists() for number in parts):
        return
    loaded = load_vlm(f"local-dir:{folder / 'model'}")
    methods = chosen_methods(study, seed, folder, loaded)
    items = Items([seed, 7], study.test)
    for number in parts:
        path = folder / f"answers{number}.json"
        if path.exists():
            continue
        keys = list(items.scenes)[number * study.part : (number + 1) * study.part]
        found, seconds = answer(loaded, methods, items, keys)
        rows = {name: [[*asked, *said] for asked, said in answers.items()] for name, answers in found.items()}
        write(path, {"answers": rows, "seconds": seconds})
        print(f"  seed {seed}: test scenes {keys[0]} to {keys[-1]} answered", flush=True)


def chosen_methods(study: Study, seed: int, folder: Path, loaded: Any) -> list[Method]:  # noqa: ANN401
    """Return the methods of the test with their settings, chosen on calibration scenes once."""
    path = folder / "chosen.json"
    items = Items([seed, 8], study.calibration)
    found = calibrate(loaded, items)
    tried = candidates(loaded, found)
    if path.exists():
        table = json.loads(path.read_text())["scores"]
        kept = [Method("greedy")] + [
            max(zip(methods, table[name], strict=True), key=lambda pair: pair[1]["score"])[0]
            for name, methods in tried.items()
        ]
    else:
        kept, table = choose(loaded, items, tried)
        facts = {
            "tau": found.tau,
            "sink_channels": found.channels,
            "prompts_with_a_sink_in_the_image": found.sinks,
            "saliency_layers": found.gift.saliency_layers,
            "enhancement_layers": found.gift.enhancement_layers,
        }
        settings = {method.name: dict(method.settings) for method in kept}
        write(path, {"found": facts, "kept": settings, "scores": table})
        print(f"  seed {seed}: {facts}\n  {settings}", flush=True)
    return [*kept, *combined(kept, *COMBINATIONS)]


def write(path: Path, content: Any) -> None:  # noqa: ANN401
    """Write JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(path)


def read_answers(study: Study, seed: int, folder: Path) -> tuple[dict[str, Answers], dict[str, float]]:
    """Return the answers about the test scenes, and the CPU seconds that they took, by method."""
    answers: dict[str, Answers] = {}
    seconds: dict[str, float] = {}
    for number in range(-(-study.test // study.part)):
        saved = json.loads((folder / f"answers{number}.json").read_text())
        for name, rows in saved["answers"].items():
            answers.setdefault(name, {}).update({(key, text): (said, tokens) for key, text, said, tokens in rows})
            seconds[name] = seconds.get(name, 0.0) + saved["seconds"][name]
    return answers, seconds


def pooled(parts: Sequence[Measured]) -> Measured:
    """Return the runs of several seeds as one; images of different seeds are different."""
    first = parts[0]
    return Measured(
        first.name,
        first.intervention,
        tuple(f"{number}/{unit}" for number, part in enumerate(parts) for unit in part.units),
        np.concatenate([part.counts for part in parts]),
        first.statistic,
        {key: np.concatenate([part.outcomes[key] for part in parts]) for key in first.outcomes},
    )


def summarise(study: Study, by_seed: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Return a row per method: each score with its mean and spread over seeds, pooled interval and test."""
    names = dict.fromkeys(name for s in study.seeds for name in by_seed[s][0])
    rows = []
    for name in names:
        seeds = [s for s in study.seeds if name in by_seed[s][0]]  # VAR needs sinks, which not every model has
        together = {kind: pooled([by_seed[s][0][name][kind] for s in seeds]) for kind in BENCHMARKS}
        intervals = {(kind, s.group, s.metric): s for kind in BENCHMARKS for s in score_run(together[kind])}
        single = {kind: [statistic_of(by_seed[s][0][name][kind]) for s in seeds] for kind in BENCHMARKS}
        row: dict[str, Any] = {"method": name, "seeds": seeds, "scores": {}}
        for column, (kind, group, metric) in COLUMNS.items():
            values = [float(found[group, metric]) for found in single[kind]]
            pool = intervals[kind, group, metric]
            row["scores"][column] = {
                "seeds": values,
                **spread(values),
                "pooled": pool.value,
                "interval": [pool.low, pool.high],
            }
        costs = [by_seed[s][1][name] / by_seed[s][1]["greedy"] for s in seeds]
        row |= {
            "unparsed": [by_seed[s][0][name]["pope"].facts["unparsed"] for s in seeds],
            "empty": [by_seed[s][0][name]["chair"].facts["empty"] for s in seeds],
            "cost": {"seeds": costs, **spread(costs)},
        }
        if name != "greedy":
            greedy = {kind: pooled([by_seed[s][0]["greedy"][kind] for s in seeds]) for kind in BENCHMARKS}
            row["against_greedy"] = against(greedy, together)
        rows.append(row)
    for column in COMPARED:
        tests = [row["against_greedy"][column] for row in rows if "against_greedy" in row]
        for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["p_holm"] = p
    return rows


def statistic_of(measured: Measured) -> Mapping[tuple[str, str], Any]:
    """Return the scores of a run."""
    return measured.statistic(measured.counts.sum(0))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard deviation."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def against(greedy: Mapping[str, Measured], other: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """Return the pooled differences of a method from plain decoding, with paired intervals and tests."""
    found = {(kind, c.group, c.metric): c for kind in BENCHMARKS for c in compare_runs(greedy[kind], other[kind])}
    chosen = {column: found[COLUMNS[column]] for column in COMPARED}
    return {
        column: {"difference": c.difference, "low": c.low, "high": c.high, "p": c.p} for column, c in chosen.items()
    }


def report(study: Study, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the tables."""
    print(f"\nmean and (standard deviation) over {len(study.seeds)} seeds; cost: CPU seconds over those of greedy")
    print(f"{'':<12}{'seeds':>6}" + "".join(f"{column:>15}" for column in COLUMNS) + f"{'unparsed':>10}{'cost':>14}")
    for row in rows:
        cells = "".join(f"{cell(row['scores'][column]):>15}" for column in COLUMNS)
        print(f"{row['method']:<12}{len(row['seeds']):>6}{cells}{sum(row['unparsed']):>10}{cell(row['cost'], 2):>14}")
    by_seed = zip(*(rows[0]["scores"][column]["seeds"] for column in COLUMNS), strict=True)
    print("\ngreedy, seed by seed\n" + " " * 18 + "".join(f"{column:>14}" for column in COLUMNS))
    for seed, values in zip(study.seeds, by_seed, strict=True):
        print(f"{seed:<18}" + "".join(f"{value:>14.3f}" for value in values))
    print("\nagainst greedy, seeds pooled: difference [95 % paired bootstrap], * if p < 0.05 (permutation, Holm)")
    print(f"{'':<12}" + "".join(f"{column:>26}" for column in COMPARED))
    for row in rows:
        if "against_greedy" in row:
            tests = (row["against_greedy"][column] for column in COMPARED)
            cells = (
                f"{t['difference']:+.3f} [{t['low']:+.3f}, {t['high']:+.3f}]{'*' if t['p_holm'] < 0.05 else ' '}"
                for t in tests
            )
            print(f"{row['method']:<12}" + "".join(f"{text:>26}" for text in cells))


def cell(values: Mapping[str, Any], digits: int = 3) -> str:
    """Return mean and standard deviation as text."""
    sd = values["sd"]
    return f"{values['mean']:.{digits}f} ({'-' if sd is None else format(sd, f'.{digits}f')})"


def draw(
    study: Study,
    rows: Sequence[Mapping[str, Any]],
    items: Items,
    answers: Mapping[str, Answers],
    folder: Path,
    pictures: Path,
) -> None:
    """Draw scenes of the first seed, with the answers of plain decoding and of the best method on the test."""
    order = sorted(rows, key=lambda row: row["scores"]["CHAIRi"]["mean"] - row["scores"]["macro"]["mean"])
    names = [row["method"] for row in order if study.seeds[0] in row["seeds"]]
    draw_answers(items, answers, list(dict.fromkeys(["greedy", names[0]])), pictures / "vlm-toy.png")
    loaded = load_vlm(f"local-dir:{folder / 'model'}")
    by_name = {method.name: method for method in chosen_methods(study, study.seeds[0], folder, loaded)}
    edits = next(by_name[name] for name in names if by_name[name].interventions and by_name[name].rule is None)
    draw_looks(loaded, items, answers["greedy"], edits, pictures / "vlm-toy-attend.png")


def run(study: Study, folder: Path, results: Path, pictures: Path) -> None:
    """Do what is missing, print the tables, and save them and a picture."""
    torch.set_num_threads(1)
    for seed in study.seeds:
        train(study, seed, folder / f"seed{seed}")
    for seed in study.seeds:
        evaluate(study, seed, folder / f"seed{seed}")
    items = {seed: Items([seed, 7], study.test) for seed in study.seeds}
    given = {seed: read_answers(study, seed, folder / f"seed{seed}") for seed in study.seeds}
    by_seed = {s: (measure(items[s], given[s][0], list(items[s].scenes)), given[s][1]) for s in study.seeds}
    rows = summarise(study, by_seed)
    report(study, rows)
    draw(study, rows, items[study.seeds[0]], given[study.seeds[0]][0], folder / f"seed{study.seeds[0]}", pictures)
    runs = [
        {name: json.loads((folder / f"seed{seed}" / f"{name}.json").read_text()) for name in ("training", "chosen")}
        for seed in study.seeds
    ]
    write(results, {"machine": machine(), "load": os.getloadavg(), "study": asdict(study), "rows": rows, "runs": runs})


def main() -> None:
    """Run the study."""
    run(Study(), FOLDER, RESULTS / "train_vlm_toy.json", REPOSITORY / "docs" / "images")


if __name__ == "__main__":
    main()
