"""Attention taken apart by class of key: what each class puts out, and how much of the weight falls on it.

Any edit of attention weights that multiplies a whole class by a factor, be the factor a constant or a function of the
masses, is arithmetic on the result; no weight is ever looked at. One pass over keys and values serves all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.attention import reference
from saccade.attention.dispatch import Backend, Decision, Operator, register
from saccade.attention.flash import can_run_flash
from saccade.attention.key_classes import PartitionedAttention, Segments, by_class
from saccade.attention.partitioned_cpu import partitioned_cpu
from saccade.attention.partitioned_triton import partitioned_triton
from saccade.attention.problem import Problem, describe
from saccade.attention.sdpa import can_run_attention_lse
from saccade.errors import ShapeError

__all__ = ["partitioned_attention"]

LOWEST = -1e30  # below every finite score


def partitioned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor | Segments,
    num_classes: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    key_log_weight: Tensor | None = None,
    weighted_class: int | None = None,
    backend: str = "auto",
) -> PartitionedAttention:
    """Compute attention, and the share of each class of keys in its output and in its weights.

    With ``p_i = softmax_j(scale * query[i] . key[j])`` over the keys that take part, class ``c`` has
    ``class_out[c, i] = sum_{j in c} p_ij value[j]`` and ``class_mass[c, i] = sum_{j in c} p_ij``: all classes share one
    normaliser, so they sum to the ordinary output and to 1. A class without keys has exactly 0. A query that sees no
    key gets zeros, a log-sum-exp of ``-inf`` and no gradient. All results are differentiable in query, key, value and
    ``key_log_weight``.

    Args:
        query: ``(B, H, L, D)``, any floating dtype; may be a strided view.
        key: ``(B, Hkv, S, D)``; H is a multiple of Hkv.
        value: ``(B, Hkv, S, Dv)``.
        key_class: Class of each key, integers ``(B, S)`` or, for each query head, ``(B, H, S)``; keys whose label is
            not in 0..C-1 are excluded, by convention -1. Or :class:`Segments` of contiguous keys, but not under
            TorchScript.
        num_classes: C.
        mask: Bool, broadcastable to ``(B, H, L, S)``, ``True`` = takes part. Key padding ``(B, 1, 1, S)`` is cheap; a
            mask that differs between queries is computed with all scores in memory on the CPU.
        causal: A query sees the keys whose position is not beyond its own.
        query_positions: Integers ``(L,)`` or ``(B, L)``; ``None`` means S - L, ..., S - 1 (aligned bottom-right).
        key_positions: Integers ``(S,)`` or ``(B, S)`` in any order; ``None`` means 0, ..., S - 1.
        scale: Factor of the products; ``None`` means ``D ** -0.5``.
        key_log_weight: Floating point, ``(B, S)`` or ``(B, H, S)``; ``w_j`` of the weighted results, read for the keys
            of ``weighted_class`` only. It does not enter the normaliser. ``-inf`` is a weight of 0.
        weighted_class: The class that it weighs; given if and only if ``key_log_weight`` is.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        Outputs, log-sum-exp and masses; see :class:`PartitionedAttention`.

    Raises:
        ShapeError: If a tensor has another shape, dtype or device, or an option lacks the one it belongs to.
        BackendError: If the backend asked for does not exist or cannot run this call.

    Source:
        The common algebra of VAR (arXiv:2503.03321), GIFT (arXiv:2510.22067), VHR (arXiv:2412.13949) and ACT
        (arXiv:2406.15765), each of which edits the weights themselves.

    Example:
        >>> query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
        >>> parts = partitioned_attention(query, key, value, Segments((0, 4, 9)), 2)
        >>> parts.class_out.shape, parts.class_mass.shape
        (torch.Size([1, 2, 2, 5, 8]), torch.Size([1, 2, 2, 5]))
        >>> torch.allclose(parts.class_out.sum(2), attention(query, key, value), atol=1e-6)
        True
    """
    options = {
        "mask": mask,
        "causal": causal,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "scale": scale,
        "key_log_weight": key_log_weight,
        "weighted_class": weighted_class,
    }
    positional = (query, key, value, key_class, num_classes)
    result: PartitionedAttention = PARTITIONED_ATTENTION.call(positional, options, backend)
    return result


@dataclass(frozen=True)
class PartitionedProblem:
    """The facts about one call that decide which backends can run it.

    Args:
        scores: What it has in common with other softmax operators.
        num_classes: C.
        labels: ``"(B, S)"``, ``"(B, H, S)"`` or ``"segments"``.
        row_mask: The mask differs between queries.
        weighted: There is a log weight.
    """

    scores: Problem
    num_classes: int
    labels: str
    row_mask: bool
    weighted: bool

    def __str__(self) -> str:
        options = ["mask per query"] * self.row_mask + ["weighted class"] * self.weighted
        return ", ".join([str(self.scores), f"{self.num_classes} classes by {self.labels}", *options])


def describe_partitioned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor | Segments,
    num_classes: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    key_log_weight: Tensor | None = None,
    weighted_class: int | None = None,
) -> PartitionedProblem:
    """Check the arguments of :func:`partitioned_attention` and return the facts about them."""
    scores = describe(query, key, value, mask=mask, causal=causal, scale=scale)
    batch, heads, queries, keys = scores.batch, scores.heads, scores.queries, scores.keys
    if num_classes < 1:
        raise ShapeError(f"num_classes must be at least 1; got {num_classes}.")
    if isinstance(key_class, Segments):
        labels = "segments"
        check_segments(key_class, num_classes, keys)
    else:
        check("key_class", key_class, {"(B, S)": (batch, keys), "(B, H, S)": (batch, heads, keys)}, query)
        labels = "(B, S)" if key_class.ndim == 2 else "(B, H, S)"
    for name, positions, length, axis in (
        ("query_positions", query_positions, queries, "L"),
        ("key_positions", key_positions, keys, "S"),
    ):
        if positions is not None:
            if not causal:
                raise ShapeError(f"{name} means something with causal=True only; pass that, or leave it out.")
            check(name, positions, {f"({axis},)": (length,), f"(B, {axis})": (batch, length)}, query)
    if (key_log_weight is None) != (weighted_class is None):
        raise ShapeError("key_log_weight and weighted_class belong together; pass both or neither.")
    if key_log_weight is not None and weighted_class is not None:
        shapes = {"(B, S)": (batch, keys), "(B, H, S)": (batch, heads, keys)}
        check("key_log_weight", key_log_weight, shapes, query, floating=True)
        if not 0 <= weighted_class < num_classes:
            raise ShapeError(
                f"weighted_class must be one of the {num_classes} classes from 0 on; got {weighted_class}."
            )
    return PartitionedProblem(
        scores=scores,
        num_classes=num_classes,
        labels=labels,
        row_mask=differs_by_query(mask),
        weighted=key_log_weight is not None,
    )


def differs_by_query(mask: Tensor | None) -> bool:
    """Return whether a mask does more than exclude keys."""
    return mask is not None and mask.ndim > 1 and mask.shape[-2] != 1


def check(
    name: str, tensor: Tensor, shapes: dict[str, tuple[int, ...]], query: Tensor, *, floating: bool = False
) -> None:
    """Raise unless a tensor has one of some shapes, integers or floating point, and lies beside ``query``."""
    if tuple(tensor.shape) not in shapes.values():
        wanted = " or ".join(f"{axes} = {shape}" for axes, shape in shapes.items())
        raise ShapeError(f"{name} must be {wanted}; got {tuple(tensor.shape)}. Use expand to share it between samples.")
    integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not (tensor.is_floating_point() if floating else integers):
        raise ShapeError(f"{name} must be {'floating point' if floating else 'integers'}; got {tensor.dtype}.")
    if tensor.device != query.device:
        raise ShapeError(f"{name} must be on the device of query, {query.device}; got {tensor.device}.")


def check_segments(segments: Segments, num_classes: int, keys: int) -> None:
    """Raise unless segments lie within the keys and their labels within the classes."""
    if segments.bounds[-1] > keys:
        raise ShapeError(f"the bounds of the segments must not exceed the {keys} keys; got {segments.bounds}.")
    labels = tuple(range(len(segments.bounds) - 1)) if segments.labels is None else segments.labels
    if not all(-1 <= label < num_classes for label in labels):
        raise ShapeError(f"segments must have labels from -1 to {num_classes - 1}; got {labels}.")


def as_labels(key_class: Tensor | Segments, query: Tensor, key: Tensor) -> Tensor:
    """Return labels ``(B, S)`` or ``(B, H, S)``."""
    if isinstance(key_class, Segments):
        return key_class.key_class(key.shape[2], query.device).expand(query.shape[0], -1)
    return key_class


def exclude(key_class: Tensor, mask: Tensor | None) -> Tensor:
    """Return int64 labels that are -1 where a mask without an axis of queries hides the key."""
    key_class = key_class.long()
    if mask is None:
        return key_class
    hidden = ~mask[(None,) * (4 - mask.ndim)].squeeze(2)  # (1 or B, 1 or H, 1 or S)
    if key_class.ndim == 2 and hidden.shape[1] == 1:
        return key_class.masked_fill(hidden.squeeze(1), -1)
    per_head = key_class if key_class.ndim == 3 else key_class.unsqueeze(1).expand(-1, hidden.shape[1], -1)
    return per_head.masked_fill(hidden, -1)


def partitioned_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor | Segments,
    num_classes: int,
    mask: Tensor | None,
    causal: bool,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float | None,
    key_log_weight: Tensor | None,
    weighted_class: int | None,
) -> PartitionedAttention:
    """Run class after class through torch's fused CPU kernel, or one query on its row of scores."""
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    labels = exclude(as_labels(key_class, query, key), mask)
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1:
        return one_row(
            query,
            key,
            value,
            labels,
            num_classes,
            query_positions,
            key_positions,
            scale,
            key_log_weight,
            weighted_class,
        )
    if not causal:
        query_positions = None
    elif query_positions is None:
        query_positions = torch.arange(keys - queries, keys)
    weighted = 0 if weighted_class is None else weighted_class
    out, lse, part_out, part_mass = partitioned_cpu(
        query, key, value, labels, num_classes, query_positions, key_positions, scale, key_log_weight, weighted
    )
    return by_class(out, lse, part_out, part_mass, num_classes)


