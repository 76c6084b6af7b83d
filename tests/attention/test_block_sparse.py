"""``block_sparse_attention``: every backend against the literal form, the rules of a selection, and what it refuses."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from saccade.attention import (
    BlockGeometry,
    BlockSelection,
    attention_lse,
    block_sparse_attention,
    block_sparse_attention_lse,
    explain,
    use_backend,
)
from saccade.attention.block_chunks import block_sparse
from saccade.attention.blocks import block_entries
from saccade.errors import BackendError, ShapeError
from tests.attention.cases import gradients
from tests.helpers import assert_close, randn


@dataclass(frozen=True)
class Sparse:
    """Sizes of one problem and what is asked of it."""

    queries: int
    keys: int
    block_q: int
    block_k: int
    head_dim: int = 8
    value_dim: int = 8
    heads: int = 2
    kv_heads: int = 2
    selections: int = 1
    top_k: int = 2
    batch: int = 2
    offset: int = 0
    sink: int = 0
    window: int = 0
    options: str = ""  # words out of "causal", "valid", "extra", "logit", "weight", "holes", "none"

    def __str__(self) -> str:
        sizes = f"L{self.queries}x{self.block_q}-S{self.keys}x{self.block_k}-D{self.head_dim}-Dv{self.value_dim}"
        heads = f"H{self.heads}x{self.kv_heads}x{self.selections}"
        rules = [f"{name}{value}" for name, value in (("sink", self.sink), ("window", self.window)) if value]
        return "-".join([sizes, heads, *rules, *self.options.split()])


SHAPES = [
    Sparse(1, 1, 1, 1, top_k=1, batch=1),
    Sparse(36, 36, 4, 4, head_dim=32, value_dim=32, top_k=3),  # BiFormer, third stage
    Sparse(22, 66, 4, 4, head_dim=16, value_dim=16),  # a small share of the keys is selected
    Sparse(24, 64, 3, 4, heads=4, kv_heads=2, selections=2, options="valid extra"),
    Sparse(20, 12, 5, 3, head_dim=6, value_dim=10, heads=3, kv_heads=3, selections=3),  # two sizes of regions
    Sparse(17, 63, 16, 15, head_dim=24, heads=4, selections=2, options="valid extra logit"),
    Sparse(65, 64, 16, 16, value_dim=24, heads=4, kv_heads=2, selections=4, options="holes weight"),
    Sparse(63, 65, 8, 16, heads=6, offset=2, sink=3, window=9, options="causal holes"),
    Sparse(64, 64, 64, 64, head_dim=64, value_dim=64, batch=1, options="extra"),
    Sparse(33, 33, 8, 4, heads=4, selections=2, sink=5, window=3, top_k=4, options="valid weight extra logit holes"),
    Sparse(16, 197, 1, 16, heads=4, kv_heads=1, offset=181, sink=1, window=20, options="causal valid"),
    Sparse(1, 197, 1, 64, heads=4, kv_heads=2, selections=2, batch=1, offset=196, options="causal extra"),
    Sparse(15, 16, 4, 100, top_k=1, offset=-3, options="causal"),
    Sparse(12, 8, 5, 4, top_k=0, sink=2),
    Sparse(12, 8, 5, 4, options="none extra logit"),
    Sparse(6, 8, 2, 4, top_k=0),
    Sparse(0, 5, 2, 2),
    Sparse(5, 0, 2, 2, top_k=0, options="extra"),
    Sparse(5, 7, 2, 2, batch=0),
]


def make(shape, dtype=torch.float32):
    """Return query, key and value as strided views, a selection in no order, options, and all that wants a gradient."""
    s = shape
    sizes = [(s.queries, s.heads, s.head_dim), (s.keys, s.kv_heads, s.head_dim), (s.keys, s.kv_heads, s.value_dim)]
    tensors = [randn(s.batch, *size, seed=i, dtype=dtype).transpose(1, 2) for i, size in enumerate(sizes)]
    words = s.options.split()
    geometry = BlockGeometry(s.block_q, s.block_k, s.queries, s.keys, s.offset, "causal" in words)
    blocks = (s.batch, s.selections, geometry.q_blocks)
    indices = randn(*blocks, geometry.k_blocks, seed=3).argsort(-1)[..., : s.top_k]
    counts = torch.full(blocks, indices.shape[-1])
    if "holes" in words:
        indices = indices.masked_fill(randn(*indices.shape, seed=4) > 1, -1)
        counts = counts - (randn(*blocks, seed=5) > 0).int()
    if "none" in words:
        counts = torch.zeros_like(counts)
    options: dict = {"scale": 0.4}
    if "valid" in words:
        options["key_valid"] = randn(s.batch, s.keys, seed=6) > -0.5
    if "extra" in words:
        options["extra_key"] = randn(1, s.kv_heads, 1, s.head_dim, seed=7, dtype=dtype)
        options["extra_value"] = randn(s.batch, s.kv_heads, geometry.q_blocks, s.value_dim, seed=8, dtype=dtype)
    if "logit" in words:
        options["extra_logit"] = randn(s.batch, 1, geometry.q_blocks, seed=9, dtype=dtype)
        options["extra_logit"][:, :, 0] = -torch.inf
    if "weight" in words:
        options["block_weight"] = randn(*indices.shape, seed=10, dtype=dtype)
    trained = tensors + [t for name, t in options.items() if name not in ("scale", "key_valid")]
    return tensors, BlockSelection(indices, counts, geometry, s.sink, s.window), options, trained


def results(function, problem, backend):
    """Return outputs and all gradients."""
    tensors, selection, options, trained = problem
    for tensor in trained:
        tensor.requires_grad_()
    out = function(*tensors, selection, **options, backend=backend)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    return [*outputs, *gradients(outputs, trained)]


def in_double(problem):
    """Return the same problem in float64."""
    tensors, selection, options, _ = problem
    tensors = [tensor.detach().double() for tensor in tensors]
    options = {
        name: value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    trained = tensors + [t for name, t in options.items() if name not in ("scale", "key_valid")]
    return tensors, selection, options, trained


@pytest.mark.parametrize("function", [block_sparse_attention, block_sparse_attention_lse])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_equal_the_literal_form(shape, function):
    problem = make(shape)
    expected = results(function, in_double(problem), "reference")
    for backend in ("auto", "gather", "reference"):
        if backend == "gather" and 0 in (shape.queries, shape.keys, shape.batch):
            continue
        for got, want in zip(results(function, problem, backend), expected, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    problem = make(Sparse(33, 30, 8, 7, head_dim=16, value_dim=16, sink=2, options="valid extra logit"), dtype)
    expected = results(block_sparse_attention_lse, in_double(problem), "reference")
    for got, want in zip(results(block_sparse_attention_lse, problem, "torch"), expected, strict=True):
        unit = torch.finfo(dtype).eps * max(1.0, want.abs().nan_to_num(posinf=0.0).max().item())
        assert_close(got, want, atol=4 * unit, rtol=4 * torch.finfo(dtype).eps)


def dense_mask(selection, heads, key_valid):
    """Return who sees whom, bool ``(B, H, L, S)``, by the words of the specification and one pair at a time."""
    g, group = selection.geometry, heads // selection.indices.shape[1]
    mask = torch.zeros(selection.indices.shape[0], heads, g.q_len, g.kv_len, dtype=torch.bool)
    for b, h, i, j in (mask == 0).nonzero().tolist():
        row = selection.indices[b, h // group, i // g.block_q][: selection.counts[b, h // group, i // g.block_q]]
        p = g.q_offset + i
        distance = p - j if g.causal else abs(p - j)
        seen = j < selection.sink or distance < selection.window or j // g.block_k in row.tolist()
        mask[b, h, i, j] = seen and (not g.causal or j <= p) and (key_valid is None or bool(key_valid[b, j]))
    return mask


@pytest.mark.parametrize(
    "shape",
    [
        Sparse(12, 15, 5, 4, selections=2, offset=3, sink=3, window=4, options="causal valid holes"),
        Sparse(12, 15, 5, 4, heads=4, offset=1, sink=3, window=3, options="valid holes"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["torch", "gather", "reference"])
def test_selection_means_the_mask_of_the_specification(shape, backend):
    problem = make(shape)
    tensors, selection, options, trained = problem
    got = results(block_sparse_attention_lse, problem, backend)
    mask = dense_mask(selection, shape.heads, options["key_valid"])
    want = attention_lse(*tensors, mask=mask, scale=0.4)
    for ours, theirs in zip(got, [*want, *gradients(list(want), trained)], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(causal):
    tensors, selection, _, _ = make(Sparse(33, 40, 8, 16, heads=4, kv_heads=2, top_k=3, offset=7))
    selection = selection._replace(geometry=selection.geometry._replace(causal=causal))
    assert_close(block_sparse_attention(*tensors, selection), attention_lse(*tensors, causal=causal).out)


def test_chunked_prefill_changes_nothing():
    tensors, selection, _, _ = make(Sparse(24, 24, 1, 4, sink=1, window=3, top_k=2, options="causal"))
    whole = block_sparse_attention(*tensors, selection)
    for start, stop in ((0, 10), (10, 24)):
        geometry = selection.geometry._replace(q_len=stop - start, q_offset=start)
        part = selection._replace(
            indices=selection.indices[:, :, start:stop], counts=selection.counts[:, :, start:stop], geometry=geometry
        )
        out = block_sparse_attention(tensors[0][:, :, start:stop], *tensors[1:], part)
        assert_close(out, whole[:, :, start:stop])


def test_heads_and_samples_are_independent():
    tensors, selection, options, _ = make(Sparse(20, 30, 6, 8, heads=3, kv_heads=3, selections=3, options="valid"))
    out = block_sparse_attention(*tensors, selection, **options)
    order = torch.tensor([2, 0, 1])
    moved = selection._replace(indices=selection.indices[:, order], counts=selection.counts[:, order])
    assert_close(block_sparse_attention(*[t[:, order] for t in tensors], moved, **options), out[:, order])
    alone = selection._replace(indices=selection.indices[1:], counts=selection.counts[1:])
    options["key_valid"] = options["key_valid"][1:]
    assert_close(block_sparse_attention(*[t[1:] for t in tensors], alone, **options), out[1:])


def test_invalid_keys_do_not_exist():
    """A row padded with keys that are not valid equals the row alone, whatever those keys hold."""
    tensors, selection, _, _ = make(Sparse(16, 16, 4, 4, batch=1))
    padded = [tensors[0], *[F.pad(t, [0, 0, 0, 8], value=1e4) for t in tensors[1:]]]
    selection_padded = selection._replace(geometry=selection.geometry._replace(kv_len=24), sink=24)
    valid = (torch.arange(24) < 16).unsqueeze(0)
    got = block_sparse_attention(*padded, selection_padded, key_valid=valid)
    assert_close(got, block_sparse_attention(*tensors, selection._replace(sink=16)))


def test_extra_key_stands_for_many_equal_keys():
    """BiFormer's padding: n tokens with one key and value are one token with a logit of log n."""
    tensors, selection, _, _ = make(Sparse(12, 12, 4, 4, batch=1, top_k=3))
    key, value = randn(1, 2, 1, 8, seed=20), randn(1, 2, 1, 8, seed=21)
    longer = [
        tensors[0],
        *[torch.cat([t, e.expand(-1, -1, 4, -1)], 2) for t, e in zip(tensors[1:], (key, value), strict=True)],
    ]
    whole = selection._replace(
        indices=torch.arange(4).expand(1, 1, 3, 4),
        counts=torch.full((1, 1, 3), 4),
        geometry=selection.geometry._replace(kv_len=16),
    )
    logit = torch.full((1, 1, 3), 4.0).log()
    got = block_sparse_attention(*tensors, selection, extra_key=key, extra_value=value, extra_logit=logit)
    assert_close(got, block_sparse_attention(*longer, whole))


