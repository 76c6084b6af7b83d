"""CHAIR finds what captions mention, in the published manner and in ours, and counts what is not there."""

import json
from importlib import resources

import numpy as np
import pytest

from saccade.errors import ConfigError
from saccade.vlm.evaluation import (
    ObjectFinder,
    chair_prompts,
    chair_scores,
    evaluate_runs,
    measure_chair,
    read_answers,
    read_chair,
    score_caption,
)
from saccade.vlm.evaluation.words import plurals, singular_by_rule, treebank_tokens

LEMMA, PUBLISHED = ObjectFinder(), ObjectFinder("2018")


@pytest.mark.parametrize(
    ("caption", "lemma", "published"),
    [
        ("A bus and two buses.", ["bus", "bus"], ["bus"]),
        ("A motor bike, a cheesecake, an iPhone", ["motorcycle", "cake", "cell phone"], []),
        ("a stove top oven", ["oven"], ["oven", "oven"]),
        ("Wine glasses on tables", ["wine glass", "dining table"], ["wine glass", "dining table"]),
        ("a baby elephant by train tracks", ["elephant"], ["elephant"]),
        ("three persons' knives", ["person", "knife"], ["person", "knife"]),
        ("The skis of skiers; children, oxen, mice, calves", ["skis", "person", "person", "cow", "mouse", "cow"], None),
        ("the dog's ball isn't (a) \u201cFrisbee\u201d", ["dog", "sports ball", "frisbee"], None),
        ("grandchildren by buffaloes", ["person", "cow"], ["person", "cow"]),
        ("", [], []),
    ],
)
def test_mentions(caption, lemma, published):
    assert list(LEMMA.find(caption).classes) == lemma
    assert list(PUBLISHED.find(caption).classes) == (lemma if published is None else published)


def test_every_word_and_plural_is_found():
    table = json.loads(resources.files("saccade.vlm").joinpath("third_party/chair_singular.json").read_text())
    single = [word for word in LEMMA.class_of if " " not in word]
    assert len(single) > 350
    wrong = []
    for word in single:
        # the table's plurals come from another hand, and a few are no English
        forms = {word, *plurals(word), *(form for form, base in table.items() if base == word)}
        forms -= {"grandchilds", "pocketknifes", "thiefs"}
        wrong += [form for form in forms if LEMMA.find(f"some {form} here").classes != (LEMMA.class_of[word],)]
    assert wrong == []


def test_places():
    caption = "A seat by the toilet and a hot dog for a cat"
    assert list(zip(LEMMA.find(caption).words, LEMMA.find(caption).places, strict=True)) == [
        ("toilet", 4),
        ("hot dog", 7),
        ("cat", 11),
    ]
    assert LEMMA.find(caption).tokens[1] == "seat"  # the length counts it
    assert PUBLISHED.find(caption).places == (3, 6, 10)  # the published places slip by the word left out
    assert LEMMA.find("A seat by the window").classes == ("chair",)


def test_tokens():
    text = "She can't, \"cannot\" and won't; it's 3:30, 1,000 (or so)... Dogs' e.g. this. The end."
    assert treebank_tokens(text.lower()) == [
        *("she", "ca", "n't", ",", "``", "can", "not", "''", "and", "wo", "n't", ";", "it", "'s", "3:30", ",", "1,000"),
        *("(", "or", "so", ")", "...", "dogs", "'", "e.g", ".", "this", ".", "the", "end", "."),
    ]


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("puppies", "puppy"),
        ("glass", "glas"),
        ("benches", "bench"),
        ("us", "us"),
        ("firemen", "fireman"),
        ("buffaloes", "buffalo"),
    ],
)
def test_singular_by_rule(word, form):
    assert singular_by_rule(word) == form


def test_own_vocabulary():
    finder = ObjectFinder(synonyms=[["sphere", "ball", "orb"], ["cube", "box"]], phrases={"glass cube": "cube"})
    assert finder.find("Two boxes, a glass cube and orbs").classes == ("cube", "cube", "sphere")
    assert ObjectFinder(singular={"doggos": "dog"}.get).find("doggos").classes == ("dog",)
    with pytest.raises(ConfigError, match=r"singular forms of its own"):
        ObjectFinder("2018", singular=str)
    with pytest.raises(ConfigError, match=r"no variant 'lema'. Did you mean 'lemma'"):
        ObjectFinder("lema")


