"""``saccade vlm questions`` and ``evaluate``, from annotations to tables."""

import json
from pathlib import Path

import pytest
from PIL import Image

from saccade.apps.cli import main
from tests.helpers import run_cli
from tests.vlm.tiny_folder import write_tiny_llava

CLASSES = ("dog", "cat", "car", "bus", "tv", "bed", "cup", "kite")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def coco(tmp_path):
    """Annotations of eight images in COCO's layout, three objects each."""
    images = [{"id": i, "file_name": f"val_{i}.png"} for i in range(8)]
    content = {
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [{"image_id": i, "category_id": (i + j) % 8} for i in range(8) for j in range(3)],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    captions = [{"image_id": i, "caption": f"A {CLASSES[i]} on a road."} for i in range(8)]
    (tmp_path / "annotations" / "captions_val.json").write_text(json.dumps({"annotations": captions}))
    return tmp_path


def test_pope_from_annotations_to_tables(coco, capsys):
    instances, data = coco / "annotations" / "instances_val.json", coco / "pope"
    asked = coco / "questions.jsonl"
    build = ["--build", str(instances), "--num-images", "6", "--seed", "1"]
    assert main(["vlm", "questions", "pope", "--data", str(data), "-o", str(asked), *build]) == 0
    assert "108 questions about 6 images" in capsys.readouterr().err
    questions = read_jsonl(asked)
    greedy = [q | {"answer": "Yes" if i % 3 else q["label"], "intervention": "none"} for i, q in enumerate(questions)]
    better = [q | {"answer": "Maybe" if i == 4 else q["label"], "intervention": "var"} for i, q in enumerate(questions)]
    files = [str(write_jsonl(coco / f"{name}.jsonl", rows)) for name, rows in (("greedy", greedy), ("var", better))]
    out, rows = coco / "scores.json", coco / "rows.jsonl"
    arguments = ["--data", str(data), "--answers", *files, "-o", str(out), "--rows", str(rows), "--resamples", "200"]
    done = run_cli("vlm", "evaluate", "pope", *arguments, "--scoring", "strict")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines() if "macro" in line][:2] == [
        ["greedy", "none", "macro"],
        ["var", "var", "macro"],
    ]
    assert "var - greedy" in done.stdout
    assert "greedy decoding is not beside" not in done.stdout
    document = json.loads(out.read_text())
    (difference,) = [c for c in document["comparisons"] if (c["group"], c["metric"]) == ("macro", "accuracy")]
    assert difference["low"] > 0
    assert difference["p"] < 0.05
    assert document["runs"]["var"]["facts"]["unparsed"] == 1
    samples = read_jsonl(rows)
    assert len(samples) == 216
    assert {"doc_id", "target", "resps", "filtered_resps", "pope_accuracy", "run"} <= samples[0].keys()


def test_chair(coco, capsys):
    asked = coco / "questions.jsonl"
    assert main(["vlm", "questions", "chair", "--data", str(coco), "-o", str(asked), "--num-images", "8"]) == 0
    questions = read_jsonl(asked)
    assert set(questions[0]) == {"id", "image", "prompt", "image_id"}
    file = write_jsonl(coco / "a.jsonl", [q | {"answer": "A bus and a dog."} for q in questions])
    for variant, value in (("lemma", 1.0), ("2018", 5 / 8)):  # to the latter "a bus" is no mention
        capsys.readouterr()
        arguments = ["--data", str(coco), "--answers", str(file), "--variant", variant, "--json", "--resamples", "100"]
        assert main(["vlm", "evaluate", "chair", *arguments]) == 0
        document = json.loads(capsys.readouterr().out)
        scores = {score["metric"]: score for score in document["runs"]["a"]["scores"]}
        assert document["scoring"] == variant
        assert scores["CHAIRs"]["value"] == value
        assert scores["Len"]["value"] == 6
    (coco / "annotations" / "captions_val.json").unlink()
    assert main(["vlm", "evaluate", "chair", "--data", str(coco), "--answers", str(file), "--resamples", "100"]) == 0
    screen = capsys.readouterr()
    assert "no captions*.json" in screen.err
    assert "greedy decoding is not beside these scores" in screen.out


