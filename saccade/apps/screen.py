"""What commands print when they are done."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.batch import RunSummary

__all__ = ["finish_run"]


def finish_run(summary: RunSummary, *, as_json: bool) -> int:
    """Print the summary of a batch run if asked for, and return its exit code."""
    if as_json:
        print(json.dumps(dataclasses.asdict(summary), ensure_ascii=False))
    return summary.exit_code
