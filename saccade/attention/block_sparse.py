"""Attention of blocks of queries to selected blocks of keys: bi-level routing, and every method that chooses blocks.

The choice itself is a :class:`BlockSelection`, which any method may make. Which keys take part is defined for each
query, see there; nothing is gathered beyond a cache-sized chunk, and no tensor of size queries x keys exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.attention import block_reference
from saccade.attention.block_chunks import block_sparse
from saccade.attention.block_gather import gather_attention, gather_attention_lse
from saccade.attention.blocks import BlockGeometry, BlockSelection, block_entries, select_blocks
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.kernels.runtime import can_run_triton
from saccade.attention.merge import AttentionLSE, merge_partials
from saccade.attention.problem import Problem, describe
from saccade.attention.sdpa import HAS_FLASH_CPU
from saccade.errors import ShapeError

__all__ = ["block_sparse_attention", "block_sparse_attention_lse"]


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_logit: Tensor | None = None,
    block_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each block of queries to its own selection of key blocks.

    ``out[i] = sum_j p_ij value[j]`` with the softmax ``p_i`` over the keys that query ``i`` may see by the selection
    (:class:`BlockSelection`: selected blocks, sink, window, causality), each once. A query that sees none gets zeros
    and no gradient. The selection itself carries no gradient.

    Args:
        query: ``(B, H, L, D)``, any floating dtype, L that of the geometry; may be a strided view.
        key: ``(B, Hkv, S, D)``; H is a multiple of Hkv.
        value: ``(B, Hkv, S, Dv)``.
        selection: Which blocks; its head axis is 1, Hkv or H. Numbers beyond the last block are refused on the CPU and
            select nothing elsewhere, where looking would wait for the device.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.
        key_valid: Bool ``(B, S)``, ``True`` = takes part; blocks that are not full, wherever they lie.
        extra_key: One more key for every query block, seen by all its queries whatever the geometry says; floating
            point, broadcastable to ``(B, Hkv, NQ, D)``. Many equal keys are one with a logit of ``log(count)``.
        extra_value: Its value, broadcastable to ``(B, Hkv, NQ, Dv)``; comes with ``extra_key``.
        extra_logit: Added to its score, broadcastable to ``(B, H, NQ)``; ``-inf`` = there is none here.
        block_weight: Factor of the keys and of the values in each selected block, shaped as ``selection.indices``
            (soft routing). Keys that are seen for another reason have factor 1.
        backend: ``"auto"``, ``"triton"``, ``"torch"``, ``"gather"`` or ``"reference"``.

    Returns:
        ``(B, H, L, Dv)``, dtype and device of ``query``.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device, or does not fit the geometry.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023 (arXiv:2303.08810), of
        which this is the second level, for any selection.

    Example:
        >>> geometry = BlockGeometry(block_q=4, block_k=4, q_len=8, kv_len=8)
        >>> selection = select_blocks(torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]), geometry, 1)  # each the other block
        >>> value = torch.arange(2.0).repeat_interleave(4).view(1, 1, 8, 1)
        >>> block_sparse_attention(torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2), value, selection).flatten()
        tensor([1., 1., 1., 1., 0., 0., 0., 0.])
    """
    options = {
        "scale": scale,
        "key_valid": key_valid,
        "extra_key": extra_key,
        "extra_value": extra_value,
        "extra_logit": extra_logit,
        "block_weight": block_weight,
    }
    out: Tensor = BLOCK_SPARSE.call((query, key, value, selection), options, backend)
    return out


