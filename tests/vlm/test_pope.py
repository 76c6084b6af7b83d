"""POPE's questions are balanced and about absent things; its scorings differ where they say."""

import json
from collections import Counter

import numpy as np
import pytest

from saccade.errors import ConfigError
from saccade.vlm.evaluation import (
    POPE_SCORINGS,
    POPE_SETS,
    ImageObjects,
    POPEQuestion,
    build_pope,
    evaluate_runs,
    measure_pope,
    pope_answer,
    pope_scores,
    read_answers,
    read_coco_objects,
    read_pope,
    sample_pope_images,
)

NAMES = ("apple", "bowl", "car", "dog", "egg", "fork", "goat", "hat", "ink", "jar")


def scenes(count=30, seed=0):
    generator = np.random.default_rng(seed)
    return [
        ImageObjects(f"{i}.jpg", tuple(generator.choice(NAMES, size=3 + i % 3, replace=False).tolist()))
        for i in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("split", POPE_SETS)
def test_sets(split):
    images = scenes()
    questions = build_pope(images, split, seed=3)
    assert questions == build_pope(images, split, seed=3)
    assert Counter(q.label for q in questions) == {"yes": 90, "no": 90}
    assert [q.id for q in questions] == [str(i + 1) for i in range(180)]
    objects = {image.image: image.objects for image in images}
    for image in images:
        asked = [q for q in questions if q.image == image.image]
        names = [q.text.split()[3] for q in asked]
        assert names[::2] == list(image.objects[:3])
        assert len(set(names)) == 6
        assert not set(names[1::2]) & set(objects[image.image])
        assert [q.text.split()[2] for q in asked] == ["an" if name[0] in "aei" else "a" for name in names]
    if split == "popular":
        counts = Counter(name for image in images for name in image.objects)
        first = images[0]
        left = [name for name, _ in counts.most_common() if name not in first.objects]
        assert [q.text.split()[3] for q in questions[1:6:2]] == left[:3]
    if split == "random":
        assert questions != build_pope(images, split, seed=4)


def test_adversarial_asks_for_what_is_often_beside():
    images = [ImageObjects(f"{i}.jpg", ("fork", "knife", "cup")) for i in range(4)]
    images += [ImageObjects("x.jpg", ("fork", "sea", "ship")), ImageObjects("y.jpg", ("moon", "star", "sky"))]
    absent = [q.text.split()[3] for q in build_pope(images, "adversarial") if q.image == "x.jpg" and q.label == "no"]
    assert absent[0] == "knife"


def test_misspelt_as_published():
    images = [ImageObjects("0.jpg", ("oven",)), ImageObjects("1.jpg", ("cat",))]
    (yes, no, *_) = build_pope(images, "random", positives=1)
    assert (yes.text, no.text) == ("Is there an oven in the image?", "Is there a cat in the image?")
    legacy = build_pope(images, "random", positives=1, legacy=True)
    assert legacy[0].text == "Is there an oven in the imange?"


def test_what_cannot_be_built():
    with pytest.raises(ConfigError, match=r"random, popular, adversarial, not 'hard'"):
        build_pope(scenes(), "hard")
    with pytest.raises(ConfigError, match=r"0.jpg has 2 objects; 3 are needed"):
        build_pope([ImageObjects("0.jpg", ("cat", "dog"))], "random")
    with pytest.raises(ConfigError, match=r"0.jpg: no object is left"):
        build_pope([ImageObjects("0.jpg", ("cat", "dog", "hat"))], "popular")
    with pytest.raises(ConfigError, match=r"31 images with 3 or more objects are needed, the annotations have 30"):
        sample_pope_images(scenes(), 31)
    assert len({image.image for image in sample_pope_images(scenes(), 7, seed=1)}) == 7


def test_from_coco(tmp_path):
    content = {
        "images": [{"id": 4, "file_name": "a.jpg"}, {"id": 5, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"image_id": 4, "category_id": c} for c in (2, 1, 2)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    assert read_coco_objects(path) == [ImageObjects("a.jpg", ("cat", "dog")), ImageObjects("b.jpg", ())]
    content["annotations"].append({"image_id": 6, "category_id": 1})
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"image or category that is not listed.*'image_id': 6"):
        read_coco_objects(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"not in COCO's layout"):
        read_coco_objects(path)


def test_files(tmp_path):
    rows = [{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "Yes"}]
    write_jsonl(tmp_path / "coco_pope_random.json", rows)  # COCO's are JSON Lines, whatever they are called
    (tmp_path / "coco_pope_popular.json").write_text(json.dumps(rows, indent=1))  # those of GQA are arrays
    expected = POPEQuestion("random", "1", "a.jpg", "Is there a dog?", "yes")
    assert read_pope(tmp_path)[0] == expected
    assert [q.split for q in read_pope(tmp_path)] == ["random", "popular"]
    (tmp_path / "sample").mkdir()
    write_jsonl(tmp_path / "sample" / "pope_coco_random_sample.jsonl", rows)
    assert read_pope(tmp_path / "sample") == [expected]
    merged = write_jsonl(tmp_path / "questions.jsonl", [q.row() for q in read_pope(tmp_path)])
    assert read_pope(merged) == read_pope(tmp_path)
    write_jsonl(tmp_path / "gqa_pope_random.json", rows)
    with pytest.raises(ConfigError, match=r"several files of the set 'random'"):
        read_pope(tmp_path)
    for change, message in (
        ({"label": "maybe"}, "row 1: label must be yes or no, got 'maybe'"),
        ({"image": None}, "row 1 has no image"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_pope(write_jsonl(tmp_path / "x.jsonl", [rows[0] | change]))
    with pytest.raises(ConfigError, match=r"row 2: id '1' was there before"):
        read_pope(write_jsonl(tmp_path / "x.jsonl", rows * 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no file named after random, popular or adversarial"):
        read_pope(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "official", "strict", "lmms_eval"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("yes.", "yes", "yes", ""),
        ("**No**, there is none.", "yes", "no", ""),
        ("NO", "yes", "no", "no"),
        ("Nope", "yes", "", ""),
        ("There is no dog", "no", "", ""),
        ("Yes. There is no cat", "yes", "yes", ""),
        ("no's", "yes", "", ""),
        ("", "yes", "", ""),
        ("\u201cNo\u201d", "yes", "no", ""),
    ],
)
def test_scorings(text, official, strict, lmms_eval):
    assert [pope_answer(text, scoring) for scoring in POPE_SCORINGS] == [official, strict, lmms_eval]


def test_unknown_scoring():
    with pytest.raises(ConfigError, match=r"no scoring 'strickt'. Did you mean 'strict'"):
        pope_answer("yes", "strickt")


def test_nothing_divides_by_zero():
    scores = pope_scores(np.array([[0.0, 0, 5, 0, 0, 0], [0, 0, 0, 0, 0, 0]]))
    assert scores["precision"].tolist() == scores["f1"].tolist() == [0, 0]
    assert scores["accuracy"].tolist() == [1, 0]


def test_measured(tmp_path):
    images = scenes(20)
    questions = [q for split in POPE_SETS for q in build_pope(images, split)]
    open_ones = set(np.random.default_rng(2).permutation(len(questions))[:40].tolist())
    rows = [
        {"id": f"{q.split}/{q.id}", "split": q.split, "answer": "Maybe" if i in open_ones else q.label}
        for i, q in enumerate(questions)
    ]
    measured = measure_pope(questions, read_answers(write_jsonl(tmp_path / "a.jsonl", rows)), scoring="strict")
    evaluation = evaluate_runs([measured], resamples=100)
    assert measured.facts["unparsed"] == 40
    assert len(measured.units) == 20
    assert measured.outcomes["macro", "accuracy"].sum() == 320
    groups = ["random", "popular", "adversarial", "macro"]
    by_set = [evaluation.score("a", group, "accuracy").value for group in groups]
    assert by_set[3] == pytest.approx(np.mean(by_set[:3]))
    assert by_set[3] == pytest.approx(8 / 9)
    assert evaluation.score("a", "macro", "precision").value == 1  # what is neither is wrong, but no false alarm
    score = evaluation.score("a", "macro", "f1")
    assert score.low < score.value < score.high
    row = measured.rows[next(i for i in range(1, 360, 2) if i not in open_ones)]
    sample = {"question_id": row["question_id"], "score": 1.0, "prediction": "no", "ground_truth": "no"}
    assert row["pope_accuracy"] == row["pope_f1_score"] == sample
    assert (row["filtered_resps"], row["target"]) == (["no"], "no")
    theirs = measure_pope(questions, read_answers(tmp_path / "a.jsonl"), scoring="lmms_eval").rows
    assert {row["pope_recall"]["prediction"] for row in theirs} == {"yes", "no", "maybe"}  # as lmms-eval writes them
    alone = measure_pope(questions[:120], read_answers(tmp_path / "a.jsonl"))
    assert {group for group, _ in alone.statistic(alone.counts.sum(0))} == {"random"}
