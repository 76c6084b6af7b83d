"""The demo's decoding: a tiny model with random weights, and what each intervention does to its attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.apps.demo_report import Session, table

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from saccade.vlm import Intervention, LoadedVLM

__all__ = ["show"]

IMAGE_PX, PATCH_PX = 112, 8
GRID = IMAGE_PX // PATCH_PX
LAYERS = (1, 2, 3, 4)
PROMPT = "Describe the image."
NEW_TOKENS = 12


def methods() -> dict[str, tuple[Intervention, Intervention]]:
    """Return each method with settings for this model, and with settings that change nothing."""
    from saccade.vlm import ACT, GIFT, PAI, VAF, VAR, VHR

    heads = {layer: (0, 1, 2, 3) for layer in LAYERS}
    sinks: dict[str, Any] = {"sink_channels": (1, 2, 3), "tau": 1.5, "layers": LAYERS}
    easy: dict[str, Any] = {
        "min_nonsink_share": 0.0,
        "min_visual_mass": 0.0,
    }  # every head with a sink counts as looking at the image
    return {
        "VAR": (VAR(move_fraction=0.9, **sinks, **easy), VAR(move_fraction=0.0, **sinks, **easy)),
        "GIFT": (GIFT((0,), LAYERS, 3.0, content_tokens="all"), GIFT((0,), LAYERS, 0.0, content_tokens="all")),
        "VHR": (VHR(alpha=2.0, layers=LAYERS), VHR(alpha=1.0, layers=LAYERS)),
        "ACT": (ACT(heads, relative_threshold=3.0), ACT(heads, beta=1.0, relative_threshold=3.0)),
        "PAI": (PAI(0.5, layers=LAYERS), PAI(0.0, layers=LAYERS)),
        "VAF": (VAF(1.5, 0.7, layers=LAYERS), VAF(1.0, 1.0, layers=LAYERS)),
    }


def show(session: Session) -> tuple[str, dict[str, str]]:
    """Run it in the current folder; return the finding and what the report's page is filled with."""
    import torch
    from PIL import Image
    from skimage import data

    from saccade.apps.demo_model import write_random_llava
    from saccade.apps.vlm_options import no_loading_bars
    from saccade.vlm import Answerer, GenerationOptions, Question, load_vlm, map_answer

    no_loading_bars()
    write_random_llava(Path("llava"), image_px=IMAGE_PX, patch_px=PATCH_PX)
    chelsea: Any = data.chelsea  # has no types
    picture = Image.fromarray(chelsea()).crop((75, 0, 375, 300))
    picture.save("cat.png")
    layers = ",".join(map(str, LAYERS))
    session.call(
        f"saccade vlm attend -m local-dir:llava/ --image cat.png --prompt '{PROMPT}' --intervention pai "
        f"--set 'layers=[{layers}]' --layers {layers} --max-new-tokens {NEW_TOKENS} -o looks/ --progress none"
    )
    loaded = load_vlm("local-dir:llava/")
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    question = Question("cat", "cat.png", PROMPT, Path("cat.png"))
    plain = map_answer(Answerer(loaded, options=options), question, picture, layers=LAYERS)
    tokens, logits = generate(loaded, plain.inputs)
    rows, maps = [], {"without": plain.weights.mean(0)}
    for name, (method, neutral) in methods().items():
        same, neutral_logits = generate(loaded, plain.inputs, neutral)
        changed, _ = generate(loaded, plain.inputs, method)
        answerer = Answerer(loaded, [method], options)
        found = map_answer(answerer, question, picture, layers=LAYERS, token_ids=plain.token_ids)
        maps[name] = found.weights.mean(0)
        rows.append(
            [
                name,
                "the same" if torch.equal(same, tokens) else "others",
                f"{float((neutral_logits - logits).abs().max() / logits.abs().max()):.1e}",
                int((changed != tokens).sum()),
                float(maps["without"].sum()),
                float(maps[name].sum()),
            ]
        )
    draw_maps(picture, maps, Path("maps.png"))
    stock = sum(row[1] == "the same" for row in rows)
    values = {
        "patches": f"{GRID} x {GRID}",
        "layers": f"{LAYERS[0]} to {LAYERS[-1]}",
        "new_tokens": str(NEW_TOKENS),
        "methods": table(
            ["", "neutral: tokens", "neutral: scores", "tokens that change", "on the image before", "after"], rows
        ),
    }
    result = (
        f"{stock} of {len(rows)} methods with neutral settings write what the model writes without them; weight on the "
        f"image {float(maps['without'].sum()):.2f}, then {', '.join(f'{row[0]} {row[5]:.2f}' for row in rows)}."
    )
    return result, values


def generate(loaded: LoadedVLM, inputs: dict[str, Any], *interventions: Intervention) -> tuple[Any, Any]:
    """Return the new tokens of greedy decoding and their scores."""
    import contextlib

    import torch

    from saccade.vlm import intervene

    model: Any = loaded.model
    at_work: Any = contextlib.nullcontext()
    if interventions:
        at_work = intervene(model, *interventions, tokenizer=loaded.processor)
    with torch.inference_mode(), at_work:
        found = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return found.sequences[:, -NEW_TOKENS:], torch.stack(found.logits, 1)


def draw_maps(picture: Image.Image, maps: Mapping[str, Tensor], path: Path) -> None:
    """Draw where on the picture the answer looked, with and without each method, in the same colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    highest = max(float(weights.max()) for weights in maps.values())
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4).ravel()
    axes[0].imshow(picture)
    axes[0].set_title("the picture")
    extent = (0, picture.width, picture.height, 0)
    for axis, (name, weights) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(picture.convert("L"), cmap="gray")
        drawn = axis.imshow(
            weights.reshape(GRID, GRID), cmap="inferno", alpha=0.65, vmin=0, vmax=highest, extent=extent
        )
        axis.set_title(f"{name}: {float(weights.sum()):.2f} on the image")
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(drawn, ax=list(axes), shrink=0.7, label="mean weight of a patch")
    figure.savefig(path, dpi=100)
