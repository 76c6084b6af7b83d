"""Calls of a decoder cut from one: its first tokens, its last token, its text alone."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.vlm.prompt import Prompt

__all__ = ["CACHE_NAMES", "cache_argument", "first_part", "last_part", "text_only_part", "uncached"]

CACHE_NAMES = ("cache", "past_key_values")  # transformers renamed it in 5.24
ALONG_TOKENS = ("inputs_embeds", "input_ids", "visual_pos_masks")  # axis 1
ALONG_LAST_AXIS = ("position_ids",)
OF_VISUAL_TOKENS = ("visual_pos_masks", "deepstack_visual_embeds")


def first_part(
    kwargs: dict[str, Any],
    stack: Any,  # noqa: ANN401 - a decoder of transformers
    count: int,
    position: int,
) -> tuple[dict[str, Any], Any]:
    """Return the call of the first ``count`` tokens, and the cache that it fills.

    Args:
        kwargs: Arguments of the whole call.
        stack: The decoder.
        count: Tokens of the first part.
        position: Tokens in the cache before it.
    """
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    cache_name = next((name for name in CACHE_NAMES if name in kwargs), cache_argument(stack))
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=stack.config)
    queries = next(kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None).shape[1]
    part = dict(kwargs)
    for name in ALONG_TOKENS:
        if part.get(name) is not None:
            part[name] = part[name][:, :count]
    for name in ALONG_LAST_AXIS:
        if part.get(name) is not None:
            part[name] = part[name][..., :count]
    part["attention_mask"] = first_mask(kwargs.get("attention_mask"), count, queries, position)
    part[cache_name] = cache
    part["use_cache"] = True
    return part, cache


def cache_argument(stack: nn.Module) -> str:
    """Return what a decoder calls its cache."""
    return "cache" if "cache" in inspect.signature(stack.forward).parameters else "past_key_values"


def first_mask(mask: Any, count: int, queries: int, position: int) -> Any:  # noqa: ANN401
    """Return a mask, or masks by kind of layer, for the first ``count`` of the queries."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {kind: first_mask(own, count, queries, position) for kind, own in mask.items()}
    if mask.ndim == 2:
        return mask[:, : position + count]
    columns = mask.shape[-1]
    if columns < position + queries:
        raise ConfigError(
            "A prompt cannot be divided between its last two tokens under a sliding window that a chunked prefill has "
            "already filled; call generate without prefill_chunk_size."
        )
    dropped = queries - count if columns == position + queries else 0  # a static cache keeps all its columns
    return mask[:, :, :count, : columns - dropped]


def last_part(
    kwargs: dict[str, Any],
    stack: Any,  # noqa: ANN401
    cache: Any,  # noqa: ANN401
    start: int,
    prompt: Prompt,
) -> dict[str, Any]:
    """Return the call of the tokens from ``start`` on, after :func:`first_part` has filled the cache."""
    part = {name: value for name, value in kwargs.items() if name not in OF_VISUAL_TOKENS}
    for name in ALONG_TOKENS:
        if part.get(name) is not None:
            part[name] = part[name][:, start:]
    for name in ALONG_LAST_AXIS:
        if part.get(name) is not None:
            part[name] = part[name][..., start:]
    part["attention_mask"] = None if bool(prompt.valid.all()) else prompt.valid.long()
    cache_name = next((name for name in CACHE_NAMES if name in kwargs), cache_argument(stack))
    return {**part, cache_name: cache}


def uncached(kwargs: dict[str, Any], queries: int) -> dict[str, Any]:
    """Return the call of a whole prompt of some length without its cache."""

    def own(mask: Any) -> Any:  # noqa: ANN401
        if isinstance(mask, dict):
            return {kind: own(part) for kind, part in mask.items()}
        return mask[..., :queries] if mask is not None and mask.ndim == 4 else mask  # a static cache has more columns

    part = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return {**part, "attention_mask": own(kwargs.get("attention_mask")), "use_cache": False}


def text_only_part(kwargs: dict[str, Any], prompt: Prompt, *, causal: bool) -> dict[str, Any]:
    """Return the call of a prompt without its visual tokens, the others closing up.

    Args:
        kwargs: Arguments of the call of the whole prompt.
        prompt: The prompt.
        causal: Rows see earlier keys only; otherwise the text sees all of itself.
    """
    embeds: Tensor = kwargs["inputs_embeds"]
    keep = prompt.valid & ~prompt.image_mask
    lengths = keep.sum(1).tolist()
    if min(lengths) == 0:
        raise ConfigError("A prompt has no text besides its image, so there is nothing to compare it with.")
    longest = max(lengths)
    short = embeds.new_zeros(embeds.shape[0], longest, embeds.shape[2])
    valid = torch.zeros(embeds.shape[0], longest, dtype=torch.long, device=embeds.device)
    for sample, length in enumerate(lengths):
        short[sample, longest - length :] = embeds[sample, keep[sample]]
        valid[sample, longest - length :] = 1
    padded = min(lengths) < longest
    part: dict[str, Any] = {
        "inputs_embeds": short,
        "attention_mask": valid if padded else None,
        "position_ids": (valid.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    if not causal:
        visible = (valid[:, None, None] != 0).expand(-1, 1, longest, -1)
        given = kwargs.get("attention_mask")
        part["attention_mask"] = dict.fromkeys(given, visible) if isinstance(given, dict) else visible
    return part
