"""A small LLaVA, trained from nothing on drawn scenes: eye, then language, then both together.

The three steps are those of its large relatives. A CLIP vision tower learns what lies in each patch, on scenes without
any prior. A Llama decoder learns the captions as text, without an image. Then the tower is frozen, and projector and
decoder learn captions and answers. Scenes and captions of the last two steps carry the prior of pairs.

All turns about an image share one pass over it: a mask lets each see the image and itself alone, and positions begin
anew, so that each is what a prompt with a single turn is.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.toy_scenes import (
    CAPTION_PROMPT,
    COLOURS,
    OBJECTS,
    SIZE,
    Scene,
    caption,
    draw_scenes,
    make_scenes,
    patch_labels,
    questions,
    words,
)

__all__ = ["Recipe", "make_model", "make_processor", "train_toy"]

TEMPLATE = (
    "{% for message in messages %}<user>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}{% endfor %}"
)
MEAN, STD = 0.35, 0.25  # of the pixels, all channels


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of training; the defaults are the ones that results are reported for.

    Args:
        together: How often both halves of a pair are in a scene of language and joint training.
        scenes: Number of scenes of joint training.
        eye_scenes: Number of scenes of the tower's training.
        eye_steps: Steps of the tower's training.
        language_steps: Steps on captions without images.
        joint_steps: Steps of joint training.
        batch: Scenes of a step of joint training, half of those of the other steps.
        turns: Questions asked about a scene in a step; even.
        patch: Pixels of a patch.
        width: Of tower and decoder.
        eye_layers: Layers of the tower.
        layers: Layers of the decoder.
        heads: Heads of the decoder.
    """

    together: float = 0.95
    scenes: int = 11200
    eye_scenes: int = 8000
    eye_steps: int = 400
    language_steps: int = 120
    joint_steps: int = 700
    batch: int = 32
    turns: int = 2
    patch: int = 8
    width: int = 128
    eye_layers: int = 3
    layers: int = 6
    heads: int = 4


def make_processor(recipe: Recipe) -> Any:  # noqa: ANN401 - a LlavaProcessor
    """Return tokenizer (one token a word), image processor and chat template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words()])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
    )
    return LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        ),
        tokenizer,
        patch_size=recipe.patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(recipe: Recipe, tokenizer: Any) -> Any:  # noqa: ANN401 - a LlavaForConditionalGeneration
    """Return the model with random weights, from torch's generator."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    eye = CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.eye_layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=recipe.patch,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eye, text_config=text, image_token_id=image_token, vision_feature_layer=-1)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """Return images ``(B, Y, X, 3)`` as the tower wants them, ``(B, 3, Y, X)``."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


class Schedule:
    """AdamW with warm-up and a cosine, in bfloat16 where that saves time."""

    def __init__(self, parameters: Iterator[nn.Parameter], steps: int, rate: float) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
        warm = max(steps // 20, 1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm, 0.02 + 0.49 * (1 + float(np.cos(np.pi * min(step / steps, 1))))),
        )

    def step(self, loss: Tensor) -> float:
        """Take a step; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.detach())


def indices(generator: np.random.Generator, count: int, batch: int, steps: int) -> Iterator[NDArray[np.int64]]:
    """Yield the samples of each step: every one once before any comes again."""
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = np.concatenate([order, generator.permutation(count)])
        yield order[:batch]
        order = order[batch:]


def train_eye(tower: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Teach the tower which object and which colour lies in each patch, on scenes without a prior."""
    scenes = make_scenes([0, 1], recipe.eye_scenes, 0.5, (2, 3, 4))
    images = draw_scenes([0, 1], scenes)
    labels = [np.stack(part) for part in zip(*(patch_labels(scene, recipe.patch) for scene in scenes), strict=True)]
    names, colours = (torch.from_numpy(part) for part in labels)
    tower.train()
    heads = nn.ModuleList([nn.Linear(recipe.width, len(names) + 1) for names in (OBJECTS, COLOURS)])
    both = nn.ModuleList([tower, heads])
    schedule = Schedule(both.parameters(), recipe.eye_steps, 1.5e-3)
    right = 0.0
    for step, chosen in enumerate(
        indices(np.random.default_rng([0, 2]), len(scenes), 2 * recipe.batch, recipe.eye_steps)
    ):
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels(images[chosen])).last_hidden_state[:, 1:]
            said = [head(features).float() for head in heads]
        want = [part[torch.from_numpy(chosen)] for part in (names, colours)]
        losses = [F.cross_entropy(s.flatten(0, 1), w.flatten()) for s, w in zip(said, want, strict=True)]
        loss = schedule.step(torch.stack(losses).sum())
        there = want[0] > 0
        now = float((said[0].argmax(-1) == want[0])[there].float().mean())
        right = now if step == 0 else 0.95 * right + 0.05 * now
        report("eye", step, recipe.eye_steps, f"loss {loss:.3f}  patches of objects right {right:.3f}")
    return {"eye_accuracy": right}