def block_sparse_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_logit: Tensor | None = None,
    block_weight: Tensor | None = None,
    backend: str = "auto",
) -> AttentionLSE:
    """Compute :func:`block_sparse_attention` and the log-sum-exp of its scores, both differentiable.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        selection: Which blocks; this and what follows as :func:`block_sparse_attention`.
        scale: Factor of the products.
        key_valid: Bool ``(B, S)``.
        extra_key: Broadcastable to ``(B, Hkv, NQ, D)``.
        extra_value: Broadcastable to ``(B, Hkv, NQ, Dv)``.
        extra_logit: Broadcastable to ``(B, H, NQ)``.
        block_weight: As ``selection.indices``.
        backend: ``"auto"``, ``"triton"``, ``"torch"``, ``"gather"`` or ``"reference"``.

    Returns:
        Output and log-sum-exp, the extra key included; zeros and ``-inf`` for a query that sees nothing.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device, or does not fit the geometry.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Example:
        >>> geometry = BlockGeometry(block_q=1, block_k=4, q_len=1, kv_len=12)
        >>> selection = select_blocks(torch.tensor([[[[0.0, 2.0, 1.0]]]]), geometry, 2)
        >>> query, key, value = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 12, 8), torch.ones(1, 1, 12, 8)
        >>> block_sparse_attention_lse(query, key, value, selection).lse.exp().round()
        tensor([[[8.]]])
    """
    options = {
        "scale": scale,
        "key_valid": key_valid,
        "extra_key": extra_key,
        "extra_value": extra_value,
        "extra_logit": extra_logit,
        "block_weight": block_weight,
    }
    result: AttentionLSE = BLOCK_SPARSE_LSE.call((query, key, value, selection), options, backend)
    return result


@dataclass(frozen=True)
class BlockSparseProblem:
    """The facts about one call that decide which backends can run it.

    Args:
        tensors: Those of query, key and value.
        geometry: The selection's.
        selection_heads: Hs, heads with selections of their own.
        selected: K, entries of the selection in a row.
        sink: Leading keys that are always seen.
        window: Reach of what is always seen.
        key_valid: Some keys may be excluded.
        extra_key: There is one more key.
        block_weight: Selected blocks are weighted.
    """

    tensors: Problem
    geometry: BlockGeometry
    selection_heads: int
    selected: int
    sink: int
    window: int
    key_valid: bool
    extra_key: bool
    block_weight: bool

    def __str__(self) -> str:
        g = self.geometry
        words = [
            str(self.tensors),
            f"{self.selected} of {g.k_blocks} blocks of {g.block_k} keys for {g.block_q} queries",
        ]
        words += [f"{self.selection_heads} selections"] * (self.selection_heads > 1)
        words += ["causal"] * g.causal + [f"sink {self.sink}"] * (self.sink > 0)
        words += [f"window {self.window}"] * (self.window > 0)
        return ", ".join(words + [name for name in ("key_valid", "extra_key", "block_weight") if getattr(self, name)])


