"""The question and its content words, found with real tokenizers."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saccade.errors import ConfigError, MissingDependencyError
from saccade.vlm.content_words import content_mask, open_class_words, question_mask, spacy_words, token_pieces
from saccade.vlm.prompt import make_prompt

IMAGE = "<image>"
TEMPLATE = "{{ '<s>' }}USER: {{ messages[0]['content'] }} ASSISTANT:"


def bytes_tokenizer():
    """Return a tokenizer of single bytes, so that every word and many letters are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", additional_special_tokens=[IMAGE])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chosen_text(tokenizer, ids, mask):
    return tokenizer.decode(ids[mask].tolist())


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def prompts(tokenizer, *questions):
    texts = [f"<s>USER: {IMAGE * 3}\n{question} ASSISTANT:" for question in questions]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return make_prompt(ids, mask, (tokenizer.convert_tokens_to_ids(IMAGE),))


QUESTIONS = ["What is the colour of the cat's bed?", "Où est le café ☕ ?"]


def test_the_question_is_what_the_user_wrote(tokenizer):
    prompt = prompts(tokenizer, *QUESTIONS)
    found = question_mask(prompt, tokenizer)
    assert [chosen_text(tokenizer, i, m) for i, m in zip(prompt.input_ids, found, strict=True)] == QUESTIONS
    everything = question_mask(prompt, None)
    assert everything[0].sum() == len(f"\n{QUESTIONS[0]} ASSISTANT:")


def test_content_words(tokenizer):
    prompt = prompts(tokenizer, *QUESTIONS)
    question = question_mask(prompt, tokenizer)
    found = content_mask(prompt, question, "closed_class", tokenizer)
    assert chosen_text(tokenizer, prompt.input_ids[0], found[0]) == "colourcat'sbed"
    assert chosen_text(tokenizer, prompt.input_ids[1], found[1]) == "Oùestlecafé"
    assert torch.equal(content_mask(prompt, question, "all", tokenizer), question)
    letters = content_mask(prompt, question, lambda text, ranges: [text[a:b] == "c" for a, b in ranges], tokenizer)
    assert chosen_text(tokenizer, prompt.input_ids[0], letters[0]) == "cc"
    with pytest.raises(ConfigError, match="gave 1 answers for"):
        content_mask(prompt, question, lambda text, ranges: [True], tokenizer)


def test_pieces_cover_the_text(tokenizer):
    text, ranges = token_pieces(tokenizer, tokenizer("é☕!", add_special_tokens=False)["input_ids"])
    assert text == "é☕!"
    assert ranges[-1] == (2, 3)
    assert open_class_words("Is it a 3-storey house?", [(0, 2), (8, 9), (9, 16), (17, 19)]) == [False, True, True, True]


def test_spacy_is_asked_for_by_name():
    with pytest.raises((MissingDependencyError, ConfigError), match="spacy"):
        spacy_words("a cat", [(0, 1)])
