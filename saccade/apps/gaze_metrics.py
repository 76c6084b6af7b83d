"""``saccade gaze metrics``: scores of scanpaths beside human agreement and chance."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.apps.gaze_options import add_reading_options, note, read_paths
from saccade.apps.options import comma_list
from saccade.apps.screen import table_lines
from saccade.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from saccade.gaze.metrics.density_table import DensityScore
    from saccade.gaze.metrics.evaluate import Comparison
    from saccade.gaze.metrics.search_table import SearchScore
    from saccade.gaze.scanpath import ScanpathSet

__all__ = ["add_arguments", "run"]

CHANCE = ("human", "random", "other_image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="compare the viewers of one file with each other")
    parser.add_argument("--pred", metavar="FILE", help="predicted scanpaths")
    parser.add_argument("--truth", metavar="FILE", help="human scanpaths to compare them with")
    parser.add_argument("-o", "--out", metavar="FILE", help="a row per pair: .csv, .tsv, .jsonl, .json, .parquet")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON document")
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--pairs",
        choices=["within-image", "all"],
        default="within-image",
        help="of one file: viewers of the same image and task, or every two paths (default: within-image)",
    )
    group.add_argument(
        "--metrics", type=comma_list, metavar="NAME,...", help="see saccade list metrics (default: all that can be)"
    )
    group.add_argument("--ppd", type=float, metavar="N", help="pixels per degree: distances in degrees")
    group.add_argument("--first", type=int, metavar="N", help="only the first N fixations of both (default: all)")
    group.add_argument("--maps", metavar="DIR", help="label maps IMAGE.png or IMAGE.npy, for the semantic metrics")
    group.add_argument(
        "--densities",
        metavar="DIR",
        help="score predicted densities IMAGE[.TASK][.SUBJECT].npy, (H, W) or one per fixation (N, H, W), at the human "
        "fixations",
    )
    group.add_argument("--baseline", metavar="FILE", help="their baseline: training recordings (default: other images)")
    group.add_argument(
        "--max-step",
        type=int,
        default=6,
        metavar="N",
        help="of target-fixation probability: 6 for present, 10 for absent targets in COCO-Search18 (default: 6)",
    )
    group.add_argument("--no-chance", action="store_true", help="leave out random paths and those of other images")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of chance and intervals (default: 0)")
    add_reading_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from saccade.batch.tables import check_table_path, write_table
    from saccade.gaze.metrics.evaluate import compare_paths, compare_viewers
    from saccade.gaze.metrics.search_table import search_table

    if (args.file is None) == (args.pred is None and args.truth is None) or (args.pred is None) != (args.truth is None):
        raise ConfigError("Give --pred and --truth, or one file whose viewers are compared with each other.")
    if args.ppd is not None and not args.ppd > 0:
        raise ConfigError(f"--ppd is pixels per degree, above 0, got {args.ppd:g}.")
    if args.baseline is not None and args.densities is None:
        raise ConfigError("--baseline is of --densities.")
    if args.out is not None:
        check_table_path(Path(args.out))
    maps = None if args.maps is None else read_maps(Path(args.maps))
    options: dict[str, Any] = {
        "metrics": args.metrics,
        "maps": maps,
        "pixels_per_degree": args.ppd,
        "first": args.first,
        "chance": not args.no_chance,
        "seed": args.seed,
    }
    if args.file is not None:
        predicted, human = None, read_paths(args.file, args)
        note(f"{args.file}: {human!r}", args)
        comparison = compare_viewers(human, pairs=args.pairs, **options)
    else:
        predicted, human = read_paths(args.pred, args), read_paths(args.truth, args)
        note(f"{args.pred}: {predicted!r}\n{args.truth}: {human!r}", args)
        comparison = compare_paths(predicted, human, **options)
    search = [] if args.metrics else search_table(
        predicted, human, max_step=args.max_step, chance=not args.no_chance, seed=args.seed
    )  # fmt: skip
    densities = [] if args.densities is None else score_densities(human, args)
    if args.out is not None:
        write_table(Path(args.out), comparison.rows())
        note(f"{args.out}: {len(comparison.values)} pairs", args)
    if args.json:
        print(json.dumps(document(comparison, search, densities, args), indent=1, allow_nan=False))
        return 0
    print_header(comparison, args)
    print("\n".join(score_lines(comparison)))
    if search:
        print()
        print("\n".join(search_lines(search)))
    if densities:
        print()
        print("\n".join(density_lines(densities)))
    return 0


def score_densities(human: ScanpathSet, args: argparse.Namespace) -> list[DensityScore]:
    """Return the scores of the densities of a folder at the human fixations."""
    from saccade.gaze.metrics.density_table import DensityFiles, density_table

    baseline = None if args.baseline is None else read_paths(args.baseline, args)
    return density_table(human, DensityFiles(Path(args.densities)), baseline=baseline, seed=args.seed)


def read_maps(folder: Path) -> dict[str, NDArray[np.integer]]:
    """Read label maps; each serves the image of its name with any extension.

    Raises:
        ConfigError: If there is none, or one is not whole numbers in two dimensions.
    """
    import numpy as np
    from PIL import Image

    class ByStem(dict[str, Any]):
        """Maps that are found by a name with or without extension."""

        def __contains__(self, name: object) -> bool:
            return super().__contains__(Path(str(name)).stem)

        def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - an array
            return super().__getitem__(Path(name).stem)

    maps = ByStem()
    for path in sorted([*folder.glob("*.png"), *folder.glob("*.npy")]):
        labels = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
        if labels.ndim != 2 or labels.dtype.kind not in "iub":
            raise ConfigError(
                f"{path} has shape {labels.shape} of {labels.dtype}; a label map is (H, W) whole numbers."
            )
        maps[path.stem] = labels
    if not maps:
        raise ConfigError(f"{folder} has no .png or .npy label map.")
    return maps


def print_header(comparison: Comparison, args: argparse.Namespace) -> None:
    """Say what the columns are, and what was left out."""
    note(
        "score: mean over the humans of an image and task, then over n predictions; 95%: bootstrap over images; undef: "
        "pairs without a value; best_human: against the most similar human; human: viewers against the others; random, "
        "other_image: chance against the viewers",
        args,
    )
    if args.first is not None:
        note(f"  only the first {args.first} fixations of both", args)
    for name, definition in comparison.definitions.items():
        note(f"  {name}: {definition}", args)
    for name, reason in comparison.left_out.items():
        note(f"  without {name}: {reason}", args)


def number(value: float | None) -> str:
    """Return four digits or a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def score_lines(comparison: Comparison) -> list[str]:
    """Return the table of scores."""
    extra = [name for name in ("best_of_k", *CHANCE) if any(getattr(s, name) is not None for s in comparison.scores)]
    rows = [["METRIC", "SCORE", "SD", "95%", "N", "UNDEF", "BEST_HUMAN", *(name.upper() for name in extra)]]
    for score in comparison.scores:
        label = f"{score.name} ({score.unit})" if score.unit else score.name
        interval = f"{number(score.low)}..{number(score.high)}"
        cells = [label, number(score.mean), number(score.sd), interval, str(score.n), str(score.undefined)]
        rows.append([*cells, number(score.best_human), *(number(getattr(score, name)) for name in extra)])
    return table_lines(rows)


