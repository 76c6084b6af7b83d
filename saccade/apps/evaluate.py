"""``saccade validate``, ``test`` and ``predict``: a checkpoint is all they need; options change what it says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade import __version__
from saccade.apps.run_folder import run_of
from saccade.apps.screen import finish_run, table_lines
from saccade.apps.shipped import config_path
from saccade.apps.training_options import add_screen_options, add_training_options, describe_trainer, lightning_options
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from saccade.apps.lightning_cli import SaccadeCLI
    from saccade.batch.progress import Reporter
    from saccade.datasets.image_data import Split

__all__ = ["EXAMPLES", "PASSES_UNKNOWN", "add_arguments", "run"]

PASSES_UNKNOWN = True
EXAMPLES = {
    "validate": [
        "saccade validate runs/resnet18",
        "saccade validate runs/resnet18 --json",
    ],
    "test": [
        "saccade test runs/resnet18",
        "saccade test model.ckpt --data.root other/ -o results/",
    ],
    "predict": [
        "saccade predict model.ckpt --data.root new/ -o predictions.csv",
        "saccade predict runs/resnet18 --data.root new/ -o predictions.parquet --devices 4 --trainer.strategy ddp",
    ],
}
SPLITS: dict[str, Split] = {"validate": "val", "test": "test", "predict": "predict"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of ``predict`` differ a little."""
    predicting = parser.prog.endswith("predict")
    out = "-o FILE" if predicting else "[-o FOLDER]"
    parser.usage = f"{parser.prog} CKPT [--data.root FOLDER] {out} [options] [--SECTION.KEY VALUE]..."
    parser.description = (
        f"{parser.description}\nConfig and data come from the checkpoint; any --data.KEY overrides them."
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint, or run folder of `saccade fit` (its best one)")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="C", help="config file or shipped name")
    if predicting:
        parser.add_argument(
            "-o", "--out", required=True, metavar="FILE", help="table: .csv, .tsv, .jsonl, .json or .parquet"
        )
        parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes per row of images (default: 5)")
        parser.add_argument("--overwrite", action="store_true", help="replace the table if it exists")
    else:
        parser.add_argument("-o", "--out", metavar="FOLDER", help="for metrics.json and pictures; default: in the run")
    add_training_options(parser)
    add_screen_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.apps.lightning_cli import SaccadeCLI, read_stored_run
    from saccade.apps.quiet import training_screen
    from saccade.checkpoints import best_checkpoint

    checkpoint = best_checkpoint(args.checkpoint)
    if args.command == "predict":
        check_table(args)
    with training_screen(args) as reporter:
        stored = read_stored_run(checkpoint)
        options = whole_folder(stored.config, args.unknown) + lightning_options(args)
        cli = SaccadeCLI(options, [config_path(name) for name in args.config], stored=stored)
        if args.command == "predict":
            return predict(args, cli, checkpoint, reporter)
        return evaluate(args, cli, checkpoint, reporter)


def whole_folder(config: str, options: list[str]) -> list[str]:
    """Return the option that makes all images of another folder of classes count, unless it was given.

    A fit holds out a part of such a folder. Of a folder that training has not seen, everything is held out.
    """
    given = {option.partition("=")[0] for option in options}
    other = "--data.root" in given and not given & {"--data", "--data.val_fraction"}
    return ["--data.val_fraction", "1.0"] if other and "ImageFolderData" in config else []


def evaluate(args: argparse.Namespace, cli: SaccadeCLI, checkpoint: Path, reporter: Reporter) -> int:
    """Compute the metrics of a split, write and print them."""
    from saccade.batch.tables import write_json

    within = run_of(checkpoint)
    default = within / args.command if within else checkpoint.with_name(f"{checkpoint.stem}-{args.command}")
    folder = default if args.out is None else Path(args.out)
    trainer = prepare(args, cli, checkpoint, reporter, folder, [])
    function = trainer.test if args.command == "test" else trainer.validate
    results = dict(function(cli.model, datamodule=cli.datamodule, verbose=False)[0])
    if trainer.is_global_zero:
        summary = {"checkpoint": str(args.checkpoint), "metrics": results}
        write_json(folder / "metrics.json", summary)
        lines = metric_lines(results)
        print(json.dumps(summary) if args.json else "\n".join(lines))
        reporter.say(f"details: {folder}/")
    return 0


def metric_lines(results: dict[str, Any]) -> list[str]:
    """Return the table of the metrics, and under it the one of the metrics of each class."""
    single = {name: value for name, value in results.items() if name.count("/") == 1}
    lines = table_lines([("metric", "value"), *((name, f"{value:.4f}") for name, value in single.items())])
    by_class: dict[str, dict[str, float]] = {}
    for name, value in results.items():
        if name not in single:
            _, metric, label = name.split("/", 2)
            by_class.setdefault(label, {})[metric] = value
    if by_class:
        columns = ("precision", "recall", "f1")
        rows = [(label, *(f"{values[column]:.4f}" for column in columns)) for label, values in by_class.items()]
        lines += ["", *table_lines([("class", *columns), *rows])]
    return lines


def predict(args: argparse.Namespace, cli: SaccadeCLI, checkpoint: Path, reporter: Reporter) -> int:
    """Write one row per item, whatever the number of processes."""
    from saccade.apps.predictions import PredictionTable, bag_row, image_row
    from saccade.checkpoints import file_digest
    from saccade.mil import SlideClassifier

    names = getattr(cli.model, "class_names", None)
    if names is None:
        raise ConfigError(f"{type(cli.model).__name__} has no class names; `saccade predict` writes tables of classes.")
    settings = {"model": f"file:{file_digest(checkpoint)}", "topk": args.topk, "preprocess": cli.model.data_config}
    row = bag_row(cli.model) if isinstance(cli.model, SlideClassifier) else image_row(names, args.topk)
    table = PredictionTable(Path(args.out), row, settings)
    trainer = prepare(args, cli, checkpoint, reporter, Path(args.out).parent, [table])
    trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    if table.summary is None:  # another process unites the parts
        return 0
    reporter.say(f"done {table.summary.done:,}  failed {table.summary.failed:,}   details: {table.summary.details}")
    return finish_run(table.summary, as_json=args.json)


def check_table(args: argparse.Namespace) -> None:
    """Raise before anything is built if the table cannot be written."""
    from saccade.batch.tables import check_table_path

    check_table_path(Path(args.out))
    if args.topk < 1:
        raise ConfigError(f"--topk must be at least 1, got {args.topk}.")
    if Path(args.out).exists() and not args.overwrite:
        raise ConfigError(f"{args.out} exists. Choose another --out, or pass --overwrite to replace it.")


def prepare(
    args: argparse.Namespace,
    cli: SaccadeCLI,
    checkpoint: Path,
    reporter: Reporter,
    folder: Path,
    callbacks: list[Callback],
) -> Trainer:
    """Load the weights, build the trainer and say what is done."""
    from saccade.checkpoints import load_weights, read_checkpoint

    load_weights(cli.model, read_checkpoint(checkpoint)["state_dict"], source=checkpoint)
    trainer = cli.build_trainer(folder, callbacks, enable_checkpointing=False)
    data = cli.describe_data(SPLITS[args.command])
    reporter.say(f"saccade {__version__}  {args.command}  {cli.describe_model()}  {data}   {describe_trainer(trainer)}")
    if changes := cli.changes():
        reporter.say(f"changed since the checkpoint: {'; '.join(changes)}")
    return trainer
