"""The Triton kernels of softmax attention over parts: interpreted on the CPU, and on a GPU where there is one.

``test_softmax.py`` compares them as a backend of ``attention_lse`` and ``attention_entropy``.
"""

import importlib.util

import pytest
import torch

from saccade.attention import attention_entropy, attention_lse, explain, reference
from saccade.attention.flash import softmax_attention, softmax_parts
from tests.attention.cases import Shape, gradients, make
from tests.helpers import TOLERANCES, assert_close, randn

cuda = torch.cuda.is_available()
interpreted = pytest.mark.skipif(cuda or importlib.util.find_spec("triton") is None, reason="needs Triton and no GPU")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not cuda, reason="needs a CUDA device")]
OPCHECK_WARNING = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # opcheck itself looks

# Options of softmax_parts; "order_heads" and the sizes are of the problem.
PARTS = {
    "plain": {"queries": 19, "keys": 40},
    "causal": {"queries": 40, "keys": 150, "causal": True, "parts": 2, "heads": 2, "kv_heads": 1},
    "mask": {"queries": 7, "keys": 40, "mask": randn(2, 1, 7, 40, seed=4) > 0},
    "decoding": {"queries": 1, "keys": 70, "causal": True, "key_bias": True, "weighted_part": 1, "scale": 0.3},
    "weighted": {"queries": 19, "keys": 70, "key_bias": True, "weighted_part": 2, "scale": 0.3, "order_heads": 4},
    "positions": {
        "queries": 19,
        "keys": 70,
        "causal": True,
        "query_positions": torch.tensor([[*range(30, 49)], [*range(3, 60, 3)]]).flip(1),
        "key_positions": (torch.arange(70) - 12).clamp(min=0)[None],
        "key_bias": True,
        "weighted_part": 0,
        "heads": 2,
        "kv_heads": 1,
        "order_heads": 2,
    },
    "many parts": {"queries": 5, "keys": 23, "parts": 9, "heads": 1, "kv_heads": 1, "key_bias": True},
}


def make_parts(name, dtype=torch.float32):
    """Return query, key, value, and the key bias if there is one, labels of the keys (-1 = in no part) and options."""
    options = dict(PARTS[name])
    sizes = {"heads": 4, "kv_heads": 2, "order_heads": 1, "parts": 3}
    queries, keys = options.pop("queries"), options.pop("keys")
    heads, kv_heads, order_heads, parts = (options.pop(word, size) for word, size in sizes.items())
    query = randn(2, queries, heads, 24, seed=1, dtype=dtype).transpose(1, 2)
    key = randn(2, keys, kv_heads, 24, seed=2, dtype=dtype).transpose(1, 2)
    value = randn(2, keys, kv_heads, 16, seed=3, dtype=dtype).transpose(1, 2)
    labels = torch.randint(-1, parts, (2, order_heads, keys), generator=torch.Generator().manual_seed(7))
    labels[0] = labels[0].where(labels[0] != 1, 0)  # one part of one sample is empty
    tensors = [query, key, value]
    if options.pop("key_bias", False):
        tensors.append(randn(2, order_heads, keys, seed=5))
        tensors[3][1, :, ::3] = -torch.inf
    options["order"] = labels.argsort(dim=-1, stable=True).int()
    options["bounds"] = (labels.unsqueeze(-2) == torch.arange(-1, parts)[:, None]).sum(-1).cumsum(-1).int()
    return tensors, labels, options


def run_parts(tensors, options, device):
    """Return results of the kernel and gradients."""
    tensors = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
    options = {word: o.to(device) if isinstance(o, torch.Tensor) else o for word, o in options.items()}
    key_bias = tensors[3] if len(tensors) > 3 else None
    outputs = list(softmax_parts(*tensors[:3], **options, key_bias=key_bias))
    return outputs + gradients(outputs, tensors)


