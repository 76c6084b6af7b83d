"""``partitioned_attention``: every backend against the literal form, the conventions, and what it is for."""

import math
from dataclasses import dataclass

import pytest
import torch

from saccade.attention import (
    Segments,
    attention,
    attention_lse,
    explain,
    partitioned_attention,
    partitioned_cpu,
    sdpa,
)
from saccade.errors import ShapeError
from tests.attention.cases import gradients
from tests.attention.test_softmax import NoScores
from tests.helpers import assert_close, randn


@dataclass(frozen=True)
class Parts:
    """Sizes of one problem, how its keys are classed, and what is masked in it."""

    queries: int
    keys: int
    head_dim: int = 8
    value_dim: int = 8
    heads: int = 2
    kv_heads: int = 2
    batch: int = 2
    classes: int = 3
    labels: str = "BS"  # "BS", "BHS", "shared" between samples, "runs" (contiguous labels), "segments"
    causal: str = ""  # "", "default" positions, "rows" (query positions), "padded" (left padding), "shuffled"
    padding: bool = False
    weight: str = ""  # "", "BS", "BHS"

    def __str__(self) -> str:
        words = [f"L{self.queries}-S{self.keys}-D{self.head_dim}-Dv{self.value_dim}-H{self.heads}x{self.kv_heads}"]
        words += [f"B{self.batch}", f"C{self.classes}-{self.labels}"]
        words += [f"causal_{self.causal}"] * bool(self.causal) + ["padding"] * self.padding
        return "-".join(words + [f"weight_{self.weight}"] * bool(self.weight))


CASES = [
    Parts(1, 1),
    Parts(15, 16, 24, 24),
    Parts(16, 15, 24, 8, labels="BHS"),
    Parts(17, 63, 32, 64, heads=4, padding=True),
    Parts(64, 64, 64, 64, heads=4, causal="default", labels="shared"),
    Parts(65, 17, 8, 24, heads=6, causal="default", labels="BHS"),
    Parts(63, 65, 64, 32, labels="segments", weight="BS"),
    Parts(1, 197, 64, 64, heads=4, kv_heads=1, causal="default", weight="BS"),
    Parts(1, 197, 24, 8, heads=4, labels="BHS", causal="shuffled", weight="BHS", padding=True),
    Parts(1, 63, labels="segments", causal="padded", classes=5),
    Parts(197, 197, 32, 32, batch=1, causal="default", padding=True, labels="runs"),
    Parts(197, 64, 24, 24, batch=1, causal="shuffled", labels="segments", weight="BHS"),
    Parts(15, 65, heads=4, causal="rows", labels="segments", weight="BS"),
    Parts(33, 33, heads=4, kv_heads=1, causal="padded", padding=True, weight="BS", labels="shared"),
    Parts(17, 33, heads=4, causal="shuffled", labels="BHS", weight="BHS", classes=1),
    Parts(9, 17, classes=7, weight="BS"),
    Parts(0, 5),
    Parts(5, 0, causal="default"),
    Parts(5, 7, batch=0, weight="BS"),
]


