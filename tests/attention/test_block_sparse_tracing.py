"""``block_sparse_attention`` inside models that are scripted, traced, exported and compiled, and its helpers."""

import pytest
import torch
from torch import nn

from saccade.attention import (
    BlockGeometry,
    BlockSelection,
    block_sparse_attention,
    block_sparse_attention_lse,
    grid_to_regions,
    regions_to_grid,
    regions_valid,
    select_blocks,
    use_backend,
)
from saccade.errors import ShapeError
from tests.attention.test_tracing import SCRIPT_WARNING
from tests.helpers import assert_close, randn


class RoutedLayer(nn.Module):
    """Routing between the regions of an image, with grouped heads, padding as a learned key, and its log-sum-exp."""

    def __init__(self):
        super().__init__()
        self.query, self.key_value = nn.Linear(16, 32), nn.Linear(16, 32)
        self.extra = nn.Parameter(torch.zeros(2, 1, 8))
        self.output = nn.Linear(32, 16)

    def forward(self, x):  # (B, H, W, 16)
        tokens = grid_to_regions(x, (2, 3))
        query = self.query(tokens).unflatten(-1, [4, 8]).transpose(1, 2)
        key, value = self.key_value(tokens).unflatten(-1, [2, 2, 8]).permute(2, 0, 3, 1, 4).unbind(0)
        geometry = BlockGeometry(6, 6, tokens.shape[1], tokens.shape[1])
        means = tokens.unflatten(1, [-1, 6]).mean(2)
        selection = select_blocks((means @ means.transpose(1, 2)).unsqueeze(1), geometry, 2)
        valid = regions_valid((x.shape[1], x.shape[2]), (2, 3), x.device).expand(x.shape[0], -1)
        extra = self.extra.unsqueeze(0)
        out = block_sparse_attention(query, key, value, selection, key_valid=valid, extra_key=extra, extra_value=extra)
        near = BlockSelection(selection.indices, selection.counts, geometry, sink=1, window=2)
        lse = block_sparse_attention_lse(query, key, value, near).lse
        out = self.output((out * torch.sigmoid(lse).unsqueeze(-1)).transpose(1, 2).flatten(2))
        return x + regions_to_grid(out, (x.shape[1], x.shape[2]), (2, 3))


@pytest.fixture
def model():
    """Two layers with fixed weights."""
    layers = nn.Sequential(RoutedLayer(), RoutedLayer()).eval()
    with torch.no_grad():
        for i, parameter in enumerate(layers.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=i))
    return layers


X = randn(2, 4, 9, 16)
OTHER = randn(3, 5, 7, 16, seed=1)


@pytest.mark.filterwarnings(SCRIPT_WARNING)
def test_script(model, tmp_path):
    torch.jit.script(model).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert_close(loaded(X), model(X))
    assert_close(loaded(OTHER), model(OTHER))


@pytest.mark.filterwarnings(SCRIPT_WARNING, "ignore::torch.jit.TracerWarning")
def test_jit_trace(model):
    traced = torch.jit.trace(model, X)
    assert_close(traced(X), model(X))
    assert "saccade::" not in str(traced.inlined_graph)


def test_fx_records_the_public_functions():
    class Layer(nn.Module):
        def forward(self, query, key, value, indices, counts):
            selection = BlockSelection(indices, counts, BlockGeometry(4, 4, 10, 10), window=2)
            out, lse = block_sparse_attention_lse(query, key, value, selection)[:2]
            return out * torch.sigmoid(lse).unsqueeze(-1) + block_sparse_attention(query, key, value, selection)

    traced = torch.fx.symbolic_trace(Layer())
    targets = [node.target for node in traced.graph.nodes]
    assert block_sparse_attention in targets
    assert block_sparse_attention_lse in targets
    tensors = [randn(1, 2, 10, 8, seed=i) for i in range(3)]
    indices = torch.tensor([[[[0], [2], [1]]]])
    arguments = (*tensors, indices, torch.ones(1, 1, 3, dtype=torch.int64))
    assert_close(traced(*arguments), Layer()(*arguments))


def test_export_holds_torch_operators_only(model):
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    other = randn(3, 4, 9, 16, seed=1)
    assert_close(exported.module()(other), model(other))


@pytest.mark.slow
def test_compile_without_graph_breaks(model):
    torch._dynamo.reset()
    layer = model[0]  # two take minutes
    compiled = torch.compile(layer, fullgraph=True)
    for batch in (2, 3):
        inputs = randn(batch, 4, 9, 16, seed=batch).requires_grad_()
        out, expected = compiled(inputs), layer(inputs)
        assert_close(out, expected)
        (grad,) = torch.autograd.grad(out.square().sum(), inputs)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), inputs)
        assert_close(grad, expected_grad, atol=1e-5 * expected_grad.abs().max().item())
    with use_backend("reference"):
        assert_close(compiled(inputs), expected)


def test_select_blocks():
    geometry = BlockGeometry(2, 4, 5, 13)
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [-torch.inf, 0.0, -torch.inf, -torch.inf], [0.0, 1.0, 2.0, 3.0]])
    got = select_blocks(scores[None, None].requires_grad_(), geometry, 2)
    assert got.indices.tolist() == [[[[1, 2], [1, -1], [2, 3]]]]  # among equals the lower number
    assert got.counts.tolist() == [[[2, 1, 2]]]
    assert select_blocks(scores[None, None], geometry, 9).indices.shape[-1] == 4
    with pytest.raises(ShapeError, match=r"with \(NQ, NB\) = \(3, 4\) by the geometry; got"):
        select_blocks(scores[None, None, :2], geometry, 2)
    with pytest.raises(ShapeError, match="top_k must be at least 1; got 0"):
        select_blocks(scores[None, None], geometry, 0)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_regions(size):
    grid = torch.arange(2 * size[0] * size[1] * 3).view(2, *size, 3)
    tokens, valid = grid_to_regions(grid, (2, 3)), regions_valid(size, (2, 3), grid.device)
    assert torch.equal(regions_to_grid(tokens, size, (2, 3)), grid)
    assert torch.equal(tokens[:, valid].flatten().sort()[0], grid.flatten())
    assert int(valid.sum()) == size[0] * size[1]
    assert not tokens[:, ~valid].any()
    for y, x in [(0, 0), (size[0] - 1, size[1] - 1)]:
        place = ((y // 2) * -(-size[1] // 3) + x // 3) * 6 + y % 2 * 3 + x % 3
        assert torch.equal(tokens[:, place], grid[:, y, x])


def test_regions_are_views_where_strides_allow():
    grid = randn(2, 4, 6, 3)
    assert grid_to_regions(grid, (2, 6)).data_ptr() == grid.data_ptr()
    tokens = randn(2, 24, 3)
    assert regions_to_grid(tokens, (4, 6), (2, 6)).data_ptr() == tokens.data_ptr()


def test_wrong_regions_are_named():
    with pytest.raises(ShapeError, match=r"grid must be \(B, H, W, C\)"):
        grid_to_regions(torch.zeros(2, 3, 4), (1, 1))
    with pytest.raises(ShapeError, match="at least 1 token high and wide"):
        grid_to_regions(torch.zeros(2, 3, 4, 1), (0, 1))
    with pytest.raises(ShapeError, match="with N = 24 for an image of"):
        regions_to_grid(torch.zeros(2, 20, 1), (3, 5), (2, 3))
