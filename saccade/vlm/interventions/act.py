"""ACT, attention calibration: tokens that draw too much attention, the first apart, give most of it to the others.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", ICML 2024 (arXiv:2406.15765); official code
GATECH-EIC/ACT at a267af7 (Apache-2.0). A method for text models; prompts need no image.

In chosen heads, with c_j the mean weight that key j gets from the queries that can see it,

    I  = {j : c_j > threshold} without its first element,   class 1 = I, class 0 = the rest
    O' = beta O_1 + (1 + (1 - beta) m_1 / m_0) O_0

Every row of the prompt is changed, by means that later rows enter into, so a layer's prompt is read twice. Our
extension to decoding, which the code does not define: the sums behind c_j go on over generated rows, and the new row is
changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from saccade.attention import attention_statistics
from saccade.errors import ConfigError, suggest
from saccade.vlm.call import AttentionCall
from saccade.vlm.edits import ClassEdit
from saccade.vlm.intervention import check_layers
from saccade.vlm.model_facts import ModelFacts
from saccade.vlm.prompt import Prompt

__all__ = ["ACT", "act_gain", "excess_tokens", "read_act_heads"]

FIRST_PUBLISHED = 2  # layer of the first list in the published files


@dataclass(frozen=True)
class ACT:
    """Parameters of attention calibration.

    Args:
        heads: Heads to change, by layer, or a file of them, see :func:`read_act_heads`. The authors publish lists for
            two models; :func:`saccade.vlm.find_act_heads` or ``saccade vlm calibrate`` finds them for others.
        beta: Share of their weight that tokens of I keep.
        threshold: Mean attention above which a token is one of I; ``None`` means ``relative_threshold / N``.
        relative_threshold: The paper's form, N being the tokens so far.
    """

    heads: Mapping[int, tuple[int, ...]] | str | Path = field(default_factory=dict)
    beta: float = 0.4
    threshold: float | None = None
    relative_threshold: float = 5.0
    name = "act"

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return the settings of the paper and of the released code; both lack the heads."""
        return {"paper": cls(), "released_code": cls(threshold=0.1)}

    def start(self, facts: ModelFacts, tokenizer: Any) -> ACTEdit:  # noqa: ANN401
        """Return the method at work on a model; see :class:`saccade.vlm.Intervention`."""
        chosen = read_act_heads(self.heads) if isinstance(self.heads, str | Path) else self.heads
        layers = check_layers("ACT", "the layers of heads", chosen, facts)
        wrong = {head for heads in chosen.values() for head in heads if not 0 <= head < facts.num_heads}
        if wrong:
            raise ConfigError(f"ACT: heads must be in 0..{facts.num_heads - 1}; got {sorted(wrong)}.")
        sliding = sorted(layer for layer in layers if facts.sliding(layer))
        if sliding:
            raise ConfigError(
                f"ACT counts attention to every token; layers {sliding} of {facts.name} see a sliding window only."
            )
        return ACTEdit(self, facts, layers, chosen)


