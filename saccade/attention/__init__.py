"""The attention core: operators that every system of this package is composed of. Imports torch alone."""

from saccade.attention.analysis import (
    AttentionStatistics,
    GateStatistics,
    attention_statistics,
    attention_statistics_from_maps,
    gate_statistics,
    head_importance,
    sink_norm_ratio,
)
from saccade.attention.block_sparse import block_sparse_attention, block_sparse_attention_lse
from saccade.attention.blocks import (
    BlockGeometry,
    BlockSelection,
    grid_to_regions,
    regions_to_grid,
    regions_valid,
    select_blocks,
)
from saccade.attention.context_mixing import ContextKernels, context_kernels, context_mixing
from saccade.attention.decay import LinearAttention, decay_slopes
from saccade.attention.dispatch import Decision, Explanation, Operator, explain, operators, use_backend
from saccade.attention.diversification import attention_diversification, attention_diversification_from_maps
from saccade.attention.entropy import attention_entropy
from saccade.attention.gates import combine_heads
from saccade.attention.key_classes import PartitionedAttention, Segments
from saccade.attention.linear import linear_attention
from saccade.attention.merge import AttentionEntropy, AttentionLSE, merge_partials
from saccade.attention.partitioned import partitioned_attention
from saccade.attention.pointwise import pointwise_attention
from saccade.attention.pooling import AttentionPooling, attention_pooling
from saccade.attention.prefix import prefix_softmax_mean
from saccade.attention.softmax import attention, attention_lse
from saccade.attention.token_pooling import token_average_pooling

__all__ = [
    "AttentionEntropy",
    "AttentionLSE",
    "AttentionPooling",
    "AttentionStatistics",
    "BlockGeometry",
    "BlockSelection",
    "ContextKernels",
    "Decision",
    "Explanation",
    "GateStatistics",
    "LinearAttention",
    "Operator",
    "PartitionedAttention",
    "Segments",
    "attention",
    "attention_diversification",
    "attention_diversification_from_maps",
    "attention_entropy",
    "attention_lse",
    "attention_pooling",
    "attention_statistics",
    "attention_statistics_from_maps",
    "block_sparse_attention",
    "block_sparse_attention_lse",
    "combine_heads",
    "context_kernels",
    "context_mixing",
    "decay_slopes",
    "explain",
    "gate_statistics",
    "grid_to_regions",
    "head_importance",
    "linear_attention",
    "merge_partials",
    "operators",
    "partitioned_attention",
    "pointwise_attention",
    "prefix_softmax_mean",
    "regions_to_grid",
    "regions_valid",
    "select_blocks",
    "sink_norm_ratio",
    "token_average_pooling",
    "use_backend",
]
