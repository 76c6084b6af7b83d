"""``pointwise_attention``: every backend against the literal form, and what sets it apart from a softmax."""

import math

import pytest
import torch

from saccade.attention import explain, pointwise_attention, reference
from saccade.attention.pointwise import pointwise
from saccade.errors import BackendError, ConfigError, ShapeError
from tests.attention.cases import SHAPES, Shape, gradients, make, visible
from tests.attention.test_softmax import NoScores, as_double
from tests.helpers import assert_close, randn

KINDS = [("sigmoid", False), ("sigmoid", True), ("elu1", False), ("elu1", True)]


def run(tensors, options, backend):
    """Return output and gradients of query, key, value and of a bias that wants one."""
    out = pointwise_attention(*tensors, **options, backend=backend)
    bias = options.get("bias")
    return [out, *gradients([out], [*tensors, *([bias] if bias is not None and bias.requires_grad else [])])]


def double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("index", "shape"), list(enumerate(SHAPES)), ids=lambda part: str(part))
def test_every_backend_equals_the_reference(index, shape, dtype):
    tensors, options = make(shape, dtype)
    for activation, normalise in (KINDS[index % 4], KINDS[(index + 2) % 4]):
        options |= {"activation": activation, "normalise": normalise}
        expected = run(double(tensors), as_double(options), "reference")
        for row in explain(pointwise_attention, *tensors, **options).rows:
            if row.ok:
                for got, want in zip(run(tensors, options, row.backend), expected, strict=True):
                    assert_close(got, want, **({"atol": 1e-4} if dtype == torch.float32 else {}))


def test_reference_equals_the_definition():
    tensors, options = make(Shape(4, 6, 3, 2, heads=2, kv_heads=1, causal=True), torch.float64)
    query, key, value = (tensor.detach() for tensor in tensors)
    seen = visible(Shape(4, 6, 3, 2, causal=True), options)
    functions = {
        "sigmoid": lambda s: 1 / (1 + math.exp(-s)),
        "elu1": lambda s: s + 1 if s > 0 else math.exp(s),
    }
    for name, function in functions.items():
        out = reference.pointwise_attention(query, key, value, name, causal=True, scale=0.4)
        for h in range(2):
            for i in range(4):
                weights = [
                    function(0.4 * float(query[0, h, i] @ key[0, 0, j])) * bool(seen[0, h, i, j]) for j in range(6)
                ]
                assert_close(out[0, h, i], torch.tensor(weights, dtype=torch.float64) @ value[0, 0])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("activation", "normalise"), KINDS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.mask == "rows" or s.bias == "padding"], ids=str)
def test_queries_that_see_nothing_get_zeros(shape, activation, normalise, backend):
    tensors, options = make(shape)
    out, *grads = run(tensors, {**options, "activation": activation, "normalise": normalise}, backend)
    blind = ~visible(shape, options).any(-1)
    assert blind.any()
    assert not out[blind].any()
    assert not grads[0][blind].any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("activation", "normalise"), KINDS)
def test_half_precision_sums_in_float32(activation, normalise, dtype):
    tensors, options = make(Shape(63, 197, 64, 64, heads=4, kv_heads=2, causal=True), dtype)
    options |= {"activation": activation, "normalise": normalise}
    expected = run(double(tensors), options, "reference")
    for got, want in zip(run(tensors, options, "torch"), expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, rtol=0, atol=(1e-2 if dtype == torch.bfloat16 else 2e-3) * want.abs().max().item())


def test_a_length_bias_keeps_the_sums_near_one():
    query, key, ones = randn(1, 2, 8, 16), randn(1, 2, 300, 16, seed=1), torch.ones(1, 2, 300, 1)
    sums = pointwise_attention(query, key, ones, bias=torch.tensor(-math.log(300)))
    assert 0.5 < sums.min() < sums.max() < 3
    assert pointwise_attention(query, key, ones).min() > 100


