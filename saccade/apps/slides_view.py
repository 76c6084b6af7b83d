"""``saccade slides view``: a page on this machine that shows slides, tissue, tiles and heatmaps."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_view_action", "view"]


def add_view_action(actions: Any) -> None:  # noqa: ANN401 - argparse's own class is not public
    """Declare the sub-command."""
    parser = actions.add_parser("view", help="show slides, tissue, tiles and heatmaps in a browser on this machine")
    parser.add_argument("folder", metavar="FOLDER", help="output of `slides run`")
    parser.add_argument("--port", type=int, default=8765, metavar="N", help="0 takes any free one (default: 8765)")
    parser.add_argument(
        "--slides", action="append", metavar="PATH", help="where the scanner files are now, if they were moved"
    )


def view(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from saccade.mil.viewer import serve

    with serve(args.folder, port=args.port, slides=args.slides) as server:
        print(f"{server.address}   {len(server.content.slides)} slides of {args.folder}   Ctrl+C ends it", flush=True)
        server.serve_forever()
    return 0
