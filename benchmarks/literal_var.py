"""VAR written the way it was published: eager attention, every map kept, a loop over heads; for comparison only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saccade.vlm import VAR
from saccade.vlm.interventions.var import sink_score

NAME = "literal_var"


class Literal:
    """State of the literal form: sinks of the prompt by layer."""

    def __init__(self, var: VAR, image_start: int, image_stop: int) -> None:
        self.var, self.start, self.stop = var, image_start, image_stop
        self.sinks: dict[int, list[int]] = {}
        self.layers: range = range(0)

    def read(self, layer: int, hidden: Tensor) -> None:
        """Find the sinks of a layer when the prompt passes."""
        if hidden.shape[1] > 1:
            score = sink_score(hidden, self.var.sink_channels or ())
            self.sinks[layer] = (score[0] > self.var.tau).nonzero()[:, 0].tolist()

    def attention(
        self,
        module: Any,  # noqa: ANN401
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Compute attention with all weights, and edit them head by head."""
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * options["scaling"]
        queries, keys = scores.shape[2:]
        if queries > 1:
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1)
        if module.layer_idx in self.layers:
            first = self.stop if queries > 1 else 0
            for head in range(weights.shape[1]):
                weights[0, head, first:] = self.edited(weights[0, head, first:].clone(), module.layer_idx)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def edited(self, weights: Tensor, layer: int) -> Tensor:
        """Move weight in the rows of one head."""
        var, sinks = self.var, self.sinks[layer]
        visual = [j for j in sinks if self.start <= j < self.stop]
        rest = [j for j in range(self.start, self.stop) if j not in set(visual)]
        if not visual:
            return weights
        on_sinks, on_rest = weights[:, visual].sum(1), weights[:, rest].sum(1)
        total = on_sinks + on_rest
        chosen = (on_sinks / (total + 1e-6 * (self.stop - self.start)) <= 1 - var.min_nonsink_share) & (
            total >= var.min_visual_mass
        )
        moved = var.move_fraction * weights[:, sinks].sum(1)
        after = weights.clone()
        after[:, sinks] *= 1 - var.move_fraction
        after[:, rest] += (moved / on_rest)[:, None] * weights[:, rest]
        return torch.where(chosen[:, None], after, weights)


@contextmanager
def literal_var(
    model: Any,  # noqa: ANN401
    var: VAR,
    image_start: int,
    image_stop: int,
) -> Iterator[None]:
    """Run the literal form inside a block, one sample with one contiguous image, dynamic cache, no padding."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    form = Literal(var, image_start, image_stop)
    AttentionInterface.register(NAME, form.attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    layers: nn.ModuleList = model.model.language_model.layers
    form.layers = range(2, len(layers) - 1)
    handles = [
        layer.register_forward_pre_hook(lambda module, args, index=index: form.read(index, args[0]))
        for index, layer in enumerate(layers)
    ]
    config = model.config.text_config
    previous, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = previous
        for handle in handles:
            handle.remove()
