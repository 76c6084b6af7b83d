"""``linear_attention``: every backend against the literal form, states, tails, decay, and what it refuses."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch

from saccade.attention import decay_slopes, explain, linear_attention, reference
from saccade.attention.linear import linear_recurrence
from saccade.errors import BackendError, ConfigError, ShapeError
from tests.attention.cases import gradients
from tests.attention.test_softmax import NoScores
from tests.helpers import assert_close, randn


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem and what is asked of it."""

    queries: int
    keys: int
    head_dim: int
    value_dim: int
    heads: int = 2
    kv_heads: int = 2
    batch: int = 2
    causal: bool = True
    decay: bool = True
    options: str = ""  # words out of "mask", "normalise", "state"

    def __str__(self) -> str:
        parts = [f"L{self.queries}-S{self.keys}-D{self.head_dim}-Dv{self.value_dim}-H{self.heads}x{self.kv_heads}"]
        return "-".join([*parts, *["causal"] * self.causal, *["decay"] * self.decay, *self.options.split()])


SHAPES = [
    Shape(1, 1, 8, 8, options="state"),
    Shape(15, 15, 24, 8, options="mask state"),
    Shape(64, 64, 32, 32, heads=4, kv_heads=2),
    Shape(65, 65, 8, 15, heads=6, kv_heads=2, batch=1, decay=False, options="normalise state"),
    Shape(130, 130, 64, 24, batch=1, options="mask normalise"),
    Shape(197, 197, 16, 16, batch=1, heads=4, kv_heads=1, options="state"),
    Shape(17, 63, 24, 8, heads=4, kv_heads=2, causal=False, decay=False, options="mask state"),
    Shape(65, 197, 8, 24, batch=1, causal=False, decay=False, options="normalise"),
    Shape(0, 0, 8, 8, options="state"),
    Shape(5, 0, 8, 16, causal=False, decay=False, options="normalise state"),
    Shape(7, 7, 8, 8, batch=0),
]


def make(shape, dtype=torch.float32):
    """Return query, key and value as strided views, positive where they are normalised, and options."""
    s = shape
    sizes = [(s.queries, s.heads, s.head_dim), (s.keys, s.kv_heads, s.head_dim), (s.keys, s.kv_heads, s.value_dim)]
    tensors = [randn(s.batch, *size, seed=i, dtype=dtype).transpose(1, 2) for i, size in enumerate(sizes)]
    if "normalise" in s.options:
        tensors[:2] = [tensor.abs() + 0.1 for tensor in tensors[:2]]
    options: dict = {"causal": s.causal, "scale": 0.4, "normalise": "normalise" in s.options}
    if s.decay:
        options["log_decay"] = -decay_slopes(s.heads)
    if "mask" in s.options:
        options["mask"] = randn(s.batch, 1, 1, s.keys, seed=4) > -0.5
    if "state" in s.options:
        width = s.value_dim + options["normalise"]
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state = randn(s.batch, s.heads, s.head_dim, width, seed=5).abs().to(state_dtype)
        options["initial_state"] = state.requires_grad_()
    return [tensor.requires_grad_() for tensor in tensors], options


def run(tensors, options, backend):
    """Return outputs, and gradients of query, key, value and an initial state."""
    outputs = list(linear_attention(*tensors, **options, backend=backend))
    state = options.get("initial_state")
    return outputs, gradients(outputs, [*tensors, *([] if state is None else [state])])


