"""The softmax operators: every backend against the literal form, and the conventions of the package."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.attention import attention, attention_entropy, attention_lse, explain, reference, sdpa
from tests.attention.cases import SHAPES, Shape, gradients, make, visible
from tests.helpers import TOLERANCES, assert_close, randn

OPERATORS = {"attention": attention, "attention_lse": attention_lse, "attention_entropy": attention_entropy}


def run(operator, tensors, options, backend):
    """Return outputs and gradients of query, key, value and of a bias that wants one."""
    result = operator(*tensors, **options, backend=backend)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    wanted = [*tensors, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    return outputs, gradients(outputs, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_reference(shape, name, dtype):
    operator = OPERATORS[name]
    tensors, options = make(shape, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected, expected_grads = run(operator, wide, as_double(options), "reference")
    for row in explain(operator, *tensors, **options).rows:
        # The interpreter is slow, and attention_entropy returns all that the kernel computes for attention_lse.
        if row.ok and (row.automatic or operator is attention_entropy):
            outputs, grads = run(operator, tensors, options, row.backend)
            for got, want in zip(outputs, expected, strict=True):
                assert_close(got, want)
            for got, want in zip(grads, expected_grads, strict=True):
                largest = float(want.abs().max()) if want.numel() else 1.0  # a sum rounds by its largest terms
                assert_close(got, want, atol=TOLERANCES[dtype]["atol"] * max(1.0, largest))


def as_double(options):
    """The same options with a float64 bias."""
    bias = options.get("bias")
    if bias is None:
        return options
    return {**options, "bias": bias.detach().double().requires_grad_(bias.requires_grad)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_accumulates_in_float32(name, dtype):
    shape = Shape(63, 197, 64, 64, heads=4, kv_heads=2, causal=True)
    tensors, options = make(shape, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected, expected_grads = run(OPERATORS[name], wide, options, "reference")
    outputs, grads = run(OPERATORS[name], tensors, options, "sdpa")
    assert all(grad.dtype == dtype for grad in grads)
    assert_close(outputs[0], expected[0])
    for got, want in zip(outputs[1:], expected[1:], strict=True):
        assert got.dtype == torch.float32
        assert_close(got, want, atol=1e-3)
    for got, want in zip(grads, expected_grads, strict=True):
        # Measured: 0.65 % of the largest gradient in bfloat16, 0.08 % in float16; both are sums of rounded terms.
        assert (got.double() - want).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 2e-3) * want.abs().max()


ON_GPU = [
    Shape(300, 300, 128, 128, heads=4, kv_heads=2, causal=True),
    Shape(130, 257, 80, 256, mask="padding", bias="heads"),
    Shape(257, 130, 192, 128, causal=True),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES + ON_GPU, ids=str)
def test_every_backend_on_cuda(shape, name, dtype):
    operator = OPERATORS[name]
    tensors, options = make(shape, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected, expected_grads = run(operator, wide, as_double(options), "reference")
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    for option, given in options.items():
        if isinstance(given, torch.Tensor):
            options[option] = given.detach().cuda().requires_grad_(given.requires_grad)
    share = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]  # TF32 may be on
    for row in explain(operator, *tensors, **options).rows:
        if row.ok:
            outputs, grads = run(operator, tensors, options, row.backend)
            for got, want in zip(outputs + grads, expected + expected_grads, strict=True):
                largest = max([1.0, *want.detach().nan_to_num(neginf=0.0).abs().flatten().tolist()])
                assert_close(got, want, rtol=0, atol=share * largest)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.mask == "rows" or s.bias == "padding"], ids=str)
def test_queries_that_see_nothing_get_zeros(shape, name, backend):
    tensors, options = make(shape)
    outputs, grads = run(OPERATORS[name], tensors, options, backend)
    blind = ~visible(shape, options).any(-1)
    assert blind.any()
    assert not outputs[0][blind].any()
    assert not grads[0][blind].any()
    assert all(grad.isfinite().all() for grad in grads)
    for got, nothing in zip(outputs[1:], (-torch.inf, 0.0), strict=False):
        assert (got[blind] == nothing).all()
        assert got[~blind].isfinite().all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.mask or s.bias], ids=str)
def test_rows_opened_for_cuda_kernels_are_cleared_again(shape):
    """On CUDA rows without a visible key are opened and cleared; the same steps must give the same on the CPU."""
    tensors, options = make(shape, torch.float64)
    query, key, value = (tensor.repeat_interleave(shape.heads // tensor.shape[1], 1) for tensor in tensors)
    scores_mask = sdpa.combine(query, key, options.get("mask"), options.get("bias"), shape.causal)
    opened, blind = sdpa.open_blind_rows(scores_mask)
    opened_score = opened if opened.dtype == torch.bool else opened > -torch.inf
    assert opened_score.any(-1).all()
    out = sdpa.sdpa(query, key, value, opened, False, options["scale"], 0.0).masked_fill(blind, 0.0)
    assert_close(out, reference.attention(*tensors, **options))


def test_bottom_right_bias_of_torch_is_ours():
    """On CUDA a causal call with L < S goes through torch's own bias, which needs no mask in memory."""
    tensors, options = make(Shape(7, 12, 8, 8, heads=4, kv_heads=2, causal=True))
    out = sdpa.lower_right_sdpa(*tensors, scale=options["scale"], dropout_p=0.0)
    assert_close(out, reference.attention(*tensors, **options))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck(name):
    shape = Shape(5, 7, 3, 4, heads=2, kv_heads=1, causal=True)
    tensors, options = make(shape, torch.float64)
    mask = randn(2, 2, 5, 7, seed=8) > -1
    bias = randn(1, 7, seed=7, dtype=torch.float64)
    function = OPERATORS[name]
    for backend in ("sdpa", "reference"):
        assert torch.autograd.gradcheck(lambda *t, b=backend: function(*t, **options, backend=b), tensors)
        assert torch.autograd.gradcheck(
            lambda *t, b=backend: function(*t, **options, mask=mask, bias=bias, backend=b), tensors
        )
    bias = randn(2, 5, 7, seed=7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: function(*t[:3], **options, bias=t[3]), [*tensors, bias])


