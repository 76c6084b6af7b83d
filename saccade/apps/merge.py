"""``saccade merge``: unite the outputs of ``--shard`` runs."""

from __future__ import annotations

import argparse
import sys

from saccade.apps.screen import finish_run

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "merge": [
        "saccade merge predictions.csv",
        "saccade merge shards/features.shard*of3.h5 -o features.h5",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="OUTPUT",
        help="the unsharded name (predictions.csv, overlays/), or all shard files",
    )
    parser.add_argument("-o", "--out", metavar="PATH", help="united output (default: the unsharded name)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.batch import merge_shards
    from saccade.gaze.predicted_paths import write_predictions

    summary = merge_shards(args.inputs, out=args.out, writers={"gaze predict": write_predictions})
    counts = f"done {summary.done:,}  failed {summary.failed:,}"
    print(f"{counts}   united in {summary.out}   details: {summary.details}", file=sys.stderr)
    return finish_run(summary, as_json=args.json)
