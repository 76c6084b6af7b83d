"""``saccade gaze``: scanpaths, each sub-command in a module of its own."""

from __future__ import annotations

import argparse
import importlib

__all__ = ["EXAMPLES", "SUBCOMMANDS", "add_arguments", "run"]

EXAMPLES = {
    "gaze": [
        "saccade gaze metrics --pred predicted.csv --truth human.csv -o pairs.csv",
        "saccade gaze split human.csv --by image -o splits/",
    ]
}

# name, one line, module of saccade.apps with add_arguments(parser) and run(args) -> int
SUBCOMMANDS = (
    ("predict", "scanpaths on images, by a trained model", "gaze_predict"),
    ("plot", "pictures, heat maps and animations of scanpaths", "gaze_plot"),
    ("metrics", "scores of scanpaths beside human agreement and chance", "gaze_metrics"),
    ("convert", "scanpaths from one file format to another", "gaze_convert"),
    ("split", "training, validation and test parts that share no image, target or viewer", "gaze_split"),
    ("features", "features of the objects in images, for training", "gaze_features"),
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