class Turns:
    """Token ids of prompts and answers.

    Args:
        processor: Of the model.
    """

    def __init__(self, processor: Any) -> None:  # noqa: ANN401
        self.tokenizer = processor.tokenizer
        self.known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def of(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return ids behind the image, and what each is to be followed by; -100 where the user speaks."""
        if (prompt, answer) not in self.known:
            asked, said = (
                self.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (f"{prompt}<assistant>", f"{answer}</s>")
            )
            ids = [*asked, *said]
            self.known[prompt, answer] = ids[:-1], [-100] * (len(asked) - 1) + said
        return self.known[prompt, answer]


def packed(
    turns: Sequence[Sequence[tuple[list[int], list[int]]]], first: Sequence[int], pad: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put the turns about each image one after the other.

    Args:
        turns: For each image, its turns.
        first: Ids before the turns, image included; all turns see them.
        pad: Fills shorter rows.

    Returns:
        Ids, targets and positions, ``(B, N)`` each, and what is added to scores: 0 where a row sees a key,
        ``(B, 1, N, N)``.
    """
    longest = len(first) + max(sum(len(ids) for ids, _ in row) for row in turns)
    length = -(-longest // 8) * 8  # few shapes: each is prepared for once
    ids, targets, places = (np.full((len(turns), length), fill) for fill in (pad, -100, 0))
    owner = np.full((len(turns), length), -2)  # of padding; -1 is what all see
    ids[:, : len(first)], owner[:, : len(first)], places[:, : len(first)] = first, -1, np.arange(len(first))
    for row, own in enumerate(turns):
        start = len(first)
        for number, (tokens, wanted) in enumerate(own):
            part = slice(start, start + len(tokens))
            ids[row, part], targets[row, part], owner[row, part] = tokens, wanted, number
            places[row, part] = len(first) + np.arange(len(tokens))
            start += len(tokens)
    of = torch.from_numpy(owner)
    seen = (of[:, None, :] == -1) | (of[:, None, :] == of[:, :, None])
    seen = (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(places), mask


def answer_loss(model: Any, embeddings: Tensor, targets: Tensor, places: Tensor, mask: Tensor) -> Tensor:  # noqa: ANN401
    """Return the cross entropy of the answers."""
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=places, use_cache=False
    ).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), targets.flatten())


def train_language(model: Any, processor: Any, recipe: Recipe, seed: int) -> dict[str, float]:  # noqa: ANN401
    """Teach the decoder to write captions without an image; this is where the prior comes from."""
    scenes = make_scenes([seed, 3], 4000, recipe.together)
    generator = np.random.default_rng([seed, 4])
    tokens, turns = processor.tokenizer, Turns(processor)
    first = tokens.convert_tokens_to_ids(["<s>", "<user>"])
    schedule = Schedule(model.parameters(), recipe.language_steps, 2e-3)
    mean = 0.0
    for step, chosen in enumerate(indices(generator, len(scenes), 2 * recipe.batch, recipe.language_steps)):
        rows = [[turns.of(CAPTION_PROMPT, caption(scenes[i], generator))] for i in chosen]
        ids, targets, places, mask = packed(rows, first, tokens.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, model.get_input_embeddings()(ids), targets, places, mask)
        now = schedule.step(loss)
        mean = now if step == 0 else 0.95 * mean + 0.05 * now
        report("language", step, recipe.language_steps, f"loss {mean:.3f}")
    return {"language_loss": mean}


