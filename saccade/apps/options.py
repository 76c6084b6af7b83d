"""Options that every batch command shares, spelled and meaning the same everywhere."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.batch import BatchOptions
    from saccade.vision_backbones.loading import ModelSource

__all__ = ["add_batch_options", "add_input_options", "add_model_options", "batch_options", "comma_list", "model_source"]


def comma_list(text: str) -> list[str]:
    """Parse ``"a,b,c"``; empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_input_options(parser: argparse.ArgumentParser, *, out_help: str) -> None:
    """Add ``INPUT...`` and ``-o``."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders (searched recursively), globs, @list.txt, or - for a list on standard input",
    )
    parser.add_argument("-o", "--out", required=True, metavar="PATH", help=out_help)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``-m`` and what says where its weights come from."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        required=True,
        metavar="NAME",
        help="timm name, open_clip:MODEL[/TAG], hf-hub:ORG/NAME, local-dir:PATH, or a run of fit (*.ckpt, folder)",
    )
    group.add_argument("--weights", metavar="PATH", help="state dict, .safetensors or .pth; official keys accepted")
    group.add_argument("--pretrained", action="store_true", help="allow timm to download its weights")
    group.add_argument("--random-weights", action="store_true", help="run although the model has no trained weights")
    group.add_argument("--img-size", type=int, metavar="PX", help="input size; default: the model's")
    group.add_argument("--crop-pct", type=float, metavar="F", help="share of the image that the centre crop keeps")
    group.add_argument("--interpolation", choices=["bilinear", "bicubic", "nearest", "lanczos"])


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ux.md 3.3 that concern the run itself."""
    compute = parser.add_argument_group("compute")
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    compute.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="auto: bf16 on GPUs that have it"
    )
    compute.add_argument(
        "--attention-backend",
        default="auto",
        choices=["auto", "sdpa", "triton", "reference"],
        help="for saccade's own operators (default: auto)",
    )
    compute.add_argument("-b", "--batch-size", type=int, default=32, metavar="N", help="default: 32")
    compute.add_argument("-j", "--num-workers", type=int, metavar="N", help="decoding processes (default: up to 4)")
    compute.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    compute.add_argument("--deterministic", action="store_true", help="only deterministic algorithms")
    run = parser.add_argument_group("run")
    run.add_argument("--limit", type=int, metavar="N", help="first N items of the sorted list")
    run.add_argument("--shard", metavar="I/N", help="every N-th item starting at the I-th (1-based), for job arrays")
    existing = run.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue an earlier run with equal settings (default)")
    existing.add_argument("--overwrite", action="store_true", help="discard an earlier run in the same place")
    run.add_argument("--on-error", choices=["skip", "stop"], default="skip", help="default: skip, and report")
    run.add_argument("--dry-run", action="store_true", help="print plan and counts, write nothing")
    screen = parser.add_argument_group("screen")
    screen.add_argument("--progress", choices=["auto", "bar", "plain", "none"], default="auto")
    screen.add_argument("-v", "--verbose", action="count", default=0, help="-vv shows tracebacks")
    screen.add_argument("-q", "--quiet", action="store_true", help="no header, progress or footer")
    screen.add_argument("--log-file", metavar="FILE", help="append what goes to the screen to FILE")
    screen.add_argument("--json", action="store_true", help="print the summary as one JSON document on stdout")
    screen.add_argument("--no-color", action="store_true", help="plain text; NO_COLOR is honoured too")


def model_source(args: argparse.Namespace) -> ModelSource:
    """Collect the parsed model options into the object that the public functions take."""
    from saccade.vision_backbones.loading import ModelSource

    return ModelSource(
        args.model,
        weights=args.weights,
        pretrained=args.pretrained,
        random_weights=args.random_weights,
        img_size=args.img_size,
        crop_pct=args.crop_pct,
        interpolation=args.interpolation,
    )


def batch_options(args: argparse.Namespace) -> BatchOptions:
    """Collect the parsed options into the object that the public functions take.

    Raises:
        ConfigError: If a value is out of range, e.g. ``--shard 4/3``.
    """
    from saccade.batch import BatchOptions

    return BatchOptions(
        device=args.device,
        precision=args.precision,
        attention_backend=args.attention_backend,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        seed=args.seed,
        deterministic=args.deterministic,
        limit=args.limit,
        shard=args.shard,
        overwrite=args.overwrite,
        on_error=args.on_error,
        dry_run=args.dry_run,
        progress="none" if args.quiet else args.progress,
        log_file=args.log_file,
        color=not args.no_color,
    )
