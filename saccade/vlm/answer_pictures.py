"""Pictures of where the words of an answer looked, before and after an intervention."""

from __future__ import annotations

import io
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from PIL import Image
from torch import Tensor

from saccade.attention import use_backend
from saccade.batch import (
    BatchOptions,
    Run,
    RunSummary,
    atomic_path,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from saccade.errors import ConfigError, DataError
from saccade.vlm.answer_maps import AnswerMaps, map_answer, sink_marks
from saccade.vlm.answer_run import AnswerPlan, items_of, readable
from saccade.vlm.content_words import open_class_words
from saccade.vlm.image_grid import ImageGrid, find_image_grid, seen_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.vlm.answering import Answerer
    from saccade.vlm.questions import Question

__all__ = ["attend_answers", "compare_answer", "draw_answer_maps"]

PANEL_INCHES = 2.4
DPI = 110


def compare_answer(
    answerer: Answerer,
    question: Question,
    image: Image.Image,
    *,
    layers: Collection[int] | None = None,
    sink_channels: tuple[int, ...] | None = None,
    tau: float | None = None,
) -> dict[str, AnswerMaps]:
    """Answer a question under interventions, and write the same words again without them.

    Args:
        answerer: Model and interventions.
        question: The question.
        image: Its picture, RGB.
        layers: As in :func:`saccade.vlm.map_answer`, like the others; both ways of decoding have the same.
        sink_channels: As there.
        tau: As there.

    Returns:
        Maps by name: ``"none"`` and that of the interventions, e.g. ``"var"``; ``"none"`` alone if there are none.
    """
    channels, limit = sink_marks(answerer, sink_channels, tau)
    settings: Any = {"layers": layers, "sink_channels": channels, "tau": limit}
    after = map_answer(answerer, question, image, **settings)
    if not answerer.interventions:
        return {"none": after}
    plain = replace(answerer, interventions=())
    before = map_answer(plain, question, image, **settings, token_ids=after.token_ids)
    return {"none": before, "+".join(entry.name for entry in answerer.interventions): after}


def draw_answer_maps(
    picture: Image.Image, maps: dict[str, AnswerMaps], grid: ImageGrid, *, words: int = 5, title: str = ""
) -> Image.Image:
    """Draw where the words of an answer looked: a row for each way of decoding, a column for the mean and some words.

    Colours of a column mean the same in all rows, from no weight to the largest weight of a token that is no sink;
    sinks of the first row are marked by crosses. Under each panel stands the weight on the whole image.

    Args:
        picture: What the model sees, RGB; see :func:`saccade.vlm.seen_picture`.
        maps: Of the same words, by the name of the row.
        grid: Where the tokens lie.
        words: Most words to show: the first that are no English function words.
        title: Stands above.

    Returns:
        RGB.

    Raises:
        ConfigError: If the grid does not fit, or the rows are about different words.
    """
    from matplotlib.figure import Figure

    first = next(iter(maps.values()))
    if any(entry.words != first.words for entry in maps.values()):
        raise ConfigError("The rows of a picture must be about the same words; pass token_ids to map_answer.")
    grid.check(first.weights.shape[1])
    shown = shown_words(first.words, words)
    picture = enlarged(picture)
    tall = picture.height / picture.width
    size = (1 + len(shown)) * PANEL_INCHES, len(maps) * (PANEL_INCHES * tall + 0.28) + 0.55
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(maps), 1 + len(shown), squeeze=False)
    sinks = grid.cells(first.sinks)
    for column in range(1 + len(shown)):
        word = None if column == 0 else shown[column - 1]
        cells = [
            grid.cells(entry.mean_weights if word is None else entry.word_weights[word]) for entry in maps.values()
        ]
        top = max(float(values.masked_fill(sinks, 0.0).max()) for values in cells)
        for row, (name, entry) in enumerate(maps.items()):
            axis = axes[row, column]
            draw_panel(axis, picture, cells[row], sinks, top)
            share = entry.image_share if word is None else float(entry.word_weights[word].sum())
            axis.set_xlabel(f"image {share:.1%}", fontsize=8, labelpad=2)
            if row == 0:
                axis.set_title("mean of all words" if word is None else plainly(first.words[word]), fontsize=9)
            if column == 0:
                axis.set_ylabel("plain" if name == "none" else name, fontsize=9)
    figure.suptitle(plainly(title), fontsize=9)
    return rendered(figure)


def shown_words(words: Sequence[str], most: int) -> list[int]:
    """Return the indices of the first words that are no English function words; of all words if there are none."""
    text = " ".join(words)
    ends = np.cumsum([len(word) + 1 for word in words]).tolist()
    ranges = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
    chosen = [place for place, keep in enumerate(open_class_words(text, ranges)) if keep]
    return (chosen or list(range(len(words))))[: max(most, 0)]


def plainly(text: str) -> str:
    """Return text that matplotlib can draw as it stands: no formulas, nothing unprintable, of one line's length."""
    kept = "".join(letter if letter.isprintable() and letter != "\ufffd" else "?" for letter in text)
    return (kept if len(kept) <= 90 else kept[:89] + "\u2026").replace("$", r"\$")


