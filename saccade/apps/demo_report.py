"""The report of ``saccade demo``: commands as they were run, tables, one page."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any

from saccade.errors import SaccadeError

__all__ = ["Outcome", "Session", "page", "table"]


@dataclass
class Session:
    """Commands that were run, as the user would type them."""

    lines: list[str] = field(default_factory=list)

    def call(self, line: str, *, expect: int = 0) -> None:
        """Print a command and run it.

        Raises:
            SaccadeError: If it ends with another exit code than expected.
        """
        from saccade.apps.cli import main

        print(f"$ {line}", flush=True)
        self.lines.append(line)
        code = main(shlex.split(line)[1:])
        if code != expect:
            raise SaccadeError(f"`{line}` ended with exit code {code}, expected {expect}.")


@dataclass(frozen=True)
class Outcome:
    """What a part of the demo showed.

    Args:
        name: The part, and its folder.
        summary: What it is about.
        result: The finding, in a line of plain text.
        seconds: How long it took.
        cpu_seconds: What it took of all cores together, whatever else they were doing.
        lines: Commands.
        values: HTML by placeholder of ``demo_pages/NAME.html``.
    """

    name: str
    summary: str
    result: str
    seconds: float
    cpu_seconds: float
    lines: list[str]
    values: dict[str, str]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table of plain text; floats with three decimals."""

    def cell(tag: str, value: Any) -> str:  # noqa: ANN401 - whatever a table shows
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return f"<{tag}>{html.escape(text)}</{tag}>"

    lines = [("th", header), *(("td", row) for row in rows)]
    body = "\n".join(f"<tr>{''.join(cell(tag, value) for value in row)}</tr>" for tag, row in lines)
    return f"<table>\n{body}\n</table>"


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the report: a table of the parts, then each of them."""
    rows = "\n".join(
        f'<tr><td><a href="#{o.name}">{o.name}</a></td><td>{html.escape(o.summary)}</td>'
        f"<td>{html.escape(o.result)}</td><td>{o.seconds:.0f} s</td><td>{o.cpu_seconds:.0f} s</td></tr>"
        for o in outcomes
    )
    sections = [f'<section id="{o.name}">\n{section(o)}</section>' for o in outcomes]
    return Template(read("report")).substitute(rows=rows, sections="\n".join(sections))


def section(outcome: Outcome) -> str:
    """Return one part of the report."""
    commands = "\n".join(f"$ {line}" for line in outcome.lines)
    return Template(read(outcome.name)).substitute(
        commands=html.escape(commands), result=html.escape(outcome.result), **outcome.values
    )


def read(name: str) -> str:
    """Return a template."""
    return resources.files("saccade.apps").joinpath("demo_pages", f"{name}.html").read_text(encoding="utf-8")