def describe_block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_logit: Tensor | None = None,
    block_weight: Tensor | None = None,
) -> BlockSparseProblem:
    """Check the arguments of :func:`block_sparse_attention` and return the facts about them.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device, or does not fit the geometry.
    """
    tensors = describe(query, key, value)
    g = selection.geometry
    if g.block_q < 1 or g.block_k < 1 or selection.sink < 0 or selection.window < 0:
        raise ShapeError(
            "block_q and block_k must be at least 1, sink and window at least 0; "
            f"got {g}, sink {selection.sink}, window {selection.window}."
        )
    if g.q_len != tensors.queries or g.kv_len != tensors.keys:
        raise ShapeError(
            f"the geometry says {g.q_len} queries and {g.kv_len} keys; got query {tuple(query.shape)} and "
            f"key {tuple(key.shape)}."
        )
    indices, counts = selection.indices, selection.counts
    rows = (tensors.batch, g.q_blocks)
    if indices.ndim != 4 or (indices.shape[0], indices.shape[2]) != rows or counts.shape != indices.shape[:3]:
        raise ShapeError(
            f"selection.indices must be (B, Hs, NQ, K) and counts (B, Hs, NQ) with B = {rows[0]} and NQ = {rows[1]}; "
            f"got {tuple(indices.shape)} and {tuple(counts.shape)}."
        )
    if indices.shape[1] not in (1, tensors.kv_heads, tensors.heads):
        raise ShapeError(
            f"selection.indices must have 1, Hkv = {tensors.kv_heads} or H = {tensors.heads} heads; "
            f"got {tuple(indices.shape)}."
        )
    if any(t.dtype not in (torch.int32, torch.int64) for t in (indices, counts)):
        raise ShapeError(
            f"selection.indices and counts must be int32 or int64; got {indices.dtype} and {counts.dtype}."
        )
    compiling = torch.compiler.is_compiling() or tensors.exporting  # then values cannot be looked at
    if indices.device.type == "cpu" and not compiling and indices.numel() > 0 and int(indices.max()) >= g.k_blocks:
        raise ShapeError(
            f"selection.indices must be below {g.k_blocks}, the number of blocks of {g.block_k} keys; "
            f"got {int(indices.max())}."
        )
    if key_valid is not None and (key_valid.dtype != torch.bool or key_valid.shape != (tensors.batch, tensors.keys)):
        raise ShapeError(
            f"key_valid must be bool (B, S) = {(tensors.batch, tensors.keys)}, True = takes part; "
            f"got {key_valid.dtype} {tuple(key_valid.shape)}."
        )
    if (extra_key is None) != (extra_value is None) or (extra_logit is not None and extra_key is None):
        raise ShapeError("extra_key and extra_value come together, and extra_logit only with them.")
    expected = {
        "extra_key": (extra_key, (rows[0], tensors.kv_heads, rows[1], tensors.head_dim)),
        "extra_value": (extra_value, (rows[0], tensors.kv_heads, rows[1], tensors.value_dim)),
        "extra_logit": (extra_logit, (rows[0], tensors.heads, rows[1])),
        "block_weight": (block_weight, tuple(indices.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None:
            check_optional(name, tensor, shape)
    for name, other in [("selection", indices), ("selection", counts), ("key_valid", key_valid)] + [
        (name, tensor) for name, (tensor, _) in expected.items()
    ]:
        if other is not None and other.device != query.device:
            raise ShapeError(f"{name} must be on the device of query, {query.device}; got {other.device}.")
    return BlockSparseProblem(
        tensors=tensors,
        geometry=g,
        selection_heads=indices.shape[1],
        selected=indices.shape[3],
        sink=selection.sink,
        window=selection.window,
        key_valid=key_valid is not None,
        extra_key=extra_key is not None,
        block_weight=block_weight is not None,
    )


def check_optional(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a tensor is floating point and of a shape; all axes of an extra key but the last may be 1."""
    exact = 4 if name == "block_weight" else len(shape) - 3  # trailing axes that are not broadcast
    fits = tensor.ndim == len(shape) and all(
        size == wanted or (size == 1 and axis < len(shape) - exact)
        for axis, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True))
    )
    if not fits or not tensor.is_floating_point():
        how = "of shape" if name == "block_weight" else "broadcastable to"
        raise ShapeError(f"{name} must be floating point, {how} {shape}; got {tensor.dtype} {tuple(tensor.shape)}.")


def can_run_kernels(problem: BlockSparseProblem) -> Decision:
    """Say whether the Triton kernels can serve."""
    decision = can_run_triton(problem.tensors.device, exporting=problem.tensors.exporting)
    if not decision.ok:
        return decision
    if problem.tensors.empty:
        return Decision(False, "the kernels need at least one sample, query and key")
    if problem.block_weight:
        return Decision(False, "the kernels have no block_weight")
    if problem.tensors.dtype == torch.float64:
        return Decision(False, "the kernels accumulate in float32")
    width = max(problem.tensors.head_dim, problem.tensors.value_dim)
    if width > 256:
        return Decision(False, f"the kernels hold head widths up to 256, not {width}")
    return decision


def can_run_chunks(problem: BlockSparseProblem) -> Decision:
    """Say whether the chunks over torch's CPU kernel can serve."""
    if problem.tensors.device != "cpu":
        return Decision(False, f"its fused kernel runs on cpu, not on {problem.tensors.device}")
    if not HAS_FLASH_CPU:
        return Decision(False, f"torch {torch.__version__} lacks the fused kernel beneath SDPA")
    if problem.tensors.empty:
        return Decision(False, "the fused kernel needs at least one sample, query and key")
    if problem.tensors.exporting:
        return Decision(False, "a custom operator cannot be exported")
    return Decision(True, "torch's fused CPU kernel on cache-sized chunks of gathered keys")


def can_run_gather(problem: BlockSparseProblem) -> Decision:
    """Say whether everything can be gathered at once."""
    if problem.tensors.empty:
        return Decision(False, "there is nothing to gather")
    return Decision(True, "torch's operators on gathered copies of all selected keys")


def always(problem: BlockSparseProblem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, holds the L x S scores")


def run_operator(
    triton: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float | None,
    key_valid: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_logit: Tensor | None,
    block_weight: Tensor | None,
) -> AttentionLSE:
    """Run the registered operator, and unite its result with the extra key."""
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    g = selection.geometry
    weight = None if block_weight is None else block_weight.to(query.dtype)
    entries, weight = block_entries(selection, weight)
    rule = [g.block_q, g.block_k, g.q_offset, int(g.causal), selection.sink, selection.window]
    part = AttentionLSE(*block_sparse(query, key, value, entries, weight, key_valid, rule, scale, triton))
    if extra_key is None or extra_value is None:
        return part
    score = scale * (query.to(part.lse.dtype) * query_rows(extra_key, query, g.block_q)).sum(-1)  # (B, H, L)
    if extra_logit is not None:
        score = score + query_rows(extra_logit.unsqueeze(-1), query, g.block_q).squeeze(-1)
    extra = query_rows(extra_value, query, g.block_q).to(part.out.dtype).expand(part.out.shape)
    return merge_partials([part, AttentionLSE(extra, score)])


def query_rows(tensor: Tensor, query: Tensor, block_q: int) -> Tensor:
    """Return what query blocks have, ``(B, Hkv or H, NQ, W)``, for each query and head; axes of 1 stay 1."""
    if tensor.shape[1] not in (1, query.shape[1]):
        tensor = tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)
    return tensor if tensor.shape[2] == 1 else tensor.repeat_interleave(block_q, 2)[:, :, : query.shape[2]]


def run_kernels(*arguments: Any) -> Tensor:  # noqa: ANN401
    """Run the Triton kernels for the output."""
    return run_operator(True, *arguments).out


def run_chunks(*arguments: Any) -> Tensor:  # noqa: ANN401
    """Run the chunks for the output."""
    return run_operator(False, *arguments).out


def scripted_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_logit: Tensor | None = None,
    block_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stand in for :func:`block_sparse_attention` in TorchScript."""
    return gather_attention(
        query, key, value, selection, scale, key_valid, extra_key, extra_value, extra_logit, block_weight
    )


def scripted_block_sparse_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_logit: Tensor | None = None,
    block_weight: Tensor | None = None,
    backend: str = "auto",
) -> AttentionLSE:
    """Stand in for :func:`block_sparse_attention_lse` in TorchScript."""
    return gather_attention_lse(
        query, key, value, selection, scale, key_valid, extra_key, extra_value, extra_logit, block_weight
    )


def example(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, BlockSelection]:
    """Return normal query, key and value ``(B, H, N, D)`` and 4 random blocks of 64 keys for every 64 queries."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    geometry = BlockGeometry(64, 64, shape[2], shape[2])
    scores = torch.rand(shape[0], 1, geometry.q_blocks, geometry.k_blocks, generator=generator)
    return query, key, value, select_blocks(scores.to(device), geometry, 4)


# The hook by which torch.jit.script asks an object for the form to compile.
block_sparse_attention.__prepare_scriptable__ = lambda: scripted_block_sparse_attention  # type: ignore[attr-defined]
block_sparse_attention_lse.__prepare_scriptable__ = (  # type: ignore[attr-defined]
    lambda: scripted_block_sparse_attention_lse
)

BLOCK_SPARSE = register(
    Operator(
        function=block_sparse_attention,
        summary="attention of query blocks to selected key blocks, sinks and a window",
        backends=(
            Backend("triton", can_run_kernels, run_kernels),
            Backend("torch", can_run_chunks, run_chunks),
            Backend("gather", can_run_gather, gather_attention),
            Backend("reference", always, block_reference.block_sparse_attention),
        ),
        describe=describe_block_sparse,
        example=example,
    )
)
BLOCK_SPARSE_LSE = register(
    Operator(
        function=block_sparse_attention_lse,
        summary="block-sparse attention and the log-sum-exp of its scores",
        backends=(
            Backend("triton", can_run_kernels, partial(run_operator, True)),
            Backend("torch", can_run_chunks, partial(run_operator, False)),
            Backend("gather", can_run_gather, gather_attention_lse),
            Backend("reference", always, block_reference.block_sparse_attention_lse),
        ),
        describe=describe_block_sparse,
        example=example,
    )
)
