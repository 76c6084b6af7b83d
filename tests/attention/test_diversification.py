"""``attention_diversification``: every backend against the literal form, and the traps of the official code."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from saccade.attention import (
    attention,
    attention_diversification,
    attention_diversification_from_maps,
    attention_lse,
    diversification_tiles,
    explain,
    reference,
    tiles,
)
from saccade.errors import BackendError, ShapeError
from tests.attention.test_softmax import NoScores
from tests.helpers import assert_close, randn


@dataclass(frozen=True)
class Layer:
    """Sizes of one problem and its options."""

    tokens: int
    width: int = 8
    heads: int = 3
    key_heads: int = 3
    batch: int = 2
    options: str = ""  # words of "mask", "blind", "bias", "multiplier"
    prefix: int = 0
    threshold: float = 2.0

    def __str__(self):
        extra = f"-{self.options}" * bool(self.options) + f"-P{self.prefix}" * bool(self.prefix)
        return f"B{self.batch}-H{self.heads}x{self.key_heads}-N{self.tokens}-D{self.width}-{self.threshold}{extra}"


LAYERS = [
    Layer(1),
    Layer(1, threshold=0.5),
    Layer(15, batch=5, heads=1, key_heads=1, threshold=1.5),
    Layer(16, width=24, heads=6, key_heads=2),
    Layer(17, width=32, options="multiplier", batch=1, threshold=1.2),
    Layer(49, heads=8, key_heads=8, threshold=1.5),
    Layer(63, options="mask bias", heads=4, key_heads=1),
    Layer(64, width=64, batch=1, options="blind multiplier", prefix=1, threshold=1.1),
    Layer(65, width=56, prefix=5, options="mask"),
    Layer(197, width=64, prefix=1, batch=1),
    Layer(12, prefix=12),
    Layer(12, batch=0),
    Layer(0),
    Layer(20, threshold=0.0, options="blind bias multiplier mask"),
]
ZERO = ["B2-H3x3-N1-D8-2.0", "B2-H3x3-N12-D8-2.0-P12", "B0-H3x3-N12-D8-2.0", "B2-H3x3-N0-D8-2.0"]  # a loss of 0


def make(layer, dtype=torch.float64):
    """Return query and key as strided views that want gradients, and options; a multiplier wants one too.

    The queries share a direction, so that they agree about some keys and the loss is not 0.
    """
    batch, heads, tokens = layer.batch, layer.heads, layer.tokens
    query = (1.5 * randn(batch, tokens, heads, layer.width, seed=1) + 0.7).to(dtype).transpose(1, 2)
    key = (1.5 * randn(batch, tokens, layer.key_heads, layer.width, seed=2)).to(dtype).transpose(1, 2)
    options = {"threshold": layer.threshold, "prefix_tokens": layer.prefix}
    for name in layer.options.split():
        if name == "mask":  # some keys of each sample are padding
            options["mask"] = (torch.arange(tokens) < tokens - 3)[None, None, None].expand(batch, 1, 1, tokens)
        elif name == "blind":  # some queries see nothing, of some heads
            options["mask"] = (randn(heads, tokens, tokens, seed=3) > 0) & (torch.arange(tokens) % 3 > 0)[:, None]
        elif name == "bias":
            options["bias"] = randn(heads, tokens, tokens, seed=4, dtype=dtype)
        elif name == "multiplier":
            options["logit_multiplier"] = randn(heads, tokens, tokens, seed=5, dtype=dtype).sigmoid().requires_grad_()
    return [query.requires_grad_(), key.requires_grad_()], options


def run(tensors, options, backend="auto"):
    """Return the loss and its gradients."""
    loss = attention_diversification(*tensors, **options, backend=backend)
    wanted = [*tensors, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    return [loss, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("elements", [100, 3000, 1 << 20], ids="tile{}".format)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_tiles_equal_the_reference(layer, elements, monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", elements)
    tensors, options = make(layer)
    expected = run(tensors, options, "reference")
    assert (expected[0] > 0.01) == (str(layer) not in ZERO)  # else there is nothing to compare
    for got, want in zip(run(tensors, options, "torch"), expected, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_computed_in_float32(dtype):
    tensors, options = make(Layer(49, options="multiplier bias"), dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wide_options = {**options, "bias": options["bias"].double()}
    wide_options["logit_multiplier"] = options["logit_multiplier"].detach().double().requires_grad_()
    expected = run(wide, wide_options, "reference")
    for backend in ("torch", "reference"):
        loss, *grads = run(tensors, options, backend)
        assert loss.dtype == torch.float32
        assert_close(loss, expected[0])
        for got, want, tensor in zip(grads, expected[1:], [*tensors, options["logit_multiplier"]], strict=True):
            assert got.dtype == tensor.dtype
            assert_close(got / want.abs().max(), want / want.abs().max())


def by_hand(maps, threshold):
    """The definition, one query at a time."""
    cosines = []
    for sample in maps:
        mean = sample.mean(0)
        tau = threshold / len(mean)
        target = [x if x > tau else 0.0 for x in mean.mean(0).tolist()]
        for row in mean.tolist():
            kept = [x if x > tau else 0.0 for x in row]
            dot = sum(x * y for x, y in zip(kept, target, strict=True))
            norms = sum(x * x for x in kept) ** 0.5, sum(y * y for y in target) ** 0.5
            cosines.append(dot / (max(norms[0], 1e-8) * max(norms[1], 1e-8)))
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("batch", [1, 3])
def test_maps_equal_the_definition(batch):
    maps = (2 * randn(batch, 2, 11, 11, dtype=torch.float64)).softmax(-1)
    got = attention_diversification_from_maps(maps, threshold=1.4)
    assert got > 0.1
    assert got.item() == pytest.approx(by_hand(maps, 1.4), rel=1e-12)


def test_prefix_rows_and_columns_are_dropped_and_rows_renormalised():
    maps = (2 * randn(2, 2, 13, 13, dtype=torch.float64)).softmax(-1)
    spatial = maps[:, :, 2:, 2:] / maps[:, :, 2:, 2:].sum(-1, keepdim=True)
    got = attention_diversification_from_maps(maps, threshold=1.4, prefix_tokens=2)
    assert got.item() == pytest.approx(by_hand(spatial, 1.4), rel=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_batch_of_one_is_like_any_other(backend):
    """The official code squeezes the batch away, compares with the mean over keys, and is 0 with no gradient."""
    tensors, options = make(Layer(25, batch=1))
    loss, *grads = run(tensors, options, backend)
    twice = [torch.cat([tensor, tensor]) for tensor in tensors]
    assert loss > 0.1
    assert all(grad.abs().max() > 1e-5 for grad in grads)
    assert_close(loss, attention_diversification(*twice, **options, backend=backend))


def test_is_a_mean_over_samples_so_windows_are_samples():
    (query, key), options = make(Layer(25, batch=4))
    each = [attention_diversification(query[i : i + 1], key[i : i + 1], **options) for i in range(4)]
    assert_close(attention_diversification(query, key, **options), torch.stack(each).mean())


def test_neither_the_order_of_heads_nor_of_tokens_counts():
    (query, key), options = make(Layer(25))
    heads, tokens = torch.tensor([2, 0, 1]), torch.randperm(25, generator=torch.Generator().manual_seed(0))
    loss = attention_diversification(query, key, **options)
    assert_close(attention_diversification(query[:, heads], key[:, heads], **options), loss)
    assert_close(attention_diversification(query[:, :, tokens], key[:, :, tokens], **options), loss)


def test_what_equals_the_threshold_is_dropped():
    """Uniform attention over 8 keys is exactly 1 / 8: kept at a threshold just below 1, dropped at 1."""
    query = torch.zeros(2, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    maps = torch.full((2, 2, 8, 8), 1 / 8, dtype=torch.float64)
    for threshold, expected in ((1.0, 0.0), (1.0 - 1e-9, 1.0)):
        loss = attention_diversification(query, query, threshold=threshold, backend="torch")
        for got in (loss, attention_diversification_from_maps(maps, threshold=threshold)):
            assert got.item() == pytest.approx(expected, abs=1e-15)
    assert not any(grad.any() for grad in run([query], {"key": query}, "torch"))


@pytest.mark.parametrize("prefix", [0, 2])
def test_gradcheck(prefix, monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", 40)
    tensors, options = make(Layer(9, width=4, heads=2, key_heads=1, threshold=1.3, options="multiplier mask"))
    multiplier = options.pop("logit_multiplier")
    options["prefix_tokens"] = prefix
    maps, _ = reference.softmax_weights(*tensors, options["mask"], None, False, None, multiplier)
    mean = (maps[:, :, prefix:, prefix:] / maps[:, :, prefix:, prefix:].sum(-1, keepdim=True)).mean(1)
    tau = 1.3 / (9 - prefix)
    assert min((mean - tau).abs().min(), (mean.mean(1) - tau).abs().min()) > 1e-5  # no entry changes side
    for backend in ("torch", "reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, w, b=backend: attention_diversification(q, k, **options, logit_multiplier=w, backend=b),
            [*tensors, multiplier],
        )


def test_a_bias_that_wants_a_gradient_holds_the_maps():
    (query, key), options = make(Layer(9, options="bias", threshold=1.3))
    options["bias"].requires_grad_()
    explanation = explain(attention_diversification, query, key, **options)
    assert explanation.chosen == "reference"
    assert "a gradient of the bias has the size of the maps" in str(explanation)
    assert torch.autograd.gradcheck(
        lambda bias: attention_diversification(query, key, bias=bias, threshold=1.3), options["bias"]
    )
    with torch.no_grad():
        assert explain(attention_diversification, query, key, **options).chosen == "torch"


@pytest.mark.parametrize("prefix", [0, 1])
def test_never_holds_a_map(prefix, monkeypatch):
    """Nothing as large as one N x N comes into being, and only vectors wait for the backward pass."""
    monkeypatch.setattr(tiles, "ELEMENTS", 4096)
    tensors, _ = make(Layer(150, batch=1))
    saved = []
    with (
        NoScores(149 * 149),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t),
    ):
        loss = attention_diversification(*tensors, prefix_tokens=prefix)
        torch.autograd.grad(loss, tensors)
    assert max(shape.numel() for shape in saved) <= tensors[0].numel()


def test_stands_beside_attention_and_takes_its_log_sum_exp():
    tensors, options = make(Layer(25))
    value = randn(2, 3, 25, 8, seed=6, dtype=torch.float64)
    out, lse = attention_lse(*tensors, value)
    loss = attention_diversification(*tensors, **options, lse=lse)
    joint = torch.autograd.grad(out.square().sum() + 3 * loss, tensors)
    alone = torch.autograd.grad(attention(*tensors, value).square().sum(), tensors)
    for got, first, second in zip(joint, alone, run(tensors, options)[1:], strict=True):
        assert_close(got, first + 3 * second)


def test_backward_is_deterministic_and_the_same_under_checkpointing():
    tensors, options = make(Layer(49, options="multiplier"))
    first, second = run(tensors, options), run(tensors, options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss = torch.utils.checkpoint.checkpoint(
        lambda q, k: attention_diversification(q, k, **options), *tensors, use_reentrant=False
    )
    for got, want in zip(torch.autograd.grad(loss, tensors), first[1:], strict=False):
        assert torch.equal(got, want)


def test_backward_inside_autocast_keeps_its_precision():
    tensors, _ = make(Layer(25), torch.float32)
    expected = torch.autograd.grad(attention_diversification(*tensors), tensors)
    loss = attention_diversification(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, tensors), expected, strict=True))
        lowered = attention_diversification(*tensors)
    assert_close(lowered, attention_diversification(*(t.bfloat16() for t in tensors)))


X = torch.zeros(2, 3, 9, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 7, 8)}, "as many queries as keys; got query"),
        ({"query": torch.zeros(3, 9, 8)}, "must be 4-D"),
        ({"key": torch.zeros(2, 2, 9, 8)}, "must be a multiple"),
        ({"threshold": -1.0}, "threshold must not be negative; got -1.0"),
        ({"threshold": float("nan")}, "threshold must not be negative; got nan"),
        ({"prefix_tokens": 10}, r"prefix_tokens must be in 0\.\.9"),
        ({"logit_multiplier": torch.zeros(2, 3, 9, 9)}, r"logit_multiplier must be floating point \(3, 9, 9\); got"),
        ({"lse": torch.zeros(2, 3, 8)}, r"lse must be floating point \(2, 3, 9\)"),
        ({"lse": torch.zeros(2, 3, 9, device="meta")}, "lse must be on the device of query, cpu; got meta"),
        ({"mask": torch.zeros(9, 9)}, "mask must be bool"),
        ({"bias": torch.zeros(4, 9, 9)}, "bias must be broadcastable"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ShapeError, match=message):
        attention_diversification(**{"query": X, "key": X, **change})


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (torch.zeros(2, 3, 8, 9), {}, r"maps must be floating point \(B, H, N, N\); got torch.float32 \(2, 3, 8, 9\)"),
        (torch.zeros(3, 9, 9), {}, "maps must be"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.int64), {}, "got torch.int64"),
        (torch.zeros(2, 3, 9, 9), {"prefix_tokens": -1}, "prefix_tokens must be"),
    ],
)
def test_wrong_maps(maps, options, message):
    with pytest.raises(ShapeError, match=message):
        attention_diversification_from_maps(maps, **options)


def test_a_call_in_words():
    (query, key), options = make(Layer(9, options="multiplier mask", prefix=1), torch.float32)
    words = "query (2, 3, 9, 8), key (2, 3, 9, 8), float32 on cpu, mask, logit_multiplier, prefix_tokens 1"
    assert explain(attention_diversification, query, key, **options).problem == words


def test_what_the_kernels_cannot_do_is_said():
    (query, key), options = make(Layer(9, options="multiplier"), torch.float32)
    with pytest.raises(BackendError, match="take no bias, mask or logit multiplier"):
        attention_diversification(query, key, **options, backend="triton")
    with pytest.raises(BackendError, match="no float64"):
        attention_diversification(query.double(), key.double(), backend="triton")


class LossLayer(nn.Module):
    """Self-attention that hands its loss out beside its output."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        loss = attention_diversification(query, key, prefix_tokens=1, threshold=1.3)
        return x + attention(query, key, value).transpose(1, 2).flatten(2), loss


