"""``saccade convert``: turn an official checkpoint into a saccade one."""

from __future__ import annotations

import argparse

from saccade.apps.mil_catalogue import AGGREGATORS
from saccade.errors import ConfigError

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "convert": [
        "saccade convert OFFICIAL.pth -m convnext_tiny -o convnext_tiny.safetensors",
        "saccade convert runs/flowers -o flowers.safetensors",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source", metavar="CHECKPOINT", help=".pth, .pt, .safetensors; or a training checkpoint *.ckpt or run folder"
    )
    parser.add_argument(
        "-m", "--model", metavar="NAME", help="timm name, oat, or one of `list mil`; a *.ckpt of saccade knows its own"
    )
    parser.add_argument("--position-table", metavar="FILE", help="of -m oat: the R x P table, .npy, .csv or .pt")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="*.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.model == "oat":
        return convert_scanpath_model(args)
    if args.position_table is not None:
        raise ConfigError("--position-table belongs to -m oat.")
    if args.model in {aggregator.name for aggregator in AGGREGATORS}:
        return convert_mil_model(args)
    from saccade.vision_backbones import convert_checkpoint

    done = convert_checkpoint(args.source, model=args.model, out=args.out, overwrite=args.overwrite)
    classes = f"{done.num_classes} classes" if done.num_classes else "no classifier"
    print(f"{args.out}: {done.model}, {len(done.report.matched)} keys, {classes}; none missing, unexpected or reshaped")
    return 0


def convert_mil_model(args: argparse.Namespace) -> int:
    """Convert weights of the ACMIL, CLAM, TransMIL, DSMIL or MIL-Lab repositories."""
    from saccade.mil.convert import convert_aggregator

    done = convert_aggregator(args.source, model=args.model, out=args.out, overwrite=args.overwrite)
    shape = f"features of width {done.feature_dim}, {done.num_classes} logits, {len(done.report.matched)} keys"
    left = f"; left out, no weights: {', '.join(done.dropped)}" if done.dropped else ""
    print(f"{args.out}: {done.model}, {shape}; none missing, unexpected or reshaped{left}")
    return 0


def convert_scanpath_model(args: argparse.Namespace) -> int:
    """Convert official weights of OAT."""
    from saccade.gaze.convert import convert_oat

    if args.position_table is None:
        raise ConfigError("Official OAT checkpoints lack the position table: name its file with --position-table.")
    done = convert_oat(args.source, table=args.position_table, out=args.out, overwrite=args.overwrite)
    shape = f"width {done.options['width']}, {done.options['encoder_layers']} + {done.options['decoder_layers']} layers"
    print(f"{args.out}: oat, {shape}, {len(done.report.matched)} keys; none missing, unexpected or reshaped")
    return 0
