"""The machinery between a model and the edits: one attention function, three kinds of hooks, one wrapped method.

While an :class:`Engine` is installed

- every attention layer of the decoder calls :func:`intervened_attention`, registered with transformers under
  ``ATTENTION_NAME``; rows that no edit changes go through the same kernel as before;
- the decoder's pre-hook finds out which tokens of the sequence a call is about, and runs the extra passes that edits
  ask for (the prompt without its image; all of the prompt but its last token);
- layers' pre-hooks hand the layer input to edits that read it;
- ``generate`` is wrapped, so that the prompt is known before the model cuts it into pieces, and so that the state of
  one call ends with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vlm.attention_function import apply_edits, describe_call, intervened_attention, plain
from saccade.vlm.edits import ClassEdit, Edit, HeadEdit, LogitEdit
from saccade.vlm.prompt import Prompt, make_prompt
from saccade.vlm.stack_calls import CACHE_NAMES, first_part, last_part, text_only_part, uncached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from saccade.vlm.model_facts import ModelFacts

__all__ = ["ATTENTION_NAME", "Engine"]

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
        self.compiles = True
        self.purpose = EDIT
        self.in_generate = False
        self.pending: Prompt | None = None  # known to the caller, not yet expanded to the batch of the decoder
        self.prompt: Prompt | None = None
        self.position = 0
        self.cached: int | Tensor = 0  # tokens before this call, as the cache counts them in a compiled step
        self.inside = False  # a call of the decoder that another one makes
        self.first_output: Tensor | None = None
        self.caches = True  # the caller of a divided call gave a cache
        self.checked_masks: dict[tuple[int, ...], tuple[Tensor, bool]] = {}
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
            vars(module)["saccade_engine"] = self
        hooks = self.handles
        hooks.append(self.model.register_forward_pre_hook(self.before_model, with_kwargs=True))
        hooks.append(self.facts.stack.register_forward_pre_hook(self.before_stack, with_kwargs=True))
        hooks.append(self.facts.stack.register_forward_hook(self.after_stack))
        for index, layer in enumerate(self.facts.layers):
            hook = functools.partial(self.before_layer, index)
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        generate: Any = self.model.generate
        vars(self.model)["generate"] = self.wrapped_generate(generate)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.set_attention(self.previous_attention)
        for module in self.facts.attentions:
            del vars(module)["saccade_engine"]
        for handle in self.handles:
            handle.remove()
        del vars(self.model)["generate"]
        self.end_prompt()

    def set_attention(self, name: str) -> None:
        """Choose the attention function of the decoder, and of it alone."""
        modules: list[Any] = [*self.facts.attentions, self.facts.stack]
        for config in {id(module.config): module.config for module in modules}.values():
            config._attn_implementation = name

    def set_edits(self, edits: Sequence[Edit]) -> None:
        """Put edits in the order in which they act: scores, weights, outputs; as given within each."""
        kinds = (LogitEdit, ClassEdit, HeadEdit)
        self.edits = [edit for kind in kinds for edit in edits if isinstance(edit, kind)]
        weighted = [edit.name for edit in self.edits if isinstance(edit, ClassEdit) and edit.weighted_class is not None]
        if len(weighted) > 1:
            raise ConfigError(f"Only one intervention can weigh single tokens; got {' and '.join(weighted)}.")
        self.by_layer = {
            layer: [edit for edit in self.edits if layer in edit.layers | edit.observed_layers | edit.watched_layers]
            for layer in range(self.facts.num_layers)
        }
        self.compiles = all(edit.compiles for edit in self.edits)
        self.fired = {edit: self.fired.get(edit, set()) for edit in self.edits}
        self.end_prompt()

    def traced(self) -> bool:
        """Return whether torch.compile is tracing a call that all edits can be traced in."""
        return torch.compiler.is_compiling() and self.compiles

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
            if kwargs.get("use_cache", config.use_cache) is False and edit.needs_cache:
                raise ConfigError(f"{edit.name} counts every token once; call generate with use_cache=True.")
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
        tokens: Any = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        if self.traced() and tokens.shape[1] == 1:
            self.cached = cache_length(kwargs)
            return None
        changed: tuple[tuple[Any, ...], dict[str, Any]] | None = self.begin(args, kwargs, tokens)
        return changed

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
            self.caches = any(kwargs.get(name) is not None for name in CACHE_NAMES)
            self.checked_masks = {}
            self.cached = self.position
            return (), last_part(kwargs, self.facts.stack, cache, start, self.prompt)
        if self.position > 0:
            raise ConfigError(
                f"{self.facts.name} needs two passes over the prompt here; call generate without prefill_chunk_size."
            )
        self.run_inside(uncached(kwargs, tokens.shape[1]), OBSERVE)
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
        if self.traced() or self.purpose != EDIT:
            return output
        return self.finish(output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def finish(self, output: Any) -> Any:  # noqa: ANN401
        """Do what :meth:`after_stack` does outside of compiled steps."""
        self.position += output.last_hidden_state.shape[1]
        if not self.inside and self.first_output is not None:
            whole = torch.cat([self.first_output, output.last_hidden_state], 1)
            kept = {name: value for name, value in output.items() if self.caches or name not in CACHE_NAMES}
            self.first_output = None
            return type(output)(**{**kept, "last_hidden_state": whole})
        return output

    def before_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hand the layer input to edits that read it, while it belongs to the prompt."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.purpose == EDIT and not (self.traced() and hidden.shape[1] == 1):
            self.hand_over(index, hidden)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hand_over(self, index: int, hidden: Tensor) -> None:
        """Do what :meth:`before_layer` does for a call that is about the prompt."""
        if self.prompt is None or self.position >= self.prompt.length:
            return
        hidden = hidden[:, : self.prompt.length - self.position]
        for edit in self.by_layer[index]:
            if edit.needs_layer_input:
                edit.layer_input(index, hidden, self.position)

    # Calls of attention

    def attend(
        self,
        module: Any,  # noqa: ANN401 - an attention module of transformers
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
        if self.traced() and query.shape[2] == 1:
            call = describe_call(self.facts, layer, module, query, key, value, mask, options, None, self.cached)
            acting = [edit for edit in edits if layer in edit.layers]
            return apply_edits(call, acting, None, {}, lambda: plain(module, query, key, value, mask, options))
        out: Tensor = self.attend_eagerly(module, layer, query, key, value, mask, options)
        return out

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
        call = describe_call(self.facts, layer, module, query, key, value, mask, options, self.position, self.cached)
        for edit in edits:
            if layer in edit.observed_layers:
                edit.observe(call)
        if self.purpose == OBSERVE:
            return plain(module, query, key, value, mask, options)
        acting = [edit for edit in edits if layer in edit.layers]
        for edit in acting:
            self.fired[edit].add(layer)
        out = apply_edits(
            call, acting, self.prompt, self.checked_masks, lambda: plain(module, query, key, value, mask, options)
        )
        for edit in edits:
            if layer in edit.watched_layers:
                edit.watch(call, acting)
        return out


def cache_length(kwargs: dict[str, Any]) -> int | Tensor:
    """Return how many tokens the cache of a call holds; a tensor for caches that count on the device."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            length: int | Tensor = kwargs[name].get_seq_length()
            return length
    return 0