class ACTEdit(ClassEdit):
    """ACT at work; ``stats`` has ``excess`` ``(B, H, S)``, the tokens of I at the last call of a layer."""

    num_classes = 2
    needs_image = False
    whole_prompt = True
    reorderable = False
    needs_cache = True
    compiles = False

    def __init__(self, act: ACT, facts: ModelFacts, layers: frozenset[int], heads: Mapping[int, Sequence[int]]) -> None:
        super().__init__("ACT", facts, layers)
        self.act = act
        self.heads = heads

    @property
    def observed_layers(self) -> frozenset[int]:
        """All of its layers: the means are over every row."""
        return self.layers

    def prepare(self, prompt: Prompt) -> None:
        """Start with no row counted."""
        super().prepare(prompt)
        self.valid = prompt.valid
        self.sums: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}

    def first_row(self, prompt: Prompt) -> list[int]:
        """Change every row."""
        return [0] * prompt.batch

    def observe(self, call: AttentionCall) -> None:
        """Add the weights of the rows of a call to the sums."""
        mask, start = call.mask, call.position
        assert start is not None
        rows = torch.nn.functional.pad(self.valid, (0, call.keys), value=True)[:, start : start + call.queries]
        rows = rows.to(call.query.device)
        if call.queries > 1:  # rows of padding do not count
            own = rows[:, None, :, None]
            mask = own if mask is None else mask & own
        found = attention_statistics(call.query, call.key, mask=mask, causal=call.causal, scale=call.scale)
        seen = rows_that_see(rows, mask, call)
        sums = found.importance * seen  # (B, H, S)
        if start > 0 and call.layer in self.sums:
            grown = (0, call.keys - self.sums[call.layer].shape[-1])
            sums = sums + torch.nn.functional.pad(self.sums[call.layer], grown)
            seen = seen + torch.nn.functional.pad(self.seen[call.layer], grown)
        self.sums[call.layer], self.seen[call.layer] = sums, seen

    def key_class(self, call: AttentionCall) -> Tensor:
        """Return 1 for the tokens of I in the chosen heads, else 0."""
        mean = self.sums[call.layer] / self.seen[call.layer].clamp(min=1)
        threshold = self.act.threshold
        count = self.seen[call.layer].amax(-1, keepdim=True)  # tokens so far: the first is seen by all
        limit = self.act.relative_threshold / count.clamp(min=1) if threshold is None else threshold
        excess = excess_tokens(mean, limit)
        chosen = torch.zeros(mean.shape[1], dtype=torch.bool, device=mean.device)
        chosen[list(self.heads[call.layer])] = True
        excess &= chosen[:, None]
        self.record("excess", call.layer, excess)
        return excess.long()

    def gain(self, layer: int, mass: Tensor) -> Tensor:
        """Scale the tokens of I down, the others up."""
        return act_gain(mass, self.act.beta)


def read_act_heads(file: str | Path) -> dict[int, tuple[int, ...]]:
    """Read heads by layer from JSON.

    Three forms are understood: an object of lists by layer, ``{"2": [0, 5], ...}``, by itself or under ``heads`` as
    ``saccade vlm calibrate`` writes it; or lists whose first belongs to layer 2, the form of the published code, by
    themselves or one of several under names, chosen by ``FILE#NAME``.

    Raises:
        ConfigError: If the file cannot be read, has another form, or has several lists and no name says which.
    """
    path, _, name = str(file).partition("#")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"ACT: cannot read heads from {path}: {error}.") from error
    if isinstance(content, dict) and name:
        if name not in content:
            raise ConfigError(f"ACT: {path} has no {name!r}.{suggest(name, content)} It has {', '.join(content)}.")
        content = content[name]
    if isinstance(content, dict) and "heads" in content:
        content = content["heads"]
    lists = dict(enumerate(content, start=FIRST_PUBLISHED)) if isinstance(content, list) else content
    wrong = f'ACT: {path} must hold lists of heads by layer, e.g. {{"2": [0, 5]}}; for one of several, {path}#NAME.'
    if not isinstance(lists, dict) or not all(str(layer).isdecimal() for layer in lists):
        raise ConfigError(wrong)
    for heads in lists.values():
        if not isinstance(heads, list) or not all(isinstance(head, int) for head in heads):
            raise ConfigError(wrong)
    return {int(layer): tuple(heads) for layer, heads in lists.items() if heads}


def rows_that_see(rows: Tensor, mask: Tensor | None, call: AttentionCall) -> Tensor:
    """Return how many of the rows of a call see each key, ``(B, 1, S)``."""
    seeing = rows[:, None, :, None].expand(-1, -1, -1, call.keys)
    if mask is not None:
        seeing = seeing & mask
    if call.causal:
        columns = torch.arange(call.keys, device=rows.device)
        seeing = seeing & (columns <= call.query_columns()[:, None])
    return seeing.sum(2)


def excess_tokens(mean: Tensor, limit: Tensor | float) -> Tensor:
    """Return the tokens with too much attention, without the first of each head.

    Args:
        mean: ``c_j``, ``(B, H, S)``.
        limit: Threshold, a number or broadcastable to it.

    Returns:
        Bool ``(B, H, S)``.
    """
    above = mean > limit
    return above & (above.cumsum(-1) > 1)


def act_gain(mass: Tensor, beta: float) -> Tensor:
    """Return the factors ``(1 + (1 - beta) m_1 / m_0, beta)`` of ``(B, H, 2, R)`` masses."""
    tiny = torch.finfo(mass.dtype).tiny
    raised = 1 + (1 - beta) * mass[:, :, 1] / mass[:, :, 0].clamp(min=tiny)
    return torch.stack([raised, torch.full_like(raised, beta)], 2)
