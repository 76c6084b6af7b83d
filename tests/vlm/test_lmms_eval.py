"""The model for lmms-eval: requests as its tasks make them, and its registry where the package is installed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from saccade.errors import ConfigError
from saccade.vlm import VHR, Answerer, GenerationOptions, Question, load_vlm
from saccade.vlm.lmms_eval import answer_requests, cut
from tests.vlm.tiny_folder import write_tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("lmms") / "llava")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30), dtype=np.uint8))


RECORDS = {"pope": {"test": [{"image": picture(i)} for i in range(3)]}}


def request(record, prompt, **arguments):
    return SimpleNamespace(args=(prompt, arguments, lambda row: [row["image"]], record, "pope", "test"))


def test_requests_are_answered_in_their_order_each_in_its_way(folder):
    answerer = Answerer(load_vlm(f"local-dir:{folder}"), [VHR()], GenerationOptions(max_new_tokens=5))
    requests = [
        request(0, "Is there a cat?", max_new_tokens=3, until=["\n\n"]),
        request(1, "And a dog?", temperature=0),
        request(2, "Really?", max_new_tokens=3, until=["\n\n"]),
    ]
    got = answer_requests(answerer, requests, RECORDS, batch_size=2)
    for place, (asked, count) in enumerate(zip(requests, (3, 5, 3), strict=True)):
        question = Question("x", "x", asked.args[0], Path("x"))
        alone = Answerer(answerer.loaded, [VHR()], GenerationOptions(max_new_tokens=count))
        (answer,) = alone.answer([question], [picture(place).convert("RGB")])
        assert got[place] == answer.text.split("\n\n")[0]
    several = SimpleNamespace(args=("?", {}, lambda row: [], 0, "pope", "test"))
    with pytest.raises(ConfigError, match=r"record 0: .* about one picture; got 0 visuals"):
        answer_requests(answerer, [several], RECORDS)
    assert cut("yes. no\n", ["\n", "."]) == "yes"


def test_registry(folder):
    registry = pytest.importorskip("lmms_eval.models.registry_v2", reason="lmms-eval is not installed")
    from saccade.vlm.lmms_eval import manifest

    found = registry.ModelRegistryV2()
    found.register_manifest(manifest())
    kind = found.get_model_class("saccade")
    model = kind.create_from_arg_string(f"pretrained=local-dir:{folder},intervention=vhr", {"batch_size": 2})
    model.task_dict = RECORDS
    (answer,) = model.generate_until([request(0, "Is there a cat?", max_new_tokens=4)])
    assert isinstance(answer, str)
    with pytest.raises(ConfigError, match="has no colour"):
        kind.create_from_arg_string(f"pretrained=local-dir:{folder},colour=red")