def train_jointly(model: Any, processor: Any, recipe: Recipe, seed: int) -> dict[str, float]:  # noqa: ANN401
    """Teach projector and decoder captions and answers; the tower is frozen."""
    scenes = make_scenes([seed, 5], recipe.scenes, recipe.together)
    images = draw_scenes([seed, 5], scenes)
    generator = np.random.default_rng([seed, 6])
    tokens, turns = processor.tokenizer, Turns(processor)
    image_token = tokens.convert_tokens_to_ids("<image>")
    visual = (SIZE // recipe.patch) ** 2
    first = [*tokens.convert_tokens_to_ids(["<s>", "<user>"]), *[image_token] * visual]
    body = model.model
    tower = body.vision_tower.eval().requires_grad_(False)
    learnt = nn.ModuleList([body.multi_modal_projector, body.language_model, model.lm_head])
    schedule = Schedule(learnt.parameters(), recipe.joint_steps, 2e-3)
    mean = 0.0
    for step, chosen in enumerate(indices(generator, len(scenes), recipe.batch, recipe.joint_steps)):
        rows = [turns_about(scenes[i], turns, generator, recipe.turns) for i in chosen]
        ids, targets, places, mask = packed(rows, first, tokens.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = tower(pixels(images[chosen])).last_hidden_state[:, 1:]
            seen = body.multi_modal_projector(features)
            embedded = model.get_input_embeddings()(ids)
            embedded = torch.cat([embedded[:, :2], seen.to(embedded.dtype), embedded[:, 2 + visual :]], 1)
            loss = answer_loss(model, embedded, targets, places, mask)
        now = schedule.step(loss)
        mean = now if step == 0 else 0.95 * mean + 0.05 * now
        report("joint", step, recipe.joint_steps, f"loss {mean:.3f}")
    return {"joint_loss": mean}


def turns_about(
    scene: Scene, turns: Turns, generator: np.random.Generator, count: int
) -> list[tuple[list[int], list[int]]]:
    """Return a caption and some questions about a scene."""
    asked = [(CAPTION_PROMPT, caption(scene, generator)), *questions(scene, generator, count)]
    return [turns.of(prompt, answer) for prompt, answer in asked]


def report(what: str, step: int, steps: int, text: str) -> None:
    """Print every tenth part of the way."""
    if (step + 1) % max(steps // 10, 1) == 0:
        print(f"  {what} {step + 1}/{steps}  {text}", flush=True)


def train_toy(recipe: Recipe, seed: int, folder: Path) -> dict[str, float]:
    """Train a model and write it with its processor to ``folder/model``.

    The tower is trained once, into ``eye.pt`` of the folder above, and serves all seeds, as CLIP does. A step whose
    weights are there is not done again.

    Returns:
        Loss or accuracy and CPU seconds of each step.
    """
    torch.manual_seed(seed)
    processor = make_processor(recipe)
    model = make_model(recipe, processor.tokenizer)
    model.set_attn_implementation("eager")  # on a CPU twice as fast as the fused function, whose backward is slow
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    tower = model.model.vision_tower
    facts |= once(folder.parent / "eye.pt", tower, 0, lambda: train_eye(tower, recipe))
    facts |= once(folder / "language.pt", model, seed, lambda: train_language(model, processor, recipe, seed))
    facts |= once(folder / "joint.pt", model, seed, lambda: train_jointly(model, processor, recipe, seed))
    model.eval().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return facts


def once(path: Path, module: nn.Module, seed: int, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Run a step of training, or read what it left; return its facts, with its CPU seconds."""
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["weights"])
        return dict(saved["facts"])
    torch.manual_seed(seed)
    start = time.process_time()
    facts = run()
    facts[f"{path.stem}_cpu_seconds"] = round(time.process_time() - start, 1)
    part = path.with_suffix(".part")
    torch.save({"weights": module.state_dict(), "facts": facts}, part)
    part.rename(path)
    return facts
