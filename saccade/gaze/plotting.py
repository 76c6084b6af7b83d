"""Pictures of scanpaths over their image: numbered fixations, heat maps, animations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saccade.errors import ConfigError, DataError
from saccade.gaze.scanpath import Scanpath, ScanpathSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ANIMATIONS", "animate_scanpath", "draw_heatmap", "draw_scanpaths", "fixation_map"]

COLOURS = ("#e6550d", "#3182bd", "#31a354", "#756bb1", "#b5651d", "#c51b8a")
MOST = 6  # paths in one panel; more hide each other
SIDE = 720  # px of a panel's longer side
ANIMATIONS = (".gif", ".mp4")
FRAMES_PER_S = 25
REFERENCE_S = 0.25  # a fixation of this duration has the usual radius


def draw_scanpaths(
    image: Image.Image, panels: Sequence[tuple[str, ScanpathSet]], *, boxes: NDArray[np.float64] | None = None
) -> Image.Image:
    """Draw paths over an image, panels side by side, e.g. human and model.

    Fixations are numbered from 1; the area of a circle is proportional to the duration, where there is one. Of more
    than six paths in a panel the first six are drawn and the title says so.

    Args:
        image: RGB.
        panels: Title and paths of each.
        boxes: ``(N, 4)`` px, drawn thinly.

    Returns:
        RGB, about 720 px per panel.

    Raises:
        ConfigError: If there is no panel.
        DataError: If a path was recorded on an image of another size.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ConfigError("There is nothing to draw: give at least one set of paths.")
    zoom = SIDE / max(image.size)
    width, height = image.width * zoom, image.height * zoom
    figure = Figure(figsize=(len(panels) * width / 100, (height + 30) / 100), dpi=100)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(0, 0, 1, height / (height + 30), 0.01)
    for axis, (title, paths) in zip(axes, panels, strict=True):
        show_image(axis, image)
        shown = min(len(paths), MOST)
        axis.set_title(title if shown == len(paths) else f"{title} ({shown} of {len(paths)})", fontsize=11)
        for box in [] if boxes is None else boxes.tolist():
            xs, ys = [box[0], box[2], box[2], box[0], box[0]], [box[1], box[1], box[3], box[3], box[1]]
            axis.plot(xs, ys, color="white", linewidth=0.6, alpha=0.7)
        for number in range(shown):
            check_size(paths[number], image)
            draw_path(axis, paths[number], COLOURS[number % len(COLOURS)], len(paths[number]))
    return rendered(figure)


