"""``saccade gaze predict``: where people look on images, by a trained model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from saccade.apps.gaze_objects import add_box_options, add_encoder_options, box_source, encoder
from saccade.apps.options import add_batch_options, add_input_options, batch_options
from saccade.apps.screen import finish_run
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.gaze.prediction import Query

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
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


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
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
