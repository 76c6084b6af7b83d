"""Paths out of a scanpath model: greedy, sampled, beam search, and the log-probability of given paths.

Works with every model that can score the next object of paths under way (:class:`PathModel`): OAT and the baselines.
All K paths of all B scenes advance together. The first step cannot end a path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import ConfigError
from saccade.gaze.scenes import SceneBatch

__all__ = ["DecodedPaths", "PathModel", "PathState", "beam_search", "greedy", "log_prob", "sample", "step_log_probs"]


class PathState(Protocol):
    """K paths under way in each of B scenes."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens ``(B, K)`` (0 at first, then object + 1); return logits ``(B, K, 1 + N)``, column 0 ends."""

    def reorder(self, index: Tensor) -> None:
        """Go on with paths ``index`` ``(B, K')`` of each scene."""


class PathModel(Protocol):
    """What predicts scanpaths."""

    def __call__(self, scenes: SceneBatch, paths: Tensor, viewers: Tensor | None = None) -> Tensor:
        """Score given paths ``(B, K, T)``: logits ``(B, K, T + 1, 1 + N)``."""

    def begin(self, scenes: SceneBatch, num_paths: int, max_length: int, viewers: Tensor | None = None) -> PathState:
        """Begin K paths in each scene."""


@dataclass(frozen=True)
class DecodedPaths:
    """K paths in each of B scenes.

    Args:
        objects: Indices, int64 ``(B, K, T)``, -1 behind the end.
        lengths: Objects in each path, int64 ``(B, K)``.
        log_prob: Log-probability of each path under the model, its end included if it ended, float32 ``(B, K)``.
        ended: Whether the path ended by itself rather than at the greatest length, bool ``(B, K)``.
    """

    objects: Tensor
    lengths: Tensor
    log_prob: Tensor
    ended: Tensor

    def path(self, scene: int, number: int = 0) -> list[int]:
        """Return one path without padding."""
        objects: list[int] = self.objects[scene, number, : int(self.lengths[scene, number])].tolist()
        return objects


def allowed_log_probs(logits: Tensor, step: int) -> Tensor:
    """Return log-probabilities of the classes allowed at a step, float32: the first step cannot end the path."""
    logits = logits.float()
    if step == 0:
        logits = torch.cat([torch.full_like(logits[..., :1], -torch.inf), logits[..., 1:]], -1)
    return logits.log_softmax(-1)


class Recorder:
    """The paths so far, and which of them go on."""

    def __init__(self, scenes: SceneBatch, num_paths: int, max_length: int) -> None:
        shape = (len(scenes), num_paths)
        self.objects = torch.full((*shape, max_length), -1, dtype=torch.long, device=scenes.device)
        self.log_prob = torch.zeros(shape, device=scenes.device)
        self.done = torch.zeros(shape, dtype=torch.bool, device=scenes.device)
        self.slots = torch.arange(num_paths, device=scenes.device).expand(shape)  # the path that each column advances

    def add(self, step: int, classes: Tensor, log_probs: Tensor) -> None:
        """Record one class for each column."""
        done = self.done.gather(1, self.slots)
        self.log_prob.scatter_add_(1, self.slots, torch.where(done, 0.0, log_probs))
        done = done | (classes == 0)
        self.objects[:, :, step].scatter_(1, self.slots, torch.where(done, -1, classes - 1))
        self.done.scatter_(1, self.slots, done)

    def inhibit(self, log_probs: Tensor, step: int, count: int) -> Tensor:
        """Give the objects that each column visited last no probability."""
        if not count or not step:
            return log_probs
        recent = self.objects[:, :, max(0, step - count) : step].gather(
            1, self.slots[..., None].expand(-1, -1, min(step, count))
        )
        classes = (recent + 1).clamp(min=1)  # finished paths hold -1 there and are not advanced
        blocked = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, classes, True)
        return log_probs.masked_fill(blocked, -torch.inf)

    def compact(self, state: PathState, tokens: Tensor) -> Tensor:
        """Drop finished paths once they are more than half of the columns; return the tokens of those that go on."""
        running = ~self.done.gather(1, self.slots)
        width = int(running.sum(1).max())
        if width > tokens.shape[1] // 2 or not width:
            return tokens
        order = running.int().sort(dim=1, descending=True, stable=True).indices[:, :width]
        state.reorder(order)
        self.slots = self.slots.gather(1, order)
        return tokens.gather(1, order)

    def result(self, steps: int) -> DecodedPaths:
        """Return the paths."""
        objects = self.objects[:, :, :steps]
        lengths = (objects >= 0).sum(-1)
        return DecodedPaths(objects[..., : max(1, int(lengths.max()))], lengths, self.log_prob, self.done)