def test_mossbench(tmp_path, capsys):
    for name in ("data", "contrast"):
        records = {str(i): {"image": f"{i}.png", "question": "?", "metadata": {"over": f"type {i}"}} for i in (1, 2, 3)}
        (tmp_path / name).mkdir()
        (tmp_path / name / "information.json").write_text(json.dumps(records))
    data = ["--data", str(tmp_path / "data"), "--contrast", str(tmp_path / "contrast")]
    assert main(["vlm", "questions", "mossbench", *data, "-o", str(tmp_path / "q.jsonl")]) == 0
    said = {"benign": "Sure", "contrast": "I cannot help with that."}
    rows = [row | {"answer": said[row["split"]], "judge": "Score: 0"} for row in read_jsonl(tmp_path / "q.jsonl")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    call = ["vlm", "evaluate", "mossbench", *data, "--answers", str(file), "--resamples", "100"]
    assert main(call) == 0
    screen = capsys.readouterr()
    assert "not the official metric" in screen.err
    assert "KEYWORD_REFUSALS" in screen.out
    assert "REFUSAL_RATE" not in screen.out
    assert main([*call, "--judge", "column"]) == 0
    screen = capsys.readouterr()
    assert "REFUSAL_RATE" in screen.out
    assert screen.err == ""


def test_model_end_to_end(coco, capsys):
    data, images = coco / "pope", coco / "images"
    build = ["--build", str(coco / "annotations" / "instances_val.json"), "--num-images", "4"]
    main(["vlm", "questions", "pope", "--data", str(data), "-o", str(coco / "q.jsonl"), *build])
    images.mkdir()
    for name in {row["image"] for row in read_jsonl(coco / "q.jsonl")}:
        Image.new("RGB", (20, 20), (200, 30, 90)).save(images / name)
    model = f"local-dir:{write_tiny_llava(coco / 'llava')}"
    arguments = ["-m", model, "--image-folder", str(images), "--max-new-tokens", "2", "--device", "cpu", "-q"]
    arguments += ["--intervention", "vhr", "--set", "alpha=3", "--set", "layers=[1,2]", "--resamples", "100"]
    out = coco / "out"
    assert main(["vlm", "evaluate", "pope", "--data", str(data), "-o", str(out), *arguments]) == 0
    document = json.loads((out / "scores.json").read_text())
    assert {name: run["intervention"] for name, run in document["runs"].items()} == {"none": "none", "vhr": "vhr"}
    assert document["runs"]["none"]["facts"]["tokens"] == 2
    assert len(read_jsonl(out / "vhr.jsonl")) == 72
    assert len(read_jsonl(out / "rows.jsonl")) == 144
    capsys.readouterr()
    before = (out / "none.jsonl").read_text()
    assert main(["vlm", "evaluate", "pope", "--data", str(data), "-o", str(out), *arguments]) == 0
    assert (out / "scores.json").read_text() == json.dumps(document, indent=2) + "\n"
    assert (out / "none.jsonl").read_text() == before  # seconds included: nothing was answered again


def test_failed_answers_end_with_3(coco, capsys):
    question = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
    data = write_jsonl(coco / "pope_random.jsonl", [question])
    file = write_jsonl(coco / "a.jsonl", [{"id": "1", "status": "failed", "error": "unreadable_image: x"}])
    assert main(["vlm", "evaluate", "pope", "--data", str(data), "--answers", str(file), "--resamples", "100"]) == 3
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --answers FILE..., or --model with -o FOLDER"),
        (["--answers", "{a}", "--intervention", "var"], "--intervention needs --model"),
        (["-m", "local-dir:x", "-o", "scores.json"], "With --model, -o is the folder"),
        (["-m", "local-dir:x", "-o", "out", "--shard", "1/2"], "Scores need every answer"),
        (["--answers", "{a}", "--scoring", "strickt"], "Did you mean 'strict'?"),
        (["--answers", "{a}", "{a}"], "Two runs have the same name: a, a"),
        (["--answers", "{a}", "--resamples", "5"], "100 resamples"),
        (["--answers", "{none}"], "Cannot read the answers"),
    ],
)
def test_usage_errors(tmp_path, capsys, arguments, message):
    question = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
    data = write_jsonl(tmp_path / "pope_random.jsonl", [question])
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "answer": "no"}])
    filled = [word.format(a=tmp_path / "a.jsonl", none=tmp_path / "none.jsonl") for word in arguments]
    assert main(["vlm", "evaluate", "pope", "--data", str(data), *filled]) == 2
    assert message in capsys.readouterr().err


def test_build_is_popes(tmp_path, capsys):
    arguments = ["--data", str(tmp_path), "-o", str(tmp_path / "q.jsonl"), "--build", "x.json"]
    assert main(["vlm", "questions", "chair", *arguments]) == 2
    assert "--build makes POPE's sets" in capsys.readouterr().err
