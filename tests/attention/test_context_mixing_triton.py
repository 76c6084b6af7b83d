"""The Triton kernels of ``context_mixing``: interpreted on the CPU in small, launched on a GPU at all sizes."""

import pytest
import torch

from saccade.attention import context_mixing, explain
from saccade.attention.kernels.runtime import INTERPRETING
from tests.attention.test_context_mixing import SHAPES, Mixing, make, run
from tests.helpers import assert_close, randn

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="kernels are launched on a GPU here, not interpreted")


def assert_equals_the_reference(tensors):
    expected = run([tensor.detach().double().requires_grad_() for tensor in tensors], "reference")
    for got, want in zip(run(tensors, "triton"), expected, strict=True):
        assert_close(got, want, atol=1e-4)


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        Mixing(4, 7, small=1, large=3, groups=1, query_width=3, value_width=2),
        Mixing(3, 3, small=1, large=3, groups=1, batch=1),
        pytest.param(Mixing(6, 5, small=3, large=5, value_width=3), marks=pytest.mark.slow),
        pytest.param(Mixing(5, 13, small=3, large=5, groups=1, query_width=20), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interpreted_kernels_equal_the_reference(shape):
    assert_equals_the_reference(make(shape))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_half_precision_is_computed_in_float32(dtype):
    tensors = [tensor.detach() for tensor in make(Mixing(7, 6, small=3, large=5, groups=1), dtype)]
    want = context_mixing(*[tensor.double() for tensor in tensors], backend="reference")
    assert_close(context_mixing(*tensors, backend="triton"), want)


@interpreted
def test_interpreted_empty_batch():
    assert_equals_the_reference(make(Mixing(7, 9, batch=0)))


def test_triton_does_not_compute_in_float64():
    row = explain(context_mixing, *make(SHAPES[0], torch.float64)).rows[0]
    assert (row.backend, row.ok, row.reason) == ("triton", False, "the Triton kernels compute in float32")


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself
def test_opcheck():
    from saccade.attention.kernels.context_mixing import forward

    shapes = [(1, 2, 3, 3), (1, 1, 10, 2), (1 + 81,), (1, 4, 3, 3)]
    tensors = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    torch.library.opcheck(
        forward, (*tensors, 1, 3), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_GPU = [*SHAPES, Mixing(14, 14, large=13, groups=8, query_width=16, value_width=16), Mixing(40, 33, query_width=40)]


class TestOnGPU:
    """On a CUDA device, against float64 on the CPU."""

    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", ON_GPU, ids=str)
    def test_kernels_equal_the_reference(self, shape, dtype):
        tensors = make(shape, dtype)
        expected = run([tensor.detach().double().requires_grad_() for tensor in tensors], "reference")
        tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
        assert explain(context_mixing, *tensors).chosen == "triton"
        share = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        for got, want in zip(run(tensors, "auto"), expected, strict=True):
            largest = max([1.0, *want.detach().abs().flatten().tolist()])
            assert_close(got, want, rtol=0, atol=share * largest)

    def test_backward_is_deterministic(self):
        tensors = [tensor.detach().cuda().requires_grad_() for tensor in make(Mixing(17, 30))]
        assert all(torch.equal(a, b) for a, b in zip(run(tensors, "triton"), run(tensors, "triton"), strict=True))