@torch.no_grad()
def greedy(
    model: PathModel, scenes: SceneBatch, *, max_length: int, viewers: Tensor | None = None, inhibition: int = 0
) -> DecodedPaths:
    """Take the most probable class at every step, the lowest of equal ones in the order of objects, then the end.

    Args:
        model: OAT or a baseline, in evaluation mode.
        scenes: B scenes.
        max_length: Most objects per path.
        viewers: int64 ``(B, 1)``, whose path to predict.
        inhibition: No return to this many of the objects visited last; 0: any return.

    Returns:
        One path per scene.
    """

    def choose(log_probs: Tensor, step: int, slots: Tensor) -> Tensor:
        return (log_probs.roll(-1, -1).argmax(-1) + 1) % log_probs.shape[-1]

    return advance(model, scenes, 1, max_length, viewers, inhibition, choose)


@torch.no_grad()
def sample(
    model: PathModel,
    scenes: SceneBatch,
    num_paths: int,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    viewers: Tensor | None = None,
    inhibition: int = 0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> DecodedPaths:
    """Draw paths, all of them in one pass.

    Args:
        model: OAT or a baseline, in evaluation mode.
        scenes: B scenes.
        num_paths: Paths per scene K.
        max_length: Most objects per path.
        temperature: Divides the log-probabilities before drawing, > 0.
        top_p: Draw among the most probable classes that together have this probability, in (0, 1].
        viewers: int64 ``(B, K)``, whose paths to predict.
        inhibition: No return to this many of the objects visited last; 0: any return.
        generator: Source of the uniform numbers, on the CPU; ``None`` means torch's own.
        uniforms: The uniform numbers themselves, ``(B, K, max_length)``: step j takes the first class, objects before
            the end, whose cumulative probability exceeds number j.

    Returns:
        Paths with their log-probability under the model itself, whatever temperature and ``top_p`` are.

    Raises:
        ConfigError: If temperature or ``top_p`` is out of range.
    """
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ConfigError(f"temperature must be > 0 and top_p in (0, 1], got {temperature} and {top_p}.")
    shape = (len(scenes), num_paths, max_length)
    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator)
    numbers = uniforms.to(scenes.device)

    def choose(log_probs: Tensor, step: int, slots: Tensor) -> Tensor:
        probability = truncate((log_probs.roll(-1, -1) / temperature).softmax(-1), top_p)
        reached = probability.cumsum(-1) > numbers[:, :, step].gather(1, slots)[..., None]
        # rounding may leave the sum below the number: then the last class that has any probability
        last = probability.shape[-1] - 1 - (probability > 0).flip(-1).int().argmax(-1)
        index = torch.where(reached.any(-1), reached.int().argmax(-1), last)
        return (index + 1) % log_probs.shape[-1]

    return advance(model, scenes, num_paths, max_length, viewers, inhibition, choose)


def advance(
    model: PathModel,
    scenes: SceneBatch,
    num_paths: int,
    max_length: int,
    viewers: Tensor | None,
    inhibition: int,
    choose: Callable[[Tensor, int, Tensor], Tensor],
) -> DecodedPaths:
    """Let all paths go on, one class at a time, until all have ended."""
    if max_length < 1 or num_paths < 1:
        raise ConfigError(f"max_length and num_paths must be at least 1, got {max_length} and {num_paths}.")
    state = model.begin(scenes, num_paths, max_length, viewers)
    paths = Recorder(scenes, num_paths, max_length)
    tokens = torch.zeros_like(paths.slots)
    for step in range(max_length):
        log_probs = allowed_log_probs(state.step(tokens), step)
        classes = choose(paths.inhibit(log_probs, step, inhibition), step, paths.slots)
        paths.add(step, classes, log_probs.gather(-1, classes[..., None])[..., 0])
        if bool(paths.done.all()):
            break
        tokens = paths.compact(state, classes)
    return paths.result(step + 1)