def one_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    labels: Tensor,
    num_classes: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    key_log_weight: Tensor | None,
    weighted_class: int | None,
) -> PartitionedAttention:
    """Attend with one query: its weights, once for each class with the others at 0, times the values; plain autograd.

    Written for few operators, since each costs as much as its work.
    """
    dtype = reference.wide(query)
    batch, heads, _, head_dim = query.shape
    kv_heads, keys, value_dim = value.shape[1:]
    groups = (batch * kv_heads, heads // kv_heads)
    padding = -(num_classes + (weighted_class is not None)) % 4  # four rows are a faster product than three
    members = reference.class_members(labels, num_classes + padding)  # (B, 1 or H, rows, S)
    if query_positions is not None or key_positions is not None:
        members = members & reference.earlier_keys(query, key, query_positions, key_positions)
    hidden = torch.where(members[:, :, :num_classes].any(2), 0.0, LOWEST).to(dtype)  # (B, 1 or H, S)
    scores = torch.baddbmm(
        hidden.expand(batch, heads, keys).reshape(*groups, keys),
        query.to(dtype).reshape(*groups, head_dim),
        key.to(dtype).reshape(groups[0], keys, head_dim).transpose(1, 2),
        alpha=scale,
    ).view(batch, heads, 1, keys)
    weights = scores.softmax(-1)
    parts = weights * members  # (B, H, rows, S)
    if key_log_weight is not None and weighted_class is not None:
        member = members[:, :, weighted_class : weighted_class + 1]
        log_weight = key_log_weight.to(dtype).reshape(batch, -1, 1, keys).masked_fill(~member, -torch.inf)
        parts = torch.cat([parts, weights * log_weight.exp()], 2)
    part_mass = parts.sum(-1, keepdim=True)
    part_out = parts.view(batch, kv_heads, -1, keys) @ value.to(dtype)  # (B, Hkv, H / Hkv * rows, Dv)
    part_out = part_out.view(batch, heads, -1, 1, value_dim)
    class_out = part_out[:, :, :num_classes]
    peak = scores.amax(-1)
    lse = (peak - weights.amax(-1).log()).masked_fill(peak < LOWEST / 2, -torch.inf)
    weighted = key_log_weight is not None
    return PartitionedAttention(
        out=class_out.sum(2).to(query.dtype),
        lse=lse,
        class_out=class_out.to(query.dtype),
        class_mass=part_mass[:, :, :num_classes],
        weighted_out=part_out[:, :, -1].to(query.dtype) if weighted else None,
        weighted_mass=part_mass[:, :, -1] if weighted else None,
    )


def run_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor | Segments,
    num_classes: int,
    mask: Tensor | None,
    *others: object,
) -> PartitionedAttention:
    """Run the Triton path, which takes labels; excluded keys are in no class, so that they are not even loaded."""
    by_query = differs_by_query(mask)
    labels = exclude(as_labels(key_class, query, key), None if by_query else mask)
    return partitioned_triton(query, key, value, labels, num_classes, mask if by_query else None, *others)  # type: ignore[arg-type]


