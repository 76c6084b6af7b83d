"""The Triton kernels of ``block_sparse_attention``: interpreted on the CPU in small, launched on a GPU at all sizes."""

import pytest
import torch

from saccade.attention import block_sparse_attention, block_sparse_attention_lse, explain
from saccade.attention.block_chunks import block_sparse
from saccade.attention.blocks import block_entries
from saccade.attention.kernels.runtime import INTERPRETING
from tests.attention.test_block_sparse import SHAPES, Sparse, in_double, make, results
from tests.helpers import assert_close

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="kernels are launched on a GPU here, not interpreted")


def assert_equals_the_reference(problem):
    expected = results(block_sparse_attention_lse, in_double(problem), "reference")
    for got, want in zip(results(block_sparse_attention_lse, problem, "triton"), expected, strict=True):
        assert_close(got, want)


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        Sparse(1, 1, 1, 1, top_k=1, batch=1),
        Sparse(12, 20, 4, 4, head_dim=6, value_dim=10, top_k=3, batch=1),  # several blocks to a tile
        Sparse(9, 17, 5, 8, heads=4, kv_heads=2, selections=2, batch=1, sink=2, window=3, options="valid extra logit"),
        Sparse(
            10, 18, 4, 8, heads=2, kv_heads=1, selections=2, batch=1, offset=8, sink=3, window=5, options="causal holes"
        ),
        Sparse(40, 40, 40, 40, top_k=1, heads=1, kv_heads=1, batch=1),  # several tiles to a block
        Sparse(5, 8, 5, 4, heads=1, kv_heads=1, batch=1, options="none"),
    ],
    ids=str,
)
def test_interpreted_kernels_equal_the_reference(shape):
    assert_equals_the_reference(make(shape))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if "weight" not in s.options and s.batch * s.keys * s.queries], ids=str
)
def test_interpreted_kernels_equal_the_reference_at_all_sizes(shape):
    assert_equals_the_reference(make(shape))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_half_precision_is_computed_in_float32(dtype):
    problem = make(Sparse(12, 12, 6, 6, batch=1, heads=1, kv_heads=1, sink=1), dtype)
    want = block_sparse_attention(*in_double(problem)[0], problem[1], backend="reference")
    assert_close(block_sparse_attention(*problem[0], problem[1], backend="triton"), want)


@interpreted
def test_interpreted_backward_is_the_same_twice():
    problem = make(Sparse(12, 12, 4, 4, batch=1, heads=1, kv_heads=1))
    first, second = (results(block_sparse_attention, problem, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def reason(problem):
    row = explain(block_sparse_attention, *problem[0], problem[1], **problem[2]).rows[0]
    assert row.backend == "triton"
    assert not row.ok
    return row.reason


def test_what_the_kernels_cannot_do():
    assert reason(make(Sparse(4, 4, 2, 2, batch=0))) == "the kernels need at least one sample, query and key"
    assert reason(make(Sparse(4, 4, 2, 2), torch.float64)) == "the kernels accumulate in float32"
    assert reason(make(Sparse(4, 4, 2, 2, head_dim=264))) == "the kernels hold head widths up to 256, not 264"
    assert reason(make(Sparse(4, 4, 2, 2, options="weight"))) == "the kernels have no block_weight"


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself
def test_opcheck():
    tensors, selection, _, _ = make(Sparse(4, 4, 4, 4, batch=1, heads=1, kv_heads=1, top_k=1))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    entries, _ = block_entries(selection, None)
    torch.library.opcheck(
        block_sparse,
        (*tensors, entries, None, None, [4, 4, 0, 0, 0, 0], 0.3, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_GPU = [
    *[shape for shape in SHAPES if "weight" not in shape.options and shape.batch * shape.keys * shape.queries],
    Sparse(3136, 3136, 64, 64, head_dim=32, value_dim=32, top_k=1),  # the three routed stages of BiFormer at 224 pixels
    Sparse(784, 784, 16, 16, head_dim=32, value_dim=32, heads=4, kv_heads=4, top_k=4),
    Sparse(196, 196, 4, 4, head_dim=32, value_dim=32, heads=8, kv_heads=8, top_k=16),
    Sparse(
        500,
        1000,
        64,
        32,
        head_dim=128,
        value_dim=64,
        heads=8,
        offset=500,
        sink=4,
        window=100,
        top_k=9,
        options="causal",
    ),
    Sparse(130, 300, 32, 64, head_dim=200, value_dim=256, selections=2, top_k=3, options="valid extra"),
]


class TestOnGPU:
    """On a CUDA device, against float64 on the CPU."""

    pytestmark = gpu

    def on_gpu(self, problem):
        tensors, selection, options, _ = problem
        tensors = [tensor.detach().cuda() for tensor in tensors]
        selection = selection._replace(indices=selection.indices.cuda(), counts=selection.counts.cuda())
        options = {n: v.detach().cuda() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        trained = tensors + [t for name, t in options.items() if name not in ("scale", "key_valid")]
        return tensors, selection, options, trained

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", ON_GPU, ids=str)
    def test_kernels_equal_the_reference(self, shape, dtype):
        problem = make(shape, dtype)
        expected = results(block_sparse_attention_lse, in_double(problem), "reference")
        eps = torch.finfo(dtype).eps
        for got, want in zip(
            results(block_sparse_attention_lse, self.on_gpu(problem), "triton"), expected, strict=True
        ):
            largest = want.abs().nan_to_num(posinf=0.0).max().item() if want.numel() else 0.0
            assert_close(got, want, atol=max(1e-5, 8 * eps * max(1.0, largest)), rtol=max(1e-4, 8 * eps))

    def test_triton_is_what_runs_and_backward_is_the_same_twice(self):
        problem = self.on_gpu(make(Sparse(784, 784, 16, 16, head_dim=32, value_dim=32, top_k=4), torch.bfloat16))
        assert explain(block_sparse_attention, *problem[0], problem[1]).chosen == "triton"
        first, second = (results(block_sparse_attention, problem, "triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