def test_a_block_listed_twice_counts_once():
    tensors, selection, _, _ = make(Sparse(8, 12, 4, 4, top_k=2, sink=1, window=2))
    doubled = selection._replace(indices=selection.indices.repeat(1, 1, 1, 2), counts=2 * selection.counts)
    for backend in ("torch", "gather", "reference"):
        got = block_sparse_attention(*tensors, doubled, backend=backend)
        assert_close(got, block_sparse_attention(*tensors, selection))


def test_int32_and_extra_key_in_another_dtype():
    tensors, selection, options, _ = make(Sparse(17, 20, 4, 8, options="extra"), torch.float16)
    want = block_sparse_attention(*tensors, selection, **options)
    options["extra_key"], options["extra_value"] = options["extra_key"].float(), options["extra_value"].float()
    with torch.autocast("cpu", torch.float16):
        narrow = selection._replace(indices=selection.indices.int(), counts=selection.counts.int())
        assert_close(block_sparse_attention(*[t.float() for t in tensors], narrow, **options), want)


def test_backward_is_the_same_twice():
    problem = make(Sparse(65, 130, 8, 8, heads=4, selections=4, top_k=9, options="weight valid"))
    first, second = (results(block_sparse_attention_lse, problem, "torch") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend):
    tensors, selection, options, trained = in_double(
        make(Sparse(7, 9, 3, 4, head_dim=3, value_dim=2, batch=1, sink=1, options="valid extra logit weight"))
    )
    names = [name for name in options if name not in ("scale", "key_valid")]
    options["extra_logit"] = options["extra_logit"].nan_to_num(neginf=0.3)
    trained = tensors + [options[name] for name in names]

    def function(*inputs):
        changed = options | dict(zip(names, inputs[3:], strict=True))
        return tuple(block_sparse_attention_lse(*inputs[:3], selection, **changed, backend=backend))

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in trained])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself
@pytest.mark.parametrize("options", ["", "valid weight causal"])
def test_opcheck(options):
    shape = Sparse(10, 12, 4, 4, heads=4, selections=2, sink=len(options), options=options)
    tensors, selection, found, trained = make(shape)
    for tensor in trained:
        tensor.requires_grad_()
    entries, weight = block_entries(selection, found.get("block_weight"))
    rule = [4, 4, 0, int("causal" in options), selection.sink, 0]
    torch.library.opcheck(block_sparse, (*tensors, entries, weight, found.get("key_valid"), rule, 0.3, False))