def enlarged(picture: Image.Image) -> Image.Image:
    """Return a picture whose longer side is 512 pixels."""
    zoom = 512 / max(picture.size)
    return picture.resize((max(round(picture.width * zoom), 1), max(round(picture.height * zoom), 1)))


def draw_panel(axis: Any, picture: Image.Image, cells: Tensor, sinks: Tensor, top: float) -> None:  # noqa: ANN401
    """Draw one map ``(rows, columns)`` over the picture; ``axis`` is matplotlib's."""
    width, height = picture.size
    axis.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    level = (cells / (top or 1.0)).clamp(max=1.0).numpy()
    opacity = 0.2 + 0.6 * level  # the picture stays visible where nothing looked
    axis.imshow(level, cmap="inferno", vmin=0, vmax=1, alpha=opacity, extent=extent, aspect="auto")
    rows, columns = sinks.shape
    y, x = (place.numpy() + 0.5 for place in sinks.nonzero(as_tuple=True))
    axis.scatter(x * width / columns, y * height / rows, marker="x", color="#00e5ff", s=18, linewidths=1.2)
    axis.set_xlim(extent[:2])
    axis.set_ylim(extent[2:])
    axis.set_xticks([])
    axis.set_yticks([])


def rendered(figure: Figure) -> Image.Image:
    """Return a figure as RGB."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def attend_answers(
    questions: Sequence[Question],
    plan: AnswerPlan,
    *,
    out: str | Path,
    layers: Collection[int] | None = None,
    sink_channels: tuple[int, ...] | None = None,
    tau: float | None = None,
    grid: ImageGrid | None = None,
    words: int = 5,
    options: BatchOptions | None = None,
) -> RunSummary:
    """Answer questions and draw where the words of each answer looked, before and after the intervention.

    One PNG file per question, named by its id, and ``attend.jsonl`` with a row for each: ``id``, ``image``, ``prompt``,
    ``answer``, ``intervention``, ``settings``, ``picture``, ``layers``, ``sinks``, ``sink_rule``, and the mean weight
    on the image and on its sinks while the words were written, ``image_share_before``, ``image_share``,
    ``sink_share_before``, ``sink_share``. A second call continues the first.

    Args:
        questions: Unique ids; see :func:`saccade.vlm.read_questions`.
        plan: Model, method and way of writing; without a method plain decoding alone is drawn.
        out: Folder.
        layers: As in :func:`saccade.vlm.map_answer`, like the next two.
        sink_channels: As there.
        tau: As there.
        grid: Where the visual tokens lie; ``None`` finds it.
        words: Most words to show.
        options: Device, shard and the like; the seed is the plan's.

    Raises:
        ConfigError: If something is wrong that concerns all questions.
    """
    options = options or BatchOptions()
    if plan.generation.num_beams > 1:
        raise ConfigError("The map of an answer follows one sequence; set num_beams to 1.")
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    by_id = {question.id: question for question in questions}
    folder = Path(out)
    reading = {"layers": None if layers is None else sorted(layers), "sink_channels": sink_channels, "tau": tau}
    shown = {"grid": None if grid is None else [grid.rows, grid.columns, grid.first], "words": words}
    run = Run(
        "vlm attend",
        items=items_of(questions),
        out=f"{folder}/",
        settings={**plan.run_settings(dtype), **reading, **shown},
        options=options,
        table=folder / "attend.jsonl",
        title=plan.title(str(device), dtype),
        unit="questions",
    )
    if options.dry_run:
        with run:
            return run.summary
    seed_everything(plan.seed, deterministic=options.deterministic)
    answerer = plan.answerer(str(device), dtype)
    with run, use_backend(options.attention_backend):
        for (item,), (image,) in readable(run, 1, options.workers):
            started = time.monotonic()
            question = by_id[item.id]
            name = f"{quote(item.id, safe='')}.png"
            try:
                maps = compare_answer(answerer, question, image, layers=layers, sink_channels=sink_channels, tau=tau)
                after = maps[list(maps)[-1]]
                cells = grid or find_image_grid(after.inputs, answerer.loaded.model, after.weights.shape[1])
                view = seen_picture(after.inputs, answerer.loaded.processor, image, cells)
                drawn = draw_answer_maps(view, maps, cells, words=words, title=f"{question.prompt}  {after.text}")
            except DataError as error:
                run.fail(item, error, seconds=time.monotonic() - started)
                continue
            with atomic_path(folder / name) as temporary:
                drawn.save(temporary, format="png")
            row = {**answer_row(question, maps["none"], after), **plan.columns(), "picture": name}
            run.done(item, seconds=time.monotonic() - started, row=row)
    return run.summary


def answer_row(question: Question, before: AnswerMaps, after: AnswerMaps) -> dict[str, Any]:
    """Return the figures of one answer."""
    return {
        "id": question.id,
        "image": question.image,
        "prompt": question.prompt,
        "answer": after.text,
        "layers": list(after.layers),
        "sinks": int(before.sinks.sum()),
        "sink_rule": before.sink_rule,
        "image_share_before": round(before.image_share, 4),
        "image_share": round(after.image_share, 4),
        "sink_share_before": round(before.sink_share, 4),
        "sink_share": round(float(after.mean_weights[before.sinks].sum()), 4),
    }
