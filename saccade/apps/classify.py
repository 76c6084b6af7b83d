"""``saccade classify``: class probabilities of images, as a table."""

from __future__ import annotations

import argparse

from saccade.apps.options import add_batch_options, add_input_options, add_model_options, batch_options, model_source
from saccade.apps.screen import finish_run

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "classify": [
        "saccade classify photos/ -m runs/flowers -o predictions.csv",
        "saccade classify photos/ -m convnext_tiny --weights w.safetensors -o predictions.parquet --topk 3",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_input_options(parser, out_help="table: .csv, .tsv, .jsonl, .json or .parquet")
    add_model_options(parser)
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes per row (default: 5)")
    parser.add_argument("--logits", metavar="FILE", help="also write all logits: .h5, .npy or .zarr")
    add_batch_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vision_backbones.inference import classify

    summary = classify(
        args.inputs,
        model=model_source(args),
        out=args.out,
        topk=args.topk,
        logits=args.logits,
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)
