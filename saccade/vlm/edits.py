"""What interventions may do to attention, and how several of them act on one row.

Every intervention of this package changes weights ``a_j`` of a query in one of three ways, applied in this order:

1. :class:`LogitEdit`: scores of a key are multiplied before the softmax, ``l'_j = f_j l_j`` (PAI, VAF).
2. :class:`ClassEdit`: weights of a class of keys are multiplied by a function of the masses (VAR, GIFT, ACT).
   With ``m_c`` the mass and ``O_c`` the output of class ``c``, ``O' = sum_c g_c O_c``, over ``sum_c g_c m_c`` if the
   row is renormalised. Several are applied one after the other: their classes are intersected, and each sees the masses
   that those before it left.
3. :class:`HeadEdit`: the output of a head is multiplied (VHR).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saccade.vlm.call import AttentionCall
from saccade.vlm.prompt import Prompt

if TYPE_CHECKING:
    from saccade.vlm.model_facts import ModelFacts

__all__ = ["ClassEdit", "Edit", "HeadEdit", "LogitEdit", "ReadingEdit", "edited_attention", "edited_gains", "recombine"]


class Edit:
    """One intervention at work on one model; the state of the current prompt lives here and nowhere else.

    Attributes:
        name: Name of the intervention, for messages.
        layers: Layers whose attention it changes.
        stats: What it found at the most recent row, by name and layer, for analysis; see each intervention.
    """

    needs_image = True  # prompts without a visual token are an error
    needs_layer_input = False  # `layer_input` is called
    whole_prompt = False  # the prompt must arrive in one piece (no chunked prefill)
    needs_cache = False  # the prompt must not be run again for every token (`use_cache=False`)
    compiles = True  # a decoding step may be traced by torch.compile
    reorderable = True  # state is about the prompt only, so beams may be re-ordered

    def __init__(self, name: str, facts: ModelFacts, layers: frozenset[int]) -> None:
        self.name = name
        self.facts = facts
        self.layers = layers
        self.stats: dict[str, dict[int, Tensor]] = {}

    @property
    def observed_layers(self) -> frozenset[int]:
        """Layers whose calls :meth:`observe` gets."""
        return frozenset()

    def prepare(self, prompt: Prompt) -> None:
        """Start with a new prompt; all earlier state ends."""
        self.stats = {}

    @property
    def watched_layers(self) -> frozenset[int]:
        """Layers whose calls :meth:`watch` gets."""
        return frozenset()

    def first_row(self, prompt: Prompt) -> list[int]:
        """Return for each sample the position of the first row that may be changed."""
        raise NotImplementedError

    def first_pass(self, prompt: Prompt) -> bool:
        """Return whether the rows before :meth:`first_row` must pass all layers before it does."""
        return False

    def reads_last_row(self, prompt: Prompt) -> bool:
        """Return whether what the first pass is for needs the last row of the prompt as well."""
        return False

    def text_only_pass(self) -> bool:
        """Return whether the prompt must be run without its visual tokens, see :meth:`observe_text_only`."""
        return False

    def layer_input(self, layer: int, hidden: Tensor, position: int) -> None:
        """Read the input ``(B, L, hidden)`` of a layer, from a place in the prompt on."""

    def observe(self, call: AttentionCall) -> None:
        """Read a call of one of :attr:`observed_layers` before it is changed."""

    def watch(self, call: AttentionCall, acting: Sequence[Edit]) -> None:
        """Read a call of one of :attr:`watched_layers` after the edits that act on the layer have changed it."""

    def observe_text_only(self, layer: int, out: Tensor) -> None:
        """Read the head outputs ``(B, H, Dv)`` of the last row of the prompt without its visual tokens."""

    def record(self, name: str, layer: int, value: Tensor) -> None:
        """Keep a figure for ``stats``."""
        if not torch.compiler.is_compiling():
            self.stats.setdefault(name, {})[layer] = value


class LogitEdit(Edit):
    """Multiplies scores before the softmax."""

    row_by_row = False  # the factor depends on the query

    def factor(self, call: AttentionCall) -> Tensor:
        """Return ``f``, ``(B, 1 or H, S)``, for the keys of a call; of one query if ``row_by_row``."""
        raise NotImplementedError


class ClassEdit(Edit):
    """Multiplies the weights of classes of keys."""

    num_classes: int
    weighted_class: int | None = None
    normalise = False

    def key_class(self, call: AttentionCall) -> Tensor:
        """Return the labels of the keys of a call, ``(B, S)`` or ``(B, H, S)``; -1 at padding."""
        raise NotImplementedError

    def log_weight(self, call: AttentionCall) -> Tensor:
        """Return ``w`` ``(B, S)`` of the weighted class, for edits that have one."""
        raise NotImplementedError

    def gain(self, layer: int, mass: Tensor) -> Tensor:
        """Return the factors of the classes.

        Args:
            layer: Index of the layer.
            mass: ``(B, H, C, R)``; with a weighted class ``(B, H, C + 1, R)``, the last being its weighted mass.

        Returns:
            Of the shape of ``mass``; a factor of the last entry multiplies the weighted output.
        """
        raise NotImplementedError


class HeadEdit(Edit):
    """Multiplies the outputs of heads."""

    def observe_output(self, layer: int, out: Tensor) -> None:
        """Read the head outputs ``(B, H, Dv)`` of the last row of the prompt."""

    def head_scale(self, layer: int) -> Tensor:
        """Return the factors, ``(B, H)``."""
        raise NotImplementedError


class ReadingEdit(ClassEdit):
    """Reads layers, all of them unless a subclass says otherwise, and changes none."""

    num_classes = 1

    def __init__(self, name: str, facts: ModelFacts) -> None:
        super().__init__(name, facts, frozenset())

    @property
    def observed_layers(self) -> frozenset[int]:
        """All layers."""
        return frozenset(range(self.facts.num_layers))

    def first_row(self, prompt: Prompt) -> list[int]:
        """Change no row."""
        return [prompt.length] * prompt.batch


def recombine(out: Tensor, mass: Tensor, gain: Tensor, *, normalise: bool) -> Tensor:
    """Return the output of a row whose weights were multiplied class by class.

    ``O' = sum_c g_c O_c``, divided by ``sum_c g_c m_c`` if normalised.

    Args:
        out: ``O_c``, ``(B, H, C, R, Dv)``.
        mass: ``m_c``, ``(B, H, C, R)``.
        gain: ``g_c``, ``(B, H, C, R)``.
        normalise: Whether the weights are to sum to 1 afterwards; a row without any stays zero.

    Returns:
        ``(B, H, R, Dv)``, dtype of ``out``, computed in that of ``gain``.
    """
    if normalise:
        total = (gain * mass).sum(2, keepdim=True)
        gain = gain / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhcr,bhcrd->bhrd", gain, out.to(gain.dtype)).to(out.dtype)


def edited_attention(
    call: AttentionCall, logit_edits: Sequence[LogitEdit], class_edits: Sequence[ClassEdit], active: Sequence[Tensor]
) -> Tensor:
    """Return the attention of the rows of a call under edits.

    Args:
        call: The rows.
        logit_edits: In order.
        class_edits: In order.
        active: For each edit of both, which rows it changes, bool ``(B, R)``, or an empty tensor for all.

    Returns:
        ``(B, H, R, Dv)``.
    """
    if not logit_edits:
        return class_attention(call, class_edits, active)
    logit_active, class_active = active[: len(logit_edits)], active[len(logit_edits) :]
    step = 1 if any(edit.row_by_row for edit in logit_edits) or any(mask.numel() for mask in logit_active) else None
    pieces = []
    for start in range(0, call.queries, step or call.queries):
        rows = call.rows(start, start + (step or call.queries))
        for edit, mask in zip(logit_edits, logit_active, strict=True):
            factor = edit.factor(rows)
            if mask.numel():
                factor = torch.where(mask[:, start].view(-1, 1, 1), factor, 1.0)
            rows = rows.with_key(scaled(rows.key, factor))
        masks = [mask[:, start : start + rows.queries] if mask.numel() else mask for mask in class_active]
        pieces.append(class_attention(rows, class_edits, masks))
    return torch.cat(pieces, 2)


def scaled(key: Tensor, factor: Tensor) -> Tensor:
    """Return keys ``(B, Hkv or H, S, D)`` times factors ``(B, 1 or H, S)``: the scores are multiplied by them."""
    if factor.shape[1] > 1:
        key = key.repeat_interleave(factor.shape[1] // key.shape[1], 1)
    return key * factor.unsqueeze(-1).to(key.dtype)


def class_attention(call: AttentionCall, edits: Sequence[ClassEdit], active: Sequence[Tensor]) -> Tensor:
    """Return the attention of the rows of a call under edits of classes."""
    if not edits:
        return call.partitioned(torch.zeros_like(call.key[:, 0, :, 0], dtype=torch.int64), 1).out
    if len(edits) > 1:
        return composed_attention(call, edits, active)
    (edit,), (rows,) = edits, active
    if edit.weighted_class is None:
        parts = call.partitioned(edit.key_class(call), edit.num_classes)
        out, mass = parts.class_out, parts.class_mass
    else:
        parts = call.partitioned(
            edit.key_class(call),
            edit.num_classes,
            key_log_weight=edit.log_weight(call),
            weighted_class=edit.weighted_class,
        )
        assert parts.weighted_out is not None
        assert parts.weighted_mass is not None
        out = torch.cat([parts.class_out, parts.weighted_out.unsqueeze(2)], 2)
        mass = torch.cat([parts.class_mass, parts.weighted_mass.unsqueeze(2)], 2)
    gain = edit.gain(call.layer, mass)
    if rows.numel():
        gain = torch.where(rows[:, None, None], gain, neutral(edit, gain))
    return recombine(out, mass, gain, normalise=edit.normalise)


def neutral(edit: ClassEdit, gain: Tensor) -> Tensor:
    """Return the factors ``(C, 1)`` that change nothing."""
    ones = gain.new_ones(gain.shape[2], 1)
    if edit.weighted_class is not None:
        ones[-1] = 0.0
    return ones


def composed_attention(call: AttentionCall, edits: Sequence[ClassEdit], active: Sequence[Tensor]) -> Tensor:
    """Apply several edits one after the other, on the intersections of their classes."""
    found = edited_gains(call, edits, active)
    return recombine(found.out, found.mass, found.gain, normalise=False)


class EditedGains(NamedTuple):
    """What edits of classes do to the weights of some rows: ``a'_j = (g_c + g_c' e^(w_j)) a_j`` for a key of class c.

    The parts are the C intersections of the classes of all edits, then weighted copies of some of them.

    Args:
        labels: Part of each key, ``(B, S)`` or ``(B, H, S)``, -1 = in none.
        out: ``O_c``, ``(B, H, parts, R, Dv)``.
        mass: ``m_c``, ``(B, H, parts, R)``.
        gain: ``g_c``, ``(B, H, parts, R)``, normalisation included.
        copies: Which intersections the weighted copies belong to.
        log_weight: ``w``, ``(B, S)``; ``None`` if there are no copies.
    """

    labels: Tensor
    out: Tensor
    mass: Tensor
    gain: Tensor
    copies: list[int]
    log_weight: Tensor | None


def edited_gains(call: AttentionCall, edits: Sequence[ClassEdit], active: Sequence[Tensor]) -> EditedGains:
    """Return outputs and masses by intersection of the edits' classes, and the factors that the edits give them.

    Args:
        call: The rows.
        edits: At least one, in order.
        active: For each, which rows it changes, as in :func:`edited_attention`.
    """
    labels, own = joint_classes([edit.key_class(call) for edit in edits], [edit.num_classes for edit in edits])
    total = len(own)
    weighting = next((index for index, edit in enumerate(edits) if edit.weighted_class is not None), None)
    copies = (
        [] if weighting is None else [j for j in range(total) if own[j][weighting] == edits[weighting].weighted_class]
    )
    log_weight = None if weighting is None else edits[weighting].log_weight(call)
    weighed: list[int | None] = [*copies] or [None]
    results = [call.partitioned(labels, total, key_log_weight=log_weight, weighted_class=copy) for copy in weighed]
    # Parts: the intersections, then weighted copies of those that belong to the weighted class.
    weighted = [(r.weighted_out, r.weighted_mass) for r in results]
    out = torch.cat([results[0].class_out, *(o.unsqueeze(2) for o, _ in weighted if o is not None)], 2)
    mass = torch.cat([results[0].class_mass, *(m.unsqueeze(2) for _, m in weighted if m is not None)], 2)
    original = torch.tensor([1.0] * total + [0.0] * len(copies), device=mass.device)[:, None]
    gain = torch.ones_like(mass)
    for index, (edit, rows) in enumerate(zip(edits, active, strict=True)):
        # A weighted copy stands in for its class only once the weighting edit has acted.
        counted = original if weighting is not None and index < weighting else 1.0
        slots = [own[j][index] for j in range(total)]
        slots += [edit.num_classes if index == weighting else own[j][index] for j in copies]
        slot = torch.tensor(slots, device=mass.device)  # which of its classes each part belongs to
        shape = (*mass.shape[:2], edit.num_classes + (edit.weighted_class is not None), mass.shape[3])
        own_mass = mass.new_zeros(shape).index_add(2, slot, gain * mass * counted)
        factor = edit.gain(call.layer, own_mass)
        if rows.numel():
            factor = torch.where(rows[:, None, None], factor, neutral(edit, factor))
        gain = gain * factor[:, :, slot]
        if edit.normalise:
            after = (gain * mass * counted).sum(2, keepdim=True)
            gain = gain / torch.where(after > 0, after, 1.0)
    return EditedGains(labels, out, mass, gain, copies, log_weight)


def joint_classes(labels: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Intersect partitions of the keys.

    Args:
        labels: Of each partition, ``(B, S)`` or ``(B, H, S)``, -1 = in no class.
        counts: Number of classes of each.

    Returns:
        Joint labels, and for each joint class the class of each partition that it lies in.
    """
    per_head = any(label.ndim == 3 for label in labels)
    joint = None
    excluded = None
    for label, count in zip(labels, counts, strict=True):
        label = label.unsqueeze(1) if per_head and label.ndim == 2 else label
        joint = label if joint is None else joint * count + label
        excluded = label < 0 if excluded is None else excluded | (label < 0)
    assert joint is not None
    assert excluded is not None
    return joint.masked_fill(excluded, -1), list(itertools.product(*(range(count) for count in counts)))
