"""The attention core: operators that every system of this package is composed of. Imports torch alone."""

from saccade.attention.context_mixing import context_mixing
from saccade.attention.decay import LinearAttention, decay_slopes
from saccade.attention.dispatch import Decision, Explanation, Operator, explain, operators, use_backend
from saccade.attention.diversification import attention_diversification, attention_diversification_from_maps
from saccade.attention.linear import linear_attention
from saccade.attention.merge import AttentionLSE, merge_partials
from saccade.attention.softmax import attention, attention_lse

__all__ = [
    "AttentionLSE",
    "Decision",
    "Explanation",
    "LinearAttention",
    "Operator",
    "attention",
    "attention_diversification",
    "attention_diversification_from_maps",
    "attention_lse",
    "context_mixing",
    "decay_slopes",
    "explain",
    "linear_attention",
    "merge_partials",
    "operators",
    "use_backend",
]
