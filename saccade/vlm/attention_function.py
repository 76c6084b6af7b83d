"""The attention function that decoders call while interventions are at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vlm.call import AttentionCall
from saccade.vlm.edits import ClassEdit, Edit, HeadEdit, LogitEdit, edited_attention
from saccade.vlm.prompt import Prompt

if TYPE_CHECKING:
    from saccade.vlm.model_facts import ModelFacts

__all__ = ["apply_edits", "describe_call", "intervened_attention", "plain"]


def intervened_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **options: Any,  # noqa: ANN401 - the contract of transformers' attention functions
) -> tuple[Tensor, None]:
    """Compute attention for transformers.

    Args:
        module: The attention module, with its engine as ``saccade_engine``.
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        attention_mask: Bool ``(B, 1, L, S)``, ``True`` = takes part, or ``None``.
        dropout: Must be 0: interventions are for inference.
        options: What the module passes besides.

    Returns:
        ``(B, L, H, Dv)``, and no weights.

    Raises:
        ConfigError: If the module asks for something that edits of weights do not cover.
    """
    owner = type(module).__name__
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ConfigError(f"{owner} uses {name} in its attention, which interventions do not cover.")
    if dropout > 0:
        raise ConfigError(f"Interventions are for inference: {owner} was called with dropout; call model.eval().")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ConfigError(f"{owner} was called with a mask of {attention_mask.dtype}; interventions need bool.")
    engine: Any = module.saccade_engine
    return engine.attend(module, query, key, value, attention_mask, options), None


def plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Return attention as transformers computes it, ``(B, L, H, Dv)``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return out


def describe_call(
    facts: ModelFacts,
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    position: int | None,
    cached: int | Tensor,
) -> AttentionCall:
    """Say which tokens the queries and keys of a call are.

    Args:
        facts: The model.
        layer: Index of the layer.
        module: Its attention module.
        query: As in :func:`intervened_attention`, like the next four.
        key: As there.
        value: As there.
        mask: As there.
        options: As there.
        position: Place of the first query; ``None`` in a compiled step.
        cached: Tokens before the first query, as the cache counts them.
    """
    queries, keys = query.shape[2], key.shape[2]
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = vars(module).get("is_causal", True)
    causal = queries > 1 and mask is None and bool(is_causal)
    first_key: int | Tensor = 0
    if causal and keys > queries:  # an empty static cache: what lies behind the queries is not filled yet
        key, value = key[:, :, :queries], value[:, :, :queries]
    elif facts.sliding(layer):
        before = cached + queries - keys
        first_key = max(before, 0) if isinstance(before, int) else before.clamp(min=0)
    scale = options.get("scaling")
    return AttentionCall(
        layer=layer,
        query=query,
        key=key,
        value=value,
        mask=mask,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        position=position,
        first_key=first_key,
    )


def apply_edits(
    call: AttentionCall,
    edits: Sequence[Edit],
    prompt: Prompt | None,
    checked_masks: dict[tuple[int, ...], tuple[Tensor, bool]],
    attend_plainly: Callable[[], Tensor],
) -> Tensor:
    """Return the attention of a call under the edits of its layer, ``(B, L, H, Dv)``.

    Rows that no edit changes are computed as without them, and those of edits of scores and weights a second time, by
    class of key: a few at the end of the prompt, or the one of a generated token.

    Args:
        call: The call.
        edits: In the order in which they act.
        prompt: The prompt; ``None`` in a compiled step.
        checked_masks: What :func:`simplified` has found out about the masks of this run of the decoder.
        attend_plainly: Computes all rows without edits.
    """
    logit_edits = [edit for edit in edits if isinstance(edit, LogitEdit)]
    class_edits = [edit for edit in edits if isinstance(edit, ClassEdit)]
    row_edits: list[Edit] = [*logit_edits, *class_edits]
    starts = [first_rows(edit, call, prompt) for edit in row_edits]
    first = min((min(start) for start in starts), default=call.queries)
    if first == 0:
        active = [active_rows(start, first, call) for start in starts]
        out = edited_attention(simplified(call, checked_masks), logit_edits, class_edits, active)
        out = out.transpose(1, 2).contiguous()
    else:
        out = attend_plainly()
        if first < call.queries:
            rows = simplified(call.rows(first, call.queries), checked_masks)
            active = [active_rows(start, first, call) for start in starts]
            out[:, first:] = edited_attention(rows, logit_edits, class_edits, active).transpose(1, 2)
    for edit in edits:
        if isinstance(edit, HeadEdit):
            if prompt is not None and call.position is not None and ends_in(prompt, call):
                last = torch.tensor(prompt.last_row, device=out.device) - call.position
                edit.observe_output(call.layer, out[torch.arange(out.shape[0], device=out.device), last])
            out = out * edit.head_scale(call.layer)[:, None, :, None].to(out.dtype)
    return out


def ends_in(prompt: Prompt, call: AttentionCall) -> bool:
    """Return whether the last token of the prompt is among the queries of a call."""
    assert call.position is not None
    return call.position < prompt.length <= call.position + call.queries


def first_rows(edit: Edit, call: AttentionCall, prompt: Prompt | None) -> list[int]:
    """Return for each sample the first row of a call that an edit changes; the number of rows if none."""
    if prompt is None or call.position is None or call.position >= prompt.length:
        return [0]
    return [min(max(start - call.position, 0), call.queries) for start in edit.first_row(prompt)]


def active_rows(starts: list[int], first: int, call: AttentionCall) -> Tensor:
    """Return which of the rows from ``first`` on an edit changes, bool ``(B, R)``; empty if all."""
    if all(start == first for start in starts):
        return torch.empty(0, device=call.query.device)
    rows = torch.arange(first, call.queries, device=call.query.device)
    return rows >= torch.tensor(starts, device=call.query.device)[:, None]


def simplified(call: AttentionCall, checked_masks: dict[tuple[int, ...], tuple[Tensor, bool]]) -> AttentionCall:
    """Write a mask that differs between queries as causality and padding, if that is all it says.

    Args:
        call: The rows.
        checked_masks: By place and shape of a mask, the mask and what was found, for other layers with the same.
    """
    mask = call.mask
    if mask is None or mask.shape[2] == 1 or call.position is None or not isinstance(call.first_key, int):
        return call
    padding = mask[:, :, -1:]
    name = (mask.data_ptr(), *mask.shape, call.first_key)
    if name not in checked_masks:
        seen = torch.arange(call.keys, device=mask.device) <= call.query_columns().unsqueeze(1)
        checked_masks[name] = (mask, bool((mask == (padding & seen)).all()))
    return replace(call, mask=padding, causal=True) if checked_masks[name][1] else call
