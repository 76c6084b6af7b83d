"""The heads that ACT changes, found by trying each on questions with known answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.errors import ConfigError
from saccade.vlm.intervene import intervene
from saccade.vlm.intervention import check_layers
from saccade.vlm.interventions.act import ACT
from saccade.vlm.model_facts import read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ACTHeads", "continued", "find_act_heads"]


@dataclass(frozen=True)
class ACTHeads:
    """What a search for ACT's heads found.

    Args:
        heads: Heads that help, by layer; for ``ACT(heads=...)``.
        gain: Change of the mean log-probability of an answer's token when one head alone is calibrated, ``(L, H)``
            float64; NaN in layers that were not tried.
        plain: The mean without any.
    """

    heads: dict[int, tuple[int, ...]]
    gain: Tensor
    plain: float


def continued(inputs: Mapping[str, Tensor], answer_ids: Tensor) -> dict[str, Tensor]:
    """Return model inputs of one prompt with an answer behind it.

    Args:
        inputs: Of one prompt; what has a number for each token of it gets zeros (ones in the mask) for the answer's.
        answer_ids: ``(T,)``.
    """
    ids = inputs["input_ids"]
    found = {
        name: torch.cat([tensor, tensor.new_zeros(1, len(answer_ids))], 1) if tensor.shape == ids.shape else tensor
        for name, tensor in {"attention_mask": torch.ones_like(ids), **inputs}.items()
    }
    found["input_ids"][:, ids.shape[1] :] = answer_ids.to(ids.device)
    found["attention_mask"][:, ids.shape[1] :] = 1
    return found


@torch.no_grad()
def find_act_heads(
    model: PreTrainedModel,
    prompts: Sequence[Mapping[str, Tensor]],
    answers: Sequence[Tensor],
    *,
    act: ACT | None = None,
    layers: Collection[int] | None = None,
    min_gain: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> ACTHeads:
    """Try ACT on each head by itself and keep those that make known answers likelier.

    The paper tries each head alone, too, and compares accuracies; the mean log-probability of the answers' tokens, our
    choice, needs one forward pass for each head and question and no answers of one word.

    Args:
        model: A model of transformers in eval mode.
        prompts: Model inputs, one prompt each.
        answers: Token ids of the answer to each, ``(T,)``.
        act: Parameters; its heads are not looked at. ``None`` means the paper's.
        layers: Layers to try; ``None`` means those of the paper, from the third to the last but one.
        min_gain: Heads are kept above this gain, in nats a token.
        progress: Called after each layer with the number of layers tried and their total.

    Raises:
        ConfigError: If there are no prompts, or not as many answers; if a layer does not exist, or ACT does not fit the
            model.
    """
    if not prompts or len(prompts) != len(answers):
        raise ConfigError(
            f"ACT's heads are found on prompts with an answer each; got {len(prompts)} and {len(answers)}."
        )
    facts = read_facts(model)
    tried = range(2, facts.num_layers - 1) if layers is None else layers
    chosen = sorted(check_layers("ACT", "layers", tried, facts))
    calls = [continued(inputs, ids) for inputs, ids in zip(prompts, answers, strict=True)]
    plain = mean_log_probability(model, calls, answers)
    gain = torch.full((facts.num_layers, facts.num_heads), torch.nan, dtype=torch.float64)
    base = act or ACT()
    for count, layer in enumerate(chosen, start=1):
        for head in range(facts.num_heads):
            with intervene(model, replace(base, heads={layer: (head,)})):
                gain[layer, head] = mean_log_probability(model, calls, answers) - plain
        if progress is not None:
            progress(count, len(chosen))
    kept = {layer: tuple((gain[layer] > min_gain).nonzero()[:, 0].tolist()) for layer in chosen}
    return ACTHeads({layer: heads for layer, heads in kept.items() if heads}, gain, plain)


def mean_log_probability(model: Any, calls: Sequence[dict[str, Tensor]], answers: Sequence[Tensor]) -> float:  # noqa: ANN401
    """Return the mean over prompts of the mean log-probability of the tokens of each answer."""
    means = []
    for inputs, ids in zip(calls, answers, strict=True):
        logits = model(**inputs).logits[0, -len(ids) - 1 : -1]
        found = logits.double().log_softmax(-1).gather(1, ids.to(logits.device)[:, None])
        means.append(float(found.mean()))
    return sum(means) / len(means)
