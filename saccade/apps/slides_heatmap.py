"""``saccade slides heatmap``: where a model looks, as pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saccade.apps.options import add_batch_options, batch_options
from saccade.apps.screen import finish_run
from saccade.errors import ConfigError

__all__ = ["add_heatmap_action", "heatmap"]


def add_heatmap_action(actions: Any) -> None:  # noqa: ANN401 - argparse's own class is not public
    """Declare the sub-command."""
    parser = actions.add_parser("heatmap", help="draw where a model looks, from bags: nothing is encoded again")
    parser.add_argument("folder", metavar="FOLDER", help="output of `slides run`")
    parser.add_argument("-m", "--model", required=True, metavar="CKPT", help="run, *.ckpt, or official weights")
    parser.add_argument("-o", "--out", metavar="FOLDER", help="for attention/ and heatmaps/ (default: the same folder)")
    parser.add_argument("--bags", metavar="FOLDER", help="bag files, if not those below FOLDER")
    parser.add_argument(
        "--slides", action="append", metavar="PATH", help="where the scanner files are now, if they were moved"
    )
    parser.add_argument("--slide", action="append", default=[], metavar="ID", help="only this slide; may be repeated")
    parser.add_argument("--name", metavar="NAME", help="of the folder below heatmaps/ (default: the model's file name)")
    group = parser.add_argument_group("picture")
    group.add_argument("--format", choices=["png", "tif"], default="png", help="tif: pyramidal OME-TIFF")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--class", dest="class_name", metavar="NAME", help="map of a class (clam_mb, dsmil, mean, max)")
    which.add_argument("--branch", type=int, metavar="N", help="map of a branch, from 1 (acmil_ga, acmil_mha)")
    group.add_argument(
        "--normalize",
        choices=["percentile", "minmax", "times-uniform", "none"],
        default="percentile",
        help="default: percentile, the rank of a tile in its slide",
    )
    group.add_argument("--alpha", type=float, default=0.5, metavar="F", help="opacity, 0 to 1 (default: 0.5)")
    group.add_argument("--colormap", default="coolwarm", metavar="NAME", help="matplotlib's (default: coolwarm)")
    group.add_argument(
        "--downsample", type=float, metavar="F", help="level-0 pixels per pixel (default: 2048 px a side; tif: 4)"
    )
    group.add_argument("--smooth", type=float, default=0.0, metavar="PX", help="blur, standard deviation (default: 0)")
    group.add_argument("--tissue", action="store_true", help="draw inside the contours of the tissue alone")
    group.add_argument("--top", type=int, default=16, metavar="N", help="tiles on the contact sheet (default: 16)")
    group.add_argument("--geojson", action="store_true", help="also write tiles with their scores for QuPath")
    add_batch_options(parser)


def heatmap(args: argparse.Namespace) -> int:
    """Draw heatmaps."""
    from saccade.mil import HeatmapOptions, draw_heatmaps, load_classifier

    model = Path(args.model)
    name = args.name or (model.name if model.is_dir() else model.stem)
    if Path(name).name != name:
        raise ConfigError(f"--name is one word without slashes; got {name!r}.")
    summary = draw_heatmaps(
        args.folder,
        classifier=load_classifier(args.model),
        name=name,
        out=args.out,
        bags=args.bags,
        slides=args.slides,
        only=args.slide,
        heatmap=HeatmapOptions(
            format=args.format,
            class_name=args.class_name,
            branch=args.branch,
            normalize=args.normalize,
            alpha=args.alpha,
            colormap=args.colormap,
            downsample=args.downsample,
            smooth=args.smooth,
            tissue=args.tissue,
            top=args.top,
            geojson=args.geojson,
        ),
        options=batch_options(args),
    )
    return finish_run(summary, as_json=args.json)
