"""Draw docs/images/corruptions.jpg: all corruptions at all severities, of a picture that scikit-image ships.

python docs/draw_corruptions.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage import data

from saccade.datasets import CORRUPTIONS, corrupt

TARGET = Path(__file__).with_name("images") / "corruptions.jpg"
SIZE, SHOWN, TEXT = 224, 88, 96
ROWS = 10


def main() -> None:
    """Draw two columns of rows, a corruption each, severity 1 to 5 from left to right."""
    picture = np.asarray(Image.fromarray(data.astronaut()).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    block = TEXT + 5 * SHOWN
    sheet = Image.new("RGB", (2 * block, ROWS * SHOWN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, name in enumerate(["clean", *CORRUPTIONS]):
        column, row = divmod(index, ROWS)
        left, top = column * block, row * SHOWN
        pen.text((left + 6, top + SHOWN // 2 - 12), name.replace("_", "\n"), fill="black")
        for severity in range(1, 6) if name != "clean" else [0]:
            tile = corrupt(picture, name, severity, 0) if severity else picture
            shown = Image.fromarray(tile).resize((SHOWN - 2, SHOWN - 2), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left + TEXT + SHOWN * max(severity - 1, 0), top))
    sheet.save(TARGET, quality=72, optimize=True)


if __name__ == "__main__":
    main()
