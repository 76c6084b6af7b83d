"""``saccade vlm evaluate``: scores of answers, beside greedy decoding and with intervals."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.apps.options import add_batch_options, batch_options
from saccade.apps.screen import table_lines
from saccade.apps.vlm_options import (
    add_generation_options,
    add_intervention_options,
    add_vlm_model_options,
    answer_plan,
    no_loading_bars,
)
from saccade.apps.vlm_questions import add_benchmark, moss_records, pope_questions
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.vlm import Question
    from saccade.vlm.evaluation import AnswerFile, Evaluation, Measured

__all__ = ["add_arguments", "document", "run"]

HEADLINES = {
    "pope": ("accuracy", "f1", "recall", "yes_ratio"),
    "chair": ("CHAIRs", "CHAIRi", "recall", "Len"),
    "mossbench": ("refusal_rate", "keyword_refusals"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_benchmark(parser)
    parser.add_argument(
        "--answers",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files to score and compare, or folders with one per set",
    )
    parser.add_argument(
        "-o", "--out", metavar="PATH", help="scores.json; with --model the folder for answers, rows and scores"
    )
    parser.add_argument("--rows", metavar="FILE", help="a row per answer with lmms-eval's names: .jsonl, .json, .csv")
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--scoring", default="official", help="pope: official, strict (the first word) or lmms_eval (default: official)"
    )
    group.add_argument("--variant", default="lemma", help="chair: lemma or 2018 (default: lemma)")
    group.add_argument(
        "--judge",
        choices=["keywords", "column"],
        default="keywords",
        help="mossbench: phrases of refusal, not the official metric, or what column 'judge' of the answers says",
    )
    group.add_argument("--resamples", type=int, default=2000, metavar="N", help="of bootstrap and test (default: 2000)")
    add_vlm_model_options(parser, required=False)
    parser.add_argument("--image-folder", metavar="DIR", help="with --model: where the images are (default: --data)")
    parser.add_argument("--num-images", type=int, default=500, metavar="N", help="chair with --model (default: 500)")
    add_intervention_options(parser)
    add_generation_options(parser)
    add_batch_options(parser)
    parser.set_defaults(batch_size=8)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vlm.evaluation import evaluate_runs, read_answers

    if args.model is None and not args.answers:
        raise ConfigError("Give --answers FILE..., or --model with -o FOLDER to write answers first.")
    if args.model is None and args.intervention is not None:
        raise ConfigError("--intervention needs --model; answers files say themselves how they were made.")
    sources = [Path(name) for name in args.answers]
    out = None if args.out is None else Path(args.out)
    rows = None if args.rows is None else Path(args.rows)
    if args.model is not None:
        if out is None or out.suffix:
            raise ConfigError("With --model, -o is the folder for answers and scores, e.g. -o out/.")
        done = write_answers(args, out)
        if args.dry_run:
            return 0
        sources = [*done, *sources]
        rows = rows or out / "rows.jsonl"
        out = out / "scores.json"
    files = [read_answers(source) for source in sources]
    evaluation = evaluate_runs(measure(args, files), seed=args.seed, resamples=args.resamples)
    save(args, evaluation, out, rows)
    if args.json:
        print(json.dumps(document(args, evaluation), ensure_ascii=False))
    else:
        print("\n".join(screen(args, evaluation)))
    failed = sum(int(facts["failed"] or 0) for facts in evaluation.facts.values())
    return 3 if failed else 0


def write_answers(args: argparse.Namespace, folder: Path) -> list[Path]:
    """Answer the benchmark's questions, plainly and under the intervention, and return the files."""
    from saccade.vlm import generate_answers

    no_loading_bars()
    questions = questions_of(args)
    plan = answer_plan(args)
    plans = [replace(plan, intervention=None, settings={})]
    if plan.intervention is not None:
        plans.append(plan)
    files = [folder / f"{one.intervention or 'none'}.jsonl" for one in plans]
    for one, file in zip(plans, files, strict=True):
        generate_answers(questions, one, out=file, options=batch_options(args))
    return files


def questions_of(args: argparse.Namespace) -> list[Question]:
    """Return the benchmark's questions with their pictures."""
    from saccade.vlm.evaluation import chair_prompts, mossbench_prompts, pope_prompts

    folder = args.image_folder or args.data
    if args.shard or args.limit:
        raise ConfigError(
            "Scores need every answer. Use vlm questions, vlm generate --shard and merge, then --answers."
        )
    if args.benchmark == "pope":
        return pope_prompts(pope_questions(args), folder)
    if args.benchmark == "chair":
        return chair_prompts(args.data, folder, count=args.num_images, seed=args.seed)
    records = moss_records(args)
    benign = mossbench_prompts([record for record in records if record.set == "benign"], folder)
    return [
        *benign,
        *mossbench_prompts([record for record in records if record.set != "benign"], args.contrast or folder),
    ]