def make(case, dtype=torch.float32):
    """Return query, key and value as strided views and the other arguments; what is differentiable wants gradients."""
    c = case
    generator = torch.Generator().manual_seed(7)
    query = randn(c.batch, c.queries, c.heads, c.head_dim, seed=1, dtype=dtype).transpose(1, 2)
    key = randn(c.batch, c.keys, c.kv_heads, c.head_dim, seed=2, dtype=dtype).transpose(1, 2)
    value = randn(c.batch, c.keys, c.kv_heads, c.value_dim, seed=3, dtype=dtype).transpose(1, 2)
    labels = torch.randint(-1, c.classes, (c.batch, c.heads, c.keys), generator=generator)
    if c.labels == "segments":
        key_class = Segments((1, c.keys // 3, c.keys // 3, c.keys // 2, c.keys), labels=(0, c.classes - 1, -1, 0))
    elif c.labels == "runs":
        key_class = labels[:, 0].sort().values
    else:
        key_class = {"BS": labels[:, 0], "BHS": labels, "shared": labels[:1, 0].expand(c.batch, -1)}[c.labels]
    options = {"scale": 0.4, "causal": bool(c.causal)}
    if c.causal == "rows":
        options["query_positions"] = torch.randint(c.keys, (c.queries,), generator=generator)
    elif c.causal == "padded":  # the first keys of the second sample are padding, all at position 0
        options["key_positions"] = (torch.arange(c.keys) - torch.tensor([[0], [4]])[: c.batch]).clamp(min=0)
        options["query_positions"] = options["key_positions"][:, c.keys - c.queries :]
    elif c.causal == "shuffled":
        order = [torch.randperm(c.keys, generator=generator) for _ in range(c.batch)]
        options["key_positions"] = torch.stack(order)
        options["query_positions"] = torch.randint(c.keys, (c.batch, c.queries), generator=generator)
    if c.padding:
        options["mask"] = (torch.arange(c.keys) >= torch.tensor([0, 4])[: c.batch, None])[:, None, None, :]
    if c.weight:
        shape = (c.batch, c.keys) if c.weight == "BS" else (c.batch, c.heads, c.keys)
        options |= {"key_log_weight": randn(*shape, seed=4, dtype=dtype).requires_grad_(), "weighted_class": 0}
    return [tensor.requires_grad_() for tensor in (query, key, value)] + [key_class, c.classes], options


def run(arguments, options, backend):
    """Return all results that there are, and the gradients of query, key, value and log weight."""
    result = partitioned_attention(*arguments, **options, backend=backend)
    outputs = [tensor for tensor in result if tensor is not None]
    wanted = arguments[:3] + [options[name] for name in options if name == "key_log_weight"]
    return outputs, gradients(outputs, wanted)


def as_double(arguments, options):
    """The same call in float64."""

    def convert(argument):
        is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
        return argument.detach().double().requires_grad_() if is_float else argument

    return [convert(a) for a in arguments], {name: convert(given) for name, given in options.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_equals_the_reference(case, dtype):
    arguments, options = make(case, dtype)
    expected, expected_grads = run(*as_double(arguments, options), "reference")
    for row in explain(partitioned_attention, *arguments, **options).rows:
        if row.ok and row.automatic:
            outputs, grads = run(arguments, options, row.backend)
            for got, want in zip(outputs + grads, expected + expected_grads, strict=True):
                largest = max([1.0, *want.detach().nan_to_num(neginf=0.0).abs().flatten().tolist()])
                assert_close(got, want, atol=(1e-12 if dtype == torch.float64 else 1e-5) * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 63])
def test_half_precision_accumulates_in_float32(queries, dtype):
    case = Parts(queries, 197, 64, 64, heads=4, causal="default", weight="BS")
    arguments, options = make(case, dtype)
    options["key_log_weight"] = options["key_log_weight"].detach().float().requires_grad_()
    expected, expected_grads = run(*as_double(arguments, options), "reference")
    outputs, grads = run(arguments, options, "torch")
    assert [tensor.dtype for tensor in outputs] == [dtype, torch.float32] * 3
    for got, want in zip(outputs, expected, strict=True):
        assert_close(got, want, atol=1e-2 if dtype == torch.bfloat16 else 2e-3)
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got.double() - want).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 4e-3) * want.abs().max()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("queries", [1, 5])
def test_empty_classes_and_blind_queries_get_exact_zeros(queries, backend):
    tensors = [randn(2, 2, n, 8, seed=n).requires_grad_() for n in (queries, 9, 9)]
    weight = randn(2, 9, seed=3).requires_grad_()
    key_class = torch.tensor([0, 2, 0, 2, -1, 0, 0, 2, 2]).expand(2, -1)
    mask = torch.tensor([True, False])[:, None, None, None].expand(-1, -1, -1, 9)  # the second sample sees nothing
    result = partitioned_attention(
        *tensors, key_class, 3, mask=mask, key_log_weight=weight, weighted_class=1, backend=backend
    )
    grads = gradients(list(result), [*tensors, weight])
    assert not result.class_out[:, :, 1].any()
    assert not result.class_mass[:, :, 1].any()
    assert not result.weighted_out.any()
    assert not result.weighted_mass.any()
    assert not any(tensor[1].any() for tensor in (result.out, result.class_out, result.class_mass))
    assert (result.lse[1] == -torch.inf).all()
    assert result.lse[0].isfinite().all()
    assert all(grad.isfinite().all() and not grad[1].any() for grad in grads)
    assert not grads[3].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("queries", [1, 5])
