"""The registry of golden runners: which code judges a row, by the row's ``runner`` word.

Runners stand in ``golden_runners*.py`` next to the tests of what they judge and are found by that file name::

    @runner("attention.sink.logit")
    def sink_logit(case: Case) -> None:
        ...
        case.compare({"output.y": y, "grad.input.q": grad})

A runner builds the object from ``case.config``, loads ``case.group("state")``, and compares every output and gradient.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from tests.golden.case import Case

Runner = Callable[[Case], None]
registry: dict[str, Runner] = {}
TESTS = Path(__file__).resolve().parent.parent


def runner(*words: str) -> Callable[[Runner], Runner]:
    """Register a function for rows with one of these ``runner`` words."""

    def register(function: Runner) -> Runner:
        for word in words:
            if word in registry:
                raise ValueError(
                    f"two golden runners for {word!r}: {registry[word].__module__} and {function.__module__}"
                )
            registry[word] = function
        return function

    return register


def discover() -> dict[str, Runner]:
    """Import every ``tests/**/golden_runners*.py`` and return the registry."""
    for path in sorted(TESTS.rglob("golden_runners*.py")):
        importlib.import_module(".".join(["tests", *path.relative_to(TESTS).with_suffix("").parts]))
    return registry
