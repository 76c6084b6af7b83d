"""Arguments that are refused, with what arrived in the message."""

import pytest
import torch

from saccade.attention import attention, attention_lse
from saccade.attention.problem import describe
from saccade.errors import ShapeError

QUERY, KEY, VALUE = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)

REFUSED = {
    "three axes": ((QUERY[0], KEY, VALUE), {}, r"must be 4-D; got query \(4, 5, 8\), key \(2, 2, 7, 8\)"),
    "batch": ((QUERY[:1], KEY, VALUE), {}, "same batch size"),
    "keys": ((QUERY, KEY, VALUE[:, :, :6]), {}, "agree in Hkv and S"),
    "kv heads": ((QUERY, KEY, VALUE[:, :1]), {}, "agree in Hkv and S"),
    "width": ((QUERY, KEY[..., :7], VALUE), {}, "same head width"),
    "no width": ((QUERY[..., :0], KEY[..., :0], VALUE), {}, "at least 1"),
    "groups": ((QUERY[:, :3], KEY, VALUE), {}, "multiple"),
    "dtype": ((QUERY.double(), KEY, VALUE), {}, "one floating-point dtype; got torch.float64, torch.float32"),
    "integers": ((QUERY.int(), KEY.int(), VALUE.int()), {}, "floating-point dtype; got torch.int32"),
    "device": ((QUERY.to("meta"), KEY, VALUE), {}, "one device; got meta, cpu"),
    "float mask": ((QUERY, KEY, VALUE), {"mask": torch.zeros(5, 7)}, "mask must be bool .*got torch.float32"),
    "mask of keys": (
        (QUERY, KEY, VALUE),
        {"mask": torch.ones(2, 7, dtype=torch.bool)},
        r"\(B, H, L, S\) = \(2, 4, 5, 7\); got \(2, 7\).*mask\[:, None, None, :\]",
    ),
    "mask of five axes": ((QUERY, KEY, VALUE), {"mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)}, "broadcastable"),
    "mask elsewhere": ((QUERY, KEY, VALUE), {"mask": torch.ones(5, 7, dtype=torch.bool, device="meta")}, "got meta"),
    "bool bias": ((QUERY, KEY, VALUE), {"bias": torch.ones(5, 7, dtype=torch.bool)}, "bias must be floating point"),
    "bias shape": ((QUERY, KEY, VALUE), {"bias": torch.zeros(4, 7, 5)}, r"bias must be broadcastable.*got \(4, 7, 5\)"),
}


@pytest.mark.parametrize("operator", [attention, attention_lse])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(operator, case):
    tensors, options, message = REFUSED[case]
    with pytest.raises(ShapeError, match=message):
        operator(*tensors, **options)


def test_bias_wants_a_gradient_only_where_gradients_are_taken():
    bias = torch.zeros(5, 7, requires_grad=True)
    assert describe(QUERY, KEY, VALUE, bias=bias).bias_requires_grad
    with torch.no_grad():
        assert not describe(QUERY, KEY, VALUE, bias=bias).bias_requires_grad


def test_meta_tensors_give_shapes():
    query, key, value = (tensor.to("meta") for tensor in (QUERY, KEY, VALUE))
    mask = torch.ones(5, 7, dtype=torch.bool, device="meta")
    assert attention(query, key, value, mask=mask).shape == (2, 4, 5, 6)
    assert attention_lse(query, key, value, causal=True).lse.shape == (2, 4, 5)
