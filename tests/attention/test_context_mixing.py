"""``context_mixing``: every backend against the literal form, and that against loops over single positions."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from benchmarks.peers import unfolded_context_mixing
from saccade.attention import context_mixing, explain, reference
from saccade.attention.context_mixing import mix_tiles, tap_kernels, window_biases
from saccade.errors import BackendError, ShapeError
from tests.attention.cases import gradients
from tests.attention.test_softmax import NoScores
from tests.helpers import assert_close, randn


@dataclass(frozen=True)
class Mixing:
    """Sizes of one problem."""

    height: int
    width: int
    small: int = 5
    large: int = 7
    groups: int = 2
    query_width: int = 4
    value_width: int = 4
    batch: int = 2
    centers: tuple[int, int] = (7, 7)

    def __str__(self) -> str:
        return (
            f"{self.height}x{self.width}-S{self.small}-K{self.large}-G{self.groups}"
            f"-c{self.query_width}-d{self.value_width}-B{self.batch}"
        )


SHAPES = [
    Mixing(9, 12),
    Mixing(7, 7),
    Mixing(8, 7, value_width=3),
    Mixing(7, 30, groups=1, query_width=8, centers=(2, 3)),
    Mixing(17, 16, small=3, large=5),
    Mixing(33, 5, small=1, large=5, groups=3, query_width=3, value_width=2, batch=1),
    Mixing(13, 15, large=13, query_width=16, value_width=16, batch=1),
    Mixing(26, 25, large=13, groups=1, batch=1),
    Mixing(9, 9, small=9, large=3),
    Mixing(1, 1, small=1, large=1),
    Mixing(7, 9, batch=0),
]


def make(shape: Mixing, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return the seven tensors; query and value are views with the channels last in memory; all want gradients."""
    s = shape
    taps = s.small**2 + s.large**2
    tensors = [
        randn(s.batch, s.height, s.width, s.groups * s.query_width, seed=1, dtype=dtype).permute(0, 3, 1, 2),
        randn(s.batch, s.groups * s.query_width, *s.centers, seed=2, dtype=dtype),
        randn(s.batch, s.height, s.width, 2 * s.groups * s.value_width, seed=3, dtype=dtype).permute(0, 3, 1, 2),
        0.2 * randn(taps, s.centers[0] * s.centers[1], seed=4, dtype=dtype),
        randn(taps, seed=5, dtype=dtype),
        randn(s.groups, 2 * s.small - 1, 2 * s.small - 1, seed=6, dtype=dtype),
        randn(s.groups, 2 * s.large - 1, 2 * s.large - 1, seed=7, dtype=dtype),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def run(tensors, backend, scale=None):
    out = context_mixing(*tensors, scale=scale, backend=backend)
    return [out, *gradients([out], tensors)]


def by_hand(query, key, value, projection, projection_bias, small_table, large_table, scale):
    """One position, group and kernel at a time."""
    batch, _, height, width = query.shape
    groups, split = small_table.shape[0], value.shape[1] // 2
    out = torch.zeros_like(value)
    first_tap = 0
    for table, first_channel in ((small_table, 0), (large_table, split)):
        kernel = (table.shape[1] + 1) // 2
        taps = slice(first_tap, first_tap + kernel**2)
        first_tap += kernel**2
        for b in range(batch):
            for g in range(groups):
                centers = key[b].flatten(1).chunk(groups)[g]  # (c, R)
                channels = torch.arange(value.shape[1])[first_channel : first_channel + split].chunk(groups)[g]
                for y in range(height):
                    for x in range(width):
                        top = min(max(y - kernel // 2, 0), height - kernel)
                        left = min(max(x - kernel // 2, 0), width - kernel)
                        affinity = scale * query[b, :, y, x].chunk(groups)[g] @ centers
                        logits = projection[taps] @ affinity + projection_bias[taps]
                        at = (top - y + kernel - 1, left - x + kernel - 1)
                        logits = logits + table[g, at[0] : at[0] + kernel, at[1] : at[1] + kernel].flatten()
                        window = value[b, channels, top : top + kernel, left : left + kernel].flatten(1)
                        out[b, channels, y, x] = window @ torch.softmax(logits, 0)
    return out


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.height * s.width < 150], ids=str)
def test_reference_equals_the_definition(shape):
    tensors = [tensor.detach() for tensor in make(shape, torch.float64)]
    assert_close(reference.context_mixing(*tensors, 0.3), by_hand(*tensors, 0.3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_equal_the_reference(shape, dtype):
    tensors = make(shape, dtype)
    expected = run([tensor.detach().double().requires_grad_() for tensor in tensors], "reference")
    assert explain(context_mixing, *tensors).chosen == "tiles"
    for got, want in zip(run(tensors, "tiles"), expected, strict=True):
        assert_close(got, want, **({"atol": 1e-4} if dtype == torch.float32 else {}))  # gradients are sums of hundreds


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_benchmarks_peer_computes_the_same(shape):
    tensors = make(shape)
    assert_close(unfolded_context_mixing(*tensors), context_mixing(*tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    tensors = make(Mixing(17, 16), dtype)
    expected = run([tensor.detach().double().requires_grad_() for tensor in tensors], "reference")
    got = run(tensors, "tiles")
    assert_close(got[0], expected[0])
    for grad, want in zip(got[1:], expected[1:], strict=True):
        assert grad.dtype == dtype
        # Measured: at most 0.4 % in bfloat16 and 0.06 % in float16; the rounding of the result alone.
        assert (grad.double() - want).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 1e-3) * want.abs().max()


def test_a_uniform_kernel_takes_the_mean_of_the_shifted_window():
    tensors = make(SHAPES[0])
    query, key, value = (tensor.detach() for tensor in tensors[:3])
    zeros = [torch.zeros_like(tensor) for tensor in tensors[3:]]
    large = context_mixing(query, key, value, *zeros)[:, 8:]
    means = nn.functional.avg_pool2d(value[:, 8:], 7, stride=1)
    assert_close(large, nn.functional.pad(means, [3, 3, 3, 3], mode="replicate"))


@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_gradcheck(backend):
    tensors = make(Mixing(5, 6, small=3, large=5, query_width=2, value_width=2, batch=1, centers=(2, 2)), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: context_mixing(*t, scale=0.7, backend=backend), tensors, fast_mode=True)


def test_backward_is_deterministic():
    tensors = make(Mixing(17, 30))
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, "tiles"), run(tensors, "tiles"), strict=True))


def test_never_holds_the_kernels_of_all_positions_nor_unfolded_values():
    shape = Mixing(64, 64, large=13, groups=4, query_width=8, value_width=8, batch=1)
    tensors = make(shape)
    positions = shape.height * shape.width
    with NoScores(positions * shape.groups * shape.large**2 // 4):
        run(tensors, "tiles")
    with NoScores(positions * shape.groups * shape.large**2 // 4), pytest.raises(AssertionError, match="made"):
        run(tensors, "reference")


def test_autocast_lowers_the_inputs():
    tensors = make(SHAPES[0])
    with torch.autocast("cpu", torch.bfloat16):
        out = context_mixing(*tensors)
    assert out.dtype == torch.bfloat16
    assert_close(out, reference.context_mixing(*[tensor.bfloat16().float() for tensor in tensors]))


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t[0], "must be 4-D"),
        (0, lambda t: t[:, :, :6], r"value must be \(2, 16, 6, 12\)"),
        (0, lambda t: t[:, :7], r"key must be \(2, 7, 7, 7\)"),
        (1, lambda t: t[:, :4], r"key must be \(2, 8, 7, 7\)"),
        (2, lambda t: t[:1], r"value must be \(2, 16, 9, 12\)"),
        (2, lambda t: t[:, :6], r"multiple of 2 G = 4 channels; got 6"),
        (3, lambda t: t[1:], r"projection must be \(74, 49\)"),
        (4, lambda t: t[1:], r"projection_bias must be \(74,\)"),
        (5, lambda t: t[:, :7, :7], r"small_table must be .* odd kernel size K; got \(2, 7, 7\)"),
        (6, lambda t: t[:1], r"large_table must be \(2, 13, 13\)"),
        (2, lambda t: t.double(), "one floating-point dtype"),
        (5, lambda t: t.to("meta"), "on one device"),
    ],
)
def test_wrong_arguments_are_named(position, change, message):
    tensors = make(SHAPES[0])
    tensors[position] = change(tensors[position].detach())
    with pytest.raises(ShapeError, match=message):
        context_mixing(*tensors)


def test_a_map_smaller_than_the_kernel_is_refused():
    query, key, value, *others = make(SHAPES[0])
    with pytest.raises(ShapeError, match=r"no smaller than the kernels of 5 and 7 taps a side; got 9 x 6\. Resize"):
        context_mixing(query[..., :6], key, value[..., :6], *others)


def test_unknown_backend():
    with pytest.raises(BackendError, match=r"it has auto, .*tiles, reference"):
        context_mixing(*make(SHAPES[0]), backend="unfold")


class MixingLayer(nn.Module):
    """Self-mixing on a map, with pooled region centres."""

    def __init__(self):
        super().__init__()
        self.query_key = nn.Conv2d(16, 16, 1)
        self.projection = nn.Linear(4, 34)
        self.small, self.large = nn.Parameter(torch.zeros(2, 5, 5)), nn.Parameter(torch.zeros(2, 9, 9))

    def forward(self, x):
        query, key = self.query_key(x).chunk(2, 1)
        key = nn.functional.adaptive_avg_pool2d(key, [2, 2])
        return x + context_mixing(query, key, x, self.projection.weight, self.projection.bias, self.small, self.large)


@pytest.fixture
def model():
    layers = nn.Sequential(MixingLayer(), MixingLayer()).eval()
    with torch.no_grad():
        for i, parameter in enumerate(layers.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=i))
    return layers


X = randn(2, 16, 6, 9)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning")
def test_script(model):
    scripted = torch.jit.script(model)
    assert_close(scripted(X), model(X))
    assert_close(scripted(X[..., :7]), model(X[..., :7]))


def test_fx_records_the_public_function(model):
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.target is context_mixing for node in traced.graph.nodes) == 2
    assert_close(traced(X), model(X))


def test_export_holds_torch_operators_only(model):
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert not [node for node in exported.graph.nodes if "saccade" in str(node.target)]
    other = randn(3, 16, 6, 9, seed=1)
    assert_close(exported.module()(other), model(other))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself
def test_opcheck():
    query, key, value, projection, projection_bias, *tables = make(Mixing(5, 6, small=3, large=5))
    kernels = tap_kernels(query, key, projection, 2, value.shape[1], None).detach()
    arguments = [
        query.detach().unflatten(1, (2, -1)),
        kernels[:, :, :9].contiguous(),
        kernels[:, :, 9:].contiguous(),
        window_biases(tables[0], projection_bias[:9]).detach(),
        window_biases(tables[1], projection_bias[9:]).detach(),
        value.detach().unflatten(1, (2, 2, -1)),
    ]
    torch.library.opcheck(mix_tiles, tuple(argument.requires_grad_() for argument in arguments))


@pytest.mark.slow
def test_compile_without_graph_breaks(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for size in (6, 11):
        x = randn(2, 16, size, 9).requires_grad_()
        out, expected = compiled(x), model(x)
        assert_close(out, expected)
        (grad,), (want,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
        assert_close(grad, want, atol=1e-5 * want.abs().max().item())