def measure(args: argparse.Namespace, files: Sequence[AnswerFile]) -> list[Measured]:
    """Count the answers of each file."""
    from saccade.vlm.evaluation import (
        ObjectFinder,
        judge_column,
        measure_chair,
        measure_mossbench,
        measure_pope,
        read_chair,
    )

    if args.benchmark == "pope":
        questions = pope_questions(args)
        return [measure_pope(questions, file, scoring=args.scoring) for file in files]
    if args.benchmark == "chair":
        finder = ObjectFinder(args.variant)
        truth = read_chair(args.data, finder, files)
        if not any(name.startswith("captions") for name in truth.sources):
            note("no captions*.json: objects that people mention but nobody annotated count as hallucinated")
        return [measure_chair(truth, file, finder) for file in files]
    records = moss_records(args)
    judge = judge_column if args.judge == "column" else None
    if judge is None:
        note("refusals are screened by keywords, which is not the official metric; see --judge")
    return [measure_mossbench(records, file, judge=judge) for file in files]


def note(text: str) -> None:
    """Print a remark on standard error."""
    print(f"saccade vlm evaluate: {text}", file=sys.stderr)


def manner(args: argparse.Namespace) -> str:
    """Return the name of the scoring in force."""
    return str({"pope": args.scoring, "chair": args.variant, "mossbench": args.judge}[args.benchmark])


def document(args: argparse.Namespace, evaluation: Evaluation) -> dict[str, Any]:
    """Return scores, facts and comparisons as one JSON document."""
    runs = {
        name: {
            "intervention": evaluation.interventions[name],
            "facts": dict(facts),
            "scores": [
                {key: value for key, value in asdict(score).items() if key != "run"}
                for score in evaluation.scores
                if score.run == name
            ],
        }
        for name, facts in evaluation.facts.items()
    }
    return {
        "benchmark": args.benchmark,
        "scoring": manner(args),
        "seed": args.seed,
        "resamples": args.resamples,
        "runs": runs,
        "comparisons": [asdict(comparison) for comparison in evaluation.comparisons],
    }


def save(args: argparse.Namespace, evaluation: Evaluation, out: Path | None, rows: Path | None) -> None:
    """Write what was asked for."""
    from saccade.batch.tables import check_table_path, write_json, write_table

    if rows is not None:
        check_table_path(rows)
        write_table(rows, [{"run": name, **row} for name, part in evaluation.rows.items() for row in part])
    if out is not None:
        write_json(out, document(args, evaluation))


def screen(args: argparse.Namespace, evaluation: Evaluation) -> list[str]:
    """Return the tables for the screen."""
    metrics = [m for m in HEADLINES[args.benchmark] if any(score.metric == m for score in evaluation.scores)]
    groups = list(dict.fromkeys(score.group for score in evaluation.scores))
    lines = [f"{args.benchmark}, {manner(args)}; 95 % bootstrap intervals, {args.resamples} resamples", ""]
    header = ["RUN", "INTERVENTION", "SET"]
    for place, metric in enumerate(metrics):
        header += [metric.upper(), "95 %"] if place < 2 else [metric.upper()]  # all intervals are in the JSON
    rows = []
    for name, intervention in evaluation.interventions.items():
        for group in groups:
            cells = [name, intervention or "-", group]
            for place, metric in enumerate(metrics):
                score = evaluation.score(name, group, metric)
                interval = [f"{figure(score.low)}..{figure(score.high)}"] if place < 2 else []
                cells += [figure(score.value), *interval]
            rows.append(cells)
    lines += table_lines([header, *rows])
    facts = list(next(iter(evaluation.facts.values())))
    given = [[name, *(figure(part[fact]) for fact in facts)] for name, part in evaluation.facts.items()]
    lines += ["", *table_lines([["RUN", *(fact.upper() for fact in facts)], *given])]
    if evaluation.comparisons:
        lines += ["", *comparison_lines(evaluation, groups, metrics)]
    if "none" not in evaluation.interventions.values():
        lines += ["", "No file says intervention 'none': greedy decoding is not beside these scores."]
    return lines


def comparison_lines(evaluation: Evaluation, groups: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Return the table of differences: of the mean over sets, or of the first one."""
    shown = "macro" if "macro" in groups else groups[0]
    rows = [["DIFFERENCE", "SET", "METRIC", "VALUE", "95 %", "P", "P HOLM", "P MCNEMAR"]]
    for c in evaluation.comparisons:
        if c.group == shown and c.metric in metrics:
            names = f"{c.second} - {c.first}"
            interval = f"{figure(c.low)}..{figure(c.high)}"
            tests = [figure(c.p), figure(c.p_adjusted), figure(c.mcnemar_p)]
            rows.append([names, c.group, c.metric, figure(c.difference), interval, *tests])
    return table_lines(rows)


def figure(value: float | None) -> str:
    """Return four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"
