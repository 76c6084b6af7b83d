"""``saccade list``: models, operators, models of whole slides, metrics, configs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from saccade.apps.catalogue import find_models
from saccade.apps.config import add_list_arguments, print_configs
from saccade.apps.mil_catalogue import AGGREGATORS
from saccade.apps.screen import table_lines

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "list": [
        "saccade list models 'convnext*'",
        "saccade list ops",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="models|ops|mil|metrics|configs")
    models = kinds.add_parser("models", help="names for -m, with size and verification")
    models.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="e.g. 'convnext*' (default: all)")
    models.add_argument("--pretrained-only", action="store_true", help="only weights that timm can download, by tag")
    models.add_argument("--source", choices=["saccade", "timm", "all"], default="all", help="default: all")
    add_json(models)
    ops = kinds.add_parser("ops", help="attention operators and who runs them on this machine")
    add_json(ops)
    aggregators = kinds.add_parser("mil", help="models that classify whole slides, for saccade slides train")
    add_json(aggregators)
    scores = kinds.add_parser("metrics", help="comparisons of scanpaths for saccade gaze metrics")
    add_json(scores)
    configs = kinds.add_parser("configs", help="shipped configs; the same as saccade config ls")
    add_list_arguments(configs)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    kinds: dict[str, Callable[[argparse.Namespace], None]]
    kinds = {"models": list_models, "ops": list_operators, "mil": list_aggregators, "metrics": list_metrics}
    kinds["configs"] = print_configs
    kinds[args.kind](args)
    return 0


def list_models(args: argparse.Namespace) -> None:
    """Print the models."""
    models = find_models(args.pattern, library=args.source, pretrained=args.pretrained_only)
    if args.json:
        print(json.dumps([asdict(model) for model in models], indent=1))
        return
    rows = [("NAME", "PARAMS", "INPUT", "TASK", "SOURCE", "VERIFIED")]
    for model in models:
        params = "-" if model.params is None else f"{model.params / 1e6:.1f} M"
        rows.append((model.name, params, model.input or "-", model.task, model.source, model.verified or "-"))
    print("\n".join(table_lines(rows)))


def list_operators(args: argparse.Namespace) -> None:
    """Print each operator, the backend that runs it on this machine, and why not the others."""
    from saccade.attention import operators

    found = [(operator.summary, operator.explain()) for operator in operators()]
    if args.json:
        keys = ("operator", "problem", "chosen", "requested")
        rows = [
            {key: getattr(explanation, key) for key in keys}
            | {"summary": summary, "backends": [row._asdict() for row in explanation.rows]}
            for summary, explanation in found
        ]
        print(json.dumps(rows, indent=1))
        return
    print("\n\n".join(f"{explanation}\n   = {summary}" for summary, explanation in found))


def list_aggregators(args: argparse.Namespace) -> None:
    """Print the models of whole slides: what they attend to, what they learn, whose weights they read."""
    if args.json:
        print(json.dumps([asdict(aggregator) for aggregator in AGGREGATORS], indent=1))
        return
    rows = [("NAME", "ATTENTION", "TASKS", "SOURCE", "WEIGHTS OF", "VERIFIED")]
    for one in AGGREGATORS:
        rows.append((one.name, one.attention, one.tasks, one.source, one.checkpoints or "-", one.verified or "-"))
    print("\n".join(table_lines(rows)))


def list_metrics(args: argparse.Namespace) -> None:
    """Print the scanpath metrics: what they need, their parameters, where they come from."""
    from saccade.gaze.metrics.registry import METRICS

    if args.json:
        keys = ("name", "columns", "best", "needs", "symmetric", "definition", "source")
        print(json.dumps([{key: getattr(metric, key) for key in keys} for metric in METRICS], indent=1))
        return
    rows = [("NAME", "BEST", "NEEDS", "SOURCE", "DEFINITION")]
    for metric in METRICS:
        rows.append((metric.name, metric.best or "-", ", ".join(metric.needs) or "-", metric.source, metric.definition))
    print("\n".join(table_lines(rows)))