def test_scores():
    score = score_caption("A dog, a dog and a cat on a bench.", {"dog", "car"}, LEMMA)
    assert score.hallucinated == (("cat", "cat"), ("bench", "bench"))
    assert score.counts() == [1, 1, 4, 2, 1, 2, 12]
    silent = score_caption("Nothing at all", (), LEMMA)
    scores = chair_scores(np.array([score.counts(), silent.counts()], dtype=float))
    assert scores["CHAIRi"].tolist() == [0.5, 0]
    assert scores["recall"].tolist() == [0.5, 0]
    both = chair_scores(np.sum([score.counts(), silent.counts()], 0).astype(float))
    assert {name: float(value) for name, value in both.items()} == {
        "CHAIRs": 0.5,
        "CHAIRi": 0.5,
        "recall": 0.5,
        "Len": 7.5,
    }


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in (391895, 522418, 7)]
    instances = {
        "images": images,
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "traffic light"}],
        "annotations": [{"image_id": 391895, "category_id": 1}, {"image_id": 522418, "category_id": 2}],
    }
    captions = {"images": images, "annotations": [{"image_id": 391895, "caption": "A puppy on a sofa"}]}
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    (folder / "captions_val2014.json").write_text(json.dumps(captions))
    return tmp_path


def answers(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_answers(path)


def test_annotations(coco, tmp_path):
    truth = read_chair(coco, LEMMA)
    assert truth.objects == {"391895": {"dog", "couch"}, "522418": {"traffic light"}, "7": frozenset()}
    assert truth.sources == ("instances_val2014.json", "captions_val2014.json")
    rows = [
        {"image_id": 391895, "caption": "A dog"},
        {"id": "q2", "image": "val2014/COCO_val2014_000000522418.jpg", "answer": "A cat"},
        {"id": "7", "answer": "A bus and a car"},
    ]
    file = answers(tmp_path / "a.jsonl", rows)
    assert [truth.image_id(answer) for answer in file.answers] == ["391895", "522418", "7"]
    assert set(read_chair(coco, LEMMA, [answers(tmp_path / "b.jsonl", rows[:1])]).objects) == {"391895"}
    measured = measure_chair(truth, file, LEMMA)
    evaluation = evaluate_runs([measured], resamples=100)
    values = [evaluation.score("a", "all", name).value for name in ("CHAIRs", "CHAIRi", "recall", "Len")]
    assert values == pytest.approx([2 / 3, 3 / 4, 1 / 3, 3])
    assert measured.units == ("391895", "522418", "7")
    assert measured.rows[0]["missed"] == ["couch"]
    assert measured.rows[2]["hallucinated"] == [["bus", "bus"], ["car", "car"]]
    for row in ({"id": "x", "image": "y.jpg", "answer": ""}, {"id": "7", "image_id": 8, "answer": ""}):
        with pytest.raises(ConfigError, match=r"is about no annotated image; its row has image_id="):
            truth.image_id(answers(tmp_path / "c.jsonl", [row]).answers[0])


def test_prompts(coco):
    asked = chair_prompts(coco, "val2014", count=2, seed=1)
    assert asked == chair_prompts(coco, "val2014", count=2, seed=1)
    assert {question.extra["image_id"] for question in asked} < {391895, 522418, 7}
    assert asked[0].prompt == "Please describe this image in detail."
    with pytest.raises(ConfigError, match=r"lists 3 images, 500 were asked for"):
        chair_prompts(coco, ".")


def test_what_is_wrong(coco, tmp_path):
    with pytest.raises(ConfigError, match=r"no instances"):
        read_chair(tmp_path / "annotations" / "none", LEMMA)
    with pytest.raises(ConfigError, match=r"no word for the annotated classes dog, traffic light"):
        read_chair(coco, ObjectFinder(synonyms=[["cube"]], phrases={}))
    (coco / "annotations" / "captions_val2014.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"not in COCO's layout"):
        read_chair(coco, LEMMA)