def largest_allocation(backend):
    """Return the most bytes that one operator allocates, inside registered operators too, forward and backward."""
    shape = Sparse(2048, 2048, 64, 64, head_dim=32, value_dim=32, top_k=24, batch=1, options="extra logit")
    tensors, selection, options, trained = make(shape)
    for tensor in trained:
        tensor.requires_grad_()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        out = block_sparse_attention(*tensors, selection, **options, backend=backend)
        torch.autograd.grad(out.sum(), trained)
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_nothing_of_the_size_of_the_gathered_keys_is_allocated():
    gathered = 24 * 2048 * 2 * 32 * 4  # keys of all query blocks
    assert largest_allocation("torch") < gathered // 3
    assert largest_allocation("gather") >= gathered


def test_explanation():
    tensors, selection, options, _ = make(Sparse(10, 12, 4, 4, sink=2, window=3, selections=2, options="valid weight"))
    text = str(explain(block_sparse_attention, *tensors, selection, **options))
    assert "2 of 3 blocks of 4 keys for 4 queries, 2 selections, sink 2, window 3, key_valid, block_weight" in text
    assert "-> torch      yes  torch's fused CPU kernel on cache-sized chunks" in text
    empty = make(SHAPES[-1])
    assert explain(block_sparse_attention, *empty[0], empty[1]).chosen == "reference"
    with pytest.raises(BackendError, match="at least one sample, query and key"), use_backend("torch"):
        block_sparse_attention(*empty[0], empty[1])


