"""``saccade vlm questions``: the question file of a benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.vlm.evaluation import MOSSRecord, POPEQuestion

__all__ = ["BENCHMARKS", "add_arguments", "add_benchmark", "moss_records", "pope_questions", "run"]

BENCHMARKS = ("pope", "chair", "mossbench")


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's name and where its data are."""
    parser.add_argument("benchmark", choices=BENCHMARKS, help="pope, chair or mossbench")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="pope: question files; chair: COCO's instances*.json and captions*.json; mossbench: images_information/",
    )
    parser.add_argument(
        "--contrast", metavar="DIR", help="mossbench: the folder of the harmful versions, scored beside"
    )


def pope_questions(args: argparse.Namespace) -> list[POPEQuestion]:
    """Read POPE's questions."""
    from saccade.vlm.evaluation import read_pope

    return read_pope(args.data)


def moss_records(args: argparse.Namespace) -> list[MOSSRecord]:
    """Read MOSSBench's records of one set or of both."""
    from saccade.vlm.evaluation import read_mossbench

    contrast = [] if args.contrast is None else read_mossbench(args.contrast, "contrast")
    return [*read_mossbench(args.data), *contrast]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_benchmark(parser)
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="questions.jsonl for saccade vlm generate")
    parser.add_argument(
        "--build", metavar="FILE", help="pope: build the three sets from annotations in COCO's layout into DIR first"
    )
    parser.add_argument(
        "--num-images", type=int, default=500, metavar="N", help="to draw for pope, chair (default: 500)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.batch.tables import check_table_path, write_table
    from saccade.vlm.evaluation import chair_prompts, mossbench_prompts

    out = Path(args.out)
    check_table_path(out)
    if args.build is not None and args.benchmark != "pope":
        raise ConfigError("--build makes POPE's sets; it cannot be combined with another benchmark.")
    rows: Sequence[Mapping[str, Any]]
    if args.benchmark == "pope":
        if args.build is not None:
            build(args)
        rows = [question.row() for question in pope_questions(args)]
    else:
        if args.benchmark == "chair":
            asked = chair_prompts(args.data, ".", count=args.num_images, seed=args.seed)
        else:
            asked = mossbench_prompts(moss_records(args), ".")
        rows = [{"id": q.id, "image": q.image, "prompt": q.prompt, **q.extra} for q in asked]
    write_table(out, rows)
    print(f"{out}: {len(rows)} questions about {len({row['image'] for row in rows})} images", file=sys.stderr)
    return 0


def build(args: argparse.Namespace) -> None:
    """Write POPE's three sets into the data folder."""
    from saccade.batch.tables import write_table
    from saccade.vlm.evaluation import POPE_SETS, build_pope, read_coco_objects, sample_pope_images

    images = sample_pope_images(read_coco_objects(args.build), args.num_images, seed=args.seed)
    for split in POPE_SETS:
        rows = [question.row() for question in build_pope(images, split, seed=args.seed)]
        write_table(Path(args.data) / f"pope_{split}.jsonl", rows)
