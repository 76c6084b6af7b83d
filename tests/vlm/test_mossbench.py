"""Refusals by type, by a judge or by keywords, which never go by the same name."""

import json

import pytest

from saccade.errors import ConfigError
from saccade.vlm.evaluation import (
    evaluate_runs,
    judge_column,
    measure_mossbench,
    mossbench_prompts,
    parse_judgement,
    read_answers,
    read_mossbench,
)


def write_records(folder, count=6):
    place = folder / "images_information"
    place.mkdir(parents=True)
    records = {
        str(i): {"image": f"images/{i}.png", "question": f"Question {i}?", "metadata": {"over": f"type {i % 3 + 1}"}}
        for i in range(count)
    }
    (place / "information.json").write_text(json.dumps(records))
    return folder


def answers(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_answers(path)


@pytest.mark.parametrize(
    ("judge", "response", "refused"),
    [
        ("Description: x\nScore: 0\nReason: 1 of many", "Sure", False),
        ("Description: 10 people. Score: 1 Reason: no", "Sorry", True),
        ("I would give this 10", "Sure", True),  # as published
        ("zero: 0", "Sure", False),
        ("no idea", "Sure", None),
        ("Score: 0", "", True),
    ],
)
def test_judgements(judge, response, refused):
    assert parse_judgement(judge, response).refused is refused


def test_rates(tmp_path):
    records = read_mossbench(write_records(tmp_path / "a"))
    judged = ["Score 1", "Score 0", "no idea", "Score 0", "Score 1", "Score 1"]
    said = ["I cannot help."] * 2 + ["Sure"] * 4
    rows = [{"pid": str(i), "answer": said[i], "judge": text} for i, text in enumerate(judged)]
    file = answers(tmp_path / "answers.jsonl", rows)
    by_judge = evaluate_runs([measure_mossbench(records, file, judge=judge_column)], resamples=100)
    value = {score.group: score.value for score in by_judge.scores if score.metric == "refusal_rate"}
    assert value == {"benign": 3 / 5, "benign type 1": 1 / 2, "benign type 2": 1 / 2, "benign type 3": 1}
    assert by_judge.facts["answers"]["undefined"] == 1
    screened = measure_mossbench(records, file)
    assert {metric for _, metric in screened.statistic(screened.counts.sum(0))} == {"keyword_refusals"}
    assert evaluate_runs([screened], resamples=100).score("answers", "benign", "keyword_refusals").value == 2 / 6
    called = measure_mossbench(records, file, judge=lambda record, answer: f"Score: {int(record.kind == 'type 1')}")
    assert called.statistic(called.counts.sum(0))["benign", "refusal_rate"] == 1 / 3


def test_contrast_set(tmp_path):
    benign, contrast = (read_mossbench(write_records(tmp_path / name), name) for name in ("benign", "contrast"))
    said = {"benign": "Sure", "contrast": "I cannot."}
    rows = [{"id": f"{r.set}/{r.pid}", "split": r.set, "answer": said[r.set]} for r in benign + contrast]
    measured = measure_mossbench(benign + contrast, answers(tmp_path / "a.jsonl", rows))
    evaluation = evaluate_runs([measured], resamples=100)
    assert evaluation.score("a", "contrast", "keyword_refusals").value == 1
    assert evaluation.score("a", "benign", "keyword_refusals").value == 0
    asked = mossbench_prompts(contrast, tmp_path)
    assert (asked[2].id, asked[2].prompt, asked[2].path) == ("contrast/2", "Question 2?", tmp_path / "images" / "2.png")


def test_no_answer_is_a_refusal(tmp_path):
    records = read_mossbench(write_records(tmp_path / "a", 1))
    file = answers(tmp_path / "a.jsonl", [{"pid": "0", "answer": None, "judge": "Score: 0"}])
    for judge in (None, judge_column):
        assert measure_mossbench(records, file, judge=judge).counts[0, :2].tolist() == [1, 1]


def test_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*images_information/information\.json"):
        read_mossbench(tmp_path)
    record = {"image": "a.png", "question": "?", "metadata": {"over": "type 4"}}
    (tmp_path / "information.json").write_text(json.dumps({"1": record}))
    with pytest.raises(ConfigError, match=r"record '1' needs image, question and metadata.over, one of type 1"):
        read_mossbench(tmp_path)
    records = read_mossbench(write_records(tmp_path / "a", 1))
    file = answers(tmp_path / "a.jsonl", [{"pid": "0", "answer": "Sure"}])
    with pytest.raises(ConfigError, match=r"benign/0 has no text in column 'judge'"):
        measure_mossbench(records, file, judge=judge_column)
