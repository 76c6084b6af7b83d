"""``saccade slides train --split FOLDER``: a cross-validation, resumed where it stopped, and what comes out of it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.apps.run_folder import latest_run, runs_of
from saccade.apps.screen import finish_run, table_lines
from saccade.errors import ConfigError, DataError

__all__ = ["cross_validate", "fold_files"]

FOLD = re.compile(r"(?:fold|splits_)(\d+)\.csv")
Train = Callable[[Path, str, Path | None], int]


def fold_files(folder: str | Path) -> list[Path]:
    """Return the folds in a folder, by number: ``fold0.csv``, ... of ``slides split``, or CLAM's ``splits_0.csv``, ...

    Raises:
        ConfigError: If there are fewer than two.
    """
    found = {int(match[1]): path for path in Path(folder).iterdir() if (match := FOLD.fullmatch(path.name))}
    if len(found) < 2:
        raise ConfigError(
            f"{folder}/ holds {len(found)} folds, expected fold0.csv, fold1.csv, ... (`saccade slides split`) or "
            "splits_0.csv, splits_1.csv, ..."
        )
    return [found[number] for number in sorted(found)]


def cross_validate(args: argparse.Namespace, settings: Mapping[str, Any], train: Train) -> int:
    """Train and test every fold that is not finished, and pool the held-out slides.

    Args:
        args: The command's options.
        settings: What results depend on, besides the splits and labels.
        train: Fits a split under a name below ``runs/``, or goes on with an interrupted run, and returns the exit code.
    """
    from saccade.batch import BatchOptions, Item, Run
    from saccade.checkpoints import file_digest

    files = fold_files(args.split)
    name = args.name or args.model
    folder = runs_of(f"{name}-folds")
    digests = {path.stem: file_digest(path) for path in files} | {"labels": file_digest(args.labels)}
    run = Run(
        "slides train",
        items=[Item(path.stem, path) for path in files],
        out=f"{folder}/",
        settings={**settings, "files": digests},
        options=BatchOptions(progress="none" if args.quiet else "plain", overwrite=args.overwrite),
        table=folder / "folds.csv",
        title=args.model,
        unit="folds",
    )
    goes_on = not args.overwrite and stored_settings(run.files.manifest) == run.settings
    with run:
        for item in run.pending:
            started = time.monotonic()
            code = train(item.path, f"{name}-{item.id}", interrupted_run(f"{name}-{item.id}") if goes_on else None)
            if code in (130, 143):
                raise KeyboardInterrupt
            try:
                if code:
                    raise DataError(f"the training ended with exit code {code}", reason="training")
                row = test_fold(latest_run(f"{name}-{item.id}"))
            except DataError as error:
                run.fail(item, error, seconds=time.monotonic() - started)
            else:
                run.done(item, row=row, seconds=time.monotonic() - started)
    if run.summary.failed == 0:
        rows = pool([path.stem for path in files], name, folder)
        print("\n".join(summary_lines(rows)))
    return finish_run(run.summary, as_json=False)


def stored_settings(manifest: Path) -> object:
    """Return the settings of an earlier run in the same place, if there is one."""
    return json.loads(manifest.read_text(encoding="utf-8"))["settings"] if manifest.exists() else None


def interrupted_run(name: str) -> Path | None:
    """Return the newest run of a name, if it has something to go on from."""
    if not (runs_of(name) / "latest").is_file():
        return None
    folder = latest_run(name)
    return folder if (folder / "checkpoints" / "last.ckpt").is_file() else None


def test_fold(folder: Path) -> dict[str, Any]:
    """Test the best checkpoint of a run; return its metrics."""
    from saccade.apps.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = main(["test", str(folder), "-q", "--json"])
    if code:
        raise DataError(f"The test of {folder} ended with exit code {code}.", reason="test")
    metrics = json.loads(shown.getvalue())["metrics"]
    return {"run": folder.as_posix(), **{key.removeprefix("test/"): value for key, value in metrics.items()}}


def pool(folds: Sequence[str], name: str, folder: Path) -> list[dict[str, Any]]:
    """Write the tables over all folds; return the summary."""
    from saccade.checkpoints import best_checkpoint, read_checkpoint
    from saccade.mil.result_tables import ResultTables, pool_folds

    runs = {fold: latest_run(f"{name}-{fold}") for fold in folds}
    facts = read_checkpoint(best_checkpoint(runs[folds[0]]))["saccade"]
    tables = ResultTables(facts["data_config"]["task"], facts["class_names"])
    return pool_folds(tables, {fold: run / "test" for fold, run in runs.items()}, folder)


def summary_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the summary as lines: over folds, and over all held-out slides and patients with 95 % intervals."""

    def interval(row: Mapping[str, Any], level: str) -> str:
        return f"{row[level]:.4f} [{row[f'{level}_low']:.4f}, {row[f'{level}_high']:.4f}]"

    lines = [("METRIC", "FOLDS", "MEAN", "SD", "ALL SLIDES [95 %]", "ALL PATIENTS [95 %]")]
    for row in rows:
        single = (str(row["folds"]), f"{row['mean']:.4f}", f"{row['sd']:.4f}")
        lines.append((str(row["metric"]), *single, interval(row, "slide"), interval(row, "patient")))
    return table_lines(lines)
