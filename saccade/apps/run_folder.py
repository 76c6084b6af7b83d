"""Run folders of ``saccade fit``: ``runs/NAME/YYYYmmdd-HHMMSS/``."""

from __future__ import annotations

import re
from datetime import datetime
from itertools import count
from pathlib import Path

from saccade.errors import ConfigError

__all__ = ["RUNS", "create_run_folder", "latest_run", "run_of", "runs_of"]

RUNS = Path("runs")


def runs_of(name: str) -> Path:
    """Return ``runs/NAME``; characters that do not belong in file names become ``_``."""
    return RUNS / (re.sub(r"[^\w.+-]+", "_", name) or "run")


def create_run_folder(name: str) -> Path:
    """Create ``runs/NAME/<now>``, never an existing folder, and note it in ``runs/NAME/latest``."""
    parent = runs_of(name)
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    for number in count(1):  # two fits may start in the same second
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        break
    (parent / "latest").write_text(folder.name + "\n", encoding="utf-8")
    return folder


def latest_run(name: str | None) -> Path:
    """Return the newest run folder, of one name or of all.

    Raises:
        ConfigError: If there is none.
    """
    where = runs_of(name) if name else RUNS
    notes = sorted(where.glob("latest" if name else "*/latest"), key=lambda path: path.stat().st_mtime)
    if not notes:
        raise ConfigError(f"There is no run to resume in {where}/ (working directory: {Path.cwd()}).")
    return notes[-1].parent / notes[-1].read_text(encoding="utf-8").strip()


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in, ``None`` if it lies elsewhere."""
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and (folder / "config.yaml").is_file() else None
