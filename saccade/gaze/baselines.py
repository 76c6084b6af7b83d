"""Simple predictors of object scanpaths, fitted on data: what a score has to beat.

Each says how probable the next object is from the present one alone, and when to end; so it decodes and scores paths by
the same functions as OAT does (:class:`saccade.gaze.PathModel`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import ConfigError, DataError
from saccade.gaze.decoding import step_log_probs
from saccade.gaze.scenes import SceneBatch

__all__ = ["CentreBias", "NearestObjects", "RandomObjects", "SalientObjects", "TransitionModel"]

Model = TypeVar("Model", bound="TransitionModel")
Examples = Sequence[tuple[SceneBatch, Tensor]]
STRENGTHS = [0.0, *torch.logspace(-2, 1.5, 36).tolist()]  # tried for the one parameter of a baseline


class TransitionModel(ABC):
    """A first-order Markov chain over the objects of a scene and the end.

    Args:
        end_rate: Probability that a path ends after a fixation.
    """

    def __init__(self, end_rate: float) -> None:
        self.end_rate = end_rate

    @abstractmethod
    def object_logits(self, scenes: SceneBatch) -> Tensor:
        """Return logits of the next object after the begin and each object, ``(B, 1 + N, N)``, or ``(B, 1, N)``."""

    def end_rates(self, scenes: SceneBatch) -> Tensor:
        """Return the probability of the end after each token, ``(B, 1 + N)``; that of the begin is ignored."""
        return torch.full((len(scenes), 1 + scenes.num_objects), self.end_rate, device=scenes.device)

    def table(self, scenes: SceneBatch) -> Tensor:
        """Return log-probabilities of the class after each token, ``(B, 1 + N, 1 + N)``."""
        logits = self.object_logits(scenes).masked_fill(~scenes.valid[:, None], -torch.inf)
        objects = logits.log_softmax(-1).expand(-1, 1 + scenes.num_objects, -1)
        end = self.end_rates(scenes).clamp(1e-6, 1 - 1e-6)[..., None]
        return torch.cat([end.log(), objects + (1 - end).log()], -1)

    def __call__(self, scenes: SceneBatch, paths: Tensor, viewers: Tensor | None = None) -> Tensor:
        """Score given paths; arguments and result as of ``OAT.forward``."""
        state = self.begin(scenes, paths.shape[1], paths.shape[2])
        tokens = F.pad(paths + 1, (1, 0))
        return torch.stack([state.step(token) for token in tokens.unbind(-1)], 2)

    def begin(
        self, scenes: SceneBatch, num_paths: int, max_length: int, viewers: Tensor | None = None
    ) -> TransitionPaths:
        """Begin paths in each scene."""
        return TransitionPaths(self.table(scenes))


class TransitionPaths:
    """Paths under way; nothing but the present object matters.

    Args:
        table: Log-probabilities ``(B, 1 + N, 1 + N)``.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def step(self, tokens: Tensor) -> Tensor:
        """Score the next step of paths at ``tokens`` ``(B, K)``, ``(B, K, 1 + N)``."""
        return self.table.gather(1, tokens[..., None].expand(-1, -1, self.table.shape[-1]))

    def reorder(self, index: Tensor) -> None:
        """Go on with other paths; they carry nothing."""


class RandomObjects(TransitionModel):
    """Any object with equal probability."""

    @classmethod
    def fit(cls, examples: Examples) -> Self:
        """Learn how long paths are."""
        return cls(end_rate_of(examples))

    def object_logits(self, scenes: SceneBatch) -> Tensor:
        """Return zeros."""
        return torch.zeros(len(scenes), 1, scenes.num_objects, device=scenes.device)


class CentreBias(TransitionModel):
    """Objects near the start, in the middle of the scene, are more probable.

    Args:
        end_rate: Probability that a path ends after a fixation.
        strength: Logits are ``-strength * (distance in cells)^2``.
    """

    def __init__(self, end_rate: float, strength: float) -> None:
        super().__init__(end_rate)
        self.strength = strength

    @classmethod
    def fit(cls, examples: Examples) -> Self:
        """Choose the strength of greatest likelihood."""
        rate = end_rate_of(examples)
        return most_likely([cls(rate, strength) for strength in STRENGTHS], examples)

    def object_logits(self, scenes: SceneBatch) -> Tensor:
        """Fall with the squared distance from the start."""
        return -self.strength * ((scenes.position - scenes.start[:, None]) ** 2).sum(-1)[:, None]