def as_double(tensors, options):
    """The same problem in float64."""
    options = dict(options)
    if "initial_state" in options:
        options["initial_state"] = options["initial_state"].detach().double().requires_grad_()
    return [tensor.detach().double().requires_grad_() for tensor in tensors], options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_reference(shape, dtype):
    tensors, options = make(shape, dtype)
    expected, expected_grads = run(*as_double(tensors, options), "reference")
    for row in explain(linear_attention, *tensors, **options).rows:
        if row.ok:
            outputs, grads = run(tensors, options, row.backend)
            for got, want in zip(outputs + grads, expected + expected_grads, strict=True):
                largest = max([1.0, *want.detach().abs().flatten().tolist()])
                assert_close(got, want, atol=(1e-5 if dtype == torch.float32 else 1e-12) * largest)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("programs", [1, 8, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_segments_gives_the_same(causal, programs, monkeypatch):
    from saccade.attention.kernels import linear

    monkeypatch.setattr(linear, "PROGRAMS", programs)
    tensors, options = make(Shape(150, 150, 8, 24, batch=1, causal=causal, decay=causal, options="state"))
    expected, expected_grads = run(tensors, options, "reference")
    outputs, grads = run(tensors, options, "triton")
    for got, want in zip(outputs + grads, expected + expected_grads, strict=True):
        assert_close(got, want, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, Shape(3000, 3000, 128, 128), Shape(500, 500, 256, 200)], ids=str)
def test_every_backend_on_cuda(shape, dtype):
    tensors, options = make(shape, dtype)
    expected, expected_grads = run(*as_double(tensors, options), "reference")
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    for option, given in options.items():
        if isinstance(given, torch.Tensor):
            options[option] = given.detach().cuda().requires_grad_(given.requires_grad)
    share = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]  # TF32 may be on
    for row in explain(linear_attention, *tensors, **options).rows:
        if row.ok:
            outputs, grads = run(tensors, options, row.backend)
            for got, want in zip(outputs + grads, expected + expected_grads, strict=True):
                largest = max([1.0, *want.detach().abs().flatten().tolist()])
                assert_close(got, want, rtol=0, atol=share * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["", "normalise"], ids=str)
def test_half_precision_keeps_sums_and_states_in_float32(dtype, options):
    tensors, options = make(Shape(197, 197, 32, 32, heads=4, kv_heads=2, options=options), dtype)
    expected, expected_grads = run(*as_double(tensors, options), "reference")
    outputs, grads = run(tensors, options, "torch")
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == torch.float32
    for got, want in zip(outputs + grads, expected + expected_grads, strict=True):
        share = 1e-5 if got.dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3
        assert_close(got, want, rtol=0, atol=share * want.abs().max().item())


def test_equals_the_recurrence_written_out():
    (query, key, value), options = make(Shape(9, 9, 3, 4, options="state"), torch.float64)
    state, steps = options["initial_state"], []
    for i in range(9):
        kept = torch.exp(options["log_decay"].double())[:, None, None]
        state = kept * state + key[:, :, i, :, None] * value[:, :, i, None, :]
        steps.append(options["scale"] * (query[:, :, i, None] @ state))
    got = reference.linear_attention(query, key, value, **{**options, "mask": None})
    assert_close(got.out, torch.cat(steps, 2))
    assert_close(got.state, state)


@pytest.mark.parametrize("cuts", [(1,), (64, 65), (30, 100, 129)], ids=str)
def test_the_state_carries_a_sequence_over_any_cuts(cuts):
    (query, key, value), options = make(Shape(130, 130, 8, 16), torch.float64)
    whole = linear_attention(query, key, value, **options)
    outs, state = [], None
    for a, b in zip([0, *cuts], [*cuts, 130], strict=True):
        part = [tensor[:, :, a:b] for tensor in (query, key, value)]
        out, state = linear_attention(*part, **options, initial_state=state)
        outs.append(out)
    assert_close(torch.cat(outs, 2), whole.out)
    assert_close(state, whole.state)
    for got, want in zip(
        gradients([torch.cat(outs, 2)], [query, key]), gradients([whole.out], [query, key]), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("slope", [1.0, 30.0])
def test_strong_decay_stays_finite(slope):
    tensors, options = make(Shape(197, 197, 8, 8, decay=False))
    options["log_decay"] = torch.full((2,), -slope)
    expected, expected_grads = run(*as_double(tensors, options), "reference")
    outputs, grads = run(tensors, options, "torch")
    for got, want in zip(outputs + grads, expected + expected_grads, strict=True):
        assert_close(got, want)


def test_no_key_gives_zeros_and_no_gradient():
    tensors, options = make(Shape(17, 17, 8, 8, options="normalise"))
    options["mask"] = torch.arange(17) > 4  # the first five queries see nothing
    for row in explain(linear_attention, *tensors, **options).rows:
        if row.ok:
            outputs, grads = run(tensors, options, row.backend)
            assert not outputs[0][:, :, :5].any()
            assert not grads[0][:, :, :5].any()
            assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("causal", "normalise"), [(True, False), (True, True), (False, True)])
