"""Which objects a caption mentions, as CHAIR counts them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from saccade.errors import ConfigError, suggest
from saccade.vlm.evaluation.words import singular_by_rule, singular_table, treebank_tokens

__all__ = ["CHAIR_VARIANTS", "Mentions", "ObjectFinder", "coco_phrases", "coco_synonyms"]

CHAIR_VARIANTS = ("lemma", "2018")


@dataclass(frozen=True)
class Mentions:
    """The objects of a caption, one entry per mention.

    Args:
        words: As the vocabulary has them, e.g. ``puppy``.
        classes: What they stand for, e.g. ``dog``.
        places: Token of the caption at which each begins, from 0.
        tokens: The caption's tokens in lower case and singular, phrases as one.
    """

    words: tuple[str, ...]
    classes: tuple[str, ...]
    places: tuple[int, ...]
    tokens: tuple[str, ...]


def third_party(name: str) -> str:
    """Return a text that comes with the package."""
    return resources.files("saccade.vlm").joinpath("third_party", name).read_text(encoding="utf-8")


@cache
def coco_synonyms() -> tuple[tuple[str, ...], ...]:
    """Return the words for each of COCO's 80 classes as CHAIR's file has them, the class first."""
    return tuple(tuple(line.strip().split(", ")) for line in third_party("chair_synonyms.txt").splitlines())


@cache
def coco_phrases() -> Mapping[str, str]:
    """Return what CHAIR takes as one word, and for which: ``{"baby bear": "bear", "hot dog": "hot dog", ...}``."""
    phrases: dict[str, str] = json.loads(third_party("chair_phrases.json"))
    return phrases


class ObjectFinder:
    """Finds mentions of objects.

    Both variants take tokens in lower case to their singular, merge phrases, drop "seat" where a toilet is mentioned,
    and look the rest up. ``2018`` is the published pipeline with its quirks: "a bus" becomes "bu" and is not found,
    synonyms with a stray space ("motor bike") or a capital ("iPhone") never match, phrases have two words, and after
    a dropped "seat" places are those of the tokens before. ``lemma`` is what later papers use in spirit: plurals of
    the vocabulary are known, "bus" is one, and these slips are mended. Their lemmas come from NLTK's tagger and
    WordNet, ours from a table made of the vocabulary, so that a score does not depend on what is installed.

    Args:
        variant: ``lemma`` or ``2018``.
        synonyms: Words for each class, the class first; ``None`` means COCO's.
        phrases: Words that count as one, and for which; ``None`` means CHAIR's.
        singular: Another function from a token to its lemma, e.g. that of a WordNet lemmatizer; with ``lemma`` alone.

    Raises:
        ConfigError: If there is no variant of this name, or ``singular`` is given for ``2018``.

    Source:
        Rohrbach et al., "Object hallucination in image captioning", EMNLP 2018 (arXiv:1809.02156);
        LisaAnne/Hallucination (BSD-2-Clause) at 6e4d33c.
    """

    def __init__(
        self,
        variant: str = "lemma",
        *,
        synonyms: Sequence[Sequence[str]] | None = None,
        phrases: Mapping[str, str] | None = None,
        singular: Callable[[str], str] | None = None,
    ) -> None:
        if variant not in CHAIR_VARIANTS:
            raise ConfigError(f"CHAIR has no variant {variant!r}.{suggest(variant, CHAIR_VARIANTS)}")
        if singular is not None and variant == "2018":
            raise ConfigError("The 2018 variant has singular forms of its own; give singular= with variant='lemma'.")
        self.variant = variant
        rows = coco_synonyms() if synonyms is None else synonyms
        if variant == "lemma":
            rows = [[word.strip().lower() for word in row] for row in rows]
        self.class_of = {word: row[0] for row in rows for word in row}
        self.phrases = dict(coco_phrases() if phrases is None else phrases)
        self.longest = max((len(phrase.split()) for phrase in self.phrases), default=1) if variant == "lemma" else 2
        self.singular = singular or (published_singular() if variant == "2018" else self.own_singular())

    def own_singular(self) -> Callable[[str], str]:
        """Return the function that knows the plurals of the vocabulary and of the words in its phrases."""
        words = {part for entry in (*self.class_of, *self.phrases) for part in entry.split()}
        table = singular_table(words)
        return lambda word: table.get(word, word)

    def find(self, caption: str) -> Mentions:
        """Return the mentions of a caption in their order."""
        single = [self.singular(word) for word in treebank_tokens(caption.lower())]
        starts, tokens = self.merge(single)
        kept = list(range(len(tokens)))
        if {"toilet", "seat"} <= set(tokens):  # the seat of a toilet is no chair
            kept = [i for i in kept if tokens[i] != "seat"]
        found = [(place, tokens[i]) for place, i in enumerate(kept) if tokens[i] in self.class_of]
        aligned = [starts[place if self.variant == "2018" else kept[place]] for place, _ in found]
        words = tuple(word for _, word in found)
        return Mentions(words, tuple(self.class_of[word] for word in words), tuple(aligned), tuple(tokens))

    def merge(self, words: Sequence[str]) -> tuple[list[int], list[str]]:
        """Return the words with phrases merged, the longest first, and where each begins."""
        starts, merged, place = [], [], 0
        while place < len(words):
            size = next(
                (n for n in range(self.longest, 1, -1) if " ".join(words[place : place + n]) in self.phrases), 1
            )
            text = " ".join(words[place : place + size])
            starts.append(place)
            merged.append(self.phrases.get(text, text) if size > 1 else text)
            place += size
        return starts, merged

    def classes_in(self, captions: Iterable[str]) -> set[str]:
        """Return the classes that any of some captions mentions."""
        return {name for caption in captions for name in self.find(caption).classes}


@cache
def published_singular() -> Callable[[str], str]:
    """Return the 2018 pipeline's singular: its table for CHAIR's words and phrases, the plain rule for all others."""
    table: dict[str, str] = json.loads(third_party("chair_singular.json"))
    return lambda word: table.get(word) or singular_by_rule(word)
