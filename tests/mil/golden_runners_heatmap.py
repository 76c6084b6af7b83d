"""Runner of the golden case of heatmaps."""

import torch

from saccade.mil.heatmap import normalize_scores, tile_map
from tests.golden.case import Case
from tests.golden.runners import runner


@runner("mil.heatmap")
def heatmap(case: Case) -> None:
    c = case.config
    percentiles = normalize_scores(case.tensors["input.scores"].numpy())
    canvas = tile_map(
        percentiles,
        case.tensors["input.coords"].numpy(),
        c["patch_size_level0"],
        tuple(c["slide_size_level0"]),
        downsample=c["downsample"],
        rounding="ceil",
    )
    overlay = torch.from_numpy(canvas.values).nan_to_num(-1.0)
    case.compare({"output.percentiles": 100 * torch.from_numpy(percentiles), "output.overlay": overlay})
