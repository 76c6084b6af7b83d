"""A LLaVA with random weights in a folder, small enough for many tests."""

from pathlib import Path

from saccade.apps.demo_model import write_random_llava


def write_tiny_llava(folder: Path, *, context: int = 256) -> Path:
    """Write a model of four layers that sees pictures as 16 patches; its attention is far from even.

    Args:
        folder: Where to.
        context: Longest sequence in tokens.
    """
    return write_random_llava(folder, context=context, image_px=16, patch_px=4, width=32, layers=4, gain=40.0)
