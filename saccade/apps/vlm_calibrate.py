"""``saccade vlm calibrate``: sink channels and layers of a model that no paper lists."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.apps.vlm_options import add_vlm_model_options, load_model, number_list
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from saccade.vlm import Answerer, Question

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--jsonl", required=True, metavar="FILE", help="questions to calibrate on: id, image, prompt")
    parser.add_argument("--image-folder", metavar="DIR", help="where their images are (default: beside the file)")
    parser.add_argument("-o", "--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--limit", type=int, default=32, metavar="N", help="questions used (default: 32)")
    parser.add_argument("--tau", type=float, default=20.0, metavar="F", help="of sink channels (default: 20)")
    group = parser.add_argument_group("heads of ACT")
    group.add_argument(
        "--act-heads", action="store_true", help="try every head: a pass for each head and question with a reference"
    )
    group.add_argument("--layers", type=number_list, metavar="N,...", help="default: the third to the last but one")
    group.add_argument("--preset", choices=["paper", "released_code"], default="paper", help="of ACT (default: paper)")
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
    if args.act_heads:
        found |= act_heads(args, answerer, questions, prompts)
    print(json.dumps(found))
    if args.out is not None:
        write_json(Path(args.out), found)
    return 0


def act_heads(
    args: argparse.Namespace, answerer: Answerer, questions: Sequence[Question], prompts: Sequence[dict[str, Tensor]]
) -> dict[str, object]:
    """Return ACT's heads, and the gain of each, in the form that ``--set heads=FILE`` reads."""
    from saccade.vlm import ACT, find_act_heads

    missing = [question.id for question in questions if not str(question.extra.get("reference", "")).strip()]
    if missing:
        raise ConfigError(f"--act-heads needs a column 'reference', the right answer; question {missing[0]} has none.")
    references = [answerer.reference_ids(str(question.extra["reference"])) for question in questions]
    result = find_act_heads(
        answerer.loaded.model,
        prompts,
        references,
        act=ACT.presets()[args.preset],
        layers=args.layers,
        progress=lambda done, total: print(f"layer {done} of {total}", file=sys.stderr),
    )
    gain = {
        str(layer): [round(g, 5) for g in row.tolist()] for layer, row in enumerate(result.gain) if row.isfinite().all()
    }
    return {"heads": {str(layer): list(heads) for layer, heads in result.heads.items()}, "gain": gain}
