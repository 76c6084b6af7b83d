"""``saccade attend``: pictures of where a model looks."""

from __future__ import annotations

import argparse

from saccade.apps.options import add_batch_options, add_input_options, add_model_options, batch_options, model_source
from saccade.apps.screen import finish_run

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "attend": [
        "saccade attend photos/ -m runs/flowers -o overlays/",
        "saccade attend photo.jpg -m biformer_tiny --weights w.safetensors -o routes/ --method routes --at 310,180",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_input_options(parser, out_help="folder for the pictures, one PNG per image")
    add_model_options(parser)
    group = parser.add_argument_group("map")
    group.add_argument(
        "--method",
        choices=["auto", "rollout", "last-layer", "cam", "routes", "kernels"],
        default="auto",
        help="auto: attention rollout for global-attention ViTs, else last-layer attention, else class activation; "
        "routes: the regions that one place reads (BiFormer); kernels: those that one place makes (OverLoCK)",
    )
    group.add_argument("--layer", metavar="NAME", help="read this module, e.g. blocks.6 (default: the last)")
    group.add_argument(
        "--class", dest="class_name", metavar="CLASS", help="map this class, by name or index (default: the top class)"
    )
    group.add_argument(
        "--at",
        metavar="X,Y",
        help="the place for routes and kernels: pixels of the photograph (310,180) or shares of its sides (0.5,0.25) "
        "(default: the middle)",
    )
    group.add_argument(
        "--heads", default="mean", metavar="mean|max|N", help="merge attention heads, or take one (default: mean)"
    )
    group.add_argument("--alpha", type=float, default=0.5, metavar="F", help="opacity, 0 to 1 (default: 0.5)")
    group.add_argument("--maps", metavar="FILE", help="also write the maps as an array: .h5, .npy or .zarr")
    add_batch_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vision_backbones.attention_overlays import attend
    from saccade.vision_backbones.places import parse_place

    summary = attend(
        args.inputs,
        model=model_source(args),
        out=args.out,
        method=args.method,
        layer=args.layer,
        class_name=args.class_name,
        heads=args.heads,
        at=None if args.at is None else parse_place(args.at),
        alpha=args.alpha,
        maps=args.maps,
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)
