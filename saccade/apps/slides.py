"""``saccade slides``: from scanner files to bags of features, and from bags to classified slides."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from saccade.apps.options import add_batch_options, add_input_options, batch_options
from saccade.apps.screen import finish_run, table_lines
from saccade.apps.slides_heatmap import add_heatmap_action, heatmap
from saccade.apps.slides_training import TRAINING, add_training_actions
from saccade.apps.slides_view import add_view_action, view
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.batch.fleet import Fleet
    from saccade.mil import Encoder, TileOptions, TissueOptions

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = {
    "slides": [
        "saccade slides info slides/",
        "saccade slides run slides/ -o out/ --mpp 0.5 --tile-px 256 -m stain-texture",
    ]
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="format, size, levels and resolution of slides")
    info.add_argument("inputs", nargs="+", metavar="SLIDE", help="files, folders, globs, @list.txt, or -")
    info.add_argument("--slide-mpp", type=float, metavar="F", help="resolution of slides that do not say it, um/px")
    info.add_argument("--json", action="store_true", help="print one JSON document")
    helps = {
        "segment": "find tissue: contours for QuPath, previews",
        "tile": "find tissue and lay tiles: coordinates",
        "embed": "features of tiles; tissue and tiles as far as they are not there yet",
        "run": "segment, tile and embed, slide by slide",
    }
    for name, text in helps.items():
        action = actions.add_parser(name, help=text)
        add_input_options(action, out_help="folder; settings are in the names of the folders below it")
        add_slide_options(action)
        if name != "segment":
            add_tile_options(action)
        if name in ("embed", "run"):
            add_encoder_options(action)
        add_engine_options(action)
        add_batch_options(action)
    add_training_actions(actions)
    add_heatmap_action(actions)
    add_view_action(actions)


def add_slide_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which slides, and how tissue is found."""
    group = parser.add_argument_group("slides and tissue")
    group.add_argument("--list", metavar="CSV", help="only these slides: columns slide, and if need be mpp")
    group.add_argument("--slide-mpp", type=float, metavar="F", help="resolution of slides that do not say it, um/px")
    group.add_argument(
        "--method", choices=["otsu", "hsv"], default="otsu", help="threshold of saturation: Otsu's or fixed"
    )
    group.add_argument("--keep-pens", action="store_true", help="count ink of felt pens as tissue")
    group.add_argument("--min-area", type=float, default=0.01, metavar="MM2", help="least piece (default: 0.01 mm2)")
    group.add_argument("--min-hole", type=float, default=0.005, metavar="MM2", help="least hole (default: 0.005 mm2)")


def add_tile_options(parser: argparse.ArgumentParser) -> None:
    """Add size, scale and choice of tiles."""
    group = parser.add_argument_group("tiles")
    group.add_argument("--mpp", type=float, default=0.5, metavar="F", help="target resolution, um/px (default: 0.5)")
    group.add_argument("--tile-px", type=int, default=256, metavar="PX", help="side at that resolution (default: 256)")
    group.add_argument("--overlap-px", type=int, default=0, metavar="PX", help="default: 0")
    group.add_argument("--min-tissue", type=float, default=0.25, metavar="F", help="least share (default: 0.25)")
    group.add_argument("--edge", choices=["pad", "drop"], default="pad", help="tiles beyond the border (default: pad)")
    group.add_argument("--resample", choices=["area", "bicubic"], default="area", help="bicubic: as TRIDENT")


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add ``-m`` and what concerns features."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "-m",
        "--model",
        required=True,
        metavar="NAME",
        help="stain-texture (no weights needed), a published one (UNI, Virchow2, ...), or any name that classify takes",
    )
    group.add_argument("--weights", metavar="PATH", help="state dict, .safetensors or .pth")
    group.add_argument("--pretrained", action="store_true", help="allow the download of weights")
    group.add_argument("--random-weights", action="store_true", help="run although the model has no trained weights")
    group.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of stored features")
    group.add_argument(
        "--on-bad-tile", choices=["skip", "white", "fail"], default="skip", help="default: skip, and count"
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add where slides are worked on."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=["local", "ray"], default="local", help="ray: a cluster; extra 'ray'")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="HOST:PORT, auto, or local (default: RAY_ADDRESS, else local)"
    )


