"""Attention in vision: one attention core, and the classifiers, slides, gaze and decoding systems built on it.

Importing this package is cheap: it imports no torch and registers nothing.
``import saccade.vision_backbones`` registers the models with timm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["__version__", "create_model"]

__version__ = "0.1.0"


def create_model(name: str, **kwargs: Any) -> nn.Module:  # noqa: ANN401 - whatever the model's constructor takes
    """Build a timm model, saccade's own backbones included.

    Args:
        name: Any timm model name, e.g. ``"convnext_tiny"``.
        **kwargs: Passed to ``timm.create_model`` (``num_classes``, ``pretrained``, ``features_only``, ...).

    Returns:
        The model, in training mode, as timm builds it.

    Raises:
        ConfigError: If no model has this name; the message suggests close ones.
    """
    from saccade.vision_backbones import create_model as create

    return create(name, **kwargs)