def rendered(figure: Figure) -> Image.Image:
    """Return a figure as RGB."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")


def show_image(axis: Any, image: Image.Image) -> None:  # noqa: ANN401 - matplotlib's Axes
    """Show an image in pixel coordinates, without axes."""
    axis.imshow(image)
    axis.set_xlim(-0.5, image.width - 0.5)
    axis.set_ylim(image.height - 0.5, -0.5)
    axis.set_axis_off()


def draw_path(axis: Any, path: Scanpath, colour: str, count: int) -> None:  # noqa: ANN401 - matplotlib's Axes
    """Draw the first ``count`` fixations."""
    x, y = path.x[:count], path.y[:count]
    duration = np.full(count, REFERENCE_S) if path.duration is None else np.asarray(path.duration)[:count]
    axis.plot(x, y, color=colour, linewidth=1.6, alpha=0.85)
    axis.scatter(
        x, y, s=190 * np.maximum(duration / REFERENCE_S, 0.15), color=colour, alpha=0.8, edgecolors="white", zorder=3
    )
    for number, (left, top) in enumerate(zip(x, y, strict=True), start=1):
        axis.text(left, top, str(number), color="white", fontsize=8, ha="center", va="center", zorder=4)


def check_size(path: Scanpath, image: Image.Image) -> None:
    """Raise if a path says that its image has another size."""
    if path.width is None or path.height is None:
        return
    if (round(path.width), round(path.height)) != image.size:
        raise DataError(
            f"The path on {path.image!r} was recorded at {path.width:.0f} x {path.height:.0f} px, the image has "
            f"{image.width} x {image.height}: give the image of that size.",
            reason="other_size",
        )


def fixation_map(paths: ScanpathSet, size: tuple[int, int], *, sigma: float) -> NDArray[np.float64]:
    """Return where people looked, ``(H, W)``: fixations weighted by duration, blurred, with sum 1.

    Args:
        paths: Paths on one image.
        size: Its width and height in px.
        sigma: Standard deviation of the blur in px; one degree of visual angle is usual.

    Raises:
        ConfigError: If sigma is not above 0.
        DataError: If no fixation lies inside the image.
    """
    from scipy.ndimage import gaussian_filter

    if not sigma > 0:
        raise ConfigError(f"sigma must be above 0 px, got {sigma}.")
    column, row = np.rint(paths.x).astype(int), np.rint(paths.y).astype(int)
    inside = (column >= 0) & (column < size[0]) & (row >= 0) & (row < size[1])
    weight = np.ones(len(column)) if paths.duration is None else np.nan_to_num(paths.duration, nan=0.0)
    weight = weight if weight.any() else np.ones(len(column))
    total = np.zeros((size[1], size[0]))
    np.add.at(total, (row[inside], column[inside]), weight[inside])
    if not total.any():
        raise DataError("No fixation lies inside the image.", reason="off_image")
    blurred: NDArray[np.float64] = gaussian_filter(total, sigma, mode="constant")
    blurred /= blurred.sum()
    return blurred


def draw_heatmap(
    image: Image.Image, paths: ScanpathSet, *, sigma: float | None = None, alpha: float = 0.6
) -> Image.Image:
    """Draw a fixation map over an image.

    Args:
        image: RGB.
        paths: Paths on it.
        sigma: Blur in px; ``None`` means 1/30 of the longer side.
        alpha: Opacity where most fixations are, 0 to 1.

    Returns:
        RGB, the image's size.
    """
    import matplotlib

    density = fixation_map(paths, image.size, sigma=max(image.size) / 30 if sigma is None else sigma)
    level = density / density.max()
    colour = matplotlib.colormaps["inferno"](level)[..., :3] * 255
    opacity = (alpha * np.sqrt(level))[..., None]
    mixed = np.asarray(image.convert("RGB"), np.float64) * (1 - opacity) + colour * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def animate_scanpath(image: Image.Image, path: Scanpath, out: str | Path, *, speed: float = 1.0) -> None:
    """Write an animation in which the fixations of a path appear one by one, each for its duration.

    Args:
        image: RGB.
        path: The path; without durations each fixation lasts 0.25 s. The last one stays a second longer.
        out: ``*.gif``, or ``*.mp4`` of 25 frames per second (MPEG-4 part 2).
        speed: 2 is twice as fast.

    Raises:
        ConfigError: If ``out`` is neither, or the speed is not above 0.
        DataError: If the path was recorded on an image of another size.
    """
    from matplotlib.figure import Figure

    from saccade.batch.tables import atomic_path

    kind = Path(out).suffix.lower()
    if kind not in ANIMATIONS:
        raise ConfigError(f"An animation is written as {' or '.join(ANIMATIONS)}, got {Path(out).name!r}.")
    if not speed > 0:
        raise ConfigError(f"speed must be above 0, got {speed}.")
    check_size(path, image)
    zoom = SIDE / max(image.size)
    frames = []
    for count in range(1, len(path) + 1):
        figure = Figure(figsize=(image.width * zoom / 100, image.height * zoom / 100), dpi=100)
        axis = figure.add_axes((0, 0, 1, 1))
        show_image(axis, image)
        draw_path(axis, path, COLOURS[0], count)
        frames.append(rendered(figure))
    seconds = (np.full(len(path), REFERENCE_S) if path.duration is None else np.asarray(path.duration)) / speed
    seconds[-1] += 1.0
    with atomic_path(Path(out)) as temporary:
        if kind == ".mp4":
            write_video(frames, seconds, temporary)
        else:
            # GIF knows hundredths of a second
            shown_ms = np.maximum(seconds * 1000, 20).round().astype(int).tolist()
            frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=shown_ms, loop=0)


def write_video(pictures: Sequence[Image.Image], seconds: NDArray[np.float64], out: Path) -> None:
    """Write pictures as a film, each for its time, rounded so that their sum is kept; each is seen at least once.

    Raises:
        DataError: If OpenCV cannot write such files here.
    """
    import cv2

    width, height = (side - side % 2 for side in pictures[0].size)  # the codec takes even sides
    writer = cv2.VideoWriter(str(out), cv2.VideoWriter.fourcc(*"mp4v"), FRAMES_PER_S, (width, height))
    if not writer.isOpened():
        raise DataError("This OpenCV was built without a writer of .mp4; write a .gif.", reason="no_writer")
    try:
        done = 0
        for picture, end in zip(pictures, np.cumsum(seconds) * FRAMES_PER_S, strict=True):
            count = max(1, round(float(end)) - done)
            done += count
            frame = np.ascontiguousarray(np.asarray(picture)[:height, :width, ::-1])  # BGR
            for _ in range(count):
                writer.write(frame)
    finally:
        writer.release()