class SalientObjects(TransitionModel):
    """Objects that stand out are more probable; decoded greedily without return, it ranks them.

    Args:
        end_rate: Probability that a path ends after a fixation.
        strength: Logits are ``strength * log(saliency)``, the saliency as a share of the scene's mean.
    """

    def __init__(self, end_rate: float, strength: float) -> None:
        super().__init__(end_rate)
        self.strength = strength

    @classmethod
    def fit(cls, examples: Examples) -> Self:
        """Choose the strength of greatest likelihood."""
        rate = end_rate_of(examples)
        return most_likely([cls(rate, strength) for strength in STRENGTHS], examples)

    def object_logits(self, scenes: SceneBatch) -> Tensor:
        """Rise with the logarithm of the saliency."""
        if scenes.saliency is None:
            raise ConfigError("The saliency baseline needs SceneBatch.saliency; see saccade.gaze.object_saliency.")
        mean = scenes.saliency.sum(1, keepdim=True) / scenes.valid.sum(1, keepdim=True)
        return self.strength * (scenes.saliency / mean).clamp(min=1e-6).log()[:, None]


class NearestObjects(TransitionModel):
    """The next object depends on how far away it is, and on whether it is the target; so does the end.

    Args:
        end_rates: Probability of the end elsewhere and on the target.
        rates: How often objects of each distance are chosen, relative to how often they could have been, ``(2, D)``:
            other objects, then the target.
        edges: Upper limits of the first D - 1 distances, in cells.
    """

    EDGES = (0.25, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 10.0)

    def __init__(self, end_rates: tuple[float, float], rates: Tensor, edges: Tensor) -> None:
        super().__init__(end_rates[0])
        self.end_on_target = end_rates[1]
        self.rates, self.edges = rates, edges

    @classmethod
    def fit(cls, examples: Examples) -> Self:
        """Count transitions, one added to each kind."""
        edges = torch.tensor(cls.EDGES)
        chosen, could = torch.ones(2, len(edges) + 1), torch.full((2, len(edges) + 1), 10.0)
        ended, passed = torch.ones(2), torch.full((2,), 2.0)
        for scenes, paths in examples:
            kinds = pair_kinds(scenes, edges)
            is_target = torch.cat([torch.zeros(len(scenes), 1, dtype=torch.bool), scenes.is_target()], 1)
            for row in range(len(scenes)):
                for present, following in steps_of(paths[row]):
                    on_target = int(is_target[row, present])
                    if present:
                        passed[on_target] += 1
                        ended[on_target] += following == 0
                    if following:
                        here = kinds[row, present][scenes.valid[row]]
                        could.view(-1).index_add_(0, here, torch.ones(len(here)))
                        chosen.view(-1)[kinds[row, present, following - 1]] += 1
        ends = (ended / passed).tolist()
        return cls((ends[0], ends[1]), chosen / could, edges)

    def object_logits(self, scenes: SceneBatch) -> Tensor:
        """Look up how attractive each object is from each place."""
        return self.rates.log().flatten().to(scenes.device)[pair_kinds(scenes, self.edges.to(scenes.device))]

    def end_rates(self, scenes: SceneBatch) -> Tensor:
        """Distinguish the target from everything else."""
        rates = super().end_rates(scenes)
        rates[:, 1:] = torch.where(scenes.is_target(), self.end_on_target, rates[:, 1:])
        return rates


def pair_kinds(scenes: SceneBatch, edges: Tensor) -> Tensor:
    """Return the class of distance, plus D for the target, of each object from each token, ``(B, 1 + N, N)``."""
    places = torch.cat([scenes.start[:, None], scenes.position], 1)
    kinds = torch.bucketize(torch.cdist(places, scenes.position), edges)
    return kinds + scenes.is_target()[:, None] * (len(edges) + 1)


def steps_of(paths: Tensor) -> Iterable[tuple[int, int]]:
    """Yield present token and next class of every step of paths ``(K, T)``."""
    for path in paths.tolist():
        tokens = [0, *(index + 1 for index in path if index >= 0), 0]
        if len(tokens) > 2:
            yield from pairwise(tokens)


def end_rate_of(examples: Examples) -> float:
    """Return the share of fixations after which a path ends."""
    paths = sum(int((paths[..., 0] >= 0).sum()) for _, paths in examples)
    fixations = sum(int((paths >= 0).sum()) for _, paths in examples)
    if not fixations:
        raise DataError("A baseline needs human paths to be fitted on, got none.", reason="no_paths")
    return paths / fixations


def most_likely(models: Sequence[Model], examples: Examples) -> Model:
    """Return the model that gives the examples the greatest probability."""
    scores = []
    for model in models:
        steps = [step_log_probs(model, scenes, paths)[0].sum() for scenes, paths in examples]
        scores.append(float(torch.stack(steps).sum()))
    return models[scores.index(max(scores))]
