"""What linear attention hands back, and the rules by which published models choose how fast each head forgets."""

# No `from __future__ import annotations` here: TorchScript does not resolve quoted annotations of a NamedTuple.
import math
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import ConfigError, suggest

__all__ = ["LinearAttention", "decay_slopes"]

RULES = ("alibi", "linear")


class LinearAttention(NamedTuple):
    """Output of linear attention and the state after the last key.

    Args:
        out: ``(B, H, L, Dv)``, dtype of the query.
        state: ``(B, H, D, Dv)``, float32 (float64 for float64 input); normalised attention has one more column, the
            decayed sum of the keys.
    """

    out: Tensor
    state: Tensor


def decay_slopes(
    num_heads: int, rule: str = "alibi", *, layer: int | None = None, num_layers: int | None = None
) -> Tensor:
    """Return how fast each head forgets; ``linear_attention`` takes the negative as ``log_decay``.

    ``"alibi"``: ``2 ** (-8 t / H)``, t = 1 .. H, for H a power of two; otherwise the slopes of the power of two below H
    and then every second slope of the power of two above. In layer ``l`` of ``n`` times ``1 - l / (n - 1) + 1e-5``.
    ``"linear"``: ``(8 h / H) (1 - l / n)``, h = 0 .. H - 1: the first head forgets nothing.

    Args:
        num_heads: H, at least 1.
        rule: ``"alibi"`` or ``"linear"``.
        layer: Index of the layer from 0; ``None`` leaves the factor of the layer out.
        num_layers: Number of layers, given together with ``layer``; at least 2 under ``"alibi"``.

    Returns:
        Slopes ``(H,)``, float32, at least 0.

    Raises:
        ConfigError: If the rule is unknown, a number is out of range, or ``layer`` comes without ``num_layers``.

    Source:
        ``"alibi"``: Press et al., "Train Short, Test Long", ICLR 2022 (arXiv:2108.12409), in layers as in
        OpenNLPLab/lightning-attention (MIT) at commit d15c385. ``"linear"``: Qin et al., "TransNormerLLM"
        (arXiv:2307.14995), with heads counted from 0 as flash-linear-attention does.

    Example:
        >>> decay_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if rule not in RULES:
        raise ConfigError(f"unknown rule {rule!r}; known: {', '.join(RULES)}.{suggest(rule, RULES)}")
    if num_heads < 1:
        raise ConfigError(f"num_heads must be at least 1; got {num_heads}.")
    depth = 0.0
    if layer is not None or num_layers is not None:
        fewest = 2 if rule == "alibi" else 1
        if layer is None or num_layers is None or num_layers < fewest or not 0 <= layer < num_layers:
            raise ConfigError(
                f"layer and num_layers go together, 0 <= layer < num_layers and num_layers >= {fewest} for {rule!r}; "
                f"got layer {layer}, num_layers {num_layers}."
            )
        depth = layer / (num_layers - 1) - 1e-5 if rule == "alibi" else layer / num_layers
    slopes = alibi_slopes(num_heads) if rule == "alibi" else [8 * head / num_heads for head in range(num_heads)]
    return torch.tensor(slopes) * (1 - depth)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return ALiBi's slopes for any number of heads."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (t + 1) / power) for t in range(power)]
    between = [2.0 ** (-4 * (t + 1) / power) for t in range(0, 2 * power, 2)]  # those of 2 * power heads, every second
    return slopes + between[: num_heads - power]
