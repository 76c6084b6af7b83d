"""Prediction on image files, pictures of paths, features of objects: through the command line and the functions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.apps.cli import main
from saccade.batch import BatchOptions
from saccade.datasets import save_scenes, search_scenes
from saccade.errors import CheckpointError, ConfigError, DataError
from saccade.gaze import (
    FeatureFile,
    ObjectBoxes,
    ObjectEncoder,
    Scanpath,
    ScanpathSet,
    animate_scanpath,
    draw_heatmap,
    draw_scanpaths,
    fixation_map,
    predict_scanpaths,
    read_boxes,
)
from saccade.gaze.formats import read_scanpaths, write_scanpaths
from saccade.gaze.object_boxes import boxes_by_detector, find_target
from saccade.gaze.object_features import clip_text_features
from saccade.gaze.prediction import Query, Strategy
from tests.gaze.oat_cases import small_oat
from tests.helpers import assert_close, run_cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write drawn scenes, their boxes, human paths, and a model that was never trained."""
    place = tmp_path_factory.mktemp("gaze")
    scenes, paths = search_scenes(3, viewers=2)
    write_scanpaths(paths, place / "human.csv")
    save_scenes(scenes, place / "scenes")
    (place / "scenes" / "boxes.csv").rename(place / "boxes.csv")
    save_model(place / "crops.ckpt", seen="crops", pyramid_levels=2, num_viewers=2)
    return place


def save_model(path: Path, *, encoder: str = "means", **options: object) -> None:
    """Write what ``saccade fit`` leaves of a model."""
    shape = {"width": 48, "position_rows": 8, "readout_scale": 1.0, **options}
    model = small_oat(**shape)
    names = {"heads": 2, "hidden": 16, "encoder_layers": 1, "decoder_layers": 2, **shape}
    features = {"kind": shape.get("seen", "nothing"), "crop_size": 24}
    if "feature_dim" in shape:
        features["encoder"] = encoder
    facts = {"task": "gaze", "options": names, "viewers": ["1", "2"], "max_length": 6, "features": features}
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"saccade": facts, "state_dict": state}, path)


def predict(folder: Path, out: Path, **options: object):
    """Predict with the crop model on the folder's scenes."""
    boxes = read_boxes(folder / "boxes.csv")
    return predict_scanpaths(
        folder / "scenes", **({"model": folder / "crops.ckpt", "boxes": boxes, "out": out} | options)
    )


