"""A local web page that shows slides, tissue, tiles and heatmaps; it binds to 127.0.0.1 and needs no network.

What a request may name is a number from a table made at the start, or a file from a fixed list; paths are never built
from what a browser sends. Requests under another host name than this machine's are refused, so that pages elsewhere
cannot read through the browser what is shown here.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from saccade.errors import ConfigError, DataError
from saccade.mil.viewer_content import ViewerContent

__all__ = ["SlideServer", "serve"]

PACKAGE = Path(__file__).parent
STATIC = {
    "/": (PACKAGE / "viewer_page" / "index.html", "text/html; charset=utf-8"),
    "/viewer.js": (PACKAGE / "viewer_page" / "viewer.js", "text/javascript; charset=utf-8"),
    "/viewer.css": (PACKAGE / "viewer_page" / "viewer.css", "text/css; charset=utf-8"),
    "/openseadragon.min.js": (
        PACKAGE / "third_party" / "openseadragon" / "openseadragon.min.js",
        "text/javascript; charset=utf-8",
    ),
}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'",
}
NUMBER = r"(\d{1,9})"
Answer = tuple[bytes, str]


class SlideServer(ThreadingHTTPServer):
    """The server; :func:`serve` makes one.

    Args:
        content: What is shown.
        port: 0 takes any free one.
    """

    daemon_threads = True

    def __init__(self, content: ViewerContent, port: int) -> None:
        self.content = content
        super().__init__(("127.0.0.1", port), RequestHandler)

    @property
    def address(self) -> str:
        """What to type into a browser."""
        return f"http://127.0.0.1:{self.server_port}/"

    def serve_in_background(self) -> None:
        """Serve from a thread until :meth:`shutdown`, for notebooks."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_close(self) -> None:
        """Free the port and close the slides."""
        super().server_close()
        self.content.close()


def serve(
    folder: str | Path, *, port: int = 8765, slides: str | Path | Sequence[str | Path] | None = None
) -> SlideServer:
    """Bind a viewer of an output folder of ``saccade slides`` to 127.0.0.1; ``serve_forever`` then runs it.

    Args:
        folder: Output of ``saccade slides segment``, ``run``, ``predict``, ``heatmap``.
        port: 0 takes any free one.
        slides: Where the scanner files are, if not where the journals in ``folder`` say.

    Raises:
        ConfigError: If there is no such folder, no slide in it that is still there, or the port cannot be had.
    """
    content = ViewerContent.of(folder, slides=slides)
    try:
        return SlideServer(content, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"Port {port} cannot be had ({error}); choose another with --port, 0 for any.") from error


class RequestHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: SlideServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with a file of the page, or a part of a slide."""
        host = self.headers.get("Host", "")
        if host not in (f"127.0.0.1:{self.server.server_port}", f"localhost:{self.server.server_port}"):
            self.answer(HTTPStatus.FORBIDDEN, b"only for this machine", "text/plain")
            return
        path = urlsplit(self.path).path
        try:
            found = self.find(path)
        except DataError as error:
            self.answer(HTTPStatus.UNPROCESSABLE_ENTITY, str(error).encode(), "text/plain; charset=utf-8")
            return
        if found is None:
            self.answer(HTTPStatus.NOT_FOUND, b"nothing here", "text/plain")
        else:
            self.answer(HTTPStatus.OK, *found)

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self.do_GET()

    def find(self, path: str) -> Answer | None:
        """Return body and type for a path; ``None`` if there is no such thing."""
        if path in STATIC:
            file, kind = STATIC[path]
            return file.read_bytes(), kind
        for pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match:
                try:
                    return function(self.server.content, *map(int, match.groups()))
                except IndexError:  # a number beyond the table
                    return None
        return None

    def answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        """Send one response."""
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a page asks for hundreds of tiles."""


def json_answer(content: object) -> Answer:
    """Return a JSON document."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode(), "application/json"


def table(content: ViewerContent) -> Answer:
    """Return all slides."""
    return json_answer(content.table())


def facts(content: ViewerContent, slide: int) -> Answer:
    """Return what is known of a slide."""
    return json_answer(content.facts(slide))


def contours(content: ViewerContent, slide: int) -> Answer:
    """Return outlines of tissue, lists of ``[x, y]``."""
    return json_answer(content.contours(slide))


def tiles(content: ViewerContent, slide: int) -> Answer:
    """Return corners and size of tiles."""
    return json_answer(content.tiles(slide))


def scores(content: ViewerContent, slide: int, number: int) -> Answer:
    """Return scores and percentiles of one map."""
    return json_answer(content.scores(slide, number))


def overlay(content: ViewerContent, slide: int, number: int) -> Answer:
    """Return a map in colours, transparent where no tile is."""
    return encode(content.overlay(slide, number), "PNG")


def pixels(content: ViewerContent, slide: int, level: int, column: int, row: int) -> Answer:
    """Return a tile of the deep zoom."""
    return encode(content.pixels(slide, level, column, row), "JPEG")


def encode(picture: Any, format: str) -> Answer:  # noqa: ANN401 - an array
    """Return a picture as a file."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, format, quality=85)
    return stream.getvalue(), f"image/{format.lower()}"


SLIDE = f"/slides/{NUMBER}"
ROUTES: tuple[tuple[re.Pattern[str], Callable[..., Answer]], ...] = tuple(
    (re.compile(pattern, re.ASCII), function)
    for pattern, function in (
        ("/slides", table),
        (SLIDE, facts),
        (f"{SLIDE}/contours", contours),
        (f"{SLIDE}/tiles", tiles),
        (f"{SLIDE}/maps/{NUMBER}", scores),
        (rf"{SLIDE}/maps/{NUMBER}\.png", overlay),
        (rf"{SLIDE}/zoom/{NUMBER}/{NUMBER}_{NUMBER}\.jpg", pixels),
    )
)
