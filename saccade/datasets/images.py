"""Reading any image file into RGB, or saying why not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from saccade.errors import DataError

__all__ = ["read_image"]


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    EXIF orientation is applied. CMYK is converted; 16-bit values are scaled from 0..65535 to 0..255; transparent pixels
    are laid on white; of an animation or a multi-page file the first picture is taken.

    Args:
        path: Image file in any format that Pillow reads.

    Returns:
        An RGB image, fully decoded.

    Raises:
        DataError: With reason ``missing_file``, ``empty_file``, ``unreadable_image`` (corrupt, truncated, not an image)
            or ``unsupported_image`` (floating-point values outside 0..1, or a decompression bomb).
    """
    file = Path(path)
    try:
        if file.stat().st_size == 0:
            raise DataError("the file is empty", reason="empty_file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # A damaged EXIF or TIFF block makes Pillow warn; the pixels decide whether the image is good.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(file) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except FileNotFoundError as error:
        raise DataError("the file does not exist", reason="missing_file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"too many pixels for one image ({error})", reason="unsupported_image") from error
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("not an image, or its header is damaged", reason="unreadable_image") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise DataError(f"cannot be decoded ({error})", reason="unreadable_image") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16, I;16B, I: how Pillow shows 16-bit grey
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("whole numbers outside 0..65535 have no agreed brightness", reason="unsupported_image")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        levels = np.asarray(image)
        if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1):
            raise DataError("floating-point values outside 0..1 have no agreed brightness", reason="unsupported_image")
        return Image.fromarray((levels * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
