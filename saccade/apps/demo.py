"""``saccade demo``: see it work offline, with data that is generated or ships with the installation."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
import shutil
import time
from pathlib import Path

from saccade.apps.demo_report import Outcome, Session, page
from saccade.errors import ConfigError, suggest

__all__ = ["EXAMPLES", "PARTS", "add_arguments", "run"]

EXAMPLES = {"demo": ["saccade demo -o demo/", "saccade demo slides -o demo/ --overwrite"]}
PARTS = {
    "images": "train a classifier, classify a folder with broken files, see where it looks",
    "slides": "whole slides from scanner file to heatmap; how well attention finds the lesion",
    "gaze": "learn to predict where viewers look, beside chance and the viewers themselves",
    "decoding": "change the attention of a multimodal model while it writes",
}
MARKER = "made-by-saccade-demo.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("-o", "--out", default="demo/", metavar="FOLDER", help="default: demo/")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that holds other things")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    unknown = next((name for name in args.parts if name not in PARTS), None)
    if unknown is not None:
        raise ConfigError(f"The demo has no part {unknown!r}.{suggest(unknown, PARTS)} It has {', '.join(PARTS)}.")
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()):
        if not (args.overwrite or (out / MARKER).exists()):
            raise ConfigError(f"{out} holds other things. Choose another --out, or pass --overwrite to replace it.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("saccade demo replaces this folder when it runs again.\n", encoding="utf-8")
    start = time.monotonic()
    outcomes = [run_part(name, out) for name in PARTS if name in args.parts or not args.parts]
    (out / "report.html").write_text(page(outcomes), encoding="utf-8")
    print(f"demo finished in {time.monotonic() - start:.0f} s: open {out / 'report.html'}")
    return 0


def run_part(name: str, out: Path) -> Outcome:
    """Run one part in a folder of its own."""
    folder = out / name
    folder.mkdir()
    print(f"$ cd {shlex.quote(str(folder))}   # {PARTS[name]}", flush=True)
    start, start_of_cpu = time.monotonic(), time.process_time()
    session = Session()
    with contextlib.chdir(folder):
        result, values = importlib.import_module(f"saccade.apps.demo_{name}").show(session)
    seconds, cpu = time.monotonic() - start, time.process_time() - start_of_cpu
    print(f"{name}: {result}   {seconds:.0f} s, {cpu:.0f} s of CPU\n", flush=True)
    return Outcome(name, PARTS[name], result, seconds, cpu, session.lines, values)
