"""``saccade embed``: feature vectors of images, as HDF5, npy or zarr."""

from __future__ import annotations

import argparse

from saccade.apps.options import add_batch_options, add_input_options, add_model_options, batch_options, model_source
from saccade.apps.screen import finish_run

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "embed": [
        "saccade embed photos/ -m convnext_tiny --weights w.safetensors -o features.h5",
        "saccade embed photos/ -m vit_small_patch16_224 --pretrained -o tokens.h5 --pool none",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_input_options(parser, out_help="features: .h5, .npy or .zarr")
    add_model_options(parser)
    parser.add_argument("--layer", metavar="NAME", help="take the output of this module, e.g. blocks.6")
    parser.add_argument("--pool", choices=["avg", "token", "none"], help="default: as the model's classifier does")
    add_batch_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vision_backbones.inference import embed

    summary = embed(
        args.inputs,
        model=model_source(args),
        out=args.out,
        layer=args.layer,
        pool=args.pool,
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)
