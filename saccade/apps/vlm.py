"""``saccade vlm``: multimodal models under interventions, each sub-command in a module of its own."""

from __future__ import annotations

import argparse
import importlib

__all__ = ["EXAMPLES", "SUBCOMMANDS", "add_arguments", "run"]

EXAMPLES = {
    "vlm": [
        "saccade vlm generate -m local-dir:llava/ --image cat.jpg --prompt 'Describe the image.' --compare none,var",
        "saccade vlm attend -m local-dir:llava/ --image cat.jpg --prompt 'Describe the image.' -o looks/ "
        "--intervention var",
    ]
}

# name, one line, module of saccade.apps with add_arguments(parser) and run(args) -> int
SUBCOMMANDS = (
    ("generate", "answers to questions about pictures", "vlm_generate"),
    ("attend", "pictures of where the words of answers looked", "vlm_attend"),
    ("questions", "the question file of a benchmark", "vlm_questions"),
    ("evaluate", "scores of answers: POPE, CHAIR, MOSSBench", "vlm_evaluate"),
    ("calibrate", "sink channels and layers of a model that no paper lists", "vlm_calibrate"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(name for name, _, _ in SUBCOMMANDS))
    for name, summary, module_name in SUBCOMMANDS:
        module = importlib.import_module(f"saccade.apps.{module_name}")
        part = kinds.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        module.add_arguments(part)
        part.set_defaults(run_kind=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    code: int = args.run_kind(args)
    return code
