"""A slide: levels, resolution, and pixels of any region at any scale."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from saccade.errors import ConfigError, DataError
from saccade.mil.resolution import Resolution, find_resolution, given_resolution
from saccade.mil.slide_backends import Backend, ImageBackend, Level, OpenSlideBackend, Pixels, TiffBackend

__all__ = ["PLAIN_IMAGES", "Slide"]

PLAIN_IMAGES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp"))
BACKENDS = ("auto", "openslide", "tiff", "image")
FILLS = {"white": 255, "black": 0}
PROBE = 32  # side of the regions on which two readers are compared
LEVEL_SLACK = 0.01  # a level 1 % coarser than asked for still serves: scanners round their level sizes


class Slide:
    """A slide opened for reading.

    Formats: all that OpenSlide 4 reads, DICOM series included (any of its files opens the slide); tiled TIFF with JPEG,
    JPEG 2000, LZW, Deflate or Zstandard, OME-TIFF pyramids included, directly; PNG, JPEG and other plain images.
    TIFF is read directly if that gives OpenSlide's very pixels, tried on three regions when the slide is opened.

    Objects can be pickled and used from several threads; every process opens its own handle when it first reads.

    Args:
        path: The file.
        mpp: Microns per pixel at level 0, one number or ``(x, y)``; ``None`` means what the file says.
        backend: ``"auto"``, or one reader by name: ``"openslide"``, ``"tiff"``, ``"image"``.
        fill: Colour outside the slide: ``"white"``, or ``"black"`` as CLAM and TRIDENT have it.

    Attributes:
        levels: The pyramid, finest first.
        resolution: Microns per pixel and their source; ``None`` if nothing credible is known.
        notices: Sentences about doubtful metadata.
        vendor: Format by OpenSlide's name, or ``"tiff"`` or ``"image"``.

    Raises:
        ConfigError: If there is no such file, backend or fill.
        DataError: If the file cannot be read; ``reason`` is ``"unreadable"`` or ``"truncated"``.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tissue.png"
        >>> Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path)
        >>> slide = Slide(path, mpp=0.5)
        >>> slide.width, slide.height, slide.resolution.source
        (80, 60, 'given')
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mpp: float | tuple[float, float] | None = None,
        backend: str = "auto",
        fill: str = "white",
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"Slide {str(path)!r} does not exist.")
        if backend not in BACKENDS or fill not in FILLS:
            raise ConfigError(
                f"backend must be one of {BACKENDS} and fill of {tuple(FILLS)}; got {backend!r}, {fill!r}."
            )
        self.fill = fill
        reader, properties, self.notices = open_backend(self.path, backend)
        self.backend = reader.name
        self.levels: tuple[Level, ...] = reader.levels
        self.properties = properties
        self.vendor = properties.get("openslide.vendor", reader.name)
        ome = reader.ome_xml if isinstance(reader, TiffBackend) else None
        self.resolution: Resolution | None
        if mpp is None:
            self.resolution, rejected = find_resolution(properties, ome)
            self.notices += rejected
        else:
            self.resolution = given_resolution(mpp)
        if self.resolution is not None and self.resolution.is_anisotropic:
            self.notices.append(f"pixels are not square: {self.resolution.x:.4g} x {self.resolution.y:.4g} um")
        self.handles: dict[int, Backend] = {os.getpid(): reader}

    @property
    def width(self) -> int:
        """Width of level 0 in pixels."""
        return self.levels[0].width

    @property
    def height(self) -> int:
        """Height of level 0 in pixels."""
        return self.levels[0].height

    @property
    def reader(self) -> Backend:
        """This process's handle."""
        process = os.getpid()
        if process not in self.handles:  # a fork has the parent's file position and locks in its hands
            self.handles = {process: make_backend(self.path, self.backend)}
        return self.handles[process]

    def require_resolution(self) -> Resolution:
        """Return the resolution.

        Raises:
            DataError: If there is none, with the reason ``"no_mpp"``.
        """
        if self.resolution is None:
            doubt = f" ({'; '.join(self.notices)})" if self.notices else ""
            raise DataError(
                f"{self.path.name} does not say how large its pixels are{doubt}; pass --slide-mpp, or an 'mpp' column "
                "in --list.",
                reason="no_mpp",
            )
        return self.resolution

    def level_for(self, downsample: float) -> int:
        """Return the coarsest level that is at most ``downsample`` (within 1 %), or 0.

        Levels that were meant to be 2 or 4 are often 1.9997 or 3.9993, or a little above.
        """
        return max(
            i for i, level in enumerate(self.levels) if i == 0 or level.downsample <= downsample * (1 + LEVEL_SLACK)
        )

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> Pixels:
        """Read pixels of a level as they are stored.

        Args:
            x: Left edge, in pixels of that level; may be outside.
            y: Top edge, likewise.
            width: In pixels of that level.
            height: Likewise.
            level: Index.

        Returns:
            RGB uint8 ``(height, width, 3)``.

        Raises:
            DataError: If pixels cannot be decoded, with the reason ``"bad_tile"``. Later reads are not affected.
        """
        return self.reader.read(level, x, y, width, height, FILLS[self.fill])

    def read_scaled(
        self, x: float, y: float, width: float, height: float, size: tuple[int, int], *, resample: str = "area"
    ) -> Pixels:
        """Read a region of level 0 at another size, from the level that suits.

        Args:
            x: Left edge in level-0 pixels.
            y: Top edge in level-0 pixels.
            width: In level-0 pixels.
            height: In level-0 pixels.
            size: Width and height of the result.
            resample: ``"area"`` (the mean of what each pixel covers) or ``"bicubic"`` (Pillow's with antialiasing, as
                TRIDENT has it).

        Returns:
            RGB uint8 ``(size[1], size[0], 3)``.

        Raises:
            DataError: As :meth:`read`.
        """
        level = self.level_for(min(width / size[0], height / size[1]))
        scale_x, scale_y = self.levels[level].downsample_x, self.levels[level].downsample_y
        left, top, wide, high = x / scale_x, y / scale_y, width / scale_x, height / scale_y
        # Whole pixels will do where rounding moves the far edges by half a pixel of level 0 at most.
        is_whole = all(
            abs(length - round(length)) * scale <= 0.5 for length, scale in ((wide, scale_x), (high, scale_y))
        )
        if is_whole and round(wide) > 0 and round(high) > 0:
            pixels = self.read(round(left), round(top), round(wide), round(high), level)
            return resize(pixels, size, resample)
        x0, y0 = int(np.floor(left)), int(np.floor(top))
        x1, y1 = int(np.ceil(left + wide)), int(np.ceil(top + high))
        pixels = self.read(x0, y0, max(x1 - x0, 1), max(y1 - y0, 1), level)
        box = (left - x0, top - y0, min(left - x0 + wide, x1 - x0), min(top - y0 + high, y1 - y0))
        method = Image.Resampling.BICUBIC if resample == "bicubic" else Image.Resampling.HAMMING
        return np.asarray(Image.fromarray(pixels).resize(size, method, box=box))

    def close(self) -> None:
        """Close this process's handle; a later read opens it again."""
        handle = self.handles.pop(os.getpid(), None)
        if handle is not None:
            handle.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": {}}

    def __repr__(self) -> str:
        return f"Slide({self.path.name!r}, {self.width} x {self.height}, {len(self.levels)} levels, {self.resolution})"


