"""What Lightning, torch and Python's warnings may say on the screen of a command: one line each, or nothing."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from saccade.batch.progress import Reporter

__all__ = ["is_first_process", "training_screen"]

# True, and of no use to who runs a command.
UNWANTED = (
    ".*LeafSpec.*",  # Lightning calls a deprecated torch function
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",  # frozen or averaged weights
    ".*exists and is not empty.*",  # a run that is continued
    ".*dataloader is not resumable.*",  # ImageData is: it continues with the images that were left
    ".*dirpath has changed.*",  # a run folder that was moved
    ".*number of training batches.*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # torchmetrics objects synchronise themselves
)


class ReporterHandler(logging.Handler):
    """Hands log records to the reporter, one line each."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Say the first line."""
        self.reporter.say(f"{record.levelname.lower()}: {first_line(record.getMessage())}")


@contextmanager
def training_screen(args: argparse.Namespace) -> Iterator[Reporter]:
    """Give the screen of a training command: the first process's, and quiet about what its user need not know.

    Log records and warnings become single lines, unwanted ones are dropped.

    Args:
        args: With ``quiet`` and ``progress``.
    """
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()
        logger.propagate = True
    silent = args.quiet or not is_first_process()
    root = logging.getLogger()
    with Reporter("none" if silent else args.progress, unit="batches") as reporter, warnings.catch_warnings():
        handler = ReporterHandler(reporter)
        root.addHandler(handler)
        warnings.simplefilter("default")
        for pattern in UNWANTED:
            warnings.filterwarnings("ignore", message=f"(?s){pattern}")
        warnings.showwarning = lambda message, *_, **__: reporter.say(f"warning: {first_line(message)}")
        try:
            yield reporter
        finally:
            root.removeHandler(handler)


def is_first_process() -> bool:
    """Tell whether this is the only process of a run, or the one that writes its files."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0  # Lightning keeps it as an attribute of the function


def first_line(message: object) -> str:
    """Return the first line of a text that is not empty."""
    return str(message).strip().splitlines()[0]
