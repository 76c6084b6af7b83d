"""Three ways to read pixels of a slide: OpenSlide, tiled TIFF directly, plain images."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from saccade.errors import DataError

__all__ = ["Backend", "ImageBackend", "Level", "OpenSlideBackend", "Pixels", "TiffBackend"]

Pixels = NDArray[np.uint8]
# Damaged files end in a DataError that names them; tifffile's own log lines would go to the screen beside it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
CACHE_BYTES = 64 << 20  # decoded tiles kept by a handle; OpenSlide's own default is 32 MiB for every slide that is open
DECODE_ERRORS = (ValueError, RuntimeError, OSError, IndexError)  # what tifffile and the codecs of imagecodecs raise
# Compressions that imagecodecs decodes to what OpenSlide shows: none, LZW, JPEG, Deflate, JPEG 2000, Zstandard.
COMPRESSIONS = (1, 5, 7, 8, 32946, 33003, 33005, 34712, 50000)


@dataclass(frozen=True)
class Level:
    """One level of a pyramid.

    Args:
        width: In its own pixels.
        height: In its own pixels.
        downsample_x: Width of level 0 over this width.
        downsample_y: Height of level 0 over this height.
    """

    width: int
    height: int
    downsample_x: float
    downsample_y: float

    @property
    def downsample(self) -> float:
        """Mean of both axes."""
        return (self.downsample_x + self.downsample_y) / 2


def pyramid(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Return levels of these widths and heights."""
    width, height = sizes[0]
    return tuple(Level(w, h, width / w, height / h) for w, h in sizes)


class Backend(Protocol):
    """What a slide needs of a reader."""

    @property
    def name(self) -> str:
        """Name of the reader."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """The pyramid, finest first."""

    @property
    def properties(self) -> Mapping[str, str]:
        """Metadata under OpenSlide's names."""

    def read(self, level: int, x: int, y: int, width: int, height: int, fill: int) -> Pixels:
        """Return RGB ``(height, width, 3)``; ``x, y`` in pixels of the level; ``fill`` outside the slide.

        Raises:
            DataError: If pixels cannot be decoded, with the reason ``"bad_tile"``.
        """

    def close(self) -> None:
        """Let go of the file."""