def truncate(probability: Tensor, top_p: float) -> Tensor:
    """Keep the most probable classes that together reach ``top_p``, renormalised."""
    if top_p == 1:
        return probability
    ordered, index = probability.sort(dim=-1, descending=True, stable=True)
    kept = ordered * (ordered.cumsum(-1) - ordered < top_p)
    kept = torch.zeros_like(probability).scatter(-1, index, kept)
    return kept / kept.sum(-1, keepdim=True)


@torch.no_grad()
def beam_search(
    model: PathModel,
    scenes: SceneBatch,
    num_beams: int,
    *,
    max_length: int,
    length_penalty: float = 0.0,
    viewers: Tensor | None = None,
) -> DecodedPaths:
    """Search for the most probable paths.

    Args:
        model: OAT or a baseline, in evaluation mode.
        scenes: B scenes.
        num_beams: Paths kept at every step and returned, K.
        max_length: Most objects per path.
        length_penalty: Paths are compared by log-probability / length^penalty, the end counted in the length; 0
            compares the probabilities themselves, which favours short paths.
        viewers: int64 ``(B, K)``, whose paths to predict.

    Returns:
        K paths per scene, the best first. Where fewer exist, the rest have length 0 and log-probability minus infinity.

    Raises:
        ConfigError: If a number is out of range.
    """
    if num_beams < 1 or max_length < 1 or length_penalty < 0:
        raise ConfigError("num_beams and max_length must be at least 1, length_penalty at least 0.")
    state = model.begin(scenes, num_beams, max_length, viewers)
    batch, device = len(scenes), scenes.device
    scores = torch.full((batch, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams begin equal; one of them counts
    objects = torch.full((batch, num_beams, max_length), -1, dtype=torch.long, device=device)
    finished = Finished.empty(batch, num_beams, max_length, device)
    tokens = torch.zeros(batch, num_beams, dtype=torch.long, device=device)
    for step in range(max_length):
        log_probs = allowed_log_probs(state.step(tokens), step)
        count = log_probs.shape[-1]
        total = (scores[..., None] + log_probs).flatten(1)
        best, index = total.topk(min(2 * num_beams, total.shape[1]))
        beam, classes = index // count, index % count
        grown = objects.gather(1, beam[..., None].expand(-1, -1, max_length))
        ended = torch.where(classes == 0, best, -torch.inf)
        finished = finished.add(grown, ended, (step + 1.0) ** length_penalty, ended=True)
        best = torch.where(classes == 0, -torch.inf, best)
        scores, order = best.topk(num_beams) if best.shape[1] >= num_beams else pad_beams(best, num_beams)
        beam, classes = beam.gather(1, order), classes.gather(1, order)
        objects = grown.gather(1, order[..., None].expand(-1, -1, max_length))
        objects[:, :, step] = classes - 1
        if bool((scores.max(1).values / (max_length + 1.0) ** length_penalty <= finished.worst).all()):
            break
        state.reorder(beam)
        tokens = classes
    else:
        finished = finished.add(objects, scores, float(max_length) ** length_penalty, ended=False)
    return finished.result()


def pad_beams(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return sorted scores and their order where there are fewer than ``count``."""
    ordered, order = scores.sort(dim=1, descending=True)
    missing = count - scores.shape[1]
    return F.pad(ordered, (0, missing), value=-torch.inf), F.pad(order, (0, missing))


@dataclass(frozen=True)
class Finished:
    """The best finished paths of a beam search, sorted by their rating."""

    objects: Tensor
    rating: Tensor
    log_prob: Tensor
    ended: Tensor

    @classmethod
    def empty(cls, batch: int, count: int, length: int, device: torch.device) -> Finished:
        """Begin with paths of no probability."""
        nothing = torch.full((batch, count), -torch.inf, device=device)
        objects = torch.full((batch, count, length), -1, dtype=torch.long, device=device)
        return cls(objects, nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool))

    @property
    def worst(self) -> Tensor:
        """Rating of the last that is kept, by scene."""
        return self.rating[:, -1]

    def add(self, objects: Tensor, log_prob: Tensor, divisor: float, *, ended: bool) -> Finished:
        """Keep the best of these and of the candidates."""
        rating, order = torch.cat([self.rating, log_prob / divisor], 1).topk(self.rating.shape[1])
        index = order[..., None].expand(-1, -1, objects.shape[-1])
        marks = torch.full_like(log_prob, ended, dtype=torch.bool)
        return Finished(
            torch.cat([self.objects, objects], 1).gather(1, index),
            rating,
            torch.cat([self.log_prob, log_prob], 1).gather(1, order),
            torch.cat([self.ended, marks], 1).gather(1, order),
        )

    def result(self) -> DecodedPaths:
        """Return the paths."""
        exists = self.log_prob > -torch.inf
        objects = torch.where(exists[..., None], self.objects, -1)
        lengths = (objects >= 0).sum(-1)
        return DecodedPaths(objects[..., : max(1, int(lengths.max()))], lengths, self.log_prob, self.ended & exists)


def step_log_probs(
    model: PathModel, scenes: SceneBatch, paths: Tensor, *, viewers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every step of given paths: each object in turn, then the end.

    Args:
        model: OAT or a baseline, in evaluation mode.
        scenes: B scenes.
        paths: int64 ``(B, K, T)``, -1 behind the end.
        viewers: int64 ``(B, K)``, whose paths they are.

    Returns:
        float32 ``(B, K, T + 1)``, and bool of the same shape: which steps are there (none of an empty path). The end of
        a path of no object is no step.
    """
    return path_log_probs(model(scenes, paths, viewers), paths)


def path_log_probs(logits: Tensor, paths: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`step_log_probs` of logits ``(B, K, T + 1, 1 + N)`` that a model gave for these paths."""
    logits = logits.float()
    first = torch.arange(logits.shape[2], device=logits.device) == 0
    no_end = F.pad(first[:, None], (0, logits.shape[-1] - 1), value=False)
    log_probs = logits.masked_fill(no_end, -torch.inf).log_softmax(-1)
    classes, there = path_classes(paths)
    return torch.where(there, log_probs.gather(-1, classes[..., None])[..., 0], 0.0), there


def path_classes(paths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class of each step of paths ``(B, K, T)``, the end last, ``(B, K, T + 1)``, and which are there."""
    classes = F.pad(paths + 1, (0, 1))
    lengths = (paths >= 0).sum(-1, keepdim=True)
    there = (torch.arange(classes.shape[-1], device=paths.device) <= lengths) & (lengths > 0)
    return classes, there


@torch.no_grad()
def log_prob(
    model: PathModel, scenes: SceneBatch, paths: Tensor, *, viewers: Tensor | None = None, with_end: bool = True
) -> Tensor:
    """Return the log-probability of given paths, float32 ``(B, K)``; that of their end is left out on request.

    Raises:
        ConfigError: If a path names an object that its scene does not have.
    """
    check_paths(scenes, paths)
    steps, _ = step_log_probs(model, scenes, paths, viewers=viewers)
    if not with_end:
        steps = torch.where(F.pad(paths >= 0, (0, 1)), steps, 0.0)
    return steps.sum(-1)


def check_paths(scenes: SceneBatch, paths: Tensor) -> None:
    """Raise unless every object of the paths exists and -1 stands behind the end alone."""
    if paths.ndim != 3 or len(paths) != len(scenes):
        raise ConfigError(f"Paths must be (B, K, T) with B = {len(scenes)}, got {tuple(paths.shape)}.")
    present = paths >= 0
    if bool((present[..., 1:] & ~present[..., :-1]).any()):
        raise ConfigError("Paths must have -1 behind their end alone.")
    known = F.pad(scenes.valid, (1, 0), value=True)
    index = (paths + 1).flatten(1)
    if int(index.max()) > scenes.num_objects or not bool(known.gather(1, index).all()):
        raise ConfigError("A path visits an object that its scene does not have.")