def search_lines(search: Sequence[SearchScore]) -> list[str]:
    """Return the table of search measures."""
    columns = [name for name in ("predicted", *CHANCE) if any(getattr(row, name) is not None for row in search)]
    rows = [["SEARCH", *(name.upper() for name in columns)]]
    rows += [[row.name, *(number(getattr(row, name)) for name in columns)] for row in search]
    return table_lines(rows)


def density_lines(densities: Sequence[DensityScore]) -> list[str]:
    """Return the table of densities."""
    rows = [["DENSITY", "SCORE", "95%", "N", "BASELINE"]]
    for score in densities:
        interval = f"{number(score.low)}..{number(score.high)}"
        rows.append([score.name, number(score.mean), interval, str(score.n), number(score.baseline)])
    return table_lines(rows)


def document(
    comparison: Comparison,
    search: Sequence[SearchScore],
    densities: Sequence[DensityScore],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return everything that is printed, NaN as null."""

    def plain(row: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()}

    return {
        "pairs": len(comparison.values),
        "scores": [plain(score) for score in comparison.scores],
        "search": [plain(row) for row in search],
        "densities": [plain(row) for row in densities],
        "definitions": comparison.definitions,
        "left_out": comparison.left_out,
        "settings": {
            "pixels_per_degree": args.ppd,
            "first": args.first,
            "max_step": args.max_step,
            "seed": args.seed,
            "pairs": args.pairs,
        },
    }