def test_gradcheck(causal, normalise, backend):
    shape = Shape(5, 5, 3, 2, kv_heads=1, causal=causal, decay=causal, options="state" + " normalise" * normalise)
    tensors, options = make(shape, torch.float64)
    state = options.pop("initial_state")

    def function(query, key, value, initial_state):
        return linear_attention(query, key, value, **options, initial_state=initial_state, backend=backend)

    assert torch.autograd.gradcheck(function, [*tensors, state])


def test_the_reference_gives_the_gradient_of_a_decay():
    tensors, options = make(Shape(9, 9, 4, 4))
    options["log_decay"].requires_grad_()
    explanation = explain(linear_attention, *tensors, **options)
    assert explanation.chosen == "reference"
    assert "log_decay" in explanation.rows[1].reason
    (grad,) = gradients(list(linear_attention(*tensors, **options)), [options["log_decay"]])
    assert grad.abs().min() > 0
    with pytest.raises(BackendError, match="no gradient of log_decay"):
        linear_attention(*tensors, **options, backend="torch")


def test_backward_is_deterministic():
    tensors, options = make(Shape(197, 197, 24, 24, options="state"))
    first, second = (run(tensors, options, "torch")[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_is_larger_than_the_inputs(causal):
    tensors, options = make(Shape(512, 512, 8, 8, batch=1, causal=causal, decay=causal))
    with NoScores(2 * 64 * 64 + 1):  # two heads: the weights of one chunk have the size of the inputs
        run(tensors, options, "torch")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("wide_out", [False, True])
def test_opcheck(wide_out):
    (query, key, value), options = make(Shape(70, 70, 8, 4, heads=4, kv_heads=2, options="state"))
    state = options["initial_state"]
    torch.library.opcheck(
        linear_recurrence, (query, key, value, options["log_decay"], state, True, 0.4, wide_out, False)
    )


def test_slopes():
    assert_close(decay_slopes(4, layer=1, num_layers=3), decay_slopes(4) * (0.5 + 1e-5))
    assert_close(decay_slopes(4, "linear"), torch.tensor([0.0, 2.0, 4.0, 6.0]))
    assert_close(decay_slopes(4, "linear", layer=1, num_layers=4), torch.tensor([0.0, 1.5, 3.0, 4.5]))
    with pytest.raises(ConfigError, match=r"unknown rule 'alibbi'.*mean 'alibi'"):
        decay_slopes(4, "alibbi")
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        decay_slopes(0)
    for layer, layers in [(0, None), (None, 3), (3, 3), (0, 1)]:
        with pytest.raises(ConfigError, match=f"got layer {layer}, num_layers {layers}"):
            decay_slopes(4, layer=layer, num_layers=layers)


def test_refusals():
    tensors, options = make(Shape(5, 5, 8, 4, heads=4))
    query, key, value = tensors
    for changed, message in [
        ({"log_decay": options["log_decay"][:3]}, r"log_decay must be \(4,\), floating point; got \(3,\)"),
        ({"log_decay": torch.zeros(4, dtype=torch.int64)}, "torch.int64"),
        ({"causal": False}, "log_decay needs causal=True"),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, r"broadcastable to \(B, 1, 1, S\); got \(5, 5\)"),
        ({"initial_state": torch.zeros(2, 4, 8, 5)}, r"initial_state must be \(2, 4, 8, 4\)"),
        ({"initial_state": torch.zeros(2, 4, 8, 4, dtype=torch.float64)}, "must be torch.float32; got torch.float64"),
    ]:
        with pytest.raises(ShapeError, match=message):
            linear_attention(query, key, value, **{**options, **changed})
    with pytest.raises(ShapeError, match=r"got L = 3, S = 5\. Earlier keys belong into initial_state"):
        linear_attention(query[:, :, :3], key, value, causal=True)
