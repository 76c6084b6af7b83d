"""The methods that are compared on the toy model: what is tried of each, which is kept, and how answers are written."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.toy_scenes import CAPTION_PROMPT, OBJECTS, Scene, draw_scenes, make_scenes, partner
from saccade.errors import ConfigError
from saccade.vlm import (
    ACT,
    GIFT,
    PAI,
    VAF,
    VAR,
    VCD,
    VHR,
    Answerer,
    ContrastRule,
    GenerationOptions,
    GIFTLayers,
    ImageGuidance,
    Intervention,
    LoadedVLM,
    Question,
    contrastive_generate,
    diffusion_noise,
    find_sink_channels,
    intervene,
    read_facts,
    select_gift_layers,
)
from saccade.vlm.evaluation import (
    POPE_SETS,
    AnswerFile,
    ChairTruth,
    GivenAnswer,
    ImageObjects,
    Measured,
    ObjectFinder,
    POPEQuestion,
    build_pope,
    measure_chair,
    measure_pope,
)
from saccade.vlm.evaluation.statistics import ratio

__all__ = ["Found", "Items", "Method", "answer", "calibrate", "candidates", "choose", "combined", "measure", "score"]

TAUS = (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0)
LONGEST = {"caption": 48, "question": 4}


@dataclass(frozen=True)
class Method:
    """A way of decoding.

    Args:
        name: For tables.
        settings: What was set, for tables.
        interventions: In order.
        rule: How the next token follows from two branches; ``None`` means there is one.
        noise: Diffusion step of the other branch's image; ``None`` with a rule means that it has no image.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    interventions: tuple[Intervention, ...] = ()
    rule: ContrastRule | None = None
    noise: int | None = None


class Items:
    """Scenes to be described and asked about.

    Args:
        seed: Of the scenes.
        count: How many.
        positives: Objects of each that are asked for in each of POPE's sets.
    """

    def __init__(self, seed: Sequence[int], count: int, positives: int = 2) -> None:
        scenes = make_scenes(seed, count, 0.5, (3,))
        generator = np.random.default_rng([*seed, 2])
        self.scenes = {str(i): scene for i, scene in enumerate(scenes)}
        self.pictures = dict(zip(self.scenes, draw_scenes(seed, scenes), strict=True))
        listed = [
            ImageObjects(key, tuple(str(name) for name in generator.permutation(scene.objects)))
            for key, scene in self.scenes.items()
        ]
        self.questions = [q for split in POPE_SETS for q in build_pope(listed, split, positives=positives)]
        self.truth = ChairTruth({key: frozenset(scene.objects) for key, scene in self.scenes.items()})

    def prompts(self, keys: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
        """Return image and words of what is asked about some scenes, each once, by kind."""
        asked = dict.fromkeys((q.image, q.text) for q in self.questions if q.image in set(keys))
        return {"caption": [(key, CAPTION_PROMPT) for key in keys], "question": list(asked)}


Answers = dict[tuple[str, str], tuple[str, int]]  # text and tokens by image and prompt


def answer(
    loaded: LoadedVLM, methods: Sequence[Method], items: Items, keys: Sequence[str], batch: int = 80
) -> tuple[dict[str, Answers], dict[str, float]]:
    """Describe some scenes and answer the questions about them by every method in turn, batch by batch.

    Returns:
        Answers, and CPU seconds of generating them, by method.
    """
    found: dict[str, Answers] = {method.name: {} for method in methods}
    seconds = dict.fromkeys(found, 0.0)
    for kind, asked in items.prompts(keys).items():
        answerer = Answerer(loaded, options=GenerationOptions(LONGEST[kind]))
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            questions = [Question(key, key, text, Path(key)) for key, text in part]
            inputs = answerer.inputs(questions, [Image.fromarray(items.pictures[key]) for key, _ in part])
            for method in methods:
                begun = time.process_time()
                ids = generate(loaded, method, inputs, LONGEST[kind])
                seconds[method.name] += time.process_time() - begun
                texts = loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)
                lengths = (ids != loaded.tokenizer.pad_token_id).sum(1).tolist()
                found[method.name].update(zip(part, zip(texts, lengths, strict=True), strict=True))
    return found, seconds


@torch.inference_mode()
def generate(loaded: LoadedVLM, method: Method, inputs: dict[str, Tensor], longest: int) -> Tensor:
    """Return the new tokens of greedy decoding under a method."""
    pad = loaded.tokenizer.pad_token_id

    def run() -> Tensor:
        if method.rule is not None:
            other = other_branch(loaded, method, inputs)
            return contrastive_generate(
                loaded.model, inputs, other, method.rule, max_new_tokens=longest, pad_token_id=pad
            )
        model: Any = loaded.model
        ids: Tensor = model.generate(**inputs, max_new_tokens=longest, do_sample=False, pad_token_id=pad)
        return ids[:, inputs["input_ids"].shape[1] :]

    if not method.interventions:
        return run()
    with intervene(loaded.model, *method.interventions, tokenizer=loaded.processor):
        return run()