def run_literally(tensors, labels, options):
    """Return results and gradients of the literal form of ``attention_lse``, one call for each part, under a mask."""
    query, key, value, *key_bias = tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    visible = options.get("mask", torch.ones(1, 1, 1, 1, dtype=torch.bool))
    if options.get("causal"):
        keys = options.get("key_positions", torch.arange(key.shape[2])[None])
        queries = options.get("query_positions", torch.arange(query.shape[2])[None] + key.shape[2] - query.shape[2])
        visible = visible & (keys[:, None, None, :] <= queries[:, None, :, None])
    runs = [(part, None) for part in range(options["bounds"].shape[-1] - 1)]
    runs += [(options.get("weighted_part", 0), bias[:, :, None]) for bias in key_bias]
    results = []
    for part, bias in runs:
        mask = visible & (labels == part)[:, :, None]
        results.append(reference.attention_lse(query, key, value, mask, bias, False, options.get("scale")))
    outputs = [torch.stack([r.out for r in results], 2), torch.stack([r.lse for r in results], 2)]
    return outputs + gradients(outputs, tensors)


def compare(name, dtype, device):
    """Compare outputs within the tolerance of the dtype, gradients relative to the largest element."""
    tensors, labels, options = make_parts(name, dtype)
    expected = run_literally(tensors, labels, options)
    share = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(run_parts(tensors, options, device), expected, strict=True):
        largest = max([1.0, *want.detach().nan_to_num(neginf=0.0).abs().flatten().tolist()])
        assert_close(got, want, rtol=0, atol=max(share, TOLERANCES[dtype]["atol"]) * largest)


@interpreted
@pytest.mark.parametrize("name", PARTS)
def test_parts_equal_attention_to_each_part_alone(name):
    compare(name, torch.float32, "cpu")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_half_precision_is_computed_in_float32(dtype):
    compare("decoding", dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in PARTS])
def test_parts_on_a_gpu(name, dtype):
    compare(name, dtype, "cuda")


def same_twice(device):
    tensors, _, options = make_parts("many parts")
    first, second = (run_parts(tensors, options, device) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_backward_is_deterministic():
    assert same_twice("cpu")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_backward_is_deterministic_on_a_gpu(device):
    assert same_twice(device)


@interpreted
def test_parts_of_all_keys_unite_to_attention():
    tensors, _, options = make_parts("plain")
    keys = tensors[1].shape[2]
    cuts = torch.tensor([0, 3, 17, keys], dtype=torch.int32).expand(2, 1, 4).contiguous()
    out, lse = softmax_parts(*tensors, options["order"], cuts)
    share = (lse - lse.logsumexp(2, keepdim=True)).exp()
    assert_close((share.unsqueeze(-1) * out).sum(2), reference.attention(*tensors))


@interpreted
@pytest.mark.filterwarnings(OPCHECK_WARNING)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(with_entropy):
    shapes = [(1, 2, 5, 8), (1, 1, 6, 8), (1, 1, 6, 4), (1, 1, 6)]
    query, key, value, key_bias = (randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    order = torch.arange(6, dtype=torch.int32)[None, None]
    bounds = torch.tensor([[[0, 2, 6]]], dtype=torch.int32)
    places = (None, None, None, None, None, 0) if with_entropy else (order, bounds, None, None, key_bias, 1)
    torch.library.opcheck(softmax_attention, (query, key, value, None, None, *places, True, 0.3, with_entropy))


@interpreted
@pytest.mark.slow
def test_compile_without_graph_breaks():
    tensors, options = make(Shape(9, 17, 8, 8, causal=True))
    compiled = torch.compile(attention_entropy, fullgraph=True, backend="aot_eager")
    outputs, expected = (list(f(*tensors, **options, backend="triton")) for f in (compiled, attention_entropy))
    for got, want in zip(outputs + gradients(outputs, tensors), expected + gradients(expected, tensors), strict=True):
        assert_close(got, want)


def test_what_the_kernel_cannot_do():
    tensors = [randn(1, 1, 2, 8, seed=i) for i in range(3)]
    bias = torch.zeros(2, 2, requires_grad=True)
    wide = randn(1, 1, 2, 300)
    for arguments, options, reason in [
        (tensors, {"bias": bias}, "no gradient of the bias"),
        ([t.double() for t in tensors], {}, "computes in float32, not in torch.float64"),
        ([*tensors[:2], wide], {}, "up to 256 wide"),
        ([t[:, :, :0] for t in tensors], {}, "at least one sample, query, key"),
    ]:
        row = explain(attention_lse, *arguments, **options).rows[0]
        assert (row.backend, row.ok) == ("triton", False)
        assert reason in row.reason
