"""What commands print when they are done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.batch import RunSummary

__all__ = ["finish_run", "table_lines"]


def finish_run(summary: RunSummary, *, as_json: bool) -> int:
    """Print the summary of a batch run if asked for, and return its exit code."""
    if as_json:
        print(json.dumps(dataclasses.asdict(summary), ensure_ascii=False))
    return summary.exit_code


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows, the header first, as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
