"""``saccade bench``: time attention operators and models."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.apps.measure import machine, measure_alternating
from saccade.apps.options import comma_list
from saccade.apps.screen import table_lines
from saccade.errors import ConfigError, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saccade.attention import Operator

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "bench": [
        "saccade bench attention --shapes 2x8x256x64 --mode fwdbwd -o bench.json",
        "saccade bench model resnet18 --batch-size 1,8 --img-size 96",
    ]
}

# Largest difference to the literal form that passes, as a share of its largest absolute value (at least 1).
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}

Row = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="attention|model")
    attention = subjects.add_parser(
        "attention", help="every backend of every operator, checked against the literal form"
    )
    attention.add_argument("--ops", type=comma_list, metavar="NAME,...", help="see saccade list ops (default: all)")
    attention.add_argument(
        "--shapes",
        type=comma_list,
        default=["2x8x1024x64"],
        metavar="BxHxNxD,...",
        help="batch, heads, tokens, head width (default: 2x8x1024x64)",
    )
    attention.add_argument("--backends", type=comma_list, default=["all"], metavar="NAME,...", help="default: all")
    attention.add_argument("--mode", choices=["fwd", "fwdbwd"], default="fwd", help="default: fwd")
    add_common(attention)
    model = subjects.add_parser("model", help="inference or training steps of a model with random weights")
    model.add_argument("name", metavar="NAME", help="timm name, see saccade list models")
    model.add_argument("--batch-size", type=comma_list, default=["1", "32"], metavar="N,...", help="default: 1,32")
    model.add_argument("--img-size", type=int, metavar="PX", help="default: the model's")
    model.add_argument("--mode", choices=["infer", "train"], default="infer", help="default: infer")
    add_common(model)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of both subjects."""
    parser.add_argument("--dtype", default="auto", choices=["auto", *TOLERANCE], help="auto: bf16 on GPUs that have it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--repeats", type=int, default=9, metavar="N", help="timed calls of each, at least 2 (default: 9)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE.json", help="also write rows, versions and hardware here"
    )
    parser.add_argument("--json", action="store_true", help="print the same JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a backend's result is out of tolerance."""
    if args.repeats < 2:
        raise ConfigError(f"--repeats must be at least 2 to give a spread; got {args.repeats}.")
    if args.out is not None and args.out.suffix != ".json":
        raise ConfigError(f"-o must end in .json; got {args.out}.")
    subjects = {"attention": attention_rows, "model": model_rows}
    rows = []
    lines = [list(HEADINGS[args.subject])]
    for row in subjects[args.subject](args):
        rows.append(row)
        lines.append([cell(row.get(key)) for key in HEADINGS[args.subject].values()])
        print(f"{row['name']} {row.get('backend', '')} {row['shape']}: {row['status']}", file=sys.stderr)
    document = {"subject": args.subject, "rows": rows, "machine": machine()}
    if args.out is not None:
        from saccade.batch.tables import write_json

        write_json(args.out, document)
    if args.json:
        print(json.dumps(document))
    else:
        print_table(lines, [row["status"] == "wrong" for row in rows])
    return int(any(row["status"] == "wrong" for row in rows))


# Column heading -> key of a row.
COMMON = {"SHAPE": "shape", "DTYPE": "dtype", "MODE": "mode", "MEDIAN MS": "median_ms", "SPREAD": "spread_ms"}
HEADINGS = {
    "attention": {"OP": "name", "BACKEND": "backend"}
    | COMMON
    | {"PEAK MIB": "peak_mib", "MAX DIFF": "max_abs_difference", "STATUS": "status", "REASON": "reason"},
    "model": {"MODEL": "name"} | COMMON | {"IMAGES/S": "images_per_s", "PEAK MIB": "peak_mib"},
}


def cell(value: object) -> str:
    """Return a table cell: three significant digits, nothing for ``None``."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def print_table(lines: list[list[str]], wrong: list[bool]) -> None:
    """Print aligned rows; on a terminal the wrong ones in red."""
    red = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line, bad in zip(table_lines(lines), [False, *wrong], strict=True):
        print(f"\033[31m{line}\033[0m" if bad and red else line)


def attention_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield one row for each operator, shape and backend."""
    from saccade.attention import operators

    device, dtype, precision = resolve(args)
    known = {operator.name: operator for operator in operators()}
    names = checked(args.ops or sorted(known), set(known), "operator", "saccade list ops")
    every = {backend.name for operator in known.values() for backend in operator.backends}
    asked = [] if args.backends == ["all"] else checked(args.backends, every, "backend", "saccade list ops")
    shapes = [parse_shape(text) for text in args.shapes]
    for name in names:
        for shape in shapes:
            tensors = known[name].example(shape, dtype, device, args.seed)
            common: Row = {"name": name, "shape": "x".join(map(str, shape)), "dtype": precision, "mode": args.mode}
            yield from operator_rows(known[name], tensors, asked, common, args.repeats)


def operator_rows(
    operator: Operator, arguments: tuple[Any, ...], asked: list[str], common: Row, repeats: int
) -> Iterator[Row]:
    """Yield the rows of one operator on one problem: of the backends asked for, or of all that ``auto`` may take."""
    from saccade.attention import Decision, explain

    backward = common["mode"] == "fwdbwd"
    for argument in filter(is_floating, arguments):
        argument.requires_grad_(backward)
    has = {row.backend: Decision(*row[1:]) for row in explain(operator.function, *arguments).rows}
    names = asked or [name for name, decision in has.items() if decision.automatic]
    decisions = {name: has.get(name, Decision(False, f"{operator.name} has no such backend")) for name in names}
    functions = {name: step(operator, arguments, name, backward) for name, decision in decisions.items() if decision.ok}
    wide = tuple(a.detach().double().requires_grad_(backward) if is_floating(a) else a for a in arguments)
    expected = step(operator, wide, "reference", backward)()
    timings = measure_alternating(functions, repeats=repeats)
    allowed = TOLERANCE[str(common["dtype"])]
    for name, decision in decisions.items():
        row = {**common, "backend": name}
        if not decision.ok:
            yield {**row, "status": "cannot run", "reason": decision.reason}
            continue
        errors = [largest(got.double() - want) for got, want in zip(functions[name](), expected, strict=True)]
        limits = [allowed * max(1.0, largest(want)) for want in expected]
        row |= asdict(timings[name]) | {"max_abs_difference": max(errors), "status": "ok"}
        if any(not error <= limit for error, limit in zip(errors, limits, strict=True)):  # NaN is wrong too
            reason = f"differs from the literal form by more than {allowed:g} of its largest value"
            row |= {"status": "wrong", "reason": reason}
        yield row


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def is_floating(argument: object) -> bool:
    """Return whether an argument is a floating-point tensor."""
    import torch

    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


def step(operator: Operator, arguments: tuple[Any, ...], backend: str, backward: bool) -> Callable[[], list[Tensor]]:
    """Return a call of the operator that gives its outputs, and the gradients of all inputs if asked for."""
    import torch

    def call() -> list[Tensor]:
        result = operator.function(*arguments, backend=backend)
        outputs = [result] if isinstance(result, torch.Tensor) else [output for output in result if output is not None]
        if not backward:
            return outputs
        inputs = [argument for argument in arguments if is_floating(argument)]
        grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
        return [output.detach() for output in outputs] + list(grads)

    return call


def model_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yield one row for each batch size."""
    import torch

    from saccade.vision_backbones import ModelSource, load_model

    device, dtype, precision = resolve(args)
    batches = [parse_count(text) for text in args.batch_size]
    loaded = load_model(ModelSource(args.name, random_weights=True, img_size=args.img_size), seed=args.seed)
    model = loaded.model.to(device, dtype).train(args.mode == "train")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for batch in batches:
        shape = (batch, *loaded.data_config["input_size"])
        images = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(device, dtype)

        def infer(images: Tensor = images) -> None:
            with torch.inference_mode():
                model(images)

        def train(images: Tensor = images) -> None:
            output = model(images).float()
            torch.nn.functional.cross_entropy(output, output.detach().argmax(-1)).backward()
            optimizer.step()
            optimizer.zero_grad()

        timing = measure_alternating({"model": train if args.mode == "train" else infer}, repeats=args.repeats)["model"]
        row: Row = {"name": args.name, "shape": "x".join(map(str, shape)), "dtype": precision, "mode": args.mode}
        yield {**row, **asdict(timing), "images_per_s": 1e3 * batch / timing.median_ms, "status": "ok"}


def resolve(args: argparse.Namespace) -> tuple[str, torch.dtype, str]:
    """Return device, dtype and the dtype's short name."""
    from saccade.batch.environment import resolve_device, resolve_precision

    device = resolve_device(args.device)
    dtype = resolve_precision(args.dtype, device)
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
    return str(device), dtype, short


def checked(names: list[str], known: set[str], kind: str, where: str) -> list[str]:
    """Return the names if all are known."""
    for name in names:
        if name not in known:
            raise ConfigError(
                f"Unknown {kind} {name!r}.{suggest(name, known)} Known: {', '.join(sorted(known))} ({where})."
            )
    return names


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Parse ``"2x8x1024x64"``."""
    sizes = [parse_count(part) for part in text.split("x")]
    if len(sizes) != 4:
        raise ConfigError(f"--shapes takes BxHxNxD, e.g. 2x8x1024x64; got {text!r}.")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def parse_count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"expected a whole number of at least 1; got {text!r}.")
    return int(text)
