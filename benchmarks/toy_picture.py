"""Pictures of test scenes with what the toy model says about them, and where it looked."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.toy_methods import LONGEST, Answers, Items, Method
from benchmarks.toy_scenes import CAPTION_PROMPT, OBJECTS, Scene, partner
from saccade.vlm import (
    Answerer,
    GenerationOptions,
    LoadedVLM,
    Question,
    draw_answer_maps,
    find_image_grid,
    map_answer,
)
from saccade.vlm.evaluation import ObjectFinder

__all__ = ["draw_answers", "draw_looks"]

FINDER = ObjectFinder(synonyms=[[name] for name in OBJECTS], phrases={})


def draw_answers(items: Items, answers: Mapping[str, Answers], methods: Sequence[str], path: Path) -> None:
    """Draw the first eight scenes in which an object lacks its partner, with the objects that descriptions name.

    Args:
        items: Test scenes.
        answers: By method.
        methods: Whose descriptions are shown.
        path: PNG file.
    """
    from matplotlib.figure import Figure

    keys = [key for key, scene in items.scenes.items() if scene.lonely][:8]
    figure = Figure(figsize=(9.6, 5.8), dpi=90, layout="constrained")
    for axis, key in zip(figure.subplots(2, 4).flat, keys, strict=False):
        axis.imshow(items.pictures[key], interpolation="nearest")
        axis.set_axis_off()
        lines = [f"{name}: {named(answers[name][key, CAPTION_PROMPT][0], items.scenes[key])}" for name in methods]
        axis.set_title("\n".join(lines), fontsize=7.5, loc="left")
    figure.savefig(path, dpi=80, bbox_inches="tight", pil_kwargs={"optimize": True})


def named(text: str, scene: Scene) -> str:
    """Return the objects of a description, absent ones in capitals, and those missed in brackets."""
    found = list(dict.fromkeys(FINDER.find(text).classes))
    said = [name if name in scene.objects else name.upper() for name in found]
    words = said + [f"({name})" for name in scene.objects if name not in found]
    return ", ".join(words[:4]) + ",\n    " * (len(words) > 4) + ", ".join(words[4:])


def draw_looks(loaded: LoadedVLM, items: Items, answers: Answers, method: Method, path: Path) -> bool:
    """Draw where the words of a plain description looked, and where they would have under a method.

    It is the first description of the test that names an absent partner; both rows write its words.

    Args:
        loaded: The model.
        items: Test scenes.
        answers: Plain ones.
        method: With interventions.
        path: PNG file.

    Returns:
        Whether there is such a description.
    """
    for key, scene in items.scenes.items():
        absent = {partner(name) for name in scene.lonely}
        if not absent & set(FINDER.find(answers[key, CAPTION_PROMPT][0]).classes):
            continue
        image = Image.fromarray(items.pictures[key])
        question = Question(key, key, CAPTION_PROMPT, Path(key))
        options = GenerationOptions(LONGEST["caption"])
        plain = map_answer(Answerer(loaded, options=options), question, image)
        edited = map_answer(Answerer(loaded, method.interventions, options), question, image, token_ids=plain.token_ids)
        grid = find_image_grid(plain.inputs, loaded.model, plain.weights.shape[1])
        title = f"there: {', '.join(scene.objects)}"
        drawn = draw_answer_maps(image, {"none": plain, method.name: edited}, grid, words=5, title=title)
        drawn.thumbnail((1000, 1000))
        drawn.quantize(64).save(path, optimize=True)
        return True
    return False