def fleet_of(args: argparse.Namespace) -> Fleet | None:
    """Return the cluster to work on, if any."""
    if args.engine == "local":
        if args.ray_address is not None:
            raise ConfigError("--ray-address belongs to --engine ray.")
        return None
    from saccade.batch.fleet import Fleet

    return Fleet(args.ray_address)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    others = {**TRAINING, "info": info, "heatmap": heatmap, "view": view}
    if args.action in others:
        return others[args.action](args)
    from saccade.mil.extraction import extract

    stage = "embed" if args.action == "run" else args.action
    with redirect_stdout(sys.stderr):  # where Ray tells of dead workers
        summary = extract(
            args.inputs,
            out=args.out,
            stage=stage,
            encoder=encoder_of(args) if stage == "embed" else None,
            tissue=tissue_of(args),
            tiles=None if stage == "segment" else tiles_of(args),
            list_file=args.list,
            slide_mpp=args.slide_mpp,
            dtype=getattr(args, "dtype", "float16"),
            on_bad_tile=getattr(args, "on_bad_tile", "skip"),
            fleet=fleet_of(args),
            options=batch_options(args),
        )
    return finish_run(summary, as_json=args.json)


def tissue_of(args: argparse.Namespace) -> TissueOptions:
    """Collect the options of tissue."""
    from saccade.mil import TissueOptions

    return TissueOptions(args.method, min_area_mm2=args.min_area, min_hole_mm2=args.min_hole, pens=not args.keep_pens)


def tiles_of(args: argparse.Namespace) -> TileOptions:
    """Collect the options of tiles."""
    from saccade.mil import TileOptions

    return TileOptions(args.mpp, args.tile_px, args.overlap_px, args.min_tissue, args.edge, args.resample)


def encoder_of(args: argparse.Namespace) -> Encoder:
    """Load a tile encoder: one of mil's by name, or any model that the image commands take."""
    from saccade.mil.encoders import ENCODERS, load_encoder, wrap_model

    own = {"stain-texture", *(name.lower() for name in ENCODERS)}
    if args.model.lower() in own:
        weights = {"weights": args.weights, "pretrained": args.pretrained, "random_weights": args.random_weights}
        return load_encoder(args.model, **weights)
    from saccade.vision_backbones.features import feature_function
    from saccade.vision_backbones.loading import ModelSource, load_model

    source = ModelSource(
        args.model, weights=args.weights, pretrained=args.pretrained, random_weights=args.random_weights
    )
    loaded = load_model(source)
    pool = feature_function(loaded.model, layer=None, pool=None)
    return wrap_model(loaded.model, name=args.model, data_config=loaded.data_config, weights=loaded.weights, pool=pool)


def info(args: argparse.Namespace) -> int:
    """Print what is known of slides; 3 if some cannot be opened, 1 if none can."""
    from saccade.errors import DataError
    from saccade.mil import Slide
    from saccade.mil.slide_items import find_slides

    rows, failed = [], 0
    items = find_slides(args.inputs)
    for item in items:
        try:
            with Slide(item.path, mpp=args.slide_mpp) as slide:
                resolution = slide.resolution
                rows.append(
                    {
                        "slide": item.id,
                        "format": slide.vendor,
                        "reader": slide.backend,
                        "width": slide.width,
                        "height": slide.height,
                        "downsamples": [round(level.downsample, 4) for level in slide.levels],
                        "mpp": None if resolution is None else [resolution.x, resolution.y],
                        "mpp_source": None if resolution is None else resolution.source,
                        "notices": slide.notices,
                        "error": None,
                    }
                )
        except DataError as error:
            failed += 1
            rows.append({"slide": item.id, "error": str(error)})
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        print("\n".join(table_lines([("SLIDE", "FORMAT", "SIZE", "LEVELS", "UM/PX", "FROM"), *map(info_line, rows)])))
    return 0 if not failed else 1 if failed == len(items) else 3


def info_line(row: dict[str, object]) -> tuple[str, ...]:
    """Return one line of the table."""
    if row["error"] is not None:
        return (str(row["slide"]), "-", "-", "-", "-", f"cannot be opened: {row['error']}")
    mpp, levels = row["mpp"], row["downsamples"]
    resolution = f"{mpp[0]:.4g}" if isinstance(mpp, list) else "unknown"
    shown = ", ".join(f"{d:g}" for d in levels) if isinstance(levels, list) else ""
    size = f"{row['width']} x {row['height']}"
    return (str(row["slide"]), str(row["format"]), size, shown, resolution, str(row["mpp_source"] or ""))