def test_command_writes_a_row_per_fixation(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    inputs, queries = [folder / "scenes", tmp_path / "broken.png"], folder / "scenes" / "queries.csv"
    options = ["--boxes", folder / "boxes.csv", "--samples", "4", "--json", "--queries", queries]
    done = run_cli("gaze", "predict", *inputs, "-m", folder / "crops.ckpt", "-o", tmp_path / "paths.csv", *options)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["done"] == 3
    assert "broken.png  failed" in done.stderr
    paths = read_scanpaths(tmp_path / "paths.csv")
    assert len(paths) == 12
    scenes = {scene.name: scene for scene in search_scenes(3)[0]}
    for path in paths:
        scene = scenes[Path(path.image).name]
        middle = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
        assert np.array_equal(np.stack([path.x, path.y], -1), middle[path.objects])
        assert (path.target_object, path.width) == (scene.target, scene.image.width)
        assert path.task == scene.task


def test_results_depend_on_no_other_image_and_survive_interruption(folder, tmp_path):
    whole = predict(folder, tmp_path / "whole.csv", strategy=Strategy(paths=3))
    one = sorted((folder / "scenes").iterdir())[1]
    boxes = read_boxes(folder / "boxes.csv")
    options = {"model": folder / "crops.ckpt", "boxes": boxes, "strategy": Strategy(paths=3)}
    journal = tmp_path / "whole.items.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], lines[2]]) + "\n")  # as if the second had not been reached
    again = predict(folder, tmp_path / "whole.csv", strategy=Strategy(paths=3))
    assert (whole.done, again.done, again.resumed) == (3, 3, 2)
    assert journal.read_text().splitlines()[1].partition('"seconds"')[2].partition('"row"')[2] in lines[1]
    with pytest.raises(ConfigError, match=r"other settings.*strategy"):
        predict(folder, tmp_path / "whole.csv", strategy=Strategy(kind="greedy"))
    (tmp_path / "mine.csv").write_text("precious")
    with pytest.raises(ConfigError, match="no run of saccade wrote it"):
        predict_scanpaths(one, out=tmp_path / "mine.csv", **options)
    assert (tmp_path / "mine.csv").read_text() == "precious"


@pytest.mark.parametrize("suffix", [".csv", ".h5"])
def test_shards_unite_to_what_one_run_writes(folder, tmp_path, capsys, suffix):
    strategy = Strategy(paths=2)
    predict(folder, tmp_path / f"whole{suffix}", strategy=strategy)
    for shard in ("1/2", "2/2"):
        predict(folder, tmp_path / f"parts{suffix}", strategy=strategy, options=BatchOptions(shard=shard))
    assert main(["merge", str(tmp_path / f"parts{suffix}")]) == 0
    assert "done 3  failed 0   united in" in capsys.readouterr().err
    whole, parts = (read_scanpaths(tmp_path / f"{name}{suffix}") for name in ("whole", "parts"))
    for column in ("image", "subject", "sample", "x", "y", "objects", "target_object", "offsets"):
        np.testing.assert_array_equal(getattr(whole, column), getattr(parts, column))


@pytest.mark.parametrize("kind", ["greedy", "beam", "sample"])
def test_strategies_keep_what_they_promise(folder, tmp_path, kind):
    strategy = Strategy(kind=kind, paths=3, max_length=4, viewer="2", inhibition=0 if kind == "beam" else 4)
    predict(folder, tmp_path / "paths.h5", strategy=strategy, queries=Query(target="1", task="find it"))
    paths = read_scanpaths(tmp_path / "paths.h5")
    assert len(paths) == (3 if kind == "greedy" else 9)
    assert set(paths.subject) == {"2"}
    assert set(paths.task) == {"find it"}
    for path in paths:
        assert len(path) <= 4
        assert kind == "beam" or len(set(path.objects.tolist())) == len(path)
        assert path.meta["log_prob"] < 0


def test_unknown_viewer_target_and_checkpoint(folder, tmp_path):
    with pytest.raises(ConfigError, match="does not know viewer '7'"):
        predict(folder, tmp_path / "a.csv", strategy=Strategy(viewer="7"))
    summary = predict(folder, tmp_path / "b.csv", queries=Query(target="nosuch"))
    assert (summary.done, summary.failed) == (0, 3)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="was not written by"):
        predict(folder, tmp_path / "c.csv", model=tmp_path / "other.ckpt")


def test_targets_by_label_index_and_box():
    objects = ObjectBoxes(torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]), ["cup", "", "cup"])
    assert find_target(objects, "1") == 1
    assert find_target(objects, "22, 1, 60, 9") == 2
    for wrong, message in (("cup", "2 objects are labelled"), ("3", "an index from 0 to 2"), ("90,0,99,9", "overlaps")):
        with pytest.raises(DataError, match=message):
            find_target(objects, wrong)


def test_encoder_of_training_is_asked_for(folder, tmp_path):
    save_model(tmp_path / "model.ckpt", seen="features", feature_dim=3)
    config = {"input_size": (3, 8, 8), "mean": [0.0] * 3, "std": [1.0] * 3}
    encoder = ObjectEncoder(lambda crops: crops.mean((2, 3)), config, name="means")
    with pytest.raises(ConfigError, match="trained on features of 'means': pass that encoder"):
        predict(folder, tmp_path / "a.csv", model=tmp_path / "model.ckpt")
    other = ObjectEncoder(encoder.function, config, name="other")
    with pytest.raises(ConfigError, match="got the encoder 'other'"):
        predict(folder, tmp_path / "a.csv", model=tmp_path / "model.ckpt", encoder=other)
    words = Query(task="a red thing", features=torch.tensor([1.0, 0.0, 0.0]))
    summary = predict(folder, tmp_path / "a.csv", model=tmp_path / "model.ckpt", encoder=encoder, queries=words)
    assert summary.done == 3


def test_feature_file_goes_with_its_boxes(tmp_path):
    boxes, features = torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([[1.0, 2.0]])
    FeatureFile.write(tmp_path / "f.h5", {"a/b.png": (boxes, features)}, encoder="means")
    file = FeatureFile(tmp_path / "f.h5")
    assert file.encoder == "means"
    assert torch.equal(file("a/b.png", boxes), features)
    with pytest.raises(DataError, match=r"no features of 'c\.png'"):
        file("c.png", boxes)
    with pytest.raises(DataError, match="features of other boxes"):
        file("a/b.png", boxes + 3)


