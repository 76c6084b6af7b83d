"""A heatmap over its slide as pyramidal OME-TIFF, written in blocks so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saccade.batch import atomic_path
from saccade.errors import DataError
from saccade.mil.heatmap import blend_heatmap
from saccade.mil.slide import Slide
from saccade.mil.slide_backends import Pixels

__all__ = ["write_heatmap_pyramid"]

TILE = 256  # side of the tiles in the file
QUALITY = 85


def write_heatmap_pyramid(
    path: str | Path, slide: Slide, colours: Pixels, map_downsample: float, *, downsample: float, alpha: float = 0.5
) -> None:
    """Write the blend of a slide and a map, from a resolution down to a picture of one tile.

    Every level is read from the slide's own pyramid and blended tile by tile. Physical pixel size is kept where the
    slide's is known. Places that cannot be decoded are white.

    Args:
        path: ``*.tif``; it appears complete or not at all.
        slide: The slide.
        colours: RGBA uint8 of the map, of :func:`saccade.mil.heatmap.colour_heatmap`.
        map_downsample: Level-0 pixels per pixel of the map.
        downsample: Level-0 pixels per pixel of the finest level of the file.
        alpha: Opacity of the map, 0..1.
    """
    import tifffile

    sizes = [(max(1, int(slide.width / downsample)), max(1, int(slide.height / downsample)))]
    while max(sizes[-1]) > TILE:
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    metadata: dict[str, object] = {"axes": "YXS"}
    if slide.resolution is not None:
        for axis, mpp in (("X", slide.resolution.x), ("Y", slide.resolution.y)):
            metadata |= {f"PhysicalSize{axis}": mpp * downsample, f"PhysicalSize{axis}Unit": "µm"}
    with atomic_path(Path(path)) as temporary, tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as writer:
        for level, (width, height) in enumerate(sizes):
            writer.write(
                blended_tiles(slide, colours, map_downsample, downsample * 2**level, (width, height), alpha),
                shape=(height, width, 3),
                dtype="uint8",
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": QUALITY},
                subfiletype=1 if level else 0,
                subifds=0 if level else len(sizes) - 1,
                metadata=None if level else metadata,
            )


def blended_tiles(
    slide: Slide, colours: Pixels, map_downsample: float, downsample: float, size: tuple[int, int], alpha: float
) -> Iterator[Pixels]:
    """Yield the tiles of one level, row by row; those at the right and lower border are filled up with white."""
    width, height = size
    side = TILE * downsample
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            x, y = left * downsample, top * downsample
            try:
                background = slide.read_scaled(x, y, side, side, (TILE, TILE))
            except DataError:  # a damaged place in the file; the rest is worth having
                background = np.full((TILE, TILE, 3), 255, np.uint8)
            ratio = downsample / map_downsample
            columns = ((np.arange(left, left + TILE) + 0.5) * ratio).astype(int)
            rows = ((np.arange(top, top + TILE) + 0.5) * ratio).astype(int)
            inside = (rows < colours.shape[0])[:, None] & (columns < colours.shape[1])
            part = colours[rows.clip(max=colours.shape[0] - 1)[:, None], columns.clip(max=colours.shape[1] - 1)]
            yield blend_heatmap(part * inside[..., None], background, alpha)