def other_branch(loaded: LoadedVLM, method: Method, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of the branch that answers are held against: a noisy image, or none."""
    if method.noise is not None:
        noise = diffusion_noise(inputs["pixel_values"], method.noise, generator=torch.Generator().manual_seed(0))
        return {**inputs, "pixel_values": noise}
    kept = inputs["input_ids"] != loaded.model.config.image_token_id
    return {name: inputs[name][kept].view(len(kept), -1) for name in ("input_ids", "attention_mask")}


def files(
    items: Items, answers: Mapping[str, Answers], keys: Sequence[str]
) -> dict[str, tuple[AnswerFile, AnswerFile]]:
    """Return answers to questions and descriptions as files of the evaluation, by method."""
    found = {}
    asked = [q for q in items.questions if q.image in set(keys)]
    for name, given in answers.items():
        rows = [answer_row(q.id, given[q.image, q.text], name, q.split) for q in asked]
        captions = [answer_row(key, given[key, CAPTION_PROMPT], name) for key in keys]
        found[name] = AnswerFile(name, tuple(rows)), AnswerFile(name, tuple(captions))
    return found


def answer_row(key: str, said: tuple[str, int], method: str, split: str = "") -> GivenAnswer:
    """Return an answer as the evaluation takes it."""
    return GivenAnswer(key, said[0], split, {"intervention": method, "tokens": said[1]})


def measure(items: Items, answers: Mapping[str, Answers], keys: Sequence[str]) -> dict[str, dict[str, Measured]]:
    """Count POPE, CHAIR, and how often absent partners are named; by method and benchmark."""
    finder = ObjectFinder(synonyms=[[name] for name in OBJECTS], phrases={})
    asked: list[POPEQuestion] = [q for q in items.questions if q.image in set(keys)]
    return {
        name: {
            "pope": measure_pope(asked, questions),
            "chair": measure_chair(items.truth, captions, finder),
            "partners": measure_partners(items.scenes, captions, finder),
        }
        for name, (questions, captions) in files(items, answers, keys).items()
    }


def measure_partners(scenes: Mapping[str, Scene], captions: AnswerFile, finder: ObjectFinder) -> Measured:
    """Count which absent objects descriptions name.

    Returns:
        ``partner``, the share of absent partners of objects that are there which are named; ``other``, the share of
        all other absent objects.
    """
    counts = []
    for row in captions.answers:
        scene, named = scenes[row.id], set(finder.find(row.text).classes)
        partners = {partner(name) for name in scene.lonely}
        others = set(OBJECTS) - set(scene.objects) - partners
        counts.append([len(partners), len(partners & named), len(others), len(others & named)])
    units = tuple(row.id for row in captions.answers)

    def statistic(sums: NDArray[np.float64]) -> dict[tuple[str, str], NDArray[np.float64]]:
        partners, named, others, others_named = np.moveaxis(sums, -1, 0)
        return {("all", "partner"): ratio(named, partners), ("all", "other"): ratio(others_named, others)}

    return Measured(captions.name, captions.name, units, np.array(counts, dtype=np.float64), statistic)


def score(measured: Mapping[str, Measured]) -> float:
    """Return what settings are chosen by: the mean of POPE's macro accuracy and the F1 of the objects described."""
    pope, chair = (part.statistic(part.counts.sum(0)) for part in (measured["pope"], measured["chair"]))
    precision, recall = 1 - float(chair["all", "CHAIRi"]), float(chair["all", "recall"])
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return (float(pope["macro", "accuracy"]) + f1) / 2


class Found(NamedTuple):
    """What depends on the model and was found on calibration prompts.

    Args:
        tau: Largest of ``TAUS`` that a channel of the first token exceeds in most middle layers; ``None`` if none is.
        channels: Those channels.
        sinks: Share of prompts with a sink in the image in at least one of VAR's layers.
        gift: Proposed layers.
    """

    tau: float | None
    channels: tuple[int, ...]
    sinks: float
    gift: GIFTLayers


def calibrate(loaded: LoadedVLM, items: Items) -> Found:
    """Find sink channels with a threshold that fits the width, and GIFT's layers."""
    asked = items.prompts(list(items.scenes))["question"]
    questions = [Question(key, key, text, Path(key)) for key, text in asked[:100]]
    pictures = [Image.fromarray(items.pictures[question.id]) for question in questions]
    inputs = Answerer(loaded, options=GenerationOptions(4)).inputs(questions, pictures)
    layers = select_gift_layers(loaded.model, [inputs], tokenizer=loaded.processor)
    for tau in TAUS:
        try:
            channels = find_sink_channels(loaded.model, [inputs], tau=tau)
        except ConfigError:
            continue
        image = inputs["input_ids"] == loaded.model.config.image_token_id
        with torch.inference_mode(), intervene(loaded.model, VAR(channels, tau)) as context:
            loaded.model(**inputs)
            sinks = torch.stack([(part & image).any(1) for part in context.stats["var"]["sinks"].values()]).any(0)
        return Found(tau, channels, float(sinks.float().mean()), layers)
    return Found(None, (), 0.0, layers)


def candidates(loaded: LoadedVLM, found: Found) -> dict[str, list[Method]]:
    """Return what is tried of each method; layers are the published ones, scaled to the depth of the model."""
    depth = read_facts(loaded.model).num_layers
    last = tuple(sorted({1, *range(depth - round(14 / 32 * depth), depth)}))
    middle = tuple(range(round(9 / 32 * depth), round(15 / 32 * depth)))
    inner = range(2, depth - 1)
    every = {layer: tuple(range(read_facts(loaded.model).num_heads)) for layer in inner}

    def tried(name: str, make: Callable[..., Intervention], *grid: dict[str, Any], **fixed: Any) -> list[Method]:  # noqa: ANN401
        return [Method(name, settings, (make(**fixed, **settings),)) for settings in grid]

    gift = {"saliency_layers": found.gift.saliency_layers, "enhancement_layers": found.gift.enhancement_layers}
    methods = {
        "GIFT": tried("GIFT", GIFT, {"alpha": 1.0}, {"alpha": 4.0}, **gift),
        "VHR": tried("VHR", VHR, {"alpha": 1.3}, {"alpha": 2.0}, layers=last),
        "PAI": tried("PAI", PAI, {"alpha": 0.2}, {"alpha": 0.5}),
        "VAF": tried("VAF", VAF, {"enhance": 1.15}, {"enhance": 1.5}, layers=middle),
        "ACT": tried("ACT", ACT, {"beta": 0.4}, {"beta": 0.7}, heads=every),
        "VCD": [
            Method("VCD", {"alpha": alpha, "step": step}, rule=VCD(alpha), noise=step)
            for alpha, step in ((1.0, 500), (1.0, 900))
        ],
        "guidance": [Method("guidance", {"gamma": gamma}, rule=ImageGuidance(gamma)) for gamma in (1.1, 1.5)],
    }
    if found.tau is not None:
        var = {"sink_channels": found.channels, "tau": found.tau}
        grid = ({"move_fraction": 0.6}, {"move_fraction": 0.9, "min_nonsink_share": 0.2})
        methods = {"VAR": tried("VAR", VAR, *grid, **var), **methods}
    return methods


def choose(
    loaded: LoadedVLM, items: Items, tried: Mapping[str, Sequence[Method]]
) -> tuple[list[Method], dict[str, Any]]:
    """Return the best settings of each method on calibration scenes, plain decoding first, and all scores."""
    keys = list(items.scenes)
    flat = [Method("greedy"), *numbered(tried)]
    answers, _ = answer(loaded, flat, items, keys)
    scores = {name: score(measured) for name, measured in measure(items, answers, keys).items()}
    table: dict[str, Any] = {"greedy": scores["greedy"]}
    kept = [Method("greedy")]
    for name, methods in tried.items():
        own = [scores[f"{name} {number}"] for number in range(len(methods))]
        kept.append(methods[int(np.argmax(own))])
        table[name] = [{"settings": dict(m.settings), "score": s} for m, s in zip(methods, own, strict=True)]
    return kept, table


def numbered(tried: Mapping[str, Sequence[Method]]) -> Iterator[Method]:
    """Yield all that is tried under names of their own."""
    for name, methods in tried.items():
        for number, method in enumerate(methods):
            yield Method(f"{name} {number}", method.settings, method.interventions, method.rule, method.noise)


def combined(kept: Sequence[Method], *names: str) -> list[Method]:
    """Return the combinations named like ``"VAR + VHR"``, with the settings that each part was given alone."""
    by_name = {method.name: method for method in kept}
    made = []
    for name in names:
        parts = name.split(" + ")
        if not set(parts) <= set(by_name):
            continue
        chosen = [by_name[part] for part in parts]
        contrast = next((m for m in chosen if m.rule is not None), Method(""))
        edits = tuple(edit for m in chosen for edit in m.interventions)
        settings = {m.name: dict(m.settings) for m in chosen}
        made.append(Method(name, settings, edits, contrast.rule, contrast.noise))
    return made
