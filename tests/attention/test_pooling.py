"""``attention_pooling``: every backend against the literal form, padded, masked and empty bags, and memory."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from saccade.attention import AttentionLSE, attention, attention_pooling, explain, merge_partials, pooling
from saccade.attention.kernels.runtime import INTERPRETING
from saccade.errors import ShapeError
from tests.attention.cases import gradients
from tests.attention.test_softmax import NoScores
from tests.helpers import assert_close, randn


@dataclass(frozen=True)
class Bag:
    """Sizes of one problem, and its mask: "", "padding" (B, 1, N) or "branch" (B, M, N) with an empty row."""

    branches: int
    instances: int
    channels: int
    batch: int = 2
    mask: str = ""


SHAPES = [
    Bag(1, 1, 1),
    Bag(5, 197, 24, mask="padding"),
    Bag(1, 300, 65),
    Bag(17, 63, 130, mask="branch"),
    Bag(3, 0, 8),
    Bag(3, 5, 8, batch=0),
    Bag(40, 64, 16, batch=1),
]


def make(shape, dtype=torch.float32, scores_dtype=None):
    """Return scores and value as strided views, both wanting gradients, and options."""
    scores = 3 * randn(shape.batch, shape.instances, shape.branches, seed=1, dtype=scores_dtype or dtype).transpose(
        1, 2
    )
    value = randn(shape.batch, shape.channels, shape.instances, seed=2, dtype=dtype).transpose(1, 2)
    options = {}
    if shape.mask == "padding":
        options["mask"] = torch.arange(shape.instances) < torch.tensor([shape.instances - 2, 0])[:, None, None]
    elif shape.mask == "branch":
        options["mask"] = randn(shape.batch, shape.branches, shape.instances, seed=3) > 0
        options["mask"][0, 0] = False
    return [scores.requires_grad_(), value.requires_grad_()], options


def run(tensors, options, backend):
    result = attention_pooling(*tensors, **options, backend=backend)
    return [*result, *gradients(list(result), tensors)]


def as_double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_reference(shape, dtype):
    tensors, options = make(shape, dtype)
    expected = run(as_double(tensors), options, "reference")
    usable = [row.backend for row in explain(attention_pooling, *tensors, **options).rows if row.ok]
    assert {"chunks", "reference"} <= set(usable)
    for backend in usable:
        for got, want in zip(run(tensors, options, backend), expected, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("shape", [Bag(4, 33, 8), Bag(4, 33, 8, mask="branch")], ids=str)
def test_is_attention_with_given_scores(shape):
    tensors, options = make(shape)
    scores, value = tensors
    query, key = torch.zeros(2, 1, 4, 1), torch.zeros(2, 1, 33, 1)
    mask = options.get("mask")
    mask = mask if mask is None else mask[:, None]
    want = attention(query, key, value[:, None], bias=scores.detach()[:, None], mask=mask)[:, 0]
    assert_close(attention_pooling(scores, value, **options).out, want)


@pytest.mark.parametrize("scores_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype, scores_dtype):
    tensors, options = make(Bag(5, 3000, 128), dtype, scores_dtype)
    expected = run(as_double(tensors), options, "reference")
    got = run(tensors, options, "chunks")
    assert [t.dtype for t in got[:3]] == [dtype, torch.float32, torch.float32]
    for tensor, want in zip(got, expected, strict=True):
        # The gradient that comes in is rounded too, so gradients are compared with the largest.
        assert (tensor.double() - want).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 2e-3) * want.abs().max()


def test_values_wider_than_the_scores_stay_wide():
    tensors, _ = make(Bag(2, 9, 4), torch.float64, torch.float32)
    assert_close(attention_pooling(*tensors).out, attention_pooling(*as_double(tensors)).out, atol=1e-6)
    assert attention_pooling(*tensors).out.dtype == torch.float64


@pytest.mark.parametrize("backend", ["chunks", "reference"])
def test_nothing_to_pool_gives_zeros(backend):
    tensors, options = make(SHAPES[1])
    scores, value = tensors
    result = attention_pooling(scores, value, **options, backend=backend)
    assert not result.out[1].any()
    assert not result.weights[1].any()
    assert (result.lse[1] == -torch.inf).all()
    assert_close(result.weights[0].sum(-1), torch.ones(5))
    grads = gradients([result.out, result.weights], tensors)
    assert not any(grad[1].any() or not grad.isfinite().all() for grad in grads)


def test_padding_changes_nothing():
    scores, value = (tensor.detach() for tensor in make(Bag(3, 40, 8))[0])
    alone = attention_pooling(scores[:, :, :25], value[:, :25])
    padded = attention_pooling(scores, value, mask=(torch.arange(40) < 25)[None, None])
    assert_close(padded.out, alone.out)
    assert_close(padded.weights[:, :, :25], alone.weights)


def test_parts_of_a_bag_unite():
    scores, value = make(Bag(3, 100, 8))[0]
    whole = attention_pooling(scores, value)
    parts = [attention_pooling(s, v) for s, v in zip(scores.split(30, 2), value.split(30, 1), strict=True)]
    merged = merge_partials([AttentionLSE(part.out, part.lse) for part in parts])
    assert_close(merged.out, whole.out)
    assert_close(merged.lse, whole.lse)


@pytest.mark.parametrize("backend", ["chunks", "reference"])
def test_gradcheck(backend):
    tensors, options = make(Bag(3, 5, 4, mask="branch"), torch.float64)
    for call in ({}, options):
        assert torch.autograd.gradcheck(lambda *t, c=call: attention_pooling(*t, **c, backend=backend)[:2], tensors)


class NoWideCopy(NoScores):
    """Fails when a float32 tensor of the size of the values comes into being."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                assert tensor.numel() < self.limit, f"{function} made {tuple(tensor.shape)}"
        return result