def test_wrong_arguments_are_named():
    tensors, selection, _, _ = make(Sparse(10, 12, 4, 4, heads=4, kv_heads=2))

    def refused(message, *, changed=tensors, **options):
        chosen = selection._replace(**{n: options.pop(n) for n in list(options) if n in BlockSelection._fields})
        with pytest.raises(ShapeError, match=message):
            block_sparse_attention(*changed, chosen, **options)

    g, indices, counts = selection.geometry, selection.indices, selection.counts
    refused("block_q and block_k must be at least 1", geometry=g._replace(block_q=0))
    refused("sink and window at least 0; got .* window -1", window=-1)
    refused(r"the geometry says 9 queries and 12 keys; got query \(2, 4, 10, 8\)", geometry=g._replace(q_len=9))
    refused(r"with B = 2 and NQ = 3; got \(1, 1, 3, 2\)", indices=indices[:1])
    refused(r"got \(2, 1, 3, 2\) and \(2, 3\)", counts=counts[:, 0])
    refused(
        "must have 1, Hkv = 2 or H = 4 heads", indices=indices.expand(-1, 3, -1, -1), counts=counts.expand(-1, 3, -1)
    )
    refused("must be int32 or int64; got torch.float32", indices=indices.float())
    refused("must be below 3, the number of blocks of 4 keys; got 3", indices=indices.clamp(min=3))
    refused(r"key_valid must be bool \(B, S\) = \(2, 12\)", key_valid=torch.ones(2, 12))
    refused("extra_key and extra_value come together", extra_key=torch.ones(1, 1, 1, 8))
    refused("extra_logit only with them", extra_logit=torch.ones(1, 1, 1))
    extra = {"extra_key": torch.ones(1, 1, 1, 8), "extra_value": torch.ones(1, 1, 1, 8)}
    refused(
        r"extra_key must be floating point, broadcastable to \(2, 2, 3, 8\)", **extra | {"extra_key": torch.ones(8)}
    )
    refused(r"extra_value .* got torch.float32 \(1, 1, 1, 1\)", **extra | {"extra_value": torch.ones(1, 1, 1, 1)})
    refused(r"extra_logit .* broadcastable to \(2, 4, 3\)", **extra, extra_logit=torch.ones(2, 2, 3))
    refused(r"block_weight must be floating point, of shape \(2, 1, 3, 2\)", block_weight=torch.ones(1, 1, 3, 2))
    meta = selection._replace(indices=indices.to("meta"))
    with pytest.raises(ShapeError, match="selection must be on the device of query, cpu; got meta"):
        block_sparse_attention(*tensors, meta)
