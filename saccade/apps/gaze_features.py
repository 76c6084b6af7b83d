"""``saccade gaze features``: features of the objects in images, for training."""

from __future__ import annotations

import argparse

from saccade.apps.gaze_objects import add_box_options, add_encoder_options, box_source, encoder
from saccade.apps.options import add_input_options
from saccade.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_input_options(parser, out_help="*.h5, for --data.features of fit")
    add_box_options(parser)
    add_encoder_options(parser, required=True)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    from saccade.gaze.object_features import encode_objects

    loaded = encoder(args)
    if loaded is None:  # argparse insists on the option
        raise ConfigError("--encoder is missing.")
    done = encode_objects(args.inputs, boxes=box_source(args), encoder=loaded, out=args.out, overwrite=args.overwrite)
    print(f"{args.out}: {done.objects} objects in {done.images} images, {done.width} numbers each by {loaded.name}")
    return 0