def test_keys_do_not_compete():
    """Unlike under a softmax, a key's part of the output is there whatever the other keys are."""
    query, key, value = randn(1, 2, 8, 16), randn(1, 2, 30, 16, seed=1), randn(1, 2, 30, 4, seed=2)
    parts = [pointwise_attention(query, key[:, :, part], value[:, :, part]) for part in (slice(0, 9), slice(9, 30))]
    assert_close(parts[0] + parts[1], pointwise_attention(query, key, value))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("activation", "normalise"), KINDS)
def test_gradcheck(activation, normalise, backend):
    tensors, options = make(Shape(5, 7, 3, 4, heads=2, kv_heads=1, batch=1, causal=True), torch.float64)
    mask = randn(1, 2, 5, 7, seed=8) > -1
    bias = randn(2, 1, 1, seed=7, dtype=torch.float64).requires_grad_()
    options |= {"activation": activation, "normalise": normalise, "mask": mask}

    def function(query, key, value, bias):
        return pointwise_attention(query, key, value, **options, bias=bias, backend=backend)

    assert torch.autograd.gradcheck(function, [*tensors, bias])


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (2, 1, 1), (1, 1, 5, 7), (2, 2, 1, 7)], ids=str)
def test_the_bias_gets_the_gradient_of_its_own_shape(shape):
    tensors, options = make(Shape(5, 7, 4, 4))
    options["bias"] = randn(*shape, seed=7).requires_grad_()
    got = run(tensors, options, "torch")
    expected = run(tensors, options, "reference")
    assert got[-1].shape == shape
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)
    with pytest.raises(BackendError, match="no gradient of the bias"):
        pointwise_attention(*tensors, **options, backend="triton")


@pytest.mark.parametrize("causal", [False, True])
def test_never_holds_the_scores(causal):
    query = randn(1, 2, 700, 8).requires_grad_()
    key, value = (randn(1, 2, 700, 8, seed=i).requires_grad_() for i in (1, 2))
    with NoScores(700 * 700):
        out = pointwise_attention(query, key, value, causal=causal, normalise=True, backend="torch")
        torch.autograd.grad(out.sum(), [query, key, value])


def test_backward_is_deterministic():
    tensors, options = make(Shape(65, 197, 24, 24, causal=True))
    first, second = (run(tensors, options, "torch") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("activation", "normalise"), KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, Shape(500, 600, 256, 200, causal=True)], ids=str)
def test_every_backend_on_cuda(shape, activation, normalise, dtype):
    tensors, options = make(shape, dtype)
    options |= {"activation": activation, "normalise": normalise}
    expected = run(double(tensors), as_double(options), "reference")
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    for option, given in options.items():
        if isinstance(given, torch.Tensor):
            options[option] = given.detach().cuda().requires_grad_(given.requires_grad)
    share = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]  # TF32 may be on
    for row in explain(pointwise_attention, *tensors, **options).rows:
        if row.ok:
            for got, want in zip(run(tensors, options, row.backend), expected, strict=True):
                assert_close(got, want, rtol=0, atol=share * max([1.0, *want.detach().abs().flatten().tolist()]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias):
    tensors, _ = make(Shape(5, 7, 8, 4, heads=4, kv_heads=2))
    bias = randn(4, 1, 1).requires_grad_() if with_bias else None
    torch.library.opcheck(pointwise, (*tensors, None, bias, "sigmoid", True, with_bias, 0.4, False))


def test_refusals():
    tensors, _ = make(Shape(5, 7, 8, 4))
    with pytest.raises(ConfigError, match=r"unknown activation 'sigmiod'.*mean 'sigmoid'"):
        pointwise_attention(*tensors, activation="sigmiod")
    with pytest.raises(ShapeError, match=r"bias must be broadcastable"):
        pointwise_attention(*tensors, bias=torch.zeros(3, 1, 1))