class OpenSlideBackend:
    """Whatever OpenSlide reads. After a decode error, which spoils a handle for ever, the slide is opened anew.

    Args:
        path: The slide, or any file of a DICOM series.

    Raises:
        DataError: If OpenSlide does not read it.
    """

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.handle = self.open()
        self.properties: Mapping[str, str] = dict(self.handle.properties)
        self.levels = pyramid([(int(w), int(h)) for w, h in self.handle.level_dimensions])

    def open(self) -> Any:  # noqa: ANN401 - openslide is untyped
        """Open the slide with the process's one cache of decoded tiles."""
        import openslide

        try:
            handle = openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:  # its subclass says that the format is unknown
            raise DataError(f"{self.path} is no slide that OpenSlide reads ({error}).", reason="unreadable") from error
        handle.set_cache(shared_cache())
        return handle

    def read(self, level: int, x: int, y: int, width: int, height: int, fill: int) -> Pixels:
        """Read a region; see :class:`Backend`."""
        import openslide

        this = self.levels[level]
        origin = (round(x * this.downsample_x), round(y * this.downsample_y))
        with self.lock:
            handle = self.handle
        try:
            rgba = np.asarray(handle.read_region(origin, level, (width, height)))
        except openslide.OpenSlideError as error:
            with self.lock:
                if self.handle is handle:
                    self.handle = self.open()
            raise DataError(
                f"{self.path.name}: cannot read {width} x {height} px at {origin}, level {level} (openslide: {error}).",
                reason="bad_tile",
            ) from error
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        if alpha.min(initial=255) == 255:
            return np.ascontiguousarray(rgb)
        # Colours are premultiplied: what is outside the slide, or missing, is transparent black.
        return rgb + ((255 - alpha.astype(np.uint16)) * fill // 255).astype(np.uint8)

    def close(self) -> None:
        """Close the handle."""
        self.handle.close()


caches: dict[int, Any] = {}


def shared_cache() -> Any:  # noqa: ANN401 - openslide is untyped
    """Return this process's cache: handles with one each would grow with the number of slides."""
    import openslide

    if os.getpid() not in caches:
        caches.clear()
        caches[os.getpid()] = openslide.OpenSlideCache(CACHE_BYTES)
    return caches[os.getpid()]


class TiffBackend:
    """Tiled 8-bit RGB TIFF read without OpenSlide: native tiles are decoded once and kept while they are near.

    Args:
        path: SVS, generic, OME or BigTIFF with tiles.

    Raises:
        DataError: If it is not such a file, or ends before its last tile does (``reason="truncated"``).
    """

    name = "tiff"

    def __init__(self, path: Path) -> None:
        import tifffile

        self.path = path
        try:
            self.file = tifffile.TiffFile(path)
            weakref.finalize(self, self.file.close)  # a slide that nobody holds any more leaves no file open
            self.pages = [level.keyframe for level in self.file.series[0].levels]
        except (*DECODE_ERRORS, tifffile.TiffFileError) as error:
            raise DataError(f"{path} cannot be read as TIFF ({error}).", reason="unreadable") from error
        size = path.stat().st_size
        for page in self.pages:
            if not page.is_tiled or page.dtype != np.uint8 or page.samplesperpixel != 3 or page.planarconfig != 1:
                raise DataError(f"{path} has no tiles of 8-bit RGB.", reason="unreadable")
            if int(page.compression) not in COMPRESSIONS:
                raise DataError(f"{path} has TIFF compression {int(page.compression)}.", reason="unreadable")
            ends = (start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True))
            if max(ends, default=0) > size:
                raise DataError(f"{path} is truncated: its tiles go on after the end of the file.", reason="truncated")
        self.levels = pyramid([(page.imagewidth, page.imagelength) for page in self.pages])
        self.properties = {f"tiff.{key}": value for key, value in self.tags().items()}
        self.cache: OrderedDict[tuple[int, int], Pixels | None] = OrderedDict()
        self.cached_bytes = 0
        self.lock = threading.Lock()

    def tags(self) -> dict[str, str]:
        """Return the resolution tags as OpenSlide words them."""
        tags = self.pages[0].tags
        if "XResolution" not in tags or "YResolution" not in tags:
            return {}
        unit = {1: "none", 2: "inch", 3: "centimeter"}.get(int(self.pages[0].resolutionunit), "none")
        x, y = self.pages[0].resolution
        return {"XResolution": str(x), "YResolution": str(y), "ResolutionUnit": unit}

    @cached_property
    def ome_xml(self) -> str | None:
        """The OME-XML description, if there is one."""
        return self.file.ome_metadata if self.file.is_ome else None

    def read(self, level: int, x: int, y: int, width: int, height: int, fill: int) -> Pixels:
        """Read a region; see :class:`Backend`."""
        page = self.pages[level]
        tile_width, tile_height = page.tilewidth, page.tilelength
        if (width, height) == (tile_width, tile_height) and x % width == y % height == 0 <= min(x, y):
            whole = self.whole_tile(level, x // width, y // height)
            if whole is not None:
                return whole
        out = np.full((height, width, 3), fill, np.uint8)
        right, bottom = min(x + width, page.imagewidth), min(y + height, page.imagelength)
        left, top = max(x, 0), max(y, 0)
        if right <= left or bottom <= top:
            return out
        columns = -(-page.imagewidth // tile_width)
        for row in range(top // tile_height, (bottom - 1) // tile_height + 1):
            for column in range(left // tile_width, (right - 1) // tile_width + 1):
                tile = self.tile(level, row * columns + column)
                if tile is None:
                    continue
                x0, y0 = max(column * tile_width, left), max(row * tile_height, top)
                x1, y1 = min((column + 1) * tile_width, right), min((row + 1) * tile_height, bottom)
                source = tile[
                    y0 - row * tile_height : y1 - row * tile_height, x0 - column * tile_width : x1 - column * tile_width
                ]
                out[y0 - y : y1 - y, x0 - x : x1 - x] = source
        return out

    def whole_tile(self, level: int, column: int, row: int) -> Pixels | None:
        """Return a native tile that is wanted as it is; it is not kept, because nobody asks for its parts.

        ``None`` means that it is at hand already, reaches beyond the slide, or is not in the file.
        """
        page = self.pages[level]
        index = row * -(-page.imagewidth // page.tilewidth) + column
        fits = (column + 1) * page.tilewidth <= page.imagewidth and (row + 1) * page.tilelength <= page.imagelength
        return self.decode(level, index) if fits and (level, index) not in self.cache else None

    def tile(self, level: int, index: int) -> Pixels | None:
        """Return a decoded native tile, or ``None`` if the file has none there (sparse pyramids)."""
        key = (level, index)
        with self.lock:
            if key in self.cache:
                self.cache.move_to_end(key)
                return self.cache[key]
        tile = self.decode(level, index)
        with self.lock:
            if key not in self.cache:
                self.cache[key] = tile
                self.cached_bytes += 0 if tile is None else tile.nbytes
            while self.cached_bytes > CACHE_BYTES:
                _, old = self.cache.popitem(last=False)
                self.cached_bytes -= 0 if old is None else old.nbytes
        return tile

    def decode(self, level: int, index: int) -> Pixels | None:
        """Read and decode a native tile."""
        page = self.pages[level]
        count = page.databytecounts[index]
        if count == 0:
            return None
        data = os.pread(self.file.filehandle.fileno(), count, page.dataoffsets[index])
        try:
            decoded = page.decode(data, index, jpegtables=page.jpegtables)[0]
        except DECODE_ERRORS as error:
            columns = -(-page.imagewidth // page.tilewidth)
            column, row = index % columns, index // columns
            raise DataError(
                f"{self.path.name}: cannot decode the native tile in column {column}, row {row} of level {level} "
                f"({type(error).__name__}: {error}).",
                reason="bad_tile",
            ) from error
        if decoded is None:
            return None
        tile: Pixels = decoded.reshape(decoded.shape[-3:])
        return tile

    def close(self) -> None:
        """Close the file and forget decoded tiles."""
        self.file.close()
        self.cache.clear()
        self.cached_bytes = 0


class ImageBackend:
    """A plain image (PNG, JPEG, ...) as a slide of one level, decoded as a whole.

    Args:
        path: The image.

    Raises:
        DataError: If it cannot be decoded, with the reason that image commands give.
    """

    name = "image"

    def __init__(self, path: Path) -> None:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                dpi = image.info.get("dpi")
                flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image ({error}).", reason="unreadable") from error
        self.pixels: Pixels = np.asarray(flat.convert("RGB"))
        self.levels = pyramid([(self.pixels.shape[1], self.pixels.shape[0])])
        self.properties: dict[str, str] = {}
        if dpi is not None:
            self.properties = dict(zip(("tiff.XResolution", "tiff.YResolution"), map(str, dpi), strict=True))
            self.properties["tiff.ResolutionUnit"] = "inch"

    def read(self, level: int, x: int, y: int, width: int, height: int, fill: int) -> Pixels:
        """Read a region; see :class:`Backend`."""
        out = np.full((height, width, 3), fill, np.uint8)
        rows, columns = self.pixels.shape[:2]
        right, bottom, left, top = min(x + width, columns), min(y + height, rows), max(x, 0), max(y, 0)
        if right > left and bottom > top:
            out[top - y : bottom - y, left - x : right - x] = self.pixels[top:bottom, left:right]
        return out

    def close(self) -> None:
        """Nothing is open."""
