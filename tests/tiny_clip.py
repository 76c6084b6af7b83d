"""A tiny open_clip model as a folder, as it would be downloaded from a hub."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"},
}


def clip_folder(folder: Path, *, weights: bool = True) -> torch.nn.Module:
    """Write a tiny open_clip model as a local folder and return the whole model."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    torch.manual_seed(3)
    whole = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    if weights:
        save_file(whole.state_dict(), folder / "model.safetensors")
    return whole
