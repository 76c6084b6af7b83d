"""What a person sees while a run lasts: header, progress, failures, footer, on standard error."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Reporter", "clock"]

PLAIN_SECONDS = 30.0  # in plain mode a line is due after this time ...
PLAIN_LINES = 10  # ... or after so many parts of the items
FAILURES_SHOWN = 20


class Reporter:
    """Writes the lines of a run to standard error and, if asked, to a log file.

    Args:
        mode: ``"bar"``, ``"plain"`` (a line per 10 % or 30 s), ``"none"`` (silent), or ``"auto"``: a bar on a terminal.
        unit: Plural noun of what is counted.
        log_file: File to which lines are appended.
        color: Allow colour; the environment variable ``NO_COLOR`` forbids it too.
    """

    def __init__(self, mode: str, *, unit: str, log_file: str | Path | None = None, color: bool = True) -> None:
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "plain"
        self.mode = mode
        self.unit = unit
        self.color = color and not os.environ.get("NO_COLOR")
        self.log: TextIO | None = None
        self.bar: Progress | None = None
        self.total = self.finished = self.failures = self.next_line = 0
        self.started = self.last_line = time.monotonic()

        if log_file is not None:
            self.log = Path(log_file).open("a", encoding="utf-8")  # noqa: SIM115 - closed with the reporter

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self.log is not None:
            self.log.close()

    def say(self, line: str) -> None:
        """Write one line."""
        if self.log is not None:
            self.log.write(line + "\n")
            self.log.flush()
        if self.mode == "none":
            return
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - this class is the screen

    def start(self, total: int) -> None:
        """Begin counting ``total`` items."""
        self.total = total
        self.started = self.last_line = time.monotonic()
        self.next_line = -(-total // PLAIN_LINES)
        if self.mode == "bar" and total:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                BarColumn(30),
                MofNCompleteColumn(),
                TextColumn(f"{{task.fields[speed]}} {self.unit}/s"),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True, no_color=not self.color),
                transient=True,
            )
            self.bar.add_task("", total=total, speed="-")
            self.bar.start()

    def advance(self) -> None:
        """Count one finished item."""
        self.finished += 1
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=1, speed=f"{self.rate(now):.3g}")
        elif self.mode == "plain" and (self.finished >= self.next_line or now - self.last_line >= PLAIN_SECONDS):
            if self.finished < self.total:
                left = clock((self.total - self.finished) / max(self.rate(now), 1e-9))
                self.say(f"{self.finished:,}/{self.total:,}  {self.rate(now):.3g} {self.unit}/s  eta {left}")
            self.last_line = now
            self.next_line = self.finished + -(-self.total // PLAIN_LINES)

    def fail(self, name: str, message: str) -> None:
        """Report a failed item; after twenty, only that there are more."""
        self.failures += 1
        if self.failures <= FAILURES_SHOWN:
            self.say(f"{name}  failed: {message}")
        elif self.failures == FAILURES_SHOWN + 1:
            self.say("further failures are listed in items.jsonl only")

    def rate(self, now: float) -> float:
        """Items per second so far."""
        return self.finished / max(now - self.started, 1e-9)

    def stop(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """Format a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
