"""``saccade gaze predict`` and ``features``: paths on images, and what models see of the objects in them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from saccade.apps.options import add_batch_options, add_input_options, batch_options
from saccade.apps.screen import finish_run
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.gaze.object_boxes import BoxSource
    from saccade.gaze.object_features import ObjectEncoder
    from saccade.gaze.prediction import Query

__all__ = ["add_feature_arguments", "add_predict_arguments", "run_features", "run_predict"]


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


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``predict``."""
    add_input_options(parser, out_help="*.csv, *.h5 or another format of scanpaths")
    parser.add_argument("-m", "--model", required=True, metavar="RUN", help="run folder or *.ckpt of fit -c gaze/oat")
    add_box_options(parser)
    search = parser.add_argument_group("search")
    what = search.add_mutually_exclusive_group()
    what.add_argument("--target", metavar="NAME|INDEX|BOX", help="object to look for: label, index or x1,y1,x2,y2")
    what.add_argument("--task-text", metavar="TEXT", help="describe it in words, for models trained on CLIP features")
    what.add_argument("--queries", metavar="FILE", help="table with image and target, a row per search")
    search.add_argument("--viewer", metavar="NAME", help="predict this viewer, for models with num_viewers")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--sampling", choices=["sample", "greedy", "beam"], default="sample", help="default: sample")
    decoding.add_argument("--samples", type=int, default=10, metavar="N", help="paths per image (default: 10)")
    decoding.add_argument("--max-length", type=int, metavar="N", help="most fixations (default: as in training)")
    decoding.add_argument("--temperature", type=float, default=1.0, metavar="F", help="of sampling (default: 1)")
    decoding.add_argument("--top-p", type=float, default=1.0, metavar="F", help="of sampling (default: 1, everything)")
    decoding.add_argument("--length-penalty", type=float, default=0.0, metavar="F", help="of beams (default: 0)")
    decoding.add_argument("--inhibition", type=int, default=0, metavar="N", help="no return to the last N objects")
    add_encoder_options(parser, required=False)
    add_batch_options(parser)


def run_predict(args: argparse.Namespace) -> int:
    """Run ``predict``."""
    from saccade.gaze.prediction import Strategy, predict_scanpaths

    strategy = Strategy(
        kind=args.sampling,
        paths=args.samples,
        max_length=args.max_length,
        temperature=args.temperature,
        top_p=args.top_p,
        length_penalty=args.length_penalty,
        inhibition=args.inhibition,
        viewer=args.viewer,
    )
    summary = predict_scanpaths(
        args.inputs,
        model=args.model,
        boxes=box_source(args),
        out=args.out,
        queries=queries(args),
        strategy=strategy,
        encoder=encoder(args),
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)


def box_source(args: argparse.Namespace) -> BoxSource:
    """Return where the objects come from."""
    from saccade.gaze.object_boxes import boxes_by_detector, boxes_on_grid, read_boxes
    from saccade.gaze.scenes import parse_grid

    if args.boxes is not None:
        return read_boxes(args.boxes)
    if args.grid is not None:
        return boxes_on_grid(*parse_grid(args.grid))
    return boxes_by_detector(args.detector_weights, threshold=args.detector_threshold)


def queries(args: argparse.Namespace) -> Query | dict[str, list[Query]] | None:
    """Return what is looked for."""
    from saccade.gaze.object_features import clip_text_features
    from saccade.gaze.prediction import Query, read_queries

    if args.queries is not None:
        return read_queries(args.queries)
    if args.task_text is not None:
        if args.encoder is None:
            raise ConfigError("--task-text needs --encoder open_clip:MODEL/TAG, the encoder of the model's training.")
        (features,) = clip_text_features(args.encoder, [args.task_text], weights=args.encoder_weights)
        return Query(task=args.task_text, features=features)
    return None if args.target is None else Query(target=args.target)


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


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``features``."""
    add_input_options(parser, out_help="*.h5, for --data.features of fit")
    add_box_options(parser)
    add_encoder_options(parser, required=True)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run_features(args: argparse.Namespace) -> int:
    """Run ``features``."""
    from saccade.gaze.object_features import encode_objects

    loaded = encoder(args)
    if loaded is None:  # argparse insists on the option
        raise ConfigError("--encoder is missing.")
    done = encode_objects(args.inputs, boxes=box_source(args), encoder=loaded, out=args.out, overwrite=args.overwrite)
    print(f"{args.out}: {done.objects} objects in {done.images} images, {done.width} numbers each by {loaded.name}")
    return 0
