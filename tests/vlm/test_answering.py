"""Answers to a file of questions: what becomes of good and bad rows, however the run is cut."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.apps.cli import main
from saccade.batch import BatchOptions
from saccade.errors import CheckpointError, ConfigError, MissingResourceError
from saccade.vlm import VAR, AnswerPlan, GenerationOptions, generate_answers, intervene, load_vlm, read_questions
from tests.helpers import run_cli
from tests.vlm.tiny_folder import write_tiny_llava

VAR_SETTINGS = {"sink_channels": (1, 2), "tau": 2.0, "min_visual_mass": 0.0, "min_nonsink_share": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, pictures (one broken, one missing) and questions."""
    folder = tmp_path_factory.mktemp("vlm")
    write_tiny_llava(folder / "llava")
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    rows = [
        {"question_id": 7, "image": "a.png", "text": "Is there a cat?", "label": "no"},
        {"id": "b", "image": "b.png", "prompt": "What colour?"},
        {"id": "broken", "image": "broken.png", "prompt": "What?"},
        {"id": "c", "image": "c.png", "prompt": "Describe the whole picture in every detail."},
        {"id": "gone", "image": "gone.png", "prompt": "What?"},
        {"id": "long", "image": "d.png", "prompt": "why " * 80},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def model_of(place):
    return f"local-dir:{place / 'llava'}"


def run(place, out, **options):
    chosen = {"intervention": "var", "settings": VAR_SETTINGS, "generation": GenerationOptions(max_new_tokens=5)}
    batch = {"batch_size": 4, "num_workers": 0}
    for name in list(options):
        if name in BatchOptions.__dataclass_fields__ and name != "seed":
            batch[name] = options.pop(name)
    questions = read_questions(place / "questions.jsonl")
    plan = AnswerPlan(model_of(place), **{**chosen, **options})
    return generate_answers(questions, plan, out=out, options=BatchOptions(**batch))


def rows_of(path):
    return {row["path"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture(scope="module")
def answers(place):
    summary = run(place, place / "answers.jsonl")
    assert (summary.done, summary.failed, summary.exit_code) == (3, 3, 3)
    return rows_of(place / "answers.jsonl")


def without_times(rows):
    return {key: {**row, "seconds": None} for key, row in rows.items()}


def test_rows(answers):
    assert list(answers) == ["7", "b", "broken", "c", "gone", "long"]
    good = answers["7"]
    assert good["id"] == "7"
    assert good["prompt"] == "Is there a cat?"
    assert good["label"] == "no"
    assert good["intervention"] == "var"
    assert good["settings"]["sink_channels"] == [1, 2]
    assert good["tokens"] == 5
    errors = {key: row["error"] for key, row in answers.items() if row["status"] == "failed"}
    assert errors["gone"] == "the file does not exist"
    assert "cannot be decoded" in errors["broken"]
    assert errors["long"].endswith("more than the model's 256")


def test_the_answer_is_that_of_the_model(place, answers):
    loaded = load_vlm(model_of(place))
    prompt = "USER: <image>\nWhat colour? ASSISTANT:"
    inputs = loaded.processor(images=[Image.open(place / "b.png")], text=prompt, return_tensors="pt")
    with intervene(loaded.model, VAR(**VAR_SETTINGS)):
        ids = loaded.model.generate(**inputs, max_new_tokens=5)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert answers["b"]["answer"] == loaded.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_pipeline_of_transformers(place, answers):
    from transformers import pipeline

    loaded = load_vlm(model_of(place))
    pipe = pipeline("image-text-to-text", model=loaded.model, processor=loaded.processor, device="cpu")
    content = [{"type": "image", "image": Image.open(place / "b.png")}, {"type": "text", "text": "What colour?"}]
    with intervene(loaded.model, VAR(**VAR_SETTINGS)):
        (found,) = pipe([{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False)
    assert found["generated_text"].strip() == answers["b"]["answer"]


def test_batches_shards_and_resuming_do_not_matter(place, answers, tmp_path):
    run(place, tmp_path / "one.jsonl", batch_size=1)
    assert without_times(rows_of(tmp_path / "one.jsonl")) == without_times(answers)
    for index in (1, 2):
        run(place, tmp_path / "cut.jsonl", shard=f"{index}/2")
    assert main(["merge", str(tmp_path / "cut.jsonl")]) == 3
    assert without_times(rows_of(tmp_path / "cut.jsonl")) == without_times(answers)
    run(place, tmp_path / "part.jsonl", limit=2)
    summary = run(place, tmp_path / "part.jsonl")
    assert summary.resumed == 2
    assert without_times(rows_of(tmp_path / "part.jsonl")) == without_times(answers)
    with pytest.raises(ConfigError, match=r"other settings .*intervention: 'var' -> None"):
        run(place, tmp_path / "part.jsonl", intervention=None, settings=None)


def test_sampling_draws_for_each_question_on_its_own(place, tmp_path):
    drawn = GenerationOptions(max_new_tokens=5, temperature=2.0)
    run(place, tmp_path / "a.jsonl", generation=drawn)
    torch.manual_seed(99)
    run(place, tmp_path / "b.jsonl", generation=drawn, shard="2/2", batch_size=1)
    whole, half = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.shard2of2.jsonl")
    assert half["b"]["answer"] == whole["b"]["answer"]
    run(place, tmp_path / "c.jsonl", generation=drawn, seed=1)
    assert rows_of(tmp_path / "c.jsonl")["b"]["answer"] != whole["b"]["answer"]


def test_a_picture_of_a_hundred_megapixels(place, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    rows = [{"id": name, "image": f"{name}.png", "prompt": "What?"} for name in ("a", "huge")]
    (tmp_path / "a.png").write_bytes((place / "a.png").read_bytes())
    (tmp_path / "q.json").write_text(json.dumps(rows))
    options = BatchOptions(num_workers=0)
    questions = read_questions(tmp_path / "q.json")
    summary = generate_answers(questions, AnswerPlan(model_of(place)), out=tmp_path / "out.jsonl", options=options)
    assert (summary.done, summary.failed) == (1, 1)
    assert rows_of(tmp_path / "out.jsonl")["huge"]["error"].startswith("too many pixels for one image")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ('{"id": 1', "neither JSON Lines nor a JSON array"),
        ('[{"id": 1, "image": "a.png"}]', r"row 1 has no prompt or text; it has id, image"),
        ('{"id": 1, "image": "a", "prompt": "p"}\n{"image": "a", "prompt": "p"}', "row 2 has no id or question_id"),
        ('{"id": 1, "image": "a", "prompt": "p"}\n{"id": "1", "image": "b", "prompt": "q"}', "row 2: id '1' was there"),
        ("[3]", "row 1 is not an object"),
    ],
)
def test_questions_that_are_wrong(text, message, tmp_path):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(ConfigError, match="Cannot read the questions"):
        read_questions(tmp_path / "none.jsonl")


def test_models_that_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="local-dir:PATH or hf-hub:ORG/NAME; got 'llava'"):
        load_vlm("llava")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_vlm(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}')
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load_vlm(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(CheckpointError, match="cannot be loaded as an image-text-to-text model"):
        load_vlm(f"local-dir:{tmp_path}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingResourceError, match="pass local-dir:PATH"):
        load_vlm("hf-hub:nobody/nothing")


def test_generation_options():
    with pytest.raises(ConfigError, match="at least 1"):
        GenerationOptions(max_new_tokens=0)
    with pytest.raises(ConfigError, match="top_p above 0"):
        GenerationOptions(top_p=0.0)


class TestCommand:
    def test_one_question_under_several(self, place, capsys):
        one = ["vlm", "generate", "-m", model_of(place), "--image", str(place / "a.png"), "--prompt", "What?"]
        assert main([*one, "--max-new-tokens", "4", "--compare", "none,vhr"]) == 0
        plain, changed = capsys.readouterr().out.rstrip("\n").split("   vhr  ")
        assert plain.startswith("  none  ")
        assert "[" in changed
        assert main([*one, "--intervention", "vaf"]) == 2
        assert "VAF: layers must be indices from 0 to 3" in capsys.readouterr().err
        assert main([*one, "--compare", "none,vhr", "--set", "alpha=3"]) == 2
        assert main(["vlm", "generate", "-m", model_of(place), "--image", str(place / "a.png")]) == 2
        assert "--jsonl and -o" in capsys.readouterr().err

    def test_a_file_of_questions(self, place, tmp_path):
        many = ["vlm", "generate", "-m", model_of(place), "--jsonl", place / "questions.jsonl"]
        many += [
            "-o",
            tmp_path / "out.jsonl",
            "--intervention",
            "vhr",
            "--set",
            "layers=[1,2]",
            "--max-new-tokens",
            "3",
        ]
        result = run_cli(*many, "--json")
        assert result.returncode == 3, result.stderr
        assert json.loads(result.stdout)["done"] == 3
        assert "Loading weights" not in result.stderr
        assert rows_of(tmp_path / "out.jsonl")["c"]["settings"] == {"layers": [1, 2]}

    def test_calibrate(self, place, capsys, tmp_path):
        rows = [{"id": i, "image": "a.png", "prompt": "What is this?"} for i in range(2)]
        (place / "few.json").write_text(json.dumps(rows))
        out = tmp_path / "found.json"
        call = ["vlm", "calibrate", "-m", model_of(place), "--jsonl", str(place / "few.json"), "-o", str(out)]
        assert main([*call, "--tau", "5"]) == 0
        shown = capsys.readouterr()
        found = json.loads(shown.out)
        assert found == json.loads(out.read_text())
        assert found["sink_channels"] is None
        assert "No channel" in shown.err
        assert len(found["rise"]) == 4
        assert main([*call, "--act-heads"]) == 2
        assert "question 0 has none" in capsys.readouterr().err
        (place / "few.json").write_text(json.dumps([{**row, "reference": "A cat."} for row in rows]))
        assert main([*call, "--tau", "5", "--act-heads", "--layers", "2"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["gain"]["2"]) == 4
        assert found["heads"].get("2", []) == [head for head, gain in enumerate(found["gain"]["2"]) if gain > 0]
