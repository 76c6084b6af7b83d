"""What ``saccade gaze predict`` and ``features`` share: where objects are, and what encodes them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.gaze.object_boxes import BoxSource
    from saccade.gaze.object_features import ObjectEncoder

__all__ = ["add_box_options", "add_encoder_options", "box_source", "encoder"]


def add_box_options(parser: argparse.ArgumentParser) -> None:
    """Add where the objects come from."""
    group = parser.add_argument_group("objects")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--boxes", metavar="FILE", help="table with image, x1, y1, x2, y2 in px, and label if known")
    source.add_argument("--grid", metavar="ROWSxCOLS", help="equal cells, e.g. 6x14")
    source.add_argument(
        "--detector-weights", metavar="FILE", help="find them by torchvision's fasterrcnn_mobilenet_v3_large_320_fpn"
    )
    group.add_argument(
        "--detector-threshold", type=float, default=0.5, metavar="F", help="least score of a detection (default: 0.5)"
    )


def add_encoder_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the encoder of the objects."""
    group = parser.add_argument_group("encoder")
    group.add_argument("--encoder", required=required, metavar="NAME", help="timm name, open_clip:MODEL[/TAG], ...")
    group.add_argument("--encoder-weights", metavar="PATH", help="state dict, .safetensors or .pth")
    group.add_argument("--pretrained", action="store_true", help="allow timm to download its weights")
    group.add_argument("--random-weights", action="store_true", help="run although the encoder has no trained weights")


def box_source(args: argparse.Namespace) -> BoxSource:
    """Return where the objects come from."""
    from saccade.gaze.object_boxes import boxes_by_detector, boxes_on_grid, read_boxes
    from saccade.gaze.scenes import parse_grid

    if args.boxes is not None:
        return read_boxes(args.boxes)
    if args.grid is not None:
        return boxes_on_grid(*parse_grid(args.grid))
    return boxes_by_detector(args.detector_weights, threshold=args.detector_threshold)


def encoder(args: argparse.Namespace) -> ObjectEncoder | None:
    """Load the encoder of the objects, if one was named."""
    from saccade.batch import resolve_device
    from saccade.gaze.object_features import ObjectEncoder
    from saccade.vision_backbones import ModelSource, load_model
    from saccade.vision_backbones.features import feature_function

    if args.encoder is None:
        return None
    loaded = load_model(
        ModelSource(
            args.encoder,
            weights=args.encoder_weights,
            pretrained=args.pretrained,
            random_weights=args.random_weights,
        ),
        seed=args.seed,
    )
    device = resolve_device(args.device)
    loaded.model.to(device)
    function = feature_function(loaded.model, layer=None, pool=None)
    return ObjectEncoder(function, loaded.data_config, name=args.encoder, device=device)
