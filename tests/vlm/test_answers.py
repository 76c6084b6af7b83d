"""Answers files of any writer are read alike; what is wrong in them is named."""

import json

import pytest

from saccade.errors import ConfigError
from saccade.vlm.evaluation import GivenAnswer, answer_facts, looks_like_refusal, match_answers, read_answers


def write(path, rows, *, array=False):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("[" + ",".join(lines) + "]" if array else "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_spellings(tmp_path):
    rows = [
        {"id": "random/7", "split": "random", "answer": "Yes", "text": "Is there a dog?", "tokens": 2},
        {"question_id": 8, "text": "No", "category": "random"},
        {"image_id": 9, "caption": "A dog."},
        {"pid": "10", "answer": " Sure! "},
    ]
    for array in (False, True):
        file = read_answers(write(tmp_path / "a.json", rows, array=array))
        assert [(a.id, a.text, a.split) for a in file.answers] == [
            ("7", "Yes", "random"),
            ("8", "No", "random"),
            ("9", "A dog.", ""),
            ("10", " Sure! ", ""),
        ]


def test_no_answer_is_empty(tmp_path):
    rows = ['{"id": 1, "answer": null}', '{"id": 2, "answer": NaN}', '{"id": 3, "status": "failed", "error": "x"}']
    file = read_answers(write(tmp_path / "a.jsonl", [*rows, '{"id": 4, "answer": "  "}']))
    assert [answer.text for answer in file.answers] == ["", "", "", "  "]
    facts = answer_facts(file.answers)
    assert (facts["answers"], facts["empty"], facts["failed"], facts["words"]) == (4, 4, 1, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no answer"),
        (['{"id": 1, "answer": "yes"'], "Cannot read the answers"),
        (["[1]", "2"], "Cannot read the answers"),
        (["3"], "row 1 is not an object"),
        ([{"answer": "yes"}], "row 1 has none of id, question_id, image_id, pid; it has answer"),
        ([{"id": 1, "label": "no"}], "row 1 has none of answer, text, caption; it has id, label"),
        ([{"id": 1, "answer": 5}], "row 1: answer must be text or null, got 5"),
        ([{"id": 1, "answer": "a"}, {"id": 1, "answer": "a"}], "row 2: id '1' was there before"),
    ],
)
def test_what_is_wrong(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        read_answers(write(tmp_path / "a.jsonl", rows))


def test_same_id_in_two_sets_is_no_duplicate(tmp_path):
    rows = [{"id": 1, "split": split, "answer": split} for split in ("random", "popular")]
    file = read_answers(write(tmp_path / "a.jsonl", rows))
    asked = [("popular", "1"), ("random", "1")]
    assert [answer.text for answer in match_answers(file, asked)] == ["popular", "random"]


def test_folder_with_a_file_per_set(tmp_path):
    for split in ("random", "popular"):
        write(tmp_path / f"coco_pope_{split}.jsonl", [{"question_id": 1, "text": split}])
    write(tmp_path / "coco_pope_random.items.jsonl", [{"id": "1", "status": "done"}])
    (tmp_path / "coco_pope_random.run.json").write_text("{}")
    file = read_answers(tmp_path)
    assert file.name == tmp_path.name
    assert [answer.text for answer in match_answers(file, [("random", "1"), ("popular", "1")])] == ["random", "popular"]


def test_matching(tmp_path):
    file = read_answers(write(tmp_path / "a.jsonl", [{"id": i, "answer": str(i)} for i in range(8)]))
    assert [answer.text for answer in match_answers(file, [("random", str(i)) for i in (3, *range(3), *range(4, 8))])]
    with pytest.raises(ConfigError, match=r"a lacks answers to 7 of 15 questions: random/8, random/9.* [.]{3}"):
        match_answers(file, [("random", str(i)) for i in range(15)])
    with pytest.raises(ConfigError, match=r"a answers 2 questions that the data do not have: 6, 7"):
        match_answers(file, [("random", str(i)) for i in range(6)])
    with pytest.raises(ConfigError, match=r"id '0' is a question of random and popular.*column 'split'"):
        match_answers(file, [(split, str(i)) for split in ("random", "popular") for i in range(8)])
    other = read_answers(write(tmp_path / "b.jsonl", [{"id": 1, "answer": "yes", "split": "popular"}]))
    with pytest.raises(ConfigError, match=r"1 of 1 questions: random/1. Rows of popular were left out"):
        match_answers(other, [("random", "1")])
    split = [("random", str(i)) for i in range(4)] + [("popular", str(i)) for i in range(4, 8)]
    assert [answer.text for answer in match_answers(file, split)] == [str(i) for i in range(8)]


def test_facts():
    answers = [
        GivenAnswer("1", "I'm sorry, I can't help.", row={"tokens": 8}),
        GivenAnswer("2", "A dog", row={"tokens": 4}),
    ]
    facts = answer_facts(answers)
    assert (facts["refusals"], facts["tokens"], facts["words"]) == (1, 6, 3.5)
    assert answer_facts([*answers, GivenAnswer("3", "x")])["tokens"] is None


@pytest.mark.parametrize(
    "text", ["I\u2019m sorry, but no.", "As an AI, I do not.", "I cannot do that.", "I am unable to say."]
)
def test_refusals(text):
    assert looks_like_refusal(text)


@pytest.mark.parametrize("text", ["", "A sorry sight.", "You cannot park here.", "Said Ann: he can't."])
def test_no_refusals(text):
    assert not looks_like_refusal(text)
