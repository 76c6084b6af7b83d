"""``with intervene(model, VAR(...)): model.generate(...)``: the one way to put interventions to work."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from saccade.errors import ConfigError, suggest
from saccade.vlm.edits import Edit
from saccade.vlm.engine import Engine
from saccade.vlm.intervention import Intervention
from saccade.vlm.interventions import ACT, GIFT, PAI, VAF, VAR, VHR
from saccade.vlm.model_facts import read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["INTERVENTIONS", "Intervening", "intervene", "make_intervention"]

INTERVENTIONS: dict[str, type[Intervention]] = {cls.name: cls for cls in (ACT, GIFT, PAI, VAF, VAR, VHR)}


def make_intervention(name: str, settings: dict[str, Any] | None = None, *, preset: str = "paper") -> Intervention:
    """Return an intervention by its name.

    Args:
        name: ``"var"``, ``"gift"``, ``"vhr"``, ``"act"``, ``"pai"`` or ``"vaf"``.
        settings: Parameters that differ from the preset.
        preset: Published settings to begin with; methods that have only those of their code begin with them.

    Raises:
        ConfigError: If there is no such intervention, preset or parameter.

    Example:
        >>> make_intervention("var", {"move_fraction": 0.5}, preset="released_code")
        VAR(sink_channels=None, tau=20.0, move_fraction=0.5, min_nonsink_share=0.5, min_visual_mass=0.2, layers=None, \
last_layer=True)
    """
    if name not in INTERVENTIONS:
        known = ", ".join(sorted(INTERVENTIONS))
        raise ConfigError(f"No intervention {name!r}.{suggest(name, INTERVENTIONS)} There are {known}.")
    presets = INTERVENTIONS[name].presets()
    if preset not in ("paper", "released_code"):
        raise ConfigError(f"preset must be 'paper' or 'released_code'; got {preset!r}.")
    base = presets.get(preset, presets["released_code"])
    known_fields = [field.name for field in dataclasses.fields(base)]  # type: ignore[arg-type]
    for key in settings or {}:
        if key not in known_fields:
            raise ConfigError(f"{name} has no parameter {key!r}.{suggest(key, known_fields)} It has {known_fields}.")
    return dataclasses.replace(base, **(settings or {}))  # type: ignore[type-var]


def intervene(
    model: PreTrainedModel,
    *interventions: Intervention | str,
    image_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    tokenizer: Any = None,  # noqa: ANN401
) -> Intervening:
    """Edit the attention of a model while a ``with`` block runs.

    The model is not modified: transformers' registry of attention functions and hooks let the edits in, and on leaving
    the block, also by an exception, everything is as it was. Inside, call ``model.generate`` or the model itself as
    ever: batches with left padding, several images, beams, sampling, any cache. What an intervention knows about a
    prompt ends with the call.

    Several interventions, in one call or in nested blocks, act in this order: scores before the softmax (PAI, VAF),
    then weights (VAR, GIFT, ACT), then outputs of heads (VHR); within each kind as given, outer blocks first. Each sees
    the attention that those before it left.

    Args:
        model: A decoder-only model of transformers in eval mode.
        interventions: One or more, e.g. ``VAR()``; a name stands for the method with its default parameters.
        image_mask: Visual positions of the prompts, bool ``(B, N)``; ``None`` finds the model's placeholder tokens.
        query_mask: Positions of the user's question, bool ``(B, N)``, for GIFT; ``None`` finds them.
        tokenizer: The model's tokenizer or processor, for methods that read words (GIFT).

    Returns:
        A context manager; inside the block its :attr:`Intervening.stats` say what was found.

    Raises:
        ConfigError: On entering, if a method does not fit the model; inside, if it cannot follow a way of generating;
            on leaving, if it never ran.
        DataError: Inside, with reason ``no_image_token``, if a prompt lacks the image that a method needs.

    Example:
        >>> with intervene(model, VAR(sink_channels=(3, 17), tau=3.0)) as ctx:  # doctest: +SKIP
        ...     answer = model.generate(**inputs, max_new_tokens=20)
    """
    if not interventions:
        raise ConfigError("intervene needs at least one intervention, e.g. intervene(model, VAR()).")
    chosen = [make_intervention(entry) if isinstance(entry, str) else entry for entry in interventions]
    for entry in chosen:
        if not isinstance(entry, Intervention):
            raise ConfigError(f"{entry!r} is not an intervention; pass VAR(), GIFT(), ... or one of their names.")
    return Intervening(model, chosen, image_mask, query_mask, tokenizer)


class Intervening:
    """What :func:`intervene` returns.

    Args:
        model: The model.
        interventions: Parameters of the methods.
        image_mask: As in :func:`intervene`, like the others.
        query_mask: As there.
        tokenizer: As there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        interventions: list[Intervention],
        image_mask: Tensor | None,
        query_mask: Tensor | None,
        tokenizer: Any,  # noqa: ANN401
    ) -> None:
        self.model = model
        self.interventions = interventions
        self.image_mask = image_mask
        self.query_mask = query_mask
        self.tokenizer = tokenizer
        self.edits: list[Edit] = []
        self.engine: Engine | None = None
        self.owner = False

    @property
    def stats(self) -> dict[str, dict[str, dict[int, Tensor]]]:
        """What each method found in the current or latest prompt: by method, figure and layer; see the methods."""
        return {edit.name.lower(): edit.stats for edit in self.edits}

    def __enter__(self) -> Self:
        facts = read_facts(self.model)
        if self.model.training:
            raise ConfigError("Interventions are for inference; call model.eval() first.")
        outer = vars(facts.attentions[0]).get("saccade_engine")
        if outer is not None and (self.image_mask is not None or self.query_mask is not None):
            raise ConfigError("image_mask and query_mask belong to the outermost intervene(...) of a model.")
        self.edits = [entry.start(facts, self.tokenizer) for entry in self.interventions]
        engine = outer or Engine(self.model, facts, self.image_mask, self.query_mask)
        engine.set_edits([*engine.edits, *self.edits])
        self.engine, self.owner = engine, outer is None
        if self.owner:
            engine.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        engine = self.engine
        assert engine is not None
        fired = {edit: engine.fired[edit] for edit in self.edits}
        self.engine = None
        if self.owner:
            engine.remove()
        else:
            engine.set_edits([edit for edit in engine.edits if edit not in self.edits])
        if kind is None:
            for edit, layers in fired.items():
                check_fired(edit, layers)


def check_fired(edit: Edit, layers: set[int]) -> None:
    """Raise unless an edit was reached in all of its layers."""
    if layers >= edit.layers:
        return
    if not layers:
        raise ConfigError(
            f"{edit.name} never ran. Inside the `with` block call the model that was given to intervene(...), or its "
            f"generate. If you did, {edit.facts.name} computes attention by other code than transformers' registry."
        )
    raise ConfigError(f"{edit.name} ran in layers {sorted(layers)} only and not in {sorted(edit.layers - layers)}.")
