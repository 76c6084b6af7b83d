"""What the interventions need to know about a Hugging Face model, found in its configuration and modules.

No family is known by name. A decoder is served if its attention goes through transformers' registry of attention
functions, which is what lets one function see the queries, keys and values of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from saccade.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelFacts", "read_facts"]


@dataclass(frozen=True)
class ModelFacts:
    """The decoder of a model and the tokens that stand for pictures.

    Args:
        name: Class of the model and its ``model_type``, for messages.
        stack: The decoder: the module that holds the layers and is called with their input.
        layers: Its layers, in order.
        attentions: The attention module of each layer.
        num_heads: Query heads of each layer.
        hidden_size: Width of the layer inputs.
        visual_token_ids: Ids of the placeholders of images and videos; empty if the model has none.
        causal: Rows of the prompt see earlier keys only; ``False`` for prefix language models such as PaliGemma.
    """

    name: str
    stack: nn.Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    num_heads: int
    hidden_size: int
    visual_token_ids: tuple[int, ...]
    causal: bool

    @cached_property
    def text_config(self) -> Any:  # noqa: ANN401 - a PreTrainedConfig
        """The configuration that the attention modules read."""
        return self.attentions[0].config

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def sliding(self, layer: int) -> bool:
        """Return whether a layer sees a window of the last keys only."""
        types = vars(self.text_config).get("layer_types")
        return types is not None and types[layer] != "full_attention"


def read_facts(model: PreTrainedModel) -> ModelFacts:
    """Find the decoder of a model and check that interventions can reach it.

    Args:
        model: A decoder-only model of transformers, with or without a vision tower.

    Raises:
        ConfigError: If the model has an encoder and a decoder, cross-attention, or attention that does not go through
            transformers' registry of attention functions.
    """
    config = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    text_config = config.get_text_config(decoder=True)
    if text_config.is_encoder_decoder or config.is_encoder_decoder:
        raise ConfigError(f"{name} has an encoder and a decoder; interventions serve decoder-only models.")
    found = {
        module_name: module
        for module_name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and vars(module).get("layer_idx") is not None
        and same_config(vars(module).get("config"), text_config)
    }
    indices = [module.layer_idx for module in found.values()]
    if not found or sorted(indices) != list(range(len(indices))):
        raise ConfigError(
            f"{name}: no single stack of self-attention layers was found in its decoder (layer_idx of modules named "
            f"...Attention: {sorted(indices)}). Models with cross-attention or fused attention are not supported."
        )
    ordered = sorted(found.items(), key=lambda item: int(item[1].layer_idx))
    owners = [module_name.rpartition(".")[0] for module_name, _ in ordered]  # ...layers.3
    stack_name = owners[0].rpartition(".")[0].rpartition(".")[0]
    if any(owner.rpartition(".")[0].rpartition(".")[0] != stack_name for owner in owners):
        raise ConfigError(f"{name}: its attention layers lie in several stacks ({owners[0]}, ..., {owners[-1]}).")
    stack = model.get_submodule(stack_name)
    owner: Any = next(m for m in reversed(parents(model, stack_name)) if hasattr(m, "_can_set_attn_implementation"))
    if not owner._can_set_attn_implementation():
        raise ConfigError(
            f"{name} computes attention in its own code and not through transformers' AttentionInterface, so an "
            "intervention would never run."
        )
    attentions = tuple(module for _, module in ordered)
    return ModelFacts(
        name=name,
        stack=stack,
        layers=tuple(model.get_submodule(owner) for owner in owners),
        attentions=attentions,
        num_heads=int(text_config.num_attention_heads),
        hidden_size=int(text_config.hidden_size),
        visual_token_ids=visual_token_ids(config),
        causal=all(vars(module).get("is_causal", True) for module in attentions),
    )


def same_config(found: Any, wanted: Any) -> bool:  # noqa: ANN401
    """Return whether a module's configuration is the decoder's; some models copy it on the way."""
    return found is wanted or (type(found) is type(wanted) and found.to_dict() == wanted.to_dict())


def parents(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules on the path from the model to a submodule, both included."""
    parts = name.split(".") if name else []
    return [model, *(model.get_submodule(".".join(parts[: stop + 1])) for stop in range(len(parts)))]


def visual_token_ids(config: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the placeholder ids that a configuration names; older ones call them ``..._token_index``."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = {getattr(config, name) for name in names if hasattr(config, name)}  # attribute_map answers for some
    return tuple(sorted(int(i) for i in ids if i is not None))
