"""``token_average_pooling``: every backend against the literal form, that against a loop, borders, layouts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import unfolded_token_average_pooling
from saccade.attention import explain, reference, token_average_pooling, token_pooling
from saccade.attention.kernels.runtime import INTERPRETING
from saccade.errors import ShapeError
from tests.attention.cases import gradients
from tests.helpers import assert_close, randn

# B, K, H, W, C: rectangles, maps smaller than the dilation, one branch, no sample
SHAPES = [
    (2, 4, 7, 5, 6),
    (1, 4, 2, 3, 65),
    (2, 1, 3, 3, 8),
    (1, 3, 1, 9, 4),
    (1, 2, 1, 1, 1),
    (1, 6, 14, 14, 70),
    (0, 4, 7, 7, 8),
]


def make(shape, dtype=torch.float32):
    """Return tokens as a view of a map, weights as a view with the branches last, both wanting gradients."""
    batch, branches, height, width, channels = shape
    tokens = randn(batch, channels, height, width, seed=1, dtype=dtype).flatten(2).transpose(1, 2)
    weights = torch.softmax(randn(batch, height, width, branches, seed=2, dtype=dtype), -1).permute(0, 3, 1, 2)
    return [tokens.requires_grad_(), weights.requires_grad_()]


def run(tensors, backend):
    out = token_average_pooling(*tensors, backend=backend)
    return [out, *gradients([out], tensors)]


def as_double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_reference_equals_the_definition(shape):
    _, branches, height, width, _ = shape
    tokens, weights = (tensor.detach() for tensor in make(shape, torch.float64))
    image = tokens.unflatten(1, (height, width))
    want = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            want[:, y, x] = weights[:, 0, y, x, None] * image[:, y, x]
            for k in range(1, branches):
                for row in (y - k, y, y + k):
                    for column in (x - k, x, x + k):
                        if 0 <= row < height and 0 <= column < width:
                            want[:, y, x] += weights[:, k, y, x, None] / 9 * image[:, row, column]
    assert_close(reference.token_average_pooling(tokens, weights), want.flatten(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_equal_the_reference(shape, dtype):
    tensors = make(shape, dtype)
    assert explain(token_average_pooling, *tensors).chosen == "boxes"
    for got, want in zip(run(tensors, "boxes"), run(as_double(tensors), "reference"), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_the_benchmarks_peer_computes_the_same(shape):
    tensors = make(shape)
    assert_close(unfolded_token_average_pooling(*tensors), token_average_pooling(*tensors))


def test_large_maps_are_worked_off_in_parts_of_the_channels(monkeypatch):
    monkeypatch.setattr(token_pooling, "BLOCK", 1)
    tensors = make((2, 4, 7, 5, 200))
    for got, want in zip(run(tensors, "boxes"), run(as_double(tensors), "reference"), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("backend", ["boxes", "reference"])
def test_the_divisor_is_nine_at_the_border_too(backend):
    weights = torch.zeros(1, 2, 5, 6)
    weights[:, 1] = 1
    image = randn(1, 3, 5, 6)
    out = token_average_pooling(image.flatten(2).transpose(1, 2), weights, backend=backend)
    want = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=True)
    assert_close(out.transpose(1, 2).unflatten(2, (5, 6)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    tensors = make((2, 4, 9, 10, 96), dtype)
    for got, want in zip(run(tensors, "boxes"), run(as_double(tensors), "reference"), strict=True):
        assert got.dtype == dtype
        # The gradient that comes in is rounded too, so gradients are compared with the largest.
        assert (got.double() - want).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 2e-3) * want.abs().max()


@pytest.mark.parametrize("backend", ["boxes", "reference"])
def test_gradcheck(backend):
    tensors = make((2, 3, 4, 5, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: token_average_pooling(*t, backend=backend), tensors)


def test_keeps_tokens_and_weights_alone():
    tensors = make((2, 4, 7, 5, 6))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        token_average_pooling(*tensors)
    assert kept == [tensor.data_ptr() for tensor in tensors]


def test_backward_is_deterministic():
    tensors = make(SHAPES[5])
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, "boxes"), run(tensors, "boxes"), strict=True))


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [
        (randn(2, 6, 4, 5), randn(2, 3, 4, 5), "must be"),
        (randn(2, 21, 6), randn(2, 3, 4, 5), "Is a class token left"),
        (randn(2, 20, 6), randn(2, 3, 4, 5).double(), "one floating-point dtype"),
        (randn(2, 20, 6), randn(2, 3, 4, 5).to("meta"), "on one device"),
    ],
)
def test_wrong_arguments_are_named(tokens, weights, message):
    with pytest.raises(ShapeError, match=message):
        token_average_pooling(tokens, weights)


class PoolingLayer(nn.Module):
    """Predicts the weights and pools, as a TAP block does."""

    def __init__(self):
        super().__init__()
        self.predictor = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, image):
        weights = torch.softmax(self.predictor(image), 1)
        tokens = token_average_pooling(image.flatten(2).transpose(1, 2), weights)
        return tokens.transpose(1, 2).reshape(image.shape)


@pytest.fixture
def model():
    layers = nn.Sequential(PoolingLayer(), PoolingLayer()).eval()
    with torch.no_grad():
        for i, parameter in enumerate(layers.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=i))
    return layers


X = randn(2, 8, 6, 5)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning")
def test_script(model):
    scripted = torch.jit.script(model)
    assert_close(scripted(X), model(X))


def test_fx_records_the_public_function(model):
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.target is token_average_pooling for node in traced.graph.nodes) == 2
    assert_close(traced(X), model(X))


def test_export_holds_torch_operators_only(model):
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    other = randn(3, 8, 6, 5, seed=1)
    assert_close(exported.module()(other), model(other))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself
def test_opcheck():
    torch.library.opcheck(token_pooling.pool_tokens, tuple(make((2, 3, 4, 5, 6))))


@pytest.mark.slow
def test_compile_without_graph_breaks(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for size in (6, 9):
        x = randn(2, 8, size, 5).requires_grad_()
        out, expected = compiled(x), model(x)
        assert_close(out, expected)
        (grad,), (want,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
        assert_close(grad, want)


interpreted = pytest.mark.skipif(not INTERPRETING, reason="Triton is absent, or launches on a GPU here")


@interpreted
@pytest.mark.parametrize("shape", [(2, 4, 3, 5, 66), (1, 1, 2, 2, 3), (1, 3, 1, 9, 4), (0, 4, 7, 7, 8)], ids=str)
def test_interpreted_kernels_equal_the_reference(shape):
    pytest.importorskip("triton")
    tensors = make(shape)
    for got, want in zip(run(tensors, "triton"), run(as_double(tensors), "reference"), strict=True):
        assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 4, 14, 14, 448)], ids=str)
def test_kernels_on_gpu(shape, dtype):
    tensors = make(shape, dtype)
    expected = run(as_double(tensors), "reference")
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    assert explain(token_average_pooling, *tensors).chosen == "triton"
    share = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for got, want in zip(run(tensors, "auto"), expected, strict=True):
        largest = max([1.0, *want.detach().abs().flatten().tolist()])
        assert_close(got, want, rtol=0, atol=share * largest)
