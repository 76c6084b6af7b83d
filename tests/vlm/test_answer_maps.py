"""Where the words of an answer looked: the figures, the place in the picture, the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.apps.cli import main
from saccade.errors import ConfigError
from saccade.vlm import (
    GIFT,
    VAR,
    VHR,
    Answerer,
    GenerationOptions,
    ImageGrid,
    Question,
    compare_answer,
    draw_answer_maps,
    find_image_grid,
    load_vlm,
    map_answer,
    seen_picture,
)
from saccade.vlm.answer_maps import answer_words
from saccade.vlm.answer_pictures import shown_words
from tests.vlm.test_intervene import SquareTensors
from tests.vlm.tiny_folder import write_tiny_llava
from tests.vlm.tiny_models import tiny

LAST = 3
EVERY_HEAD = {"tau": 1.5, "min_nonsink_share": 0.0, "min_visual_mass": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    write_tiny_llava(folder / "llava")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return load_vlm(f"local-dir:{place / 'llava'}")


def asked(place, loaded, *methods, **settings):
    question = Question("q", "a.png", "What is this?", place / "a.png")
    answerer = Answerer(loaded, methods, GenerationOptions(max_new_tokens=9))
    return answerer, question, Image.open(place / "a.png").convert("RGB")


def test_var_in_the_last_layer_moves_just_what_it_says(place, loaded):
    """What enters the last layer does not depend on what happens there, so both maps are of the same attention."""
    var = VAR(sink_channels=(1, 2, 3), move_fraction=0.6, layers=(LAST,), last_layer=True, **EVERY_HEAD)
    maps = compare_answer(*asked(place, loaded, var), layers=(LAST,))
    before, after = maps["none"], maps["var"]
    sinks = before.sinks
    assert 0 < int(sinks.sum()) < 16
    assert before.sink_rule == after.sink_rule == "channels"
    torch.testing.assert_close(after.weights[:, sinks], 0.4 * before.weights[:, sinks])
    grown = after.weights[:, ~sinks] / before.weights[:, ~sinks]
    assert (grown > 1).all()
    assert after.image_share > before.image_share
    assert after.sink_share == pytest.approx(0.4 * before.sink_share, rel=1e-4)


def test_maps_of_an_answer_and_of_the_same_words_forced(place, loaded):
    own = map_answer(*asked(place, loaded))
    (answer,) = asked(place, loaded)[0].answer(*([entry] for entry in asked(place, loaded)[1:]))
    assert own.text == answer.text
    assert own.weights.shape == (9, 16)
    assert own.layers == (1, 2)
    forced = map_answer(*asked(place, loaded), token_ids=own.token_ids)
    torch.testing.assert_close(forced.weights, own.weights)
    neutral = map_answer(*asked(place, loaded, VHR(alpha=1.0)), token_ids=own.token_ids)
    torch.testing.assert_close(neutral.weights, own.weights, rtol=1e-4, atol=1e-5)
    gift = GIFT((1,), (0, 1, 2), 2.0, content_tokens="all")  # the prompt is divided before its last token
    assert not torch.allclose(map_answer(*asked(place, loaded, gift)).weights[0], own.weights[0], atol=1e-3)
    assert "saccade_engine" not in vars(loaded.model.model.language_model.layers[0].self_attn)


def test_no_attention_map_of_the_prompt_exists(place, loaded):
    answerer, question, image = asked(place, loaded, VHR())
    length = answerer.inputs([question], [image])["input_ids"].shape[1]
    with SquareTensors(length) as mode:
        map_answer(answerer, question, image)
    assert not mode.found


def test_what_cannot_be_mapped(place, loaded):
    answerer, question, image = asked(place, loaded)
    with pytest.raises(ConfigError, match="layers must be indices from 0 to 3"):
        map_answer(answerer, question, image, layers=(4,))
    beams = Answerer(loaded, [], GenerationOptions(num_beams=2))
    with pytest.raises(ConfigError, match="set num_beams to 1"):
        map_answer(beams, question, image)


def test_words_and_their_tokens():
    pieces = {1: "A", 2: " red", 3: " cu", 4: "p.", 5: " "}
    tokenizer = SimpleNamespace(all_special_ids=[0], decode=lambda ids, **options: "".join(pieces[i] for i in ids))
    text, words, tokens = answer_words(tokenizer, torch.tensor([1, 2, 3, 4, 5, 0]))
    assert text == "A red cup."
    assert words == ("A", "red", "cup.")
    assert tokens == ((0,), (1,), (2, 3))
    assert answer_words(tokenizer, torch.tensor([0]))[1:] == ((), ())
    assert shown_words(("There", "is", "a", "red", "cup."), 5) == [3, 4]
    assert shown_words(("It", "is."), 1) == [0]


class TestGrid:
    @pytest.mark.parametrize(
        ("family", "grid"),
        [
            ("llava", ImageGrid(4, 4)),
            ("llava_next", ImageGrid(4, 4)),
            ("qwen2_vl", ImageGrid(4, 4)),
            ("gemma3", ImageGrid(2, 2)),
        ],
    )
    def test_of_families(self, family, grid):
        found = tiny(family)
        visual = sum(token == 119 for token in found.visual)
        assert find_image_grid(found.inputs([11]), found.model, visual) == grid

    def test_oblong(self):
        found = tiny("qwen2_vl")
        wide = {"image_grid_thw": torch.tensor([[1, 4, 12]])}
        assert find_image_grid(wide, found.model, 12) == ImageGrid(2, 6)
        assert ImageGrid(2, 2, first=1).cells(torch.arange(6)).tolist() == [[1, 2], [3, 4]]

    def test_unknown_ones(self):
        with pytest.raises(ConfigError, match="have no place in the picture"):
            find_image_grid(tiny("blip_2").inputs([11]), tiny("blip_2").model, 6)
        with pytest.raises(ConfigError, match="--grid ROWSxCOLUMNS"):
            find_image_grid(tiny("idefics3").inputs([11]), tiny("idefics3").model, 8)
        with pytest.raises(ConfigError, match="2 x 4 tokens from token 1 on does not fit into the 8"):
            ImageGrid(2, 4, 1).check(8)


def test_picture(place, loaded):
    maps = compare_answer(*asked(place, loaded, VHR()))
    inputs = maps["vhr"].inputs
    image = Image.open(place / "a.png").convert("RGB")
    view = seen_picture(inputs, loaded.processor, image, ImageGrid(4, 4))
    assert view.size == (16, 16)  # the middle of 24 x 16 pixels
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC), dtype=float)[:, 4:20]
    assert np.abs(np.asarray(view, dtype=float) - expected).mean() < 2
    drawn = draw_answer_maps(view, maps, ImageGrid(4, 4), words=2, title="50 $ or $x^2$?")
    one = draw_answer_maps(view, {"none": maps["none"]}, ImageGrid(4, 4), words=0)
    assert drawn.width > 1.5 * one.width
    assert drawn.height > 1.5 * one.height
    marked = np.zeros(16, dtype=bool)
    marked[3] = True
    crossed = {"none": SimpleNamespace(**{**facts_of(maps["none"]), "sinks": torch.from_numpy(marked)})}
    blue = np.asarray(draw_answer_maps(view, crossed, ImageGrid(4, 4), words=0)).astype(int)
    rows, columns = np.nonzero((blue[..., 1] > 200) & (blue[..., 2] > 230) & (blue[..., 0] < 60))
    assert columns.min() > 0.6 * blue.shape[1]  # the token in the upper right corner
    assert rows.max() < 0.5 * blue.shape[0]
    with pytest.raises(ConfigError, match="the same words"):
        draw_answer_maps(view, {**maps, "other": SimpleNamespace(words=("x",))}, ImageGrid(4, 4))


def facts_of(maps):
    names = ("words", "weights", "word_weights", "mean_weights", "image_share")
    return {name: getattr(maps, name) for name in names}


class TestCommand:
    def test_a_file_of_questions_again_and_with_a_broken_picture(self, place, tmp_path, capsys):
        rows = [
            {"id": name, "image": image, "prompt": "What?"} for name, image in (("a/1", "a.png"), ("b", "broken.png"))
        ]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        call = ["vlm", "attend", "-m", f"local-dir:{place / 'llava'}", "--jsonl", tmp_path / "q.jsonl"]
        call += [
            "--image-folder",
            place,
            "-o",
            tmp_path / "out",
            "--intervention",
            "vhr",
            "--max-new-tokens",
            "3",
            "--json",
        ]
        assert main(list(map(str, call))) == 3
        assert json.loads(capsys.readouterr().out)["done"] == 1
        assert main(list(map(str, call))) == 3  # goes on where it stopped: with the broken picture
        assert "resume: 1 already done" in capsys.readouterr().err
        table = [json.loads(line) for line in (tmp_path / "out/attend.jsonl").read_text().splitlines()]
        good, bad = table
        assert good["picture"] == "a%2F1.png"
        with Image.open(tmp_path / "out" / good["picture"]) as picture:
            assert picture.width > 300
        assert 0 < good["image_share_before"] < 1
        assert good["intervention"] == "vhr"
        assert bad["status"] == "failed"

    def test_one_question(self, place, tmp_path, capsys):
        call = ["vlm", "attend", "-m", f"local-dir:{place / 'llava'}", "--image", str(place / "a.png")]
        call += ["--prompt", "What?", "--max-new-tokens", "3", "--layers", "0,3", "-o", str(tmp_path / "out"), "-q"]
        assert main(call) == 0
        assert (tmp_path / "out" / "a.png").exists()
        assert json.loads((tmp_path / "out/attend.jsonl").read_text())["layers"] == [0, 3]
        assert main([*call, "--grid", "5x5", "--overwrite"]) == 2
        assert "5 x 5 tokens from token 0 on does not fit into the 16" in capsys.readouterr().err
        assert main([*call, "--grid", "5", "--overwrite"]) == 2
        assert main([*call, "--jsonl", "q.jsonl", "--overwrite"]) == 2
        assert main([*call, "--num-beams", "2", "--overwrite"]) == 2
        assert "num_beams" in capsys.readouterr().err