def test_never_widens_all_values():
    tensors, _ = make(Bag(2, 10_000, 256, batch=1), torch.bfloat16)
    with NoWideCopy(10_000 * 256 // 4):
        run(tensors, {}, "chunks")
    with NoWideCopy(10_000 * 256 // 4), pytest.raises(AssertionError, match="made"):
        run(tensors, {}, "reference")


def test_backward_is_deterministic():
    tensors, _ = make(Bag(5, 5000, 64), torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, {}, "chunks"), run(tensors, {}, "chunks"), strict=True))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((randn(2, 5), randn(2, 5, 4)), {}, "must be .* and value"),
        ((randn(2, 3, 5), randn(2, 6, 4)), {}, "agree in B and N"),
        ((randn(2, 3, 5).int(), randn(2, 5, 4)), {}, "floating point"),
        ((randn(2, 3, 5), randn(2, 5, 4)), {"mask": randn(2, 3, 5)}, "mask must be bool"),
        ((randn(2, 3, 5), randn(2, 5, 4)), {"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask\[:, None\]"),
        ((randn(2, 3, 5), randn(2, 5, 4).to("meta")), {}, "on one device"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ShapeError, match=message):
        attention_pooling(*arguments, **options)


class PoolingModel(nn.Module):
    """Attention-based multiple instance learning with two branches."""

    def __init__(self):
        super().__init__()
        self.scores, self.head = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, bags):
        pooled = attention_pooling(self.scores(bags).transpose(1, 2), bags)
        return self.head(pooled.out).mean(1) + pooled.weights.amax()


@pytest.fixture
def model():
    model = PoolingModel().eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i))
    return model


X = randn(2, 9, 8)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning")
def test_script(model):
    scripted = torch.jit.script(model)
    assert_close(scripted(X[:, :4]), model(X[:, :4]))


def test_fx_records_the_public_function(model):
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target is attention_pooling for node in traced.graph.nodes)
    assert_close(traced(X), model(X))


def test_export_holds_torch_operators_only(model):
    batch, instances = torch.export.Dim("batch", min=2), torch.export.Dim("instances", min=2)
    exported = torch.export.export(model.bfloat16(), (X.bfloat16(),), dynamic_shapes=({0: batch, 1: instances},))
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    other = randn(3, 17, 8, seed=1).bfloat16()
    assert_close(exported.module()(other), model(other))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself
def test_opcheck():
    weights, value = torch.softmax(randn(2, 3, 5), -1), randn(2, 5, 4).bfloat16()
    torch.library.opcheck(pooling.pool_values, (weights.requires_grad_(), value.requires_grad_()))


@pytest.mark.slow
def test_compile_without_graph_breaks(model):
    torch._dynamo.reset()
    model = model.bfloat16()
    compiled = torch.compile(model, fullgraph=True)
    for instances in (9, 13):
        x = randn(2, instances, 8).bfloat16().requires_grad_()
        out, expected = compiled(x), model(x)
        assert_close(out, expected)
        (grad,), (want,) = (torch.autograd.grad(y.sum(), x) for y in (out, expected))
        assert_close(grad, want, atol=0.1)


interpreted = pytest.mark.skipif(not INTERPRETING, reason="Triton is absent, or launches on a GPU here")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_kernels_in_half_precision(dtype):
    pytest.importorskip("triton")
    tensors, options = make(Bag(3, 70, 66), dtype)
    expected = run(as_double(tensors), options, "reference")
    for got, want in zip(run(tensors, options, "triton"), expected, strict=True):
        assert_close(got, want)


@interpreted
def test_interpreted_kernel_adds_up_its_splits(monkeypatch):
    kernels = pytest.importorskip("saccade.attention.kernels.pooling")
    monkeypatch.setattr(kernels, "SPLIT", kernels.INSTANCES)
    tensors, _ = make(Bag(2, 300, 20))
    assert_close(
        attention_pooling(*tensors, backend="triton").out, attention_pooling(*tensors, backend="reference").out
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, Bag(5, 20_000, 384)], ids=str)
def test_kernels_on_gpu(shape, dtype):
    tensors, options = make(shape, dtype)
    expected = run(as_double(tensors), options, "reference")
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    options = {name: tensor.cuda() for name, tensor in options.items()}
    assert explain(attention_pooling, *tensors, **options).chosen == "triton"
    for got, want in zip(run(tensors, options, "auto"), expected, strict=True):
        assert_close(got, want, **({"atol": 1e-3} if dtype == torch.float32 else {}))  # TF32 may be on
