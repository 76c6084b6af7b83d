"""``saccade analyze``: what the attention heads of a vision transformer do, and what each is worth."""

from __future__ import annotations

import argparse

from saccade.apps.options import add_batch_options, add_input_options, add_model_options, batch_options, model_source
from saccade.apps.screen import finish_run

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "analyze": [
        "saccade analyze photos/val -m runs/flowers -o report/",
        "saccade analyze photos/ -m vit_small_patch16_224 --pretrained -o report/ --importance none --limit 500",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_input_options(parser, out_help="folder for the report")
    add_model_options(parser)
    group = parser.add_argument_group("analysis")
    group.add_argument(
        "--importance",
        choices=["zero", "mean", "none"],
        default="zero",
        help="prune each head by setting its output to zero, or to its mean over the images; none leaves this out, by "
        "far the longest part (default: zero)",
    )
    group.add_argument(
        "--labels",
        choices=["auto", "folders", "predicted"],
        default="auto",
        help="true classes: names of folders, or the model's predictions (default: folders if all images lie in one)",
    )
    group.add_argument(
        "--pattern-images",
        type=int,
        default=64,
        metavar="N",
        help="cluster the attention maps of the first N images; 0: none (default: 64)",
    )
    add_batch_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vision_backbones.analysis import analyze

    summary = analyze(
        args.inputs,
        model=model_source(args),
        out=args.out,
        labels=args.labels,
        importance=args.importance,
        pattern_images=args.pattern_images,
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)
