"""The Triton path of ``partitioned_attention``: interpreted on the CPU in small, launched on a GPU for all cases."""

import pytest
import torch

from saccade.attention import explain, partitioned_attention
from saccade.attention.kernels.runtime import INTERPRETING
from saccade.attention.partitioned_triton import class_order, merge_classes
from tests.attention.test_partitioned import CASES, Parts, as_double, make, run
from tests.helpers import assert_close, randn

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="kernels are launched on a GPU here, not interpreted")
SMALL = [
    Parts(5, 19, 12, 8, heads=2, kv_heads=1, labels="BHS", padding=True, weight="BS"),
    Parts(17, 20, heads=2, kv_heads=1, causal="default", labels="runs"),
    Parts(7, 40, batch=2, heads=1, kv_heads=1, causal="shuffled", labels="segments", weight="BHS"),
    Parts(1, 33, heads=2, kv_heads=1, causal="padded", padding=True),
]


def assert_equals_the_reference(case, dtype, device, share):
    """Compare results and gradients, relative to the largest element."""
    arguments, options = make(case, dtype)
    expected = [tensor for part in run(*as_double(arguments, options), "reference") for tensor in part]

    def moved(argument):
        is_tensor = isinstance(argument, torch.Tensor)
        return argument.detach().to(device).requires_grad_(argument.requires_grad) if is_tensor else argument

    options = {name: moved(given) for name, given in options.items()}
    got = [tensor for part in run([moved(a) for a in arguments], options, "triton") for tensor in part]
    for ours, theirs in zip(got, expected, strict=True):
        largest = max([1.0, *theirs.detach().nan_to_num(neginf=0.0).abs().flatten().tolist()])
        assert_close(ours, theirs, rtol=0, atol=share * largest)


@interpreted
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpreted_kernels_equal_the_reference(case):
    assert_equals_the_reference(case, torch.float32, "cpu", 1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_interpreted_half_precision_is_computed_in_float32(dtype):
    assert_equals_the_reference(Parts(5, 19), dtype, "cpu", 2e-2 if dtype == torch.bfloat16 else 4e-3)


@interpreted
def test_a_mask_per_query_is_read_by_the_kernel():
    arguments, options = make(Parts(5, 9, heads=2))
    options["mask"] = randn(2, 1, 5, 9, seed=3) > 0
    options["mask"][0, 0, 2] = False
    got, expected = (partitioned_attention(*arguments, **options, backend=name)[:4] for name in ("triton", "reference"))
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)


@interpreted
def test_backward_is_deterministic():
    arguments, options = make(SMALL[0])
    first, second = (run(arguments, options, "triton")[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck itself
def test_opcheck():
    parts_out, parts_lse = randn(1, 2, 3, 5, 8).requires_grad_(), randn(1, 2, 3, 5, seed=1).requires_grad_()
    torch.library.opcheck(merge_classes, (parts_out, parts_lse, 2))


def test_class_order():
    labels = torch.tensor([[[2, 0, -1, 0, 7, 2]]])
    order, bounds = class_order(labels, 3, None)
    assert order.tolist() == [[[2, 1, 3, 0, 5, 4]]]
    assert bounds.tolist() == [[[1, 3, 3, 5]]]
    order, bounds = class_order(labels, 3, torch.tensor([5, 4, 3, 2, 1, 0]))
    assert order.tolist() == [[[2, 3, 1, 5, 0, 4]]]
    assert bounds.tolist() == [[[1, 3, 3, 5]]]


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Parts(5, 7), torch.float64, "float64"),
        (Parts(5, 7, 300), torch.float32, "256 wide"),
        (CASES[-2], None, "at least"),
    ],
)
def test_says_what_the_kernel_cannot_do(case, dtype, reason):
    arguments, options = make(case, dtype or torch.float32)
    row = explain(partitioned_attention, *arguments, **options).rows[0]
    assert (row.backend, row.ok) == ("triton", False)
    assert reason in row.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.batch and case.queries and case.keys], ids=str)
def test_on_a_gpu(case, dtype):
    share = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}[dtype]  # TF32 may be on
    assert_equals_the_reference(case, dtype, "cuda", share)