def run_reference(
    query: Tensor, key: Tensor, value: Tensor, key_class: Tensor | Segments, *others: object
) -> PartitionedAttention:
    """Run the literal form, which takes labels."""
    run: PartitionedAttention = reference.partitioned_attention(
        query,
        key,
        value,
        as_labels(key_class, query, key),
        *others,  # type: ignore[arg-type]
    )
    return run


def can_run_triton(problem: PartitionedProblem) -> Decision:
    """Say whether the kernels of softmax attention can serve."""
    return can_run_flash(problem.scores)


def can_run_torch(problem: PartitionedProblem) -> Decision:
    """Say yes to one query anywhere, and to all that the CPU kernel beneath SDPA can serve."""
    if problem.row_mask:
        return Decision(False, "a mask that differs between queries needs the scores in full")
    if problem.scores.queries == 1 and not problem.scores.empty:
        return Decision(True, "one query: its row of scores")
    decision = can_run_attention_lse(problem.scores)
    return Decision(True, "torch's fused CPU kernel, class by class") if decision.ok else decision


def always(problem: PartitionedProblem) -> Decision:
    """Return yes: the literal form runs everywhere."""
    return Decision(True, "literal form, holds the L x S scores of every class")


def example(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor | int, ...]:
    """Return normal query, key and value of one shape ``(B, H, N, D)``, and three classes."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    key_class = torch.randint(3, (shape[0], shape[2]), generator=generator).to(device)
    return query, key, value, key_class, 3


def scripted_partitioned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_class: Tensor,
    num_classes: int,
    mask: Tensor | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    key_log_weight: Tensor | None = None,
    weighted_class: int | None = None,
    backend: str = "auto",
) -> PartitionedAttention:
    """Stand in for :func:`partitioned_attention` in TorchScript: its literal form, made of torch's own operators."""
    return reference.partitioned_attention(
        query,
        key,
        value,
        key_class,
        num_classes,
        mask,
        causal,
        query_positions,
        key_positions,
        scale,
        key_log_weight,
        weighted_class,
    )


partitioned_attention.__prepare_scriptable__ = lambda: scripted_partitioned_attention  # type: ignore[attr-defined]

PARTITIONED_ATTENTION = register(
    Operator(
        function=partitioned_attention,
        summary="attention, and the share of each class of keys in output and weights",
        backends=(
            Backend("triton", can_run_triton, run_triton),
            Backend("torch", can_run_torch, partitioned_torch),
            Backend("reference", always, run_reference),
        ),
        describe=describe_partitioned,
        example=example,
    )
)
