"""The demo's decoding: a tiny model with random weights, and what each intervention does to its attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.apps.demo_report import Session, table

if TYPE_CHECKING:
    from PIL import Image

    from saccade.vlm import Intervention, LoadedVLM, PromptAttention

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
    easy = {"min_nonsink_share": 0.0, "min_visual_mass": 0.0}  # every head with a sink counts as looking at the image
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
    from saccade.vlm import load_vlm, prompt_attention

    write_random_llava(Path("llava"), context=512, image_px=IMAGE_PX, patch_px=PATCH_PX, width=64, layers=6, gain=10.0)
    picture = Image.fromarray(data.chelsea()).crop((75, 0, 375, 300))
    picture.save("cat.png")
    session.call(
        f"saccade vlm generate -m local-dir:llava/ --image cat.png --prompt '{PROMPT}' --intervention pai "
        f"--set 'layers=[1,2,3,4]' --max-new-tokens {NEW_TOKENS}"
    )
    loaded = load_vlm("local-dir:llava/")
    inputs = prepare(loaded, picture)
    tokens, logits = generate(loaded, inputs)
    plain = prompt_attention(loaded.model, inputs)
    rows, maps = [], {"without": plain}
    for name, (method, neutral) in methods().items():
        same, neutral_logits = generate(loaded, inputs, neutral)
        changed, _ = generate(loaded, inputs, method)
        maps[name] = prompt_attention(loaded.model, inputs, method, tokenizer=loaded.processor)
        rows.append(
            [
                name,
                "the same" if torch.equal(same, tokens) else "others",
                f"{float((neutral_logits - logits).abs().max() / logits.abs().max()):.1e}",
                int((changed != tokens).sum()),
                image_share(plain),
                image_share(maps[name]),
            ]
        )
    draw_maps(picture, maps, Path("maps.png"))
    stock = sum(row[1] == "the same" for row in rows)
    moved = ", ".join(f"{row[0]} {row[5]:.2f}" for row in rows)
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
        f"image {image_share(plain):.2f}, then {moved}."
    )
    return result, values


def prepare(loaded: LoadedVLM, picture: Image.Image) -> dict[str, Any]:
    """Return the inputs of the model for the prompt and a picture."""
    from saccade.vlm import Answerer, GenerationOptions, Question

    answerer = Answerer(loaded, options=GenerationOptions(max_new_tokens=NEW_TOKENS))
    return dict(answerer.inputs([Question("cat", "cat.png", PROMPT, Path("cat.png"))], [picture]))


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


def image_share(found: PromptAttention) -> float:
    """Return the mean weight of the last token on the image in the changed layers."""
    return float(found.image_mass[list(LAYERS)].mean())


def draw_maps(picture: Image.Image, maps: Mapping[str, PromptAttention], path: Path) -> None:
    """Draw where on the picture the last token looks, with and without each method, in the same colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grids = {
        name: found.weights[list(LAYERS)][..., found.image_mask[0]].mean((0, 1, 2)).reshape(GRID, GRID)
        for name, found in maps.items()
    }
    highest = max(float(grid.max()) for grid in grids.values())
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4).ravel()
    axes[0].imshow(picture)
    axes[0].set_title("the picture")
    extent = (0, picture.width, picture.height, 0)
    for axis, (name, grid) in zip(axes[1:], grids.items(), strict=False):
        axis.imshow(picture.convert("L"), cmap="gray", alpha=0.5)
        drawn = axis.imshow(grid, cmap="inferno", alpha=0.65, vmin=0, vmax=highest, extent=extent)
        axis.set_title(f"{name}: {image_share(maps[name]):.2f} on the image")
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(drawn, ax=list(axes), shrink=0.7, label="mean weight of a patch")
    figure.savefig(path, dpi=100)
