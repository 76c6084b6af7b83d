"""Golden runner of the scores: POPE's sets and scorings, CHAIR of 2018, MOSSBench's parser."""

import numpy as np

from saccade.vlm.evaluation import (
    POPE_SCORINGS,
    GivenAnswer,
    ImageObjects,
    ObjectFinder,
    build_pope,
    chair_scores,
    chair_truth,
    co_occurring_objects,
    measure_pope,
    object_counts,
    parse_judgement,
    pope_answer,
    score_caption,
)
from saccade.vlm.evaluation.answers import AnswerFile
from saccade.vlm.evaluation.pope_questions import POPEQuestion
from tests.golden.case import Case
from tests.golden.runners import runner


@runner("vlm.metrics")
def metrics(case: Case) -> None:
    document = case.document()
    check_chair(document["chair"])
    check_pope_build(document["pope_build"])
    check_pope_eval(document["pope_eval"])
    for pair, expected in zip(document["mossbench_judge"]["input"], document["mossbench_judge"]["output"], strict=True):
        judgement = parse_judgement(pair["judge"], pair["response"])
        assert [judgement.description, int(judgement.refused), judgement.reason] == expected


def both(parts: dict) -> list[dict]:
    """Return the rows of train and val."""
    return [row for rows in parts.values() for row in rows]


def check_chair(document: dict) -> None:
    given, expected = document["input"], document["output"]
    finder = ObjectFinder("2018")
    truth = chair_truth(both(given["instances"]), given["categories"], both(given["captions_gt"]), finder)
    for image, objects in expected["ground_truth"].items():
        assert sorted(truth.get(image, ())) == objects
    sums = np.zeros(7)
    for row, wanted in zip(given["captions"], expected["per_caption"], strict=True):
        score = score_caption(row["caption"], truth[str(row["image_id"])], finder)
        counts = score.counts()
        sums += counts
        assert list(score.mentions.words) == wanted["words"]
        assert list(score.mentions.classes) == wanted["node_words"]
        assert list(score.mentions.places) == wanted["idxs"]
        assert [list(pair) for pair in score.hallucinated] == wanted["hallucinated"]
        assert [score.mentions.places[i] for i in score.wrong] == wanted["hallucination_idxs"]
        assert counts[1] == wanted["CHAIRs"]
        assert (counts[3] / counts[2] if counts[2] else 0.0) == wanted["CHAIRi"]
    scores = chair_scores(sums)
    names = {"CHAIRs": "CHAIRs", "CHAIRi": "CHAIRi", "recall": "recall_variant"}
    assert {theirs: float(scores[ours]) for ours, theirs in names.items()} == {
        theirs: expected[theirs] for theirs in names.values()
    }
    assert float(scores["Len"]) / 100 == expected["len_variant"]


def check_pope_build(document: dict) -> None:
    given, expected = document["input"], document["output"]
    images = [ImageObjects(row["image"], tuple(row["objects"])) for row in given["images"]]
    assert list(object_counts(images).items()) == list(expected["ground_truth_objects"].items())
    assert co_occurring_objects(images) == expected["co_occur"]
    for split, rows in expected["questions"].items():
        questions = build_pope(images, split, seed=given["seed"], positives=given["sample_num"], legacy=True)
        assert [{name: q.row()[name] for name in rows[0]} for q in questions] == rows


def check_pope_eval(document: dict) -> None:
    answers, labels = document["answers"], document["labels"]
    said = [pope_answer(answer) for answer in answers]
    assert [int(word == "yes") for word in said] == document["output_official"]["pred"]
    questions = [POPEQuestion("all", str(i), f"{i}.jpg", "", label) for i, label in enumerate(labels)]
    file = AnswerFile("answers", tuple(GivenAnswer(str(i), text) for i, text in enumerate(answers)))
    for scoring in POPE_SCORINGS:
        expected = document.get(f"output_{scoring}")
        if expected is None:  # strict is ours
            continue
        measured = measure_pope(questions, file, scoring=scoring)
        sums = measured.counts.sum(0)
        for place, cell in enumerate(("TP", "FP", "TN", "FN")):
            assert sums[place] == expected.get(cell, sums[place])
        for (_, metric), value in measured.statistic(sums).items():
            assert float(value) == expected[metric]
