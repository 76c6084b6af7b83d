"""The machinery between a model and the edits: one attention function, three kinds of hooks, one wrapped method.

While an :class:`Engine` is installed

- every attention layer of the decoder calls :func:`intervened_attention`, registered with transformers under
  ``ATTENTION_NAME``; rows that no edit changes go through the same kernel as before;
- the decoder's pre-hook finds out which tokens of the sequence a call is about, and runs the extra passes that edits ask
  for (the prompt without its image; all of the prompt but its last token);
- layers' pre-hooks hand the layer input to edits that read it;
- ``generate`` is wrapped, so that the prompt is known before the model cuts it into pieces, and so that the state of one
  call ends with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vlm.call import AttentionCall
from saccade.vlm.edits import ClassEdit, Edit, HeadEdit, LogitEdit, edited_attention
from saccade.vlm.prompt import Prompt, make_prompt
from saccade.vlm.stack_calls import first_part, last_part, text_only_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from saccade.vlm.model_facts import ModelFacts

__all__ = ["ATTENTION_NAME", "Engine", "intervened_attention"]

ATTENTION_NAME = "saccade_intervention"
EDIT, OBSERVE, TEXT_ONLY = "edit", "observe", "text_only"  # what the decoder is being run for


class Engine:
    """Runs edits inside one model.

    Args:
        model: The model.
        facts: What is known about it.
        image_mask: Visual positions of the prompts, bool ``(B, N)``; ``None`` finds the placeholders.
        query_mask: Positions of the user's words, bool ``(B, N)``.
    """

    def __init__(
        self, model: PreTrainedModel, facts: ModelFacts, image_mask: Tensor | None, query_mask: Tensor | None
    ) -> None:
        self.model = model
        self.facts = facts
        self.image_mask = image_mask
        self.query_mask = query_mask
        self.edits: list[Edit] = []
        self.by_layer: dict[int, list[Edit]] = {}
        self.fired: dict[Edit, set[int]] = {}
        self.handles: list[Any] = []
        self.purpose = EDIT
        self.in_generate = False
        self.pending: Prompt | None = None  # known to the caller, not yet expanded to the batch of the decoder
        self.prompt: Prompt | None = None
        self.position = 0
        self.cached: int | Tensor = 0  # tokens before this call, as the cache counts them in a compiled step
        self.inside = False  # a call of the decoder that another one makes
        self.first_output: Tensor | None = None
        self.checked_masks: dict[int, tuple[Tensor, bool]] = {}
        self.previous_attention = ""

    # Installation

    def install(self) -> None:
        """Put the attention function, the hooks and the wrapper in place."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(ATTENTION_NAME, intervened_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        self.previous_attention = self.facts.text_config._attn_implementation
        self.set_attention(ATTENTION_NAME)
        for module in self.facts.attentions:
            module.saccade_engine = self
        hooks = self.handles
        hooks.append(self.model.register_forward_pre_hook(self.before_model, with_kwargs=True))
        hooks.append(self.facts.stack.register_forward_pre_hook(self.before_stack, with_kwargs=True))
        hooks.append(self.facts.stack.register_forward_hook(self.after_stack))
        for index, layer in enumerate(self.facts.layers):
            hook = functools.partial(self.before_layer, index)
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self.model.generate = self.wrapped_generate(self.model.generate)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the model as it was."""
        self.set_attention(self.previous_attention)
        for module in self.facts.attentions:
            del module.saccade_engine
        for handle in self.handles:
            handle.remove()
        del self.model.generate
        self.end_prompt()

    def set_attention(self, name: str) -> None:
        """Choose the attention function of the decoder, and of it alone."""
        for config in {id(m.config): m.config for m in (*self.facts.attentions, self.facts.stack)}.values():
            config._attn_implementation = name

    def set_edits(self, edits: Sequence[Edit]) -> None:
        """Put edits in the order in which they act: scores, weights, outputs; as given within each."""
        kinds = (LogitEdit, ClassEdit, HeadEdit)
        self.edits = [edit for kind in kinds for edit in edits if isinstance(edit, kind)]
        weighted = [edit.name for edit in self.edits if isinstance(edit, ClassEdit) and edit.weighted_class is not None]
        if len(weighted) > 1:
            raise ConfigError(f"Only one intervention can weigh single tokens; got {' and '.join(weighted)}.")
        self.by_layer = {
            layer: [edit for edit in self.edits if layer in edit.layers or layer in edit.observed_layers]
            for layer in range(self.facts.num_layers)
        }
        self.fired = {edit: self.fired.get(edit, set()) for edit in self.edits}
        self.end_prompt()

    # Calls of the model

    def wrapped_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``generate`` with the prompt noted before and forgotten after."""

        @functools.wraps(generate)
        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if self.in_generate:
                return generate(*args, **kwargs)
            self.check_generation(kwargs)
            given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            ids = given if isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point() else None
            self.end_prompt()
            self.pending = make_prompt(
                ids, kwargs.get("attention_mask"), self.facts.visual_token_ids, self.image_mask, self.query_mask
            )
            self.in_generate = True
            try:
                return generate(*args, **kwargs)
            finally:
                self.in_generate = False
                self.end_prompt()

        return run

    def check_generation(self, kwargs: dict[str, Any]) -> None:
        """Raise if an edit cannot follow the way of generating asked for."""
        config = kwargs.get("generation_config") or self.model.generation_config
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise ConfigError(
                "generate was given a cache with tokens that this intervention has not seen. Start the conversation "
                "inside `with intervene(...)` from its full text, without past_key_values."
            )
        chunk = kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
        beams = kwargs.get("num_beams", config.num_beams) or 1
        assisted = kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None
        for edit in self.edits:
            if chunk is not None and edit.whole_prompt:
                raise ConfigError(
                    f"{edit.name} must see the prompt in one piece; call generate without prefill_chunk_size."
                )
            if (beams > 1 or assisted) and not edit.reorderable:
                raise ConfigError(
                    f"{edit.name} keeps figures about generated tokens, which beams and assisted generation re-order "
                    "or take back; generate without them."
                )

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the prompt of a plain forward call."""
        if self.in_generate or torch.compiler.is_compiling():
            return
        if cache_length(kwargs) == 0:
            ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)
            self.end_prompt()
            self.pending = make_prompt(
                ids, kwargs.get("attention_mask"), self.facts.visual_token_ids, self.image_mask, self.query_mask
            )

    def end_prompt(self) -> None:
        """Forget the prompt and what edits know about it."""
        self.pending = self.prompt = None
        self.position = 0
        self.first_output = None
        self.checked_masks = {}

    # Calls of the decoder

    def before_stack(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Find out which tokens a call is about, and run extra passes."""
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
        if torch.compiler.is_compiling() and tokens.shape[1] == 1:
            self.cached = cache_length(kwargs)
            return None
        return self.begin(args, kwargs, tokens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Do what :meth:`before_stack` does outside of compiled steps."""
        if self.inside:
            return None
        length = cache_length(kwargs)
        self.checked_masks = {}
        if isinstance(length, int):
            self.position = length
        elif self.prompt is None:
            self.position = 0
        self.cached = self.position
        self.prepare(tokens)
        assert self.prompt is not None
        stop = self.position + tokens.shape[1]
        if self.position >= self.prompt.length:
            return None
        if self.position == 0 and any(edit.text_only_pass() for edit in self.edits):
            self.run_text_only(kwargs, tokens)
        if any(edit.first_pass(self.prompt) for edit in self.edits) and stop >= self.prompt.length:
            return self.run_first_pass(args, kwargs, tokens)
        return None

    def prepare(self, tokens: Tensor) -> None:
        """Start the edits on a new prompt, in the batch that the decoder sees."""
        if self.prompt is not None:
            return
        if self.pending is None:
            raise ConfigError(
                f"The decoder of {self.facts.name} was called on its own, so the prompt is not known. Call the model "
                "itself, or its generate."
            )
        batch = tokens.shape[0]
        if batch % self.pending.batch:
            raise ConfigError(f"A prompt of {self.pending.batch} samples became a batch of {batch}.")
        self.prompt = self.pending.expand(batch // self.pending.batch).to(tokens.device)
        for edit in self.edits:
            if edit.needs_image:
                self.prompt.require_images(edit.name)
            edit.prepare(self.prompt)

    def run_text_only(self, kwargs: dict[str, Any], tokens: Tensor) -> None:
        """Run the prompt without its visual tokens through the decoder."""
        assert self.prompt is not None
        if tokens.ndim != 3:
            raise ConfigError(f"{self.facts.name} hands token ids to its decoder; embeddings were expected.")
        self.run_inside(text_only_part(kwargs, self.prompt, causal=self.facts.causal), TEXT_ONLY)

    def run_first_pass(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run the prompt, or all of it but the last token, for what edits read; then let the call go on."""
        assert self.prompt is not None
        if args:
            raise ConfigError(f"The decoder of {self.facts.name} takes its input by position; by name was expected.")
        if self.facts.causal and not any(edit.reads_last_row(self.prompt) for edit in self.edits):
            start = self.prompt.length - 1 - self.position
            if start == 0:
                return None
            first, cache = first_part(kwargs, self.facts.stack, start, self.position)
            self.first_output = self.run_inside(first, EDIT)
            self.checked_masks = {}
            self.cached = self.position
            return (), last_part(kwargs, cache, start, self.prompt)
        if self.position > 0:
            raise ConfigError(
                f"{self.facts.name} needs two passes over the prompt here; call generate without prefill_chunk_size."
            )
        whole = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        self.run_inside({**whole, "use_cache": False}, OBSERVE)
        return None

    def run_inside(self, kwargs: dict[str, Any], purpose: str) -> Tensor:
        """Call the decoder from within a call of it; return its last hidden states."""
        self.inside, self.purpose = True, purpose
        try:
            hidden: Tensor = self.facts.stack(**kwargs).last_hidden_state
        finally:
            self.inside, self.purpose = False, EDIT
        return hidden

    def after_stack(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        """Put the parts of a divided call together, and count."""
        if torch.compiler.is_compiling() or self.purpose != EDIT:
            return output
        self.position += output.last_hidden_state.shape[1]
        if not self.inside and self.first_output is not None:
            output["last_hidden_state"] = torch.cat([self.first_output, output.last_hidden_state], 1)
            self.first_output = None
        return output

    def before_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hand the layer input to edits that read it, while it belongs to the prompt."""
        if torch.compiler.is_compiling() or self.purpose != EDIT or self.prompt is None:
            return
        if self.position >= self.prompt.length:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden[:, : self.prompt.length - self.position]
        for edit in self.by_layer[index]:
            if edit.needs_layer_input and index in edit.layers:
                edit.layer_input(index, hidden, self.position)

    # Calls of attention

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Compute the attention of one layer, ``(B, L, H, Dv)``."""
        layer = int(module.layer_idx)
        edits = self.by_layer[layer]
        if not edits:
            return plain(module, query, key, value, mask, options)
        if torch.compiler.is_compiling() and query.shape[2] == 1:
            call = self.describe(module, layer, query, key, value, mask, options)
            return self.edited(call, [edit for edit in edits if layer in edit.layers], module, mask, options)
        return self.attend_eagerly(module, layer, query, key, value, mask, options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend_eagerly(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Do what :meth:`attend` does outside of compiled steps."""
        edits = self.by_layer[layer]
        if self.prompt is None:
            raise ConfigError(f"{self.facts.name} was called without a prompt that interventions know.")
        if self.purpose == TEXT_ONLY:
            out = plain(module, query, key, value, mask, options)
            for edit in edits:
                if layer in edit.layers:
                    edit.observe_text_only(layer, out[:, -1])
            return out
        call = self.describe(module, layer, query, key, value, mask, options)
        for edit in edits:
            if layer in edit.observed_layers:
                edit.observe(call)
        if self.purpose == OBSERVE:
            return plain(module, query, key, value, mask, options)
        acting = [edit for edit in edits if layer in edit.layers]
        for edit in acting:
            self.fired[edit].add(layer)
        return self.edited(call, acting, module, mask, options)

    def describe(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> AttentionCall:
        """Say which tokens the queries and keys of a call are."""
        compiling = torch.compiler.is_compiling()
        queries, keys = query.shape[2], key.shape[2]
        is_causal = options.get("is_causal")
        causal = queries > 1 and mask is None and bool(vars(module).get("is_causal", True) if is_causal is None else is_causal)
        first_key: int | Tensor = 0
        if causal and keys > queries:  # an empty static cache: what lies behind the queries is not filled yet
            key, value = key[:, :, :queries], value[:, :, :queries]
        elif self.facts.sliding(layer):
            before = self.cached + queries - keys
            first_key = max(before, 0) if isinstance(before, int) else before.clamp(min=0)
        scale = options.get("scaling")
        call = AttentionCall(
            layer=layer,
            query=query,
            key=key,
            value=value,
            mask=mask,
            causal=causal,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            position=None if compiling else self.position,
            first_key=first_key,
        )
        return call

    def edited(
        self,
        call: AttentionCall,
        edits: list[Edit],
        module: nn.Module,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Return the attention of a call under the edits of its layer, ``(B, L, H, Dv)``."""
        if not edits:
            return plain(module, call.query, call.key, call.value, mask, options)
        logit_edits = [edit for edit in edits if isinstance(edit, LogitEdit)]
        class_edits = [edit for edit in edits if isinstance(edit, ClassEdit)]
        head_edits = [edit for edit in edits if isinstance(edit, HeadEdit)]
        row_edits: list[Edit] = [*logit_edits, *class_edits]
        starts = [self.rows_from(edit, call) for edit in row_edits]
        first = min((min(start) for start in starts), default=call.queries)
        if first > 0:
            out = plain(module, call.query, call.key, call.value, mask, options)
        if first < call.queries:
            rows = self.simplified(call.rows(first, call.queries))
            active = [active_rows(start, first, call) for start in starts]
            changed = edited_attention(rows, logit_edits, class_edits, active).transpose(1, 2)
            if first > 0:
                out[:, first:] = changed
            else:
                out = changed.contiguous()
        for edit in head_edits:
            stop = None if call.position is None else call.position + call.queries
            if stop is not None and call.position < self.prompt.length <= stop:  # type: ignore[operator, union-attr]
                rows_of = torch.tensor(self.prompt.last_row, device=out.device) - call.position  # type: ignore[union-attr]
                edit.observe_output(call.layer, out[torch.arange(out.shape[0], device=out.device), rows_of])
            out = out * edit.head_scale(call.layer)[:, None, :, None].to(out.dtype)
        return out

    def rows_from(self, edit: Edit, call: AttentionCall) -> list[int]:
        """Return for each sample the first row of a call that an edit changes; the number of rows if none."""
        if call.position is None or call.position >= self.prompt.length:  # type: ignore[union-attr]
            return [0]
        starts = edit.first_row(self.prompt)  # type: ignore[arg-type]
        return [min(max(start - call.position, 0), call.queries) for start in starts]

    def simplified(self, call: AttentionCall) -> AttentionCall:
        """Write a mask that differs between queries as causality and padding, if that is all it says."""
        mask = call.mask
        if mask is None or mask.shape[2] == 1 or call.position is None or not isinstance(call.first_key, int):
            return call
        padding = mask[:, :, -1:]
        if id(mask) not in self.checked_masks:
            columns = torch.arange(call.keys, device=mask.device)
            seen = columns <= call.query_columns().unsqueeze(1)
            self.checked_masks[id(mask)] = (mask, bool((mask == (padding & seen)).all()))
        if not self.checked_masks[id(mask)][1]:
            return call
        return AttentionCall(
            call.layer, call.query, call.key, call.value, padding, True, call.scale, call.position, call.first_key
        )


CACHE_NAMES = ("cache", "past_key_values")


def cache_length(kwargs: dict[str, Any]) -> int | Tensor:
    """Return how many tokens the cache of a call holds; a tensor for caches that count on the device."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            length: int | Tensor = kwargs[name].get_seq_length()
            return length
    return 0


def active_rows(starts: list[int], first: int, call: AttentionCall) -> Tensor:
    """Return which of the rows from ``first`` on an edit changes, bool ``(B, R)``; empty if all."""
    if all(start == first for start in starts):
        return torch.empty(0, device=call.query.device)
    rows = torch.arange(first, call.queries, device=call.query.device)
    return rows >= torch.tensor(starts, device=call.query.device)[:, None]


def plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Return attention as transformers computes it, ``(B, L, H, Dv)``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return out


def intervened_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **options: Any,  # noqa: ANN401 - the contract of transformers' attention functions
) -> tuple[Tensor, None]:
    """Compute attention for transformers; the function behind ``ATTENTION_NAME``.

    Args:
        module: The attention module, with its ``Engine`` as ``saccade_engine``.
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
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ConfigError(f"{type(module).__name__} uses {name} in its attention, which interventions do not cover.")
    if dropout > 0 or (attention_mask is not None and attention_mask.dtype != torch.bool):
        what = "dropout; call model.eval()" if dropout > 0 else f"a {attention_mask.dtype} mask where bool was expected"  # type: ignore[union-attr]
        raise ConfigError(f"Interventions are for inference: {type(module).__name__} was called with {what}.")
    engine: Engine = module.saccade_engine
    return engine.attend(module, query, key, value, attention_mask, options), None