@pytest.mark.parametrize("name", OPERATORS)
def test_scale_zero_means_equal_weights(name):
    query, key, value = (randn(1, 1, 4, 8, seed=i) for i in range(3))
    for backend in ("sdpa", "reference"):
        result = OPERATORS[name](query, key, value, scale=0.0, backend=backend)
        assert_close(result if name == "attention" else result.out, value.mean(2, keepdim=True).expand(1, 1, 4, 8))


def test_one_cached_query_sees_every_key():
    query, key, value = randn(1, 2, 1, 8), randn(1, 2, 9, 8, seed=1), randn(1, 2, 9, 8, seed=2)
    assert_close(attention(query, key, value, causal=True), attention(query, key, value))


class NoScores(TorchDispatchMode):
    """Fails when any tensor of L x S elements or more comes into being."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                assert tensor.numel() < self.limit, f"{function} made {tuple(tensor.shape)}"
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(197, 197), (150, 197), (197, 150)])
@pytest.mark.parametrize("name", ["attention_lse", "attention_entropy"])
def test_never_holds_the_scores(name, queries, keys, causal):
    query = randn(1, 2, queries, 8).requires_grad_()
    key, value = (randn(1, 2, keys, 8, seed=i).requires_grad_() for i in (1, 2))
    with NoScores(queries * keys):
        outputs = OPERATORS[name](query, key, value, causal=causal, backend="sdpa")
        loss = sum(result.masked_fill(result == -torch.inf, 0).sum() for result in outputs)
        torch.autograd.grad(loss, [query, key, value])


def test_the_detector_of_scores_detects_them():
    query, key, value = (randn(1, 2, 64, 8, seed=i) for i in range(3))
    with NoScores(64 * 64), pytest.raises(AssertionError, match="made"):
        attention_lse(query, key, value, backend="reference")


def test_falls_back_where_torch_lacks_the_private_kernel(monkeypatch):
    tensors, options = make(Shape(5, 7, 8, 8, causal=True))
    expected = attention_lse(*tensors, **options)
    monkeypatch.setattr(sdpa, "HAS_FLASH_CPU", False)
    explanation = explain(attention_lse, *tensors, **options)
    assert explanation.chosen == "reference"
    assert "has no aten::" in explanation.rows[1].reason
    for got, want in zip(attention_lse(*tensors, **options), expected, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_lowers_the_inputs_as_for_sdpa(name):
    query, key = randn(1, 2, 9, 8), randn(1, 2, 9, 8, seed=1).bfloat16()  # as after a norm and after a linear layer
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("sdpa", "reference"):
            result = OPERATORS[name](query, key, key, backend=backend)
            out = result if name == "attention" else result.out
            assert out.dtype == torch.bfloat16
            assert_close(out, reference.attention(query.bfloat16().float(), key.float(), key.float()))


def test_backward_is_deterministic():
    tensors, options = make(Shape(65, 197, 24, 24, causal=True))
    first, second = (run(attention_lse, tensors, options, "sdpa")[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_is_only_where_it_is_asked_for():
    query = torch.zeros(1, 1, 1, 8)
    key, value = torch.zeros(1, 1, 20_000, 8), torch.ones(1, 1, 20_000, 8)
    torch.manual_seed(0)
    dropped = attention(query, key, value, dropout_p=0.5)
    assert_close(dropped, torch.ones_like(dropped), atol=0.05)
    assert not torch.equal(dropped, attention(query, key, value))


def test_entropy_is_that_of_the_weights():
    """Against the definition, on weights from one hot to equal."""
    query, key = randn(1, 1, 6, 8) * torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 100.0])[:, None], randn(1, 1, 9, 8, seed=1)
    for backend in ("sdpa", "reference"):
        entropy = attention_entropy(query, key, key, backend=backend).entropy
        weights = (query.double() @ key.double().mT / 8**0.5).softmax(-1)
        assert_close(entropy, torch.special.entr(weights).sum(-1), atol=1e-4)
        assert entropy[0, 0, 0] == pytest.approx(torch.tensor(9.0).log().item(), abs=1e-5)
        assert (entropy >= 0).all()


def test_entropy_of_a_bias_that_differs_between_queries_needs_the_scores():
    query, key = randn(1, 4, 5, 8), randn(1, 2, 7, 8, seed=1)
    for shape, chosen in {(7,): "sdpa", (1, 1, 1, 7): "sdpa", (4, 1, 7): "reference", (5, 7): "reference"}.items():
        assert explain(attention_entropy, query, key, key, bias=randn(*shape, seed=2)).chosen == chosen