@pytest.fixture
def model():
    layer = LossLayer().eval()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i))
    return layer


INPUT = randn(2, 9, 16)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_script_trace_and_fx(model):
    expected = model(INPUT)
    for form in (torch.jit.script(model), torch.jit.trace(model, INPUT), torch.fx.symbolic_trace(model)):
        for got, want in zip(form(INPUT), expected, strict=True):
            assert_close(got, want)


def test_export_holds_torch_operators_only(model):
    shapes = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=3)},)
    exported = torch.export.export(model, (INPUT,), dynamic_shapes=shapes)
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    other = randn(3, 17, 16, seed=1)
    for got, want in zip(exported.module()(other), model(other), strict=True):
        assert_close(got, want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("options", ["", "multiplier mask"])
def test_opcheck(options):
    tensors, given = make(Layer(9, heads=2, key_heads=1, options=options), torch.float32)
    rest = (None, given.get("mask"), given.get("logit_multiplier"))
    forward = diversification_tiles.tiled_diversification
    torch.library.opcheck(forward, (*tensors, *rest, 2.0, 0.3))
    loss, statistics = forward(*tensors, *rest, 2.0, 0.3)
    known = [t if t is None else t.detach() for t in (loss, *tensors, *rest, statistics)]
    torch.library.opcheck(diversification_tiles.tiled_diversification_backward, (*known, 2.0, 0.3))


@pytest.mark.slow
def test_compile_without_graph_breaks(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (9, 13):
        inputs = randn(2, tokens, 16).requires_grad_()
        results = [form(inputs) for form in (compiled, model)]
        grads = [torch.autograd.grad(out.square().sum() + 3 * loss, inputs)[0] for out, loss in results]
        for got, want in zip([*results[0], grads[0]], [*results[1], grads[1]], strict=True):
            assert_close(got, want, atol=1e-5 * max(1.0, want.abs().max().item()))
