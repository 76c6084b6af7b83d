"""GIFT's saliency map: a few rows of a few layers, read as the prompt passes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from saccade.vlm.call import AttentionCall
from saccade.vlm.prompt import Prompt

__all__ = ["SaliencyReader", "normalised_saliency", "rising_attention"]


class SaliencyReader:
    """Collects the attention of content tokens, and of the tokens before them, to image tokens.

    Args:
        prompt: The prompt.
        content: Content tokens, bool ``(B, N)``.
        layers: Saliency layers.
    """

    def __init__(self, prompt: Prompt, content: Tensor, layers: Collection[int]) -> None:
        self.content = content & prompt.valid
        self.content[:, 0] = False  # it has no token before it
        self.layers = sorted(layers)
        self.image_mask = prompt.image_mask
        places = self.content.any(0).nonzero()[:, 0].tolist()
        self.rows = sorted({row for place in places for row in (place - 1, place)})
        self.pairs = [(self.rows.index(place - 1), self.rows.index(place)) for place in places]
        self.chosen = self.content[:, places]  # (B, pairs)
        self.found: dict[int, dict[int, Tensor]] = {layer: {} for layer in self.layers}
        counts = prompt.num_visual
        self.visual = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]  # (B, V)
        order = (~prompt.image_mask).long().argsort(dim=1, stable=True)
        self.columns = order[:, : self.visual.shape[1]]  # (B, V), places of the image tokens, then others

    @property
    def last_row(self) -> int:
        """The last row that is read; -1 if none is."""
        return self.rows[-1] if self.rows else -1

    @property
    def complete(self) -> bool:
        """Whether all rows of all layers have been read."""
        return all(len(rows) == len(self.rows) for rows in self.found.values())

    def read(self, call: AttentionCall) -> None:
        """Read the rows of a call that are wanted and not yet known."""
        if call.position is None:
            return
        found = self.found[call.layer]
        wanted = [row for row in self.rows if 0 <= row - call.position < call.queries and row not in found]
        if wanted:
            index = torch.tensor(wanted, device=call.query.device) - call.position
            weights = thin_weights(call.pick(index), self.columns.to(index.device), self.visual.to(index.device))
            found.update(zip(wanted, weights.unbind(2), strict=True))

    def rise(self) -> Tensor:
        """Return ``s_j``, ``(B, V)``: the mean rise of attention to each image token over layers, heads and words."""
        device = self.image_mask.device
        maps = [
            rising_attention(torch.stack([rows[row] for row in self.rows], 2).to(device), self.pairs, self.chosen)
            for rows in self.found.values()
        ]
        return torch.stack(maps).mean(0)

    def saliency(self) -> Tensor:
        """Return ``S_j`` over the prompt, ``(B, N)`` float32 on the device of the prompt, 0 outside the image."""
        whole = torch.zeros(self.image_mask.shape, device=self.image_mask.device)
        if not self.rows:
            return whole
        values = normalised_saliency(self.rise(), self.visual)
        return whole.scatter(1, self.columns, values.masked_fill(~self.visual, 0.0))


def thin_weights(call: AttentionCall, columns: Tensor, visual: Tensor) -> Tensor:
    """Return the attention weights of a few queries on the image tokens, ``(B, H, R, V)``, float32.

    Args:
        call: The queries.
        columns: Places of the image tokens, ``(B, V)``.
        visual: Which of them are, bool ``(B, V)``.
    """
    everything = torch.zeros(call.key.shape[0], call.keys, dtype=torch.int64, device=call.key.device)
    lse = call.partitioned(everything, 1).lse  # (B, H, R)
    start = call.first_key if isinstance(call.first_key, int) else 0
    place = columns - start
    inside = visual & (place >= 0) & (place < call.keys)
    place = place.clamp(0, call.keys - 1)
    batch, kv_heads, _, head_dim = call.key.shape
    index = place[:, None, :, None].expand(batch, kv_heads, -1, head_dim)
    key = call.key.gather(2, index).repeat_interleave(call.query.shape[1] // kv_heads, 1)  # (B, H, V, D)
    scores = call.scale * call.query.float() @ key.float().transpose(2, 3)
    visible = inside[:, None, None]
    if call.mask is not None:
        own = call.mask.expand(batch, 1, call.mask.shape[2], call.keys)
        visible = visible & own.gather(3, place[:, None, None].expand(-1, 1, own.shape[2], -1))
    if call.causal:
        visible = visible & (place[:, None, None] <= call.query_columns()[:, None])
    blind = lse == -torch.inf
    return torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1)).masked_fill(
        ~visible | blind.unsqueeze(-1), 0.0
    )


def rising_attention(weights: Tensor, pairs: Sequence[tuple[int, int]], chosen: Tensor) -> Tensor:
    """Return ``mean_{h, i} max(a_hij - a_h(i-1)j, 0)`` over the upper half of the heads, ``(B, V)``.

    Args:
        weights: ``(B, H, R, V)``.
        pairs: Indices of rows ``(i - 1, i)`` of each content token.
        chosen: Which pairs belong to a sample, bool ``(B, pairs)``. A sample without any has 0.
    """
    before, after = (torch.tensor(rows, device=weights.device) for rows in zip(*pairs, strict=True))
    rise = (weights[:, :, after] - weights[:, :, before]).clamp(min=0) * chosen[:, None, :, None]
    kept = rise.sum((2, 3)).topk(rise.shape[1] // 2, dim=1).indices  # (B, H // 2)
    per_head = rise.sum(2) / chosen.sum(1).clamp(min=1)[:, None, None]
    return per_head.gather(1, kept[..., None].expand(-1, -1, weights.shape[-1])).mean(1)


def normalised_saliency(values: Tensor, visual: Tensor) -> Tensor:
    """Clamp to mean +- 3 standard deviations and scale to [0, 1]; 0 where all are equal.

    Args:
        values: ``s_j``, ``(B, V)``.
        visual: Which entries count, bool ``(B, V)``.

    Returns:
        ``S_j``, ``(B, V)``.
    """
    count = visual.sum(1, keepdim=True)
    mean = (values * visual).sum(1, keepdim=True) / count.clamp(min=1)
    square = ((values - mean).square() * visual).sum(1, keepdim=True)
    deviation = (square / (count - 1).clamp(min=1)).sqrt()
    values = values.clamp(mean - 3 * deviation, mean + 3 * deviation)
    low = values.masked_fill(~visual, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~visual, -torch.inf).amax(1, keepdim=True)
    spread = torch.where(high > low, high - low, torch.inf)
    return (values - low) / spread
