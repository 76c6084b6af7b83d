"""``saccade convert``: turn an official checkpoint into a saccade one."""

from __future__ import annotations

import argparse

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
    parser.add_argument("-m", "--model", metavar="NAME", help="timm name; a *.ckpt knows its own")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="*.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vision_backbones import convert_checkpoint

    done = convert_checkpoint(args.source, model=args.model, out=args.out, overwrite=args.overwrite)
    classes = f"{done.num_classes} classes" if done.num_classes else "no classifier"
    print(f"{args.out}: {done.model}, {len(done.report.matched)} keys, {classes}; none missing, unexpected or reshaped")
    return 0
