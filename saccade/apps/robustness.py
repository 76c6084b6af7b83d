"""``saccade robustness``: accuracy under corruption and shift, with the metrics that papers report."""

from __future__ import annotations

import argparse
import dataclasses
import json

from saccade.apps.options import add_batch_options, add_model_options, batch_options, comma_list, model_source
from saccade.apps.screen import table_lines

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "robustness": [
        "saccade robustness photos/test -m runs/flowers -o corrupted/ --suite corruptions",
        "saccade robustness ImageNet-C/ -m resnet50 --weights w.pth -o c/ --suite imagenet-c --clean ImageNet/val",
    ]
}
SUITES = ("imagenet-c", "imagenet-p", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "corruptions")


def severity_list(text: str) -> list[int]:
    """Parse ``"1,3,5"``."""
    return [int(part) for part in comma_list(text)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "roots", nargs="+", metavar="ROOT", help="folder of the suite; for imagenet-c and -p also several"
    )
    parser.add_argument("-o", "--out", required=True, metavar="PATH", help="folder for metrics, tables and plot")
    add_model_options(parser)
    group = parser.add_argument_group("suite")
    group.add_argument(
        "--suite",
        required=True,
        choices=SUITES,
        help="which one; corruptions: made on the fly of the images in ROOT/CLASS/, not comparable with imagenet-c",
    )
    group.add_argument(
        "--clean", metavar="FOLDER", help="imagenet-c: clean images by class, for relative mCE and retention"
    )
    group.add_argument(
        "--corruptions",
        type=comma_list,
        metavar="A,B",
        help="these, or groups: noise,blur,weather,digital,extra (default: all)",
    )
    group.add_argument(
        "--severities", type=severity_list, default=[1, 2, 3, 4, 5], metavar="N,N", help="default: 1,2,3,4,5"
    )
    group.add_argument("--difficulty", type=int, default=1, metavar="N", help="imagenet-p: 1, 2 or 3 (default: 1)")
    group.add_argument(
        "--reference", metavar="FILE", help="imagenet-p: parts.csv of the model that mFR and mT5D divide by (AlexNet)"
    )
    add_batch_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vision_backbones.robustness import evaluate_robustness

    summary = evaluate_robustness(
        args.roots,
        model=model_source(args),
        out=args.out,
        suite=args.suite,
        clean=args.clean,
        corruptions=args.corruptions,
        severities=args.severities,
        difficulty=args.difficulty,
        reference=args.reference,
        options=batch_options(args),
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(summary), ensure_ascii=False))
    elif summary.metrics and not args.quiet:
        print("\n".join(table_lines([("metric", "value"), *((n, f"{v:.2f}") for n, v in summary.metrics.items())])))
    return summary.exit_code
