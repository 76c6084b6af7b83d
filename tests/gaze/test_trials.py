"""Recordings become scenes with paths, and decoded paths become recordings."""

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.datasets.drawn_search import search_scenes
from saccade.errors import ConfigError, DataError
from saccade.gaze import Scanpath, ScanpathSet, cut_crops, object_saliency, spectral_residual
from saccade.gaze.decoding import DecodedPaths
from saccade.gaze.scenes import box_positions, grid_boxes, parse_grid
from saccade.gaze.trials import collate_trials, lay_grid, scanpaths_of, scene_of, trials_of
from tests.helpers import assert_close


def test_trials_keep_every_path_and_its_viewer():
    paths = search_scenes(5, viewers=3)[1]
    trials = trials_of(paths)
    scenes, objects, viewers = collate_trials(trials, viewers=["1", "3"])
    assert [trial.image for trial in trials] == [f"scene-{i:04d}.png" for i in range(5)]
    assert objects.shape[:2] == (5, 3)
    for row, record in enumerate(paths):
        path = objects[row // 3, row % 3]
        assert path[path >= 0].tolist() == record.objects.tolist()
        assert scenes.target[row // 3] == record.target_object
    assert viewers.tolist() == [[0, -1, 1]] * 5


def test_decoded_paths_go_back_and_forth():
    paths = search_scenes(4, viewers=2)[1]
    trials = trials_of(paths)
    _, objects, _ = collate_trials(trials)
    lengths = (objects >= 0).sum(-1)
    decoded = DecodedPaths(objects, lengths, torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool))
    back = scanpaths_of(decoded, trials, viewers=["1", "2"])
    assert back.objects.tolist() == paths.objects.tolist()
    assert back.subject.tolist() == paths.subject.tolist()
    again = collate_trials(trials_of(back))[1]
    assert torch.equal(again, objects)


def test_grid_cells_as_objects():
    box = np.array([150.0, 10.0, 190.0, 40.0])
    record = Scanpath("a", [0, 99, 100, 299, 350], [0, 49.9, 50, 99, -5], width=300, height=100, target_box=box)
    (laid,) = lay_grid(ScanpathSet.from_paths([record]), 2, 3)
    assert laid.objects.tolist() == [0, 0, 4, 5, 2]
    assert laid.target_object == 1
    scene = trials_of(ScanpathSet.from_paths([laid]))[0].scene
    assert_close(scene.position[0], torch.tensor([[r, c] for r in range(2) for c in range(3)]).float())
    assert_close(scene.start, torch.tensor([[0.5, 1.0]]))


@pytest.mark.parametrize("text", ["6", "6x", "0x4", "6x14x2", "sixxten"])
def test_what_is_no_grid(text):
    with pytest.raises(ConfigError, match="ROWSxCOLUMNS"):
        parse_grid(text)


def test_unit_of_positions_does_not_depend_on_the_size_of_pixels():
    boxes = torch.from_numpy(search_scenes(1)[0][0].boxes).float()
    one, pitch = box_positions(boxes)
    double, twice = box_positions(boxes * 2 + 50)
    assert_close(one, double)
    assert_close(twice, pitch * 2)
    sparse = grid_boxes(3, 4, 400, 300) + torch.tensor([20, 20, -20, -20])
    assert_close(box_positions(sparse)[0], box_positions(grid_boxes(3, 4, 400, 300))[0], rtol=0.2)


def test_boxes_that_cannot_be():
    with pytest.raises(DataError, match=r"Box 1 is empty: \[5.0, 5.0, 5.0, 9.0\]"):
        scene_of(torch.tensor([[0.0, 0, 4, 4], [5, 5, 5, 9]]))
    with pytest.raises(DataError, match="Target 3 is not among 1 objects"):
        scene_of(torch.tensor([[0.0, 0, 4, 4]]), target=3)
    with pytest.raises(DataError, match="has no boxes of objects"):
        trials_of(ScanpathSet.from_paths([Scanpath("a", [1.0], [1.0])]))
    with pytest.raises(DataError, match="lies outside the image"):
        cut_crops(Image.new("RGB", (10, 10)), torch.tensor([[20.0, 0, 30, 5]]), 8)


def test_crops_are_what_the_boxes_hold():
    image = Image.new("RGB", (60, 40))
    image.paste((255, 0, 0), (10, 10, 30, 30))
    crops = cut_crops(image, torch.tensor([[10.0, 10, 30, 30], [30, 10, 50, 30]]), (6, 4))
    assert crops.shape == (2, 3, 6, 4)
    assert_close(crops[0].mean((1, 2)), torch.tensor([1.0, 0, 0]))
    assert not crops[1].any()


def test_drawn_scenes_are_the_same_every_time():
    scenes, paths = search_scenes(3)
    more, others = search_scenes(5)
    assert paths.x.tolist() == others.x[: len(paths.x)].tolist()
    assert np.array_equal(np.asarray(scenes[2].image), np.asarray(more[2].image))
    for scene in more:
        kinds = list(zip(scene.colour, scene.shape, strict=True))
        assert kinds.count(kinds[scene.target]) == 1
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
    assert not np.array_equal(search_scenes(3, seed=1)[1].x, paths.x)


def test_spectral_residual_finds_the_odd_one():
    image = np.full((200, 300), 120, np.uint8)
    image[::8] = image[:, ::8] = 60  # a texture that repeats
    image[90:110, 200:220] = 250
    saliency = spectral_residual(image)
    assert saliency.shape == (200, 300)
    assert abs(saliency.mean() - 1) < 1e-3
    odd, *others = object_saliency(
        saliency, torch.tensor([[195.0, 85, 225, 115], [20, 20, 50, 50], [100, 120, 130, 150]])
    )
    assert odd > 3 * max(others)
    flat = spectral_residual(np.full((20, 30, 3), 7, np.uint8))
    assert (flat == 1).all()


def test_saliency_of_boxes_is_their_mean():
    saliency = np.arange(12, dtype=np.float32).reshape(3, 4)
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 9, 9], [20, 20, 30, 30]])
    assert_close(object_saliency(saliency, boxes), torch.tensor([2.5, (5 + 6 + 7 + 9 + 10 + 11) / 6, 0.0]))


def test_mirrored_scenes_keep_distances():
    scenes = collate_trials(trials_of(search_scenes(4)[1]))[0]
    for flips in ((True, False), (False, True), (True, True)):
        mirrored = scenes.mirrored(*flips)
        for row in range(4):
            there = scenes.valid[row]
            before, after = (torch.cat([s.position[row][there], s.start[row : row + 1]]) for s in (scenes, mirrored))
            assert_close(torch.cdist(after, after), torch.cdist(before, before))
            assert (mirrored.position[row][there] >= -1e-5).all()
            moved = (after - before).abs().amax(0) > 1e-3
            assert moved.tolist() == list(flips)
        assert_close(mirrored.mirrored(*flips).position[scenes.valid], scenes.position[scenes.valid])