def test_weights_count_in_their_class_only(queries, backend):
    """What stands elsewhere, NaN even, is never read; minus infinity is a weight of 0."""
    tensors = [randn(1, 2, n, 8, seed=n) for n in (queries, 9, 9)]
    key_class = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1]])
    weight = torch.tensor([[torch.nan, 0.5, -torch.inf, torch.nan, 0.5, torch.inf, torch.nan, 0.5, 0.5]])
    weight.requires_grad_()
    result = partitioned_attention(*tensors, key_class, 2, key_log_weight=weight, weighted_class=1, backend=backend)
    without = partitioned_attention(*tensors, key_class.masked_fill(weight == -torch.inf, 0), 2, backend=backend)
    assert_close(result.weighted_mass, without.class_mass[:, :, 1] * math.e**0.5)
    assert_close(result.weighted_out, without.class_out[:, :, 1] * math.e**0.5)
    assert_close(result.out, attention(*tensors))
    (grad,) = gradients([result.weighted_out], [weight])
    assert grad.isfinite().all()
    assert not grad[key_class == 0].any()


def test_classes_sum_to_attention_in_any_order_of_keys():
    query, key, value = randn(2, 4, 33, 16), randn(2, 2, 65, 16, seed=1), randn(2, 2, 65, 8, seed=2)
    key_class = torch.randint(0, 3, (2, 65), generator=torch.Generator().manual_seed(0))
    result = partitioned_attention(query, key, value, key_class, 3)
    expected = attention_lse(query, key, value)
    assert_close(result.class_out.sum(2), expected.out)
    assert_close(result.class_mass.sum(2), torch.ones(2, 4, 33))
    assert_close(result.lse, expected.lse)
    order = torch.randperm(65, generator=torch.Generator().manual_seed(1))
    shuffled = partitioned_attention(query, key[:, :, order], value[:, :, order], key_class[:, order], 3)
    for got, want in zip(shuffled[:4], result[:4], strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("queries", [1, 33])
def test_left_padding_changes_nothing(queries):
    query, key, value = (randn(1, 2, n, 8, seed=n) for n in (queries, 40, 40))
    key_class = torch.randint(0, 3, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = partitioned_attention(query, key, value, key_class, 3, causal=True)
    key, value = (torch.cat([torch.full((1, 2, 7, 8), 50.0), t], 2) for t in (key, value))
    key_class = torch.cat([torch.zeros(1, 7, dtype=torch.int64), key_class], 1)
    mask = torch.arange(47) >= 7
    result = partitioned_attention(query, key, value, key_class, 3, causal=True, mask=mask)
    for got, want in zip(result[:4], expected[:4], strict=True):
        assert_close(got, want)


def test_a_mask_per_query_takes_the_literal_form():
    arguments, options = make(Parts(5, 7, heads=4, causal="default"))
    mask = randn(2, 1, 5, 7, seed=3) > 0
    explanation = explain(partitioned_attention, *arguments, **options, mask=mask)
    assert explanation.chosen == "reference"
    assert "mask per query" in explanation.problem
    result = partitioned_attention(*arguments, **options, mask=mask)
    seen = mask & (arguments[3] >= 0)[:, None, None, :]
    assert_close(result.out, attention(*arguments[:3], mask=seen, causal=True, scale=0.4))


def test_a_mask_per_head_excludes_keys():
    arguments, options = make(Parts(5, 7, heads=4))
    mask = randn(2, 4, 1, 7, seed=3) > 0
    results = [
        partitioned_attention(*arguments, **options, mask=mask, backend=backend) for backend in ("torch", "reference")
    ]
    for got, want in zip(results[0][:4], results[1][:4], strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("weight", ["BS", "BHS"])
def test_gradcheck(weight, queries, backend):
    case = Parts(queries, 6, 3, 2, heads=2, kv_heads=1, batch=1, causal="shuffled", weight=weight, labels=weight)
    arguments, options = make(case, torch.float64)
    log_weight = options.pop("key_log_weight")

    def function(query, key, value, log_weight):
        result = partitioned_attention(
            query, key, value, *arguments[3:], **options, key_log_weight=log_weight, backend=backend
        )
        return [tensor.masked_fill(tensor == -torch.inf, 0.0) for tensor in result]

    assert torch.autograd.gradcheck(function, [*arguments[:3], log_weight])


@pytest.mark.parametrize("wanted", [["out"], ["lse"], ["class_mass"], ["class_out"], ["weighted_mass"]])
def test_gradients_of_single_results(wanted):
    arguments, options = make(Parts(9, 17, heads=4, causal="default", weight="BS"), torch.float64)
    found = []
    for backend in ("torch", "reference"):
        result = partitioned_attention(*arguments, **options, backend=backend)
        inputs = [*arguments[:3], options["key_log_weight"]]
        loss = sum(
            getattr(result, name).masked_fill(result.lse[0, 0, 0] == torch.inf, 0.0).sin().sum() for name in wanted
        )
        found.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    for got, want in zip(*found, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("causal", ["", "default", "shuffled"])
@pytest.mark.parametrize("labels", ["BS", "BHS", "segments"])
def test_never_holds_the_scores(labels, causal):
    case = Parts(197, 211, batch=1, labels=labels, causal=causal, weight="BS")
    arguments, options = make(case)
    with NoScores(197 * 211):
        run(arguments, options, "torch")


@pytest.mark.parametrize("causal", ["", "default"])
def test_backward_is_deterministic(causal):
    arguments, options = make(Parts(65, 197, 24, 24, heads=4, labels="BHS", causal=causal, weight="BHS"))
    first, second = (run(arguments, options, "torch")[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_falls_back_where_torch_lacks_the_private_kernel(monkeypatch):
    arguments, options = make(Parts(5, 7))
    monkeypatch.setattr(sdpa, "HAS_FLASH_CPU", False)
    assert explain(partitioned_attention, *arguments, **options).chosen == "reference"


def test_autocast_lowers_query_key_and_value():
    arguments, options = make(Parts(9, 17, weight="BS"))
    with torch.autocast("cpu", torch.bfloat16):
        result = partitioned_attention(*arguments, **options)
    assert [tensor.dtype for tensor in result] == [torch.bfloat16, torch.float32] * 3


def test_segments():
    segments = Segments((2, 4, 4, 7), labels=(1, 0, -1))
    assert segments.key_class(9).tolist() == [-1, -1, 1, 1, -1, -1, -1, -1, -1]
    assert Segments((0, 2, 5)).key_class(6).tolist() == [0, 0, 1, 1, 1, -1]
    assert hash(segments) == hash(Segments((2, 4, 4, 7), (1, 0, -1)))
    for bounds, labels, message in [
        ((3,), None, "at least two bounds"),
        ((3, 2), None, "ascending"),
        ((-1, 2), None, "from 0"),
        ((0, 2), (0, 1), "one label per segment, 1; got"),
    ]:
        with pytest.raises(ShapeError, match=message):
            Segments(bounds, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_class": torch.zeros(2, 6, dtype=torch.int64)}, r"key_class must be \(B, S\) = \(2, 7\) or .*expand"),
        ({"key_class": torch.zeros(2, 7)}, "key_class must be integers; got torch.float32"),
        ({"key_class": torch.zeros(2, 7, dtype=torch.bool)}, "key_class must be integers; got torch.bool"),
        ({"key_class": Segments((0, 8))}, "must not exceed the 7 keys"),
        ({"key_class": Segments((0, 1, 2, 3, 4))}, "labels from -1 to 2"),
        ({"num_classes": 0}, "at least 1; got 0"),
        ({"query_positions": torch.arange(5)}, "query_positions means something with causal=True only"),
        ({"causal": True, "key_positions": torch.arange(5)}, r"key_positions must be \(S,\) = \(7,\) or \(B, S\)"),
        ({"causal": True, "key_positions": torch.arange(7.0)}, "key_positions must be integers"),
        ({"weighted_class": 1}, "belong together"),
        ({"key_log_weight": torch.zeros(2, 7)}, "belong together"),
        ({"key_log_weight": torch.zeros(7), "weighted_class": 1}, r"key_log_weight must be \(B, S\)"),
        ({"key_log_weight": torch.zeros(2, 7).long(), "weighted_class": 1}, "must be floating point"),
        ({"key_log_weight": torch.zeros(2, 7), "weighted_class": 3}, "one of the 3 classes"),
        ({"key_log_weight": torch.zeros(2, 7, device="meta"), "weighted_class": 1}, "must be on the device of query"),
        ({"mask": torch.zeros(2, 7).bool()}, "mask must be broadcastable"),
    ],
)
def test_error_messages(change, message):
    query, key, value = (randn(2, 2, n, 8) for n in (5, 7, 7))
    arguments = {"query": query, "key": key, "value": value, "key_class": torch.zeros(2, 7).long(), "num_classes": 3}
    with pytest.raises(ShapeError, match=message):
        partitioned_attention(**(arguments | change))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # opcheck itself looks
@pytest.mark.parametrize("weight", ["", "BHS"])
def test_opcheck(weight):
    arguments, options = make(Parts(5, 7, heads=4, weight=weight))
    inputs = [*arguments, torch.arange(2, 7), None, 0.4, options.get("key_log_weight"), 1]
    torch.library.opcheck(partitioned_cpu.partitioned_cpu, inputs)
