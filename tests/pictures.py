"""A folder of pictures with everything in it that users have, good, odd and broken, made from scikit-image's own."""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

BROKEN = {
    "broken/corrupt.jpg": "unreadable_image",
    "broken/empty.png": "empty_file",
    "broken/text.jpg": "unreadable_image",
}
GOOD = (
    "a/same.png",
    "alpha.png",
    "b/same.png",
    "cmyk.jpg",
    "deep.png",
    "grey.bmp",
    "palette.gif",
    "photo.jpg",
    "rotated.jpg",
    "truncated-never.webp",
)


def write_pictures(folder: Path) -> Path:
    """Write the files named above, and some that are no items."""
    for name in ("a", "b", "broken", ".hidden"):
        (folder / name).mkdir(parents=True)
    photo = Image.fromarray(data.astronaut()[:200, :300])
    cat = Image.fromarray(data.chelsea()[:240, :200])
    photo.save(folder / "photo.jpg", quality=95)
    photo.save(folder / "a/same.png")
    cat.save(folder / "b/same.png")
    cat.convert("CMYK").save(folder / "cmyk.jpg")
    cat.save(folder / "truncated-never.webp", lossless=True)
    cat.convert("L").save(folder / "grey.bmp")
    cat.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(folder / "palette.gif")
    Image.fromarray(np.asarray(cat.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 300, dtype=np.uint8), (200, 1))))
    alpha.save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn by 90 degrees clockwise to see it upright
    photo.rotate(90, expand=True).save(folder / "rotated.jpg", exif=exif, quality=95)
    whole = (folder / "photo.jpg").read_bytes()
    (folder / "broken/corrupt.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "broken/empty.png").touch()
    (folder / "broken/text.jpg").write_text("this is not a picture\n")
    (folder / "notes.txt").write_text("not an item\n")
    photo.save(folder / ".hidden/photo.jpg")
    return folder
