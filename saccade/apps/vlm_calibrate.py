"""``saccade vlm calibrate``: sink channels and layers of a model that no paper lists."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from saccade.apps.vlm_options import add_vlm_model_options, load_model
from saccade.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--jsonl", required=True, metavar="FILE", help="questions to calibrate on: id, image, prompt")
    parser.add_argument("--image-folder", metavar="DIR", help="where their images are (default: beside the file)")
    parser.add_argument("-o", "--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--limit", type=int, default=32, metavar="N", help="questions used (default: 32)")
    parser.add_argument("--tau", type=float, default=20.0, metavar="F", help="of sink channels (default: 20)")
    add_vlm_model_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])


def run(args: argparse.Namespace) -> int:
    """Run the command; the result goes to standard output as JSON."""
    from saccade.batch.tables import write_json
    from saccade.datasets.images import read_image
    from saccade.vlm import find_sink_channels, read_questions, select_gift_layers
    from saccade.vlm.answering import Answerer

    questions = read_questions(args.jsonl, image_folder=args.image_folder)[: args.limit]
    answerer = Answerer(load_model(args))
    prompts = [answerer.inputs([question], [read_image(question.path)]) for question in questions]
    found: dict[str, object] = {"model": args.model, "questions": len(prompts)}
    try:
        found["sink_channels"] = list(find_sink_channels(answerer.loaded.model, prompts, tau=args.tau))
    except ConfigError as error:  # GIFT's layers are of use without VAR's channels
        print(f"saccade vlm calibrate: {error}", file=sys.stderr)
        found["sink_channels"] = None
    layers = select_gift_layers(answerer.loaded.model, prompts, tokenizer=answerer.loaded.processor)
    found["saliency_layers"] = list(layers.saliency_layers)
    found["enhancement_layers"] = list(layers.enhancement_layers)
    for name in ("rise", "visual_share", "question_share"):
        found[name] = [round(value, 4) for value in vars(layers)[name].tolist()]
    print(json.dumps(found))
    if args.out is not None:
        write_json(Path(args.out), found)
    return 0
