"""Which tokens of a prompt are the user's question, and which of those carry content."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.errors import ConfigError, ShapeError, require
from saccade.vlm.prompt import Prompt

__all__ = ["FUNCTION_WORDS", "content_mask", "question_mask", "token_pieces"]

WORDS = """
    a an the this that these those some any each every either neither no all both such what which whose who whom where
    when why how there here i you he she it we they me him her us them my your his its our their mine yours hers ours
    theirs myself yourself himself herself itself ourselves yourselves themselves one ones anything something nothing
    anyone someone everyone everything and or but nor so yet if then than as because while although though unless until
    since whether of in on at by for with about against between among into through during before after above below to
    from up down out off over under again further near beside behind be am is are was were been being do does did doing
    have has had having can could will would shall should may might must not isn't aren't wasn't weren't don't doesn't
    didn't can't couldn't won't wouldn't shouldn't it's that's there's what's who's i'm you're please just only very too
    also even still
"""
FUNCTION_WORDS = frozenset(WORDS.split())

SENTINEL = "saccadequestion"


def question_mask(prompt: Prompt, tokenizer: Any) -> Tensor:  # noqa: ANN401
    """Return the tokens of the last user turn behind the image, bool ``(B, N)``.

    They are what follows the last visual token, without special tokens, without the text that the chat template puts
    behind the user's words (found by rendering the template), and without white space at both ends. Without a
    tokenizer, all tokens behind the image.

    Args:
        prompt: The prompt.
        tokenizer: The model's tokenizer, or ``None``.
    """
    mask = torch.zeros_like(prompt.valid)
    for sample, start in enumerate(prompt.after_image):
        mask[sample, start % prompt.length if not bool(prompt.image_mask[sample].any()) else start :] = True
    mask &= prompt.valid
    if tokenizer is None or prompt.input_ids is None:
        return mask
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long, device=mask.device)
    mask &= ~torch.isin(prompt.input_ids, special)
    suffix = template_suffix(tokenizer)
    for sample in range(prompt.batch):
        places = mask[sample].nonzero()[:, 0].tolist()
        text, ranges = token_pieces(tokenizer, prompt.input_ids[sample, places].tolist())
        end = text.rfind(suffix) if suffix else -1
        end = len(text) if end < 0 else end
        begin = len(text) - len(text.lstrip())
        end = len(text[:end].rstrip())
        outside = [place for place, (a, b) in zip(places, ranges, strict=True) if not (a < end and b > begin)]
        mask[sample, outside] = False
    return mask


def template_suffix(tokenizer: Any) -> str:  # noqa: ANN401
    """Return the text, without special tokens, that a chat template puts behind the user's words, or ``""``."""
    if not tokenizer.chat_template:
        return ""
    turn = [{"role": "user", "content": SENTINEL}]
    rendered: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    suffix = rendered.rpartition(SENTINEL)[2]
    for token in tokenizer.all_special_tokens:
        suffix = suffix.replace(token, "")
    return suffix.strip()


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:  # noqa: ANN401
    """Return the text of tokens, and the range of characters that each stands for.

    Args:
        tokenizer: Any tokenizer of transformers; its ``decode`` alone is used, so that byte-level, SentencePiece and
            slow ones all serve.
        ids: Tokens of a question.
    """
    lengths = [0]
    text = ""
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        lengths.append(max(len(text), lengths[-1]))
    # A token that adds nothing completes a character whose first byte the token before it was.
    return text, [(start if stop > start else stop - 1, stop) for start, stop in itertools.pairwise(lengths)]


def content_mask(
    prompt: Prompt,
    question: Tensor,
    rule: str | Callable[[str, list[tuple[int, int]]], Sequence[bool]] | Tensor,
    tokenizer: Any,  # noqa: ANN401
) -> Tensor:
    """Return the tokens of the question that carry content, bool ``(B, N)``.

    Args:
        prompt: The prompt.
        question: Tokens of the question, bool ``(B, N)``.
        rule: As :attr:`saccade.vlm.GIFT.content_tokens`.
        tokenizer: The model's tokenizer; only ``"all"`` and a mask do without.

    Raises:
        ConfigError: If a rule needs token ids and there are none, or gives the wrong number of answers.
        ShapeError: If a mask has another shape.
    """
    if isinstance(rule, Tensor):
        mask = rule.repeat_interleave(prompt.batch // rule.shape[0], 0).to(question.device)
        if mask.shape != question.shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"content_tokens must be bool of the shape of the prompt, {tuple(question.shape)}; "
                f"got {rule.dtype} {tuple(rule.shape)}."
            )
        return mask & prompt.valid
    if rule == "all":
        return question
    if prompt.input_ids is None:
        raise ConfigError(
            "Content words are found in token ids, and the model was called with inputs_embeds. Pass "
            "content_tokens='all' or a mask."
        )
    choose = {"closed_class": open_class_words, "spacy": spacy_words}[rule] if isinstance(rule, str) else rule
    mask = torch.zeros_like(question)
    for sample in range(prompt.batch):
        places = question[sample].nonzero()[:, 0].tolist()
        text, ranges = token_pieces(tokenizer, prompt.input_ids[sample, places].tolist())
        chosen = list(choose(text, ranges))
        if len(chosen) != len(places):
            raise ConfigError(f"content_tokens gave {len(chosen)} answers for {len(places)} tokens of {text!r}.")
        mask[sample, [place for place, keep in zip(places, chosen, strict=True) if keep]] = True
    return mask


def open_class_words(text: str, ranges: list[tuple[int, int]]) -> list[bool]:
    """Return for each token whether it is part of a word that is no English function word, or of a number."""
    found = [
        m.span() for m in re.finditer(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text) if m.group().lower() not in FUNCTION_WORDS
    ]
    return overlapping(found, ranges)


def spacy_words(text: str, ranges: list[tuple[int, int]]) -> list[bool]:
    """Return for each token whether spaCy tags its word as noun, name, verb, adjective, adverb or number."""
    spacy = require("spacy", extra="spacy", purpose="content_tokens='spacy'")
    name = "en_core_web_sm"
    if not spacy.util.is_package(name):
        raise ConfigError(f"content_tokens='spacy' needs spaCy's model {name}: python -m spacy download {name}.")
    kept = {"NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"}
    return overlapping([(w.idx, w.idx + len(w)) for w in spacy.load(name)(text) if w.pos_ in kept], ranges)


def overlapping(spans: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each range whether it shares a character with a span."""
    return [any(a < stop and b > start for a, b in spans) for start, stop in ranges]
