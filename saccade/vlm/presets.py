"""Published settings that belong to one model, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.vlm.model_facts import ModelFacts

__all__ = ["MODEL_PRESETS", "ModelPreset", "model_preset"]


@dataclass(frozen=True)
class ModelPreset:
    """Settings of one model, found again by the shape of its decoder.

    Args:
        models: The models they were published for.
        families: Prefixes of the decoder's ``model_type``.
        shape: Hidden size, number of layers and largest vocabulary of the decoder.
        sink_channels: VAR's channels that mark sink tokens.
        saliency_layers: GIFT's layers of the saliency map.
        enhancement_layers: GIFT's layers that are changed.
        gift_alpha: GIFT's exponent.
        source: Where they are from.
    """

    models: str
    families: tuple[str, ...]
    shape: tuple[int, int, int]
    sink_channels: tuple[int, ...] | None = None
    saliency_layers: tuple[int, ...] | None = None
    enhancement_layers: tuple[int, ...] | None = None
    gift_alpha: float | None = None
    source: str = ""


GIFT_CODE = "amazon-science/GIFT at e20b8a9"

MODEL_PRESETS = (
    ModelPreset(
        models="LLaVA-1.5-7B (Llama-2-7B)",
        families=("llama",),
        shape=(4096, 32, 33000),
        sink_channels=(1415, 2533),
        saliency_layers=(11,),
        enhancement_layers=tuple(range(12, 23)),
        gift_alpha=5.0,
        source=f"sinks: arXiv:2503.03321 and seilk/VisAttnSink at 98e62d6; layers: {GIFT_CODE}",
    ),
    ModelPreset(
        models="LLaVA-1.5-13B, LLaVA-1.6-Vicuna-13B (Llama-2-13B)",
        families=("llama",),
        shape=(5120, 40, 33000),
        sink_channels=(2100, 4743),
        saliency_layers=(10,),
        enhancement_layers=tuple(range(14, 21)),
        gift_alpha=5.0,
        source=f"sinks: arXiv:2503.03321; layers (LLaVA-1.5): {GIFT_CODE}",
    ),
    ModelPreset(
        models="Qwen2-VL-7B (Qwen2-7B)",
        families=("qwen2_vl", "qwen2"),
        shape=(3584, 28, 153000),
        sink_channels=(458, 2570),
        saliency_layers=(14,),
        enhancement_layers=tuple(range(5, 19)),
        gift_alpha=4.0,
        source=f"sinks: arXiv:2503.03321, appendix; layers: {GIFT_CODE}",
    ),
)


def model_preset(facts: ModelFacts) -> ModelPreset | None:
    """Return the published settings for a model, or ``None`` if there are none."""
    config = facts.text_config
    for preset in MODEL_PRESETS:
        hidden_size, layers, vocabulary = preset.shape
        if (
            str(config.model_type).startswith(preset.families)
            and (facts.hidden_size, facts.num_layers) == (hidden_size, layers)
            and int(config.vocab_size) <= vocabulary
        ):
            return preset
    return None