def resize(pixels: Pixels, size: tuple[int, int], resample: str) -> Pixels:
    """Resize to width and height; the same size is returned as it is."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if resample == "bicubic":
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    shrinks = size[0] <= width and size[1] <= height
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC), np.uint8)


def make_backend(path: Path, name: str) -> Backend:
    """Open a slide with a reader by name."""
    if name == "openslide":
        return OpenSlideBackend(path)
    return TiffBackend(path) if name == "tiff" else ImageBackend(path)


def open_backend(path: Path, wanted: str) -> tuple[Backend, dict[str, str], list[str]]:
    """Return the reader for a slide, the metadata known of it, and notices.

    Raises:
        DataError: If no reader opens it.
    """
    if wanted == "image" or (wanted == "auto" and path.suffix.lower() in PLAIN_IMAGES):
        image = ImageBackend(path)
        return image, image.properties, []
    direct: TiffBackend | DataError
    trusted: OpenSlideBackend | DataError
    try:
        trusted = OpenSlideBackend(path)
    except DataError as error:
        trusted = error
    try:
        direct = TiffBackend(path)
    except DataError as error:
        direct = error
    properties = {} if isinstance(direct, DataError) else dict(direct.properties)
    if isinstance(trusted, OpenSlideBackend):
        properties |= trusted.properties
    chosen: Backend | DataError
    if wanted != "auto":
        chosen = trusted if wanted == "openslide" else direct
    elif isinstance(direct, DataError):
        chosen = direct if isinstance(trusted, DataError) and direct.reason == "truncated" else trusted
    elif isinstance(trusted, DataError):
        chosen = direct
    else:
        chosen = direct if agree(direct, trusted) else trusted
    if isinstance(chosen, DataError):
        raise chosen
    for other in (direct, trusted):
        if other is not chosen and not isinstance(other, DataError):
            other.close()
    return chosen, properties, []


def agree(direct: TiffBackend, trusted: OpenSlideBackend) -> bool:
    """Whether both readers give the same pixels in three regions that OpenSlide can read."""
    base = direct.levels[0]
    if (base.width, base.height) != (trusted.levels[0].width, trusted.levels[0].height):
        return False
    if len(trusted.levels) > len(direct.levels):
        return False
    compared = 0
    for share in (0.5, 0.25, 0.75, 0.1, 0.9):
        x, y = round(base.width * share), round(base.height * share)
        try:
            expected = trusted.read(0, x, y, PROBE, PROBE, 255)
            if not np.array_equal(direct.read(0, x, y, PROBE, PROBE, 255), expected):
                return False
        except DataError:
            continue  # a damaged tile says nothing about the reader
        compared += 1
        if compared == 3:
            break
    return compared > 0