def test_features_command_feeds_training(folder, tmp_path, capsys):
    options = ["--boxes", folder / "boxes.csv", "--encoder", "test_resnet", "--random-weights", "-o", tmp_path / "f.h5"]
    assert main(["gaze", "features", *map(str, [folder / "scenes", *options])]) == 0
    assert "96 numbers each by test_resnet" in capsys.readouterr().out
    boxes = read_boxes(folder / "boxes.csv")("scene-0000.png", Image.new("RGB", (9, 9))).boxes
    features = FeatureFile(tmp_path / "f.h5")("scene-0000.png", boxes)
    assert features.shape == (len(boxes), 96)
    assert features.std(0).max() > 0


def test_table_of_boxes_is_checked(tmp_path):
    (tmp_path / "b.csv").write_text("image,x1,y1,x2\na,1,2,3\n")
    with pytest.raises(ConfigError, match="lacks the columns y2"):
        read_boxes(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("image,x1,y1,x2,y2\na,1,2,3,four\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_boxes(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("image,x1,y1,x2,y2\na.png,1,2,3,4\n")
    with pytest.raises(DataError, match=r"no boxes of 'aa\.png'.* Did you mean 'a\.png'"):
        read_boxes(tmp_path / "b.csv")("aa.png", Image.new("RGB", (9, 9)))


def test_plot_command(folder, tmp_path, capsys):
    image, human = str(folder / "scenes" / "scene-0001.png"), str(folder / "human.csv")
    assert main(["gaze", "plot", image, "--scanpath", human, "--truth", human, "-o", str(tmp_path / "both.png")]) == 0
    assert capsys.readouterr().out.strip().endswith("scene-0001.png, 2 human, 2 model")
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.width > 2 * 700
    assert main(["gaze", "plot", image, "--scanpath", human, "--name", "x.png", "-o", str(tmp_path / "x.png")]) == 2
    assert "no such path on 'x.png'" in capsys.readouterr().err


def one_path(**options: object) -> ScanpathSet:
    """Return one path on an image of 60 x 40 px."""
    return ScanpathSet.from_paths([Scanpath("a.png", [10.0, 50.0], [10.0, 30.0], **options)])


def test_fixations_are_drawn_where_they_are():
    grey = Image.new("RGB", (60, 40), (128, 128, 128))
    picture = np.asarray(draw_scanpaths(grey, [("title", one_path())]), np.int64)
    changed = np.abs(picture[30:] - 128).sum(-1) > 60  # below the title
    rows, columns = np.nonzero(changed)
    scale = picture.shape[1] / 60
    assert abs(columns.min() / scale - 9) < 2
    assert abs(columns.max() / scale - 51) < 2
    assert abs(rows.max() / scale - 31) < 2
    with pytest.raises(DataError, match="recorded at 600 x 400 px, the image has 60 x 40"):
        draw_scanpaths(grey, [("title", one_path(width=600, height=400))])


def test_fixation_map_weighs_by_duration():
    density = fixation_map(one_path(duration=[0.1, 0.3]), (60, 40), sigma=2.0)
    assert_close(torch.tensor(density.sum()), torch.tensor(1.0, dtype=torch.float64))
    assert density[30, 50] == pytest.approx(3 * density[10, 10], rel=1e-6)
    picture = np.asarray(draw_heatmap(Image.new("RGB", (60, 40), (255, 255, 255)), one_path()))
    assert picture[20, 30].tolist() == [255, 255, 255]
    assert picture[10, 10].tolist() != [255, 255, 255]
    with pytest.raises(DataError, match="No fixation lies inside"):
        fixation_map(one_path(), (5, 5), sigma=1.0)


def test_animation_lasts_as_long_as_the_fixations(tmp_path):
    animate_scanpath(Image.new("RGB", (60, 40)), one_path(duration=[0.2, 0.4])[0], tmp_path / "a.gif", speed=2.0)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 2
        durations = []
        for frame in range(2):
            animation.seek(frame)
            durations.append(animation.info["duration"])
    assert durations == [100, 1200]  # the last one stays a second longer
    with pytest.raises(ConfigError, match=r"written as \.gif or \.mp4"):
        animate_scanpath(Image.new("RGB", (6, 4)), one_path()[0], tmp_path / "a.png")


def test_film_shows_each_fixation_for_its_duration(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = one_path(duration=[0.2, 0.01])[0]  # the second is shorter than a frame, and stays a second longer
    animate_scanpath(Image.new("RGB", (61, 40), (128, 128, 128)), path, tmp_path / "a.mp4")
    film = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert film.get(cv2.CAP_PROP_FPS) == 25
    frames = []
    while (read := film.read())[0]:
        frames.append(read[1].astype(int))
    assert len(frames) == 5 + 25
    scale = 720 / 61
    second = np.s_[int(28 * scale) : int(32 * scale), int(48 * scale) : int(52 * scale)]
    shown = [np.abs(frame[second] - 128).max() > 60 for frame in frames]
    assert shown == [False] * 5 + [True] * 25
    assert frames[-1][second][..., 2].mean() > frames[-1][second][..., 0].mean()  # orange, in BGR
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_batches_and_precision(folder, tmp_path):
    options = {"strategy": Strategy(paths=5)}
    for size in (1, 2, 32):
        predict(
            folder, tmp_path / f"{size}.csv", options=BatchOptions(batch_size=size, num_workers=size % 2), **options
        )
    assert (tmp_path / "1.csv").read_text() == (tmp_path / "2.csv").read_text() == (tmp_path / "32.csv").read_text()
    summary = predict(folder, tmp_path / "half.csv", options=BatchOptions(precision="bf16"), **options)
    assert summary.done == 3


def test_target_in_words_needs_clip():
    with pytest.raises(ConfigError, match="needs an open_clip encoder, the model was trained with 'resnet18'"):
        clip_text_features("resnet18", ["a mug"])
    with pytest.raises(ConfigError, match=r"Unknown open_clip model 'ViT-S-32-alto'.* Did you mean 'ViT-S-32-alt'"):
        clip_text_features("open_clip:ViT-S-32-alto", ["a mug"])
    with pytest.raises(ConfigError, match="names no weights: add a tag"):
        clip_text_features("open_clip:ViT-S-32-alt", ["a mug"])


@pytest.mark.slow
def test_target_in_words_is_the_text_tower(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    features = clip_text_features("open_clip:ViT-S-32-alt", ["a mug", "a cup"], weights=str(tmp_path / "clip.pt"))
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer("ViT-S-32-alt")(["a mug", "a cup"])
        assert_close(features, model.encode_text(tokens, normalize=True))


@pytest.mark.slow
def test_detector_finds_boxes_inside_the_image(tmp_path):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    image = search_scenes(1)[0][0].image
    found = boxes_by_detector(tmp_path / "detector.pth", threshold=0.0)("a.png", image).boxes
    assert (found >= 0).all()
    assert (found[:, 2] <= image.width).all()
    with pytest.raises(DataError, match="finds no object"):
        boxes_by_detector(tmp_path / "detector.pth", threshold=1.0)("a.png", image)


@pytest.mark.slow
def test_command_with_words_and_a_detector(folder, tmp_path):
    """The whole way: detected boxes, CLIP features of their crops, a target described in words."""
    import open_clip
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    clip, name = open_clip.create_model("ViT-S-32-alt").eval(), "open_clip:ViT-S-32-alt"
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    width = clip.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(["a"])).shape[-1]
    save_model(tmp_path / "model.ckpt", encoder=name, seen="features", feature_dim=width, position_rows=64, width=384)
    found = {}
    for text in ("mug", "a red circle"):
        out = tmp_path / f"{text}.h5"
        objects = ["--detector-weights", tmp_path / "detector.pth", "--detector-threshold", "0"]
        words = ["--task-text", text, "--encoder", name, "--encoder-weights", tmp_path / "clip.pt"]
        options = [*objects, *words, "-m", tmp_path / "model.ckpt", "--sampling", "greedy", "-o", out]
        assert main(["gaze", "predict", *map(str, [folder / "scenes" / "scene-0000.png", *options])]) == 0
        (path,) = read_scanpaths(out)
        assert (path.task, path.target_object) == (text, None)
        found[text] = path.meta["log_prob"]
    assert found["mug"] != found["a red circle"]
