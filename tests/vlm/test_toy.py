"""The toy model of ``python -m benchmarks train_vlm_toy``: scenes carry their prior, training fits the prompts."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.toy_scenes import (
    CAPTION_PROMPT,
    OBJECTS,
    PAIRS,
    SIZE,
    caption,
    draw_scenes,
    glyph,
    make_scenes,
    partner,
    patch_labels,
    question,
    questions,
    words,
)
from benchmarks.toy_vlm import Recipe, Turns, answer_loss, make_model, make_processor, packed, pixels
from saccade.vlm.evaluation import ObjectFinder

FINDER = ObjectFinder(synonyms=[[name] for name in OBJECTS], phrases={})


@pytest.mark.parametrize("together", [0.0, 0.5, 0.95])
def test_halves_of_a_pair_come_together_as_often_as_asked(together):
    scenes = make_scenes([0], 2000, together)
    groups = [sum(name in scene.objects for name in pair) for scene in scenes for pair in PAIRS]
    there = Counter(groups)
    assert there[2] / (there[1] + there[2]) == pytest.approx(together, abs=0.03)
    halves = Counter(name for scene in scenes for name in scene.lonely)
    if together < 0.9:  # neither half is the one that is left more often
        for first, second in PAIRS:
            assert halves[first] / (halves[first] + halves[second]) == pytest.approx(0.5, abs=0.25)


def test_scenes_repeat_and_depend_on_their_seed():
    first, again, other = (make_scenes([seed, 1], 20, 0.5) for seed in (3, 3, 4))
    assert first == again != other
    assert (draw_scenes([3, 1], first) == draw_scenes([3, 1], again)).all()
    assert (draw_scenes([3, 1], first) != draw_scenes([4, 1], first)).any()


def test_objects_lie_where_the_labels_say():
    for scene in make_scenes([5], 50, 0.9):
        names, colours = patch_labels(scene, 8)
        assert len(names) == (SIZE // 8) ** 2
        assert Counter(OBJECTS[i - 1] for i in names if i) == {name: 4 for name in scene.objects}
        assert ((names > 0) == (colours > 0)).all()
    plain = draw_scenes([6], [make_scenes([6], 1, 1.0, (2,))[0]])[0].astype(float)
    labels = patch_labels(make_scenes([6], 1, 1.0, (2,))[0], 8)[0].reshape(SIZE // 8, -1)
    bright = plain.max(-1).reshape(SIZE // 8, 8, SIZE // 8, 8).mean((1, 3))
    assert bright[labels > 0].mean() > bright[labels == 0].mean() + 10


def test_shapes_differ():
    shapes = {name: glyph(name) > 0 for name in OBJECTS}
    for one in OBJECTS:
        assert 0.1 < shapes[one].mean() < 0.7
        for other in OBJECTS:
            if one != other:
                union = (shapes[one] | shapes[other]).sum()
                assert (shapes[one] & shapes[other]).sum() < 0.75 * union


def test_captions_name_all_objects_and_partners_one_after_the_other():
    generator = np.random.default_rng(0)
    for scene in make_scenes([1], 200, 0.95):
        text = caption(scene, generator)
        found = FINDER.find(text.split(".")[0])
        assert sorted(found.classes) == sorted(scene.objects)
        assert set(FINDER.find(text).classes) == set(scene.objects)
        for name in scene.objects:
            if name not in scene.lonely:
                here, there = found.classes.index(name), found.classes.index(partner(name))
                assert abs(here - there) == 1
        assert set(text.lower().replace(",", " ,").replace(".", " .").split()) <= set(words())


def test_questions_are_half_yes_and_right():
    generator = np.random.default_rng(0)
    for scene in make_scenes([2], 100, 0.95):
        asked = questions(scene, generator, 4)
        assert Counter(label for _, label in asked) == {"Yes.": 2, "No.": 2}
        for text, label in asked:
            name = next(name for name in OBJECTS if text == question(name))
            assert (name in scene.objects) == (label == "Yes.")


def test_a_packed_turn_is_what_a_prompt_is():
    """Each of several turns about an image has the loss that the stock model gives to it alone."""
    recipe = Recipe(width=32, eye_layers=1, layers=2, heads=2)
    processor = make_processor(recipe)
    torch.manual_seed(0)
    model = make_model(recipe, processor.tokenizer).eval()
    scene = make_scenes([1], 1, 0.5)[0]
    image = draw_scenes([1], [scene])
    turns = Turns(processor)
    asked = [(CAPTION_PROMPT, caption(scene, np.random.default_rng(0))), *questions(scene, np.random.default_rng(0), 2)]
    tokens = processor.tokenizer
    visual = (SIZE // recipe.patch) ** 2
    first = [*tokens.convert_tokens_to_ids(["<s>", "<user>"]), *[model.config.image_token_id] * visual]
    with torch.no_grad():
        features = model.model.multi_modal_projector(model.model.vision_tower(pixels(image)).last_hidden_state[:, 1:])
        ids, targets, places, mask = packed([[turns.of(*one) for one in asked]], first, tokens.pad_token_id)
        embedded = model.get_input_embeddings()(ids)
        embedded[:, 2 : 2 + visual] = features
        together = answer_loss(model, embedded, targets, places, mask)
        alone, count = 0.0, 0
        for prompt, said in asked:
            turn = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
            ]
            text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            inputs = processor(images=[Image.fromarray(image[0])], text=text, return_tensors="pt")
            assert torch.allclose(inputs["pixel_values"], pixels(image), atol=1e-5)
            answer = torch.tensor([tokens(f"{said}</s>", add_special_tokens=False)["input_ids"]])
            whole = torch.cat([inputs["input_ids"], answer], 1)
            logits = model(input_ids=whole, pixel_values=inputs["pixel_values"]).logits
            scores = logits[:, inputs["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
            alone -= float(scores.gather(2, answer[..., None]).sum())
            count += answer.shape[1]
    assert float(together) == pytest.approx(alone / count, rel=1e-4)


@pytest.mark.slow
def test_the_whole_study_at_the_smallest_size(tmp_path, capsys):
    """Train, choose, answer, report; a second call does nothing again and reports the same."""
    from benchmarks import train_vlm_toy

    recipe = Recipe(
        scenes=32,
        eye_scenes=32,
        eye_steps=2,
        language_steps=2,
        joint_steps=2,
        batch=8,
        width=64,
        eye_layers=1,
        layers=4,
    )
    study = train_vlm_toy.Study(recipe, seeds=(0, 1), calibration=4, test=6, part=3)
    train_vlm_toy.run(study, tmp_path / "runs", tmp_path / "first.json", tmp_path)
    printed = capsys.readouterr().out
    (tmp_path / "runs" / "seed1" / "answers1.json").unlink()
    train_vlm_toy.run(study, tmp_path / "runs", tmp_path / "again.json", tmp_path)
    first, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "again"))
    assert "against greedy" in printed
    assert 0 < (tmp_path / "vlm-toy.png").stat().st_size < 200_000
    names = [row["method"] for row in first["rows"]]
    assert names[0] == "greedy"
    assert {"GIFT", "VHR", "PAI", "VAF", "ACT", "VCD", "guidance", "GIFT + VCD"} <= set(names)
    for one, other in zip(first["rows"], again["rows"], strict=True):
        assert one["scores"] == other["scores"]
        assert all(0 <= p["p_holm"] <= 1 for p in one.get("against_greedy", {}).values())
