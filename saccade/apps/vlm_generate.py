"""``saccade vlm generate``: answers to questions about pictures."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from saccade.apps.options import add_batch_options, batch_options, comma_list
from saccade.apps.screen import finish_run
from saccade.apps.vlm_options import (
    add_generation_options,
    add_intervention_options,
    add_vlm_model_options,
    answer_plan,
    generation_options,
    load_model,
    no_loading_bars,
    settings_of,
)
from saccade.errors import ConfigError

__all__ = ["add_arguments", "changed_words", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--image", metavar="FILE", help="one picture; the answer is printed")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask about it")
    parser.add_argument(
        "--compare",
        type=comma_list,
        metavar="NAME,...",
        help="answers under several, changes marked: none,var,gift",
    )
    parser.add_argument("--jsonl", metavar="FILE", help="many questions: rows with id, image, prompt")
    parser.add_argument("--image-folder", metavar="DIR", help="where their images are (default: beside the file)")
    parser.add_argument("-o", "--out", metavar="FILE", help="table of answers: .jsonl, .json, .csv, .tsv or .parquet")
    add_vlm_model_options(parser)
    add_intervention_options(parser)
    add_generation_options(parser)
    group = parser.add_argument_group("several devices or nodes, through Lightning")
    group.add_argument("--devices", metavar="N", help="processes in each node; -b and -j count for each")
    group.add_argument("--num-nodes", type=int, default=1, metavar="N", help="default: 1")
    group.add_argument("--strategy", default="auto", metavar="NAME", help="Lightning's, e.g. ddp (default: auto)")
    add_batch_options(parser)
    parser.set_defaults(batch_size=8)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    one = args.image is not None and args.prompt is not None
    many = args.jsonl is not None and args.out is not None
    if one == many or (many and args.compare) or (one and args.out is not None):
        raise ConfigError("Give --image and --prompt (with or without --compare), or --jsonl and -o.")
    return run_one(args) if one else run_many(args)


def run_many(args: argparse.Namespace) -> int:
    """Answer a file of questions."""
    from saccade.vlm import generate_answers, read_questions

    no_loading_bars()
    questions = read_questions(args.jsonl, image_folder=args.image_folder)
    plan, options = answer_plan(args), batch_options(args)
    if args.devices is None:
        return finish_run(generate_answers(questions, plan, out=args.out, options=options), as_json=args.json)
    from saccade.apps.quiet import training_screen
    from saccade.vlm.predictor import predict_answers

    shared = {"devices": args.devices, "num_nodes": args.num_nodes, "strategy": args.strategy}
    with training_screen(args):
        summary = predict_answers(questions, plan, out=args.out, options=options, **shared)
    return 0 if summary is None else finish_run(summary, as_json=args.json)  # the first process has counted


def run_one(args: argparse.Namespace) -> int:
    """Answer one question and print the answer, or those of several interventions."""
    from saccade.datasets.images import read_image
    from saccade.vlm import make_intervention
    from saccade.vlm.answering import Answerer
    from saccade.vlm.questions import Question

    names = args.compare or [args.intervention or "none"]
    settings = settings_of(args.set)
    if len(names) > 1 and settings:
        raise ConfigError("--set belongs to one intervention; it cannot be combined with --compare.")
    methods = {
        name: [] if name == "none" else [make_intervention(name, settings, preset=args.preset)] for name in names
    }
    image = read_image(args.image)
    question = Question("question", args.image, args.prompt, Path(args.image))
    loaded = load_model(args)
    answerers = {name: Answerer(loaded, own, generation_options(args), args.seed) for name, own in methods.items()}
    for answerer in answerers.values():
        answerer.check()
    first = ""
    for name, answerer in answerers.items():
        (answer,) = answerer.answer([question], [image])
        if len(names) == 1:
            print(answer.text)
            break
        print(f"{name:>6}  {answer.text if not first else changed_words(first, answer.text)}")
        first = first or answer.text
    return 0


def changed_words(before: str, after: str) -> str:
    """Return the second text with words that the first does not have there in ``[brackets]``."""
    old, new = before.split(), after.split()
    parts = []
    for kind, _, _, start, stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = " ".join(new[start:stop])
        if words:
            parts.append(words if kind == "equal" else f"[{words}]")
    return " ".join(parts)
