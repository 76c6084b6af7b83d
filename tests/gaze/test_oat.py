"""OAT: scenes of any size in one batch, what the options change, weights in and out."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saccade.apps.cli import main
from saccade.checkpoints import load_weights
from saccade.errors import CheckpointError, ConfigError, ShapeError
from saccade.gaze import load_predictor
from saccade.gaze.convert import read_position_table
from saccade.gaze.oat import OAT
from saccade.gaze.scenes import SceneBatch, box_positions, grid_boxes, grid_scene, stack_scenes
from tests.gaze.oat_cases import padded, ragged_scenes, small_oat
from tests.helpers import assert_close, randn

PATHS = padded([[[0, 4, 4], [5, 4]], [[11, 3, 2, 0], [7]], [[1, 0], [0, 1]]])


def test_padded_batch_equals_each_scene_alone():
    model, scenes = small_oat(), ragged_scenes()
    together = model(scenes, PATHS)
    for row, grid in enumerate([grid_scene(2, 3, 4), grid_scene(3, 4, 0), grid_scene(1, 2)]):
        alone = model(grid, PATHS[row : row + 1])
        count = alone.shape[-1]
        assert_close(together[row, ..., :count], alone[0])
        assert (together[row, ..., count:] == -torch.inf).all()


def test_objects_have_no_order():
    model, grid = small_oat(), grid_scene(2, 3, 4)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    shuffled = SceneBatch(grid.position[:, order], grid.valid, grid.start, torch.tensor([5]))
    back = order.argsort()
    paths = torch.tensor([[[0, 4, 2]]])
    logits = model(shuffled, back[paths])
    assert_close(logits[..., 1:][..., back], model(grid, paths)[..., 1:])
    assert_close(logits[..., 0], model(grid, paths)[..., 0])


def test_positions_between_cells_change_the_path_smoothly():
    model, grid = small_oat(), grid_scene(2, 3, 4)
    moved = [SceneBatch(grid.position + shift, grid.valid, grid.start, grid.target) for shift in (0.0, 1e-3, 0.3)]
    base, near, far = (model(scene, PATHS[:1]) for scene in moved)
    assert (near - base).abs().max() < 0.02 < (far - base).abs().max()


def test_hidden_target_position_is_not_read():
    scenes = [grid_scene(2, 3, target) for target in (1, 4)]
    first_step = torch.tensor([[[0]]])
    for position, equal in (("known", False), ("hidden", True)):
        model = small_oat(target_position=position)
        one, other = (model(scene, first_step)[0, 0, 0] for scene in scenes)
        assert torch.allclose(one, other, atol=1e-6) == equal


def test_viewers_differ_and_an_unknown_one_is_their_mean():
    model, scene = small_oat(num_viewers=2), grid_scene(2, 3, 4)
    paths = PATHS[:1, :1].expand(1, 3, -1)
    logits = model(scene, paths, torch.tensor([[0, 1, -1]]))
    assert not torch.allclose(logits[0, 0], logits[0, 1], atol=1e-3)
    assert_close(logits[0, 2], model(scene, paths)[0, 2])
    with torch.no_grad():
        model.viewers.weight[:] = model.viewers.weight.mean(0)
    assert_close(*(model(scene, paths, viewers)[0] for viewers in (torch.tensor([[0, 1, -1]]), None)))


def test_features_and_a_target_from_elsewhere():
    model, grid = small_oat(seen="features", feature_dim=5), grid_scene(2, 3, 2)
    features = randn(1, 6, 5)
    seen = SceneBatch(grid.position, grid.valid, grid.start, grid.target, features)
    told = SceneBatch(grid.position, grid.valid, grid.start, grid.target, features, target_features=features[:, 2])
    assert_close(model(told, PATHS[:1]), model(seen, PATHS[:1]))
    other = SceneBatch(
        grid.position, grid.valid, grid.start, grid.target, features, target_features=randn(1, 5, seed=9)
    )
    assert not torch.allclose(model(other, PATHS[:1]), model(seen, PATHS[:1]), atol=1e-3)
    with pytest.raises(ShapeError, match="takes 5 features per object, got 4"):
        model(SceneBatch(grid.position, grid.valid, grid.start, grid.target, features[..., :4]), PATHS[:1])
    with pytest.raises(ShapeError, match=r"must be \(B, N, F\)"):
        model(grid, PATHS[:1])


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_spatial_pyramid_takes_crops_of_any_size(levels):
    model = small_oat(seen="crops", pyramid_levels=levels)
    grid = ragged_scenes()
    for size in ((24, 19), (61, 40)):
        features = randn(3, 12, 3, *size)
        scenes = SceneBatch(grid.position, grid.valid, grid.start, grid.target, features)
        logits = model(scenes, PATHS)
        changed = torch.where(grid.valid[..., None, None, None], features, 7.0)  # what stands in padding is not seen
        assert_close(model(SceneBatch(grid.position, grid.valid, grid.start, grid.target, changed), PATHS), logits)


def test_fixed_crop_size_is_explained():
    model, grid = small_oat(seen="crops"), grid_scene(1, 2)
    with pytest.raises(ShapeError, match=r"Crops of 40 x 40 pixels do not fit.*149\.\.163 high"):
        model(SceneBatch(grid.position, grid.valid, grid.start, grid.target, randn(1, 2, 3, 40, 40)), PATHS[2:])


def test_scene_beyond_the_positions_is_refused():
    with pytest.raises(ShapeError, match=r"row or column 5, the model has codes for 0 to 3.*larger position_rows"):
        small_oat()(grid_scene(6, 1), torch.tensor([[[0]]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 25}, "width must be even"),
        ({"position_rows": 5}, r"Codes of 4 numbers cannot be exact for 5 positions.*position_rows <= 4"),
        ({"seen": "features"}, "feature_dim belongs to seen='features'"),
        ({"position": "table", "position_columns": 3}, "3 columns gives 9 numbers, the model needs 12"),
        ({"seen": "crops", "pyramid_levels": 5}, "pyramid_levels must be 0, 2, 3 or 4"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        small_oat(**options)


def official_state(model: OAT) -> dict[str, torch.Tensor]:
    """Return a state dict as the official training writes it, with everything it never uses."""
    state = {f"model.{key}": value for key, value in model.state_dict().items() if key != "position.table"}
    unused = {"generator.weight": (8, 24), "generator.bias": (8,), "LinearEmbedding.weight": (12, 3)}
    unused |= {"LinearEmbedding.bias": (12,), "onedpositional_encoding.pos_embedding": (5000, 1, 24)}
    return state | {f"model.{key}": torch.zeros(shape) for key, shape in unused.items()}


def test_official_layout_loads_and_a_missing_table_is_named():
    source = small_oat(seen="crops", pyramid_levels=2, position="table")
    target = OAT(24, 2, 16, 1, 2, seen="crops", pyramid_levels=2, position="table", position_rows=4).eval()
    state = official_state(source)
    with pytest.raises(CheckpointError, match=r"without the position table.*under the key 'position.table'"):
        load_weights(target, state, source="official.ckpt")
    load_weights(target, state | {"position.table": randn(4, 4)}, source="official.ckpt")
    assert torch.equal(target.position.table, randn(4, 4))
    assert_close(target.cross_attentions[1].decode_fc.weight, source.cross_attentions[1].decode_fc.weight)


def test_full_size_has_the_official_number_of_weights():
    with torch.device("meta"):
        model = OAT(position="table", position_rows=14, position_columns=86)
    unused = 86 * 512 + 86 + 256 * 3 + 256  # generator of 84 objects, LinearEmbedding
    assert sum(parameter.numel() for parameter in model.parameters()) + unused == 18_300_985


def test_box_positions_of_a_grid_are_its_rows_and_columns():
    position, pitch = box_positions(grid_boxes(2, 3, 300, 100))
    assert_close(position, grid_scene(2, 3).position[0])
    assert pitch.tolist() == [50, 100]


def test_mixed_scenes_are_refused():
    grid = grid_scene(1, 2)
    seen = SceneBatch(grid.position, grid.valid, grid.start, grid.target, randn(1, 2, 5))
    with pytest.raises(ValueError, match="Some scenes have features and others have not"):
        stack_scenes([grid, seen])
    with pytest.raises(ShapeError, match=r"SceneBatch.valid must be \(1, 2\)"):
        SceneBatch(grid.position, grid.valid[:, :1], grid.start, grid.target)


def test_convert_command_writes_what_prediction_loads(tmp_path, capsys):
    source = small_oat(width=32, heads=4, seen="crops", pyramid_levels=2, position="table", position_columns=6)
    torch.save({"state_dict": official_state(source)}, tmp_path / "official.ckpt")
    torch.save({"table": randn(4, 6)}, tmp_path / "table.pt")
    words = ["convert", str(tmp_path / "official.ckpt"), "-m", "oat", "-o", str(tmp_path / "oat.safetensors")]
    assert main(words) == 2
    assert "name its file with --position-table" in capsys.readouterr().err
    assert main([*words, "--position-table", str(tmp_path / "table.pt")]) == 0
    assert "oat, width 32, 1 + 2 layers" in capsys.readouterr().out
    loaded = load_predictor(tmp_path / "oat.safetensors")
    assert torch.equal(loaded.model.position.table, randn(4, 6))
    assert torch.equal(loaded.model.readout.weight, source.readout.weight)
    assert loaded.features == {"kind": "crops", "crop_size": [150, 93]}
    del (state := official_state(source))["model.readout.weight"]
    torch.save(state, tmp_path / "official.ckpt")
    assert main([*words, "--position-table", str(tmp_path / "table.pt"), "--overwrite"]) == 1
    assert "readout.weight" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".safetensors"])
def test_position_tables_are_read(tmp_path, suffix):
    table, path = randn(3, 5), tmp_path / f"table{suffix}"
    if suffix == ".npy":
        np.save(path, table.numpy())
    elif suffix == ".csv":
        np.savetxt(path, table.numpy(), delimiter=",")
    else:
        save_file({"table": table}, path)
    assert_close(read_position_table(path), table)
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(ConfigError, match=r"has shape \(4,\), expected \(R, P\)"):
        read_position_table(tmp_path / "flat.npy")
