"""``saccade vlm attend``: pictures of where the words of answers looked, before and after an intervention."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.apps.options import add_batch_options, batch_options
from saccade.apps.screen import finish_run
from saccade.apps.vlm_options import (
    add_generation_options,
    add_intervention_options,
    add_vlm_model_options,
    answer_plan,
    no_loading_bars,
    number_list,
)
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.vlm import ImageGrid

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--image", metavar="FILE", help="one picture")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask about it")
    parser.add_argument("--jsonl", metavar="FILE", help="many questions: rows with id, image, prompt")
    parser.add_argument("--image-folder", metavar="DIR", help="where their images are (default: beside the file)")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder: a PNG per question and attend.jsonl")
    group = parser.add_argument_group("map")
    group.add_argument("--layers", type=number_list, metavar="N,...", help="layers to read (default: the middle half)")
    group.add_argument(
        "--words", type=int, default=5, metavar="N", help="most words shown beside the mean (default: 5)"
    )
    group.add_argument("--sink-channels", type=number_list, metavar="N,...", help="default: VAR's, or by weight")
    group.add_argument("--tau", type=float, metavar="F", help="of sink channels (default: VAR's, or 20)")
    group.add_argument("--grid", metavar="ROWSxCOLS", help="visual tokens of the whole picture (default: found)")
    group.add_argument("--first-token", type=int, default=0, metavar="N", help="first visual token of --grid")
    add_vlm_model_options(parser)
    add_intervention_options(parser)
    add_generation_options(parser)
    add_batch_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.vlm import Question, attend_answers, read_questions

    one = args.image is not None and args.prompt is not None
    if one == (args.jsonl is not None):
        raise ConfigError("Give --image and --prompt, or --jsonl.")
    grid = parse_grid(args.grid, args.first_token)
    if one:
        path = Path(args.image)
        questions = [Question(path.stem, args.image, args.prompt, path)]
    else:
        questions = read_questions(args.jsonl, image_folder=args.image_folder)
    no_loading_bars()
    summary = attend_answers(
        questions,
        answer_plan(args),
        out=args.out,
        layers=args.layers,
        sink_channels=args.sink_channels,
        tau=args.tau,
        grid=grid,
        words=args.words,
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)


def parse_grid(text: str | None, first: int) -> ImageGrid | None:
    """Parse ``"24x24"``.

    Raises:
        ConfigError: If it is not of this form.
    """
    from saccade.vlm import ImageGrid

    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ConfigError(f"--grid needs ROWSxCOLS, e.g. 24x24; got {text!r}.")
    return ImageGrid(int(match[1]), int(match[2]), first)
