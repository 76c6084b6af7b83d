"""English words as caption metrics see them: tokens in the manner of the Penn Treebank, singular forms by rule."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["plurals", "singular_by_rule", "singular_table", "treebank_tokens"]

SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
# applied in this order to one sentence
TREEBANK = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u2018\u2019]", "'"),
        (r"[\u201c\u201d]", '"'),
        (r"(^|[ (\[{<])\"", r"\1 `` "),
        (r"\.\.\.", " ... "),
        (r"[;@#$%&?!]", r" \g<0> "),
        (r"([:,])(?=\D|$)", r" \1 "),
        (r"(?<=[^.])\.(?=[\])}>\"' ]*$)", " . "),
        (r"[\]\[(){}<>]|--", r" \g<0> "),
        (r"\"", " '' "),
        (r"(?<=[^' ])('s|'m|'d|'ll|'re|'ve|n't)(?=\s|$)", r" \1"),
        (r"(?<=[^' ])'(?=\s|$)", " '"),
        (r"\bcan(?=not\b)", "can "),
        (r"\b(gim|lem)(?=me\b)", r"\1 "),
        (r"\b(gon|wan)(?=na\b)", r"\1 "),
        (r"\bgot(?=ta\b)", "got "),
        (r"(?<!\S)'t(?=is\b|was\b)", "'t "),
    )
)
IRREGULAR = {
    "calf": ("calves",),
    "child": ("children",),
    "foot": ("feet",),
    "goose": ("geese",),
    "knife": ("knives",),
    "mouse": ("mice",),
    "ox": ("oxen",),
    "person": ("people", "persons"),
    "shelf": ("shelves",),
    "thief": ("thieves",),
    "tooth": ("teeth",),
    "wolf": ("wolves",),
}

REGULAR_MAN = ("doberman", "human", "roman", "shaman", "talisman")


def treebank_tokens(text: str) -> list[str]:
    """Split a text into sentences, at a stop and white space, and those into words, punctuation and clitics.

    Clitics are "n't", "'s" and the like. Curly quotes count as straight ones. The case stays as it is; rules for
    clitics expect lower case.
    """
    tokens: list[str] = []
    for sentence in SENTENCE_END.split(text.strip()):
        for pattern, replacement in TREEBANK:
            sentence = pattern.sub(replacement, sentence)
        tokens += sentence.split()
    return tokens


def plurals(word: str) -> tuple[str, ...]:
    """Return the plural forms of an English noun in lower case, with variants of spelling where there are some."""
    for singular, forms in IRREGULAR.items():
        if word.endswith(singular) and (word == singular or len(singular) > 3):
            return tuple(word.removesuffix(singular) + form for form in forms)
    if word.endswith("man") and word not in REGULAR_MAN:
        return (word[:-3] + "men",)
    if word.endswith("bus"):
        return (word + "es", word + "ses")
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return (word + "es",)
    if re.search(r"[^aeiou]y$", word):
        return (word[:-1] + "ies",)
    if re.search(r"[^aeiou]o$", word):
        return (word + "s", word + "es")
    return (word + "s",)


def singular_table(words: Iterable[str]) -> dict[str, str]:
    """Return plural -> singular for some words; a plural that is itself one of them is left out."""
    known = set(words)
    return {form: word for word in sorted(known) for form in plurals(word) if form not in known}


def singular_by_rule(word: str) -> str:
    """Return a word without the ending of a plural, right or wrong: "dogs" gives "dog", "bus" gives "bu"."""
    for ending, singular in (("children", "child"), ("people", "person"), ("men", "man")):
        if word.endswith(ending):
            return word.removesuffix(ending) + singular
    if re.search(r"[^aeiou]ies$", word):
        return word[:-3] + "y"
    if word.endswith("oes"):
        return word[:-2]
    if re.search(r"(?:ss|x|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 2 and word.endswith("s") else word
