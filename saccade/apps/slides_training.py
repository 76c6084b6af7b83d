"""``saccade slides split|train|predict``: from bags and labels to a model and its predictions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from saccade.apps.mil_catalogue import AGGREGATORS
from saccade.apps.options import add_batch_options, batch_options
from saccade.apps.screen import finish_run, table_lines
from saccade.errors import ConfigError

__all__ = ["TRAINING", "add_training_actions"]

MODELS = tuple(aggregator.name for aggregator in AGGREGATORS)


def add_training_actions(actions: Any) -> None:  # noqa: ANN401 - argparse's own class is not public
    """Declare the sub-commands."""
    split = actions.add_parser("split", help="divide slides into folds, patients together")
    split.add_argument("labels", metavar="CSV", help="table with the column slide")
    split.add_argument("-o", "--out", required=True, metavar="FOLDER", help="for fold0.csv, fold1.csv, ...")
    split.add_argument("--folds", type=int, default=5, metavar="N", help="default: 5")
    split.add_argument("--group", metavar="COLUMN", help="keep equal values together (default: patient, if there)")
    split.add_argument("--stratify", metavar="COLUMN", help="same shares of each value everywhere, e.g. label")
    split.add_argument("--val-fraction", type=float, default=0.15, metavar="F", help="of the rest (default: 0.15)")
    split.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    train = actions.add_parser("train", help="train on bags and labels: fit with a config that is written and printed")
    train.add_argument("bags", metavar="BAGS", help="folder of bag files, or the output of `slides run`")
    train.add_argument("--labels", required=True, metavar="CSV", help="columns slide, label; if need be patient, split")
    train.add_argument("--label-column", default="label", metavar="COLUMN", help="default: label")
    train.add_argument("--task", choices=["classification", "regression", "survival"], default="classification")
    train.add_argument("--model", choices=MODELS, default="acmil_ga", metavar="NAME", help=f"{', '.join(MODELS)}")
    train.add_argument(
        "--split",
        metavar="CSV",
        help="a fold of `slides split`, or CLAM's splits_*.csv; a folder of them: cross-validation over all folds",
    )
    train.add_argument("--epochs", type=int, default=50, metavar="N", help="default: 50")
    train.add_argument("--lr", type=float, default=1e-4, metavar="X", help="default: 1e-4")
    train.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without a better val/loss")
    train.add_argument("--standardize", action="store_true", help="centre and scale features, e.g. of stain-texture")
    train.add_argument("--class-weights", choices=["balanced"], help="weight classes inverse to their frequency")
    train.add_argument("--aem", type=float, default=0.0, metavar="F", help="weight of attention entropy maximisation")
    train.add_argument("--name", metavar="NAME", help="folder below runs/ (default: the model's name)")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    train.add_argument("--overwrite", action="store_true", help="discard an earlier cross-validation of that name")
    train.add_argument("-q", "--quiet", action="store_true", help="no table of epochs")

    predict = actions.add_parser("predict", help="classify slides from their bags, and keep the attention")
    predict.add_argument("bags", metavar="BAGS", help="folder of bag files, or the output of `slides run`")
    predict.add_argument("-m", "--model", required=True, metavar="CKPT", help="run, *.ckpt, or official weights")
    predict.add_argument("-o", "--out", required=True, metavar="FILE", help="table: .csv, .tsv, .jsonl or .parquet")
    predict.add_argument("--attention", metavar="FOLDER", help="also write ID.h5 with attention and coordinates")
    add_batch_options(predict)


def split(args: argparse.Namespace) -> int:
    """Write folds and print what is in them."""
    from saccade.datasets.bag_data import read_labels
    from saccade.datasets.bag_splits import SPLITS, make_folds, write_folds

    slides = read_labels(args.labels)

    def column(name: str) -> list[str]:
        missing = [slide.id for slide in slides if not (slide.values.get(name) or "").strip()]
        if missing:
            raise ConfigError(f"{args.labels} has nothing in column {name!r} for slide {missing[0]!r}.")
        return [slide.values[name].strip() for slide in slides]

    folds = make_folds(
        [slide.id for slide in slides],
        folds=args.folds,
        groups=column(args.group) if args.group else [slide.patient for slide in slides],
        labels=column(args.stratify) if args.stratify else None,
        val_fraction=args.val_fraction,
        seed=args.seed,
    )
    paths = write_folds(args.out, folds)
    counts = [[str(list(fold.values()).count(name)) for name in SPLITS] for fold in folds]
    print("\n".join(table_lines([("FOLD", *SPLITS), *([str(p), *c] for p, c in zip(paths, counts, strict=True))])))
    return 0


def train(args: argparse.Namespace) -> int:
    """Train on one split, or cross-validate over a folder of them."""
    from saccade.apps.slides_folds import cross_validate

    if args.split and Path(args.split).is_dir():
        settings = training_config(args, None)
        return cross_validate(args, settings, partial(fit, args))
    return fit(args, Path(args.split) if args.split else None, args.name)


def training_config(args: argparse.Namespace, split: Path | None) -> dict[str, Any]:
    """Return the config of `saccade fit` that the options mean."""
    from saccade.mil.slide_folder import feature_folder

    data = {"root": str(feature_folder(args.bags)), "labels": args.labels, "label_column": args.label_column}
    data |= {"task": args.task} | ({"split": str(split)} if split else {})
    data |= {"standardize": True} if args.standardize else {}
    model: dict[str, Any] = {"model": args.model, "lr": args.lr, "aem": args.aem}
    if args.class_weights:
        model["class_weights"] = args.class_weights
    trainer: dict[str, Any] = {"max_epochs": args.epochs}
    if args.patience is not None:
        stopping = {"monitor": "val/loss", "patience": args.patience}
        trainer["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stopping}]
    return {
        "seed_everything": args.seed,
        "model": {"class_path": "saccade.mil.SlideClassifier", "init_args": model},
        "data": {"class_path": "saccade.datasets.BagData", "init_args": data},
        "trainer": trainer,
    }


def fit(args: argparse.Namespace, split: Path | None, name: str | None, interrupted: Path | None = None) -> int:
    """Write a config, print it, and fit; or go on with an interrupted run."""
    import tempfile

    import yaml

    from saccade.apps.cli import main

    quiet = ["-q"] if args.quiet else []
    if interrupted is not None:
        return main(["fit", "--resume", str(interrupted), *quiet])
    text = yaml.safe_dump(training_config(args, split), sort_keys=False)
    if not args.quiet:
        print(f"# saccade fit -c THIS\n{text}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slides.yaml"
        path.write_text(text, encoding="utf-8")
        more = ["--name", name] if name else []
        return main(["fit", "-c", str(path), *more, *quiet])


def predict(args: argparse.Namespace) -> int:
    """Write predictions and attention."""
    from saccade.mil import load_classifier, predict_bags
    from saccade.mil.slide_folder import feature_folder

    summary = predict_bags(
        feature_folder(args.bags),
        classifier=load_classifier(args.model),
        out=args.out,
        attention=args.attention,
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)


TRAINING: dict[str, Callable[[argparse.Namespace], int]] = {"split": split, "train": train, "predict": predict}
