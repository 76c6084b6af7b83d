"""The Triton kernels of softmax attention: on a GPU where there is one, else through Triton's interpreter."""

import pytest
import torch

from saccade.attention import reference
from saccade.attention.flash import softmax_parts
from tests.attention.cases import gradients
from tests.helpers import assert_close, randn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts_problem(queries, keys, heads=4, kv_heads=2, order_heads=1, parts=3, dtype=torch.float32, excluded=True):
    """Query, key and value, a label of each key, and what the kernel reads of them; part 1 of sample 0 is empty."""
    batch, head_dim, value_dim = 2, 24, 16
    query = randn(batch, queries, heads, head_dim, seed=1, dtype=dtype).transpose(1, 2)
    key = randn(batch, keys, kv_heads, head_dim, seed=2, dtype=dtype).transpose(1, 2)
    value = randn(batch, keys, kv_heads, value_dim, seed=3, dtype=dtype).transpose(1, 2)
    labels = torch.randint(-excluded, parts, (batch, order_heads, keys), generator=torch.Generator().manual_seed(7))
    labels[0] = labels[0].where(labels[0] != 1, 0)
    order = labels.argsort(dim=-1, stable=True).int()
    classes = torch.arange(-1, parts)[:, None]
    counts = (labels.unsqueeze(-2) == classes).sum(-1)  # (B, Hs, P + 1)
    return [query, key, value], labels, order, counts.cumsum(-1).int()


def literal_parts(tensors, labels, parts, options):
    """Each part by the literal form of ``attention_lse`` under a mask."""
    query, key, value = tensors
    visible = options.get("mask")
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool) if visible is None else visible
    key_bias, key_positions, query_positions = (
        options.get(n) for n in ("key_bias", "key_positions", "query_positions")
    )
    if options.get("causal"):
        if key_positions is None:
            key_positions = torch.arange(key.shape[2])[None]
        if query_positions is None:
            query_positions = torch.arange(query.shape[2])[None] + key.shape[2] - query.shape[2]
        visible = visible & (key_positions[:, None, None, :] <= query_positions[:, None, :, None])
    scale, results = options.get("scale"), []
    for part in range(parts):
        mask = visible & (labels == part)[:, :, None]
        results.append(reference.attention_lse(query, key, value, mask, scale=scale))
    if key_bias is not None:
        mask = visible & (labels == options["weighted_part"])[:, :, None]
        results.append(reference.attention_lse(query, key, value, mask, key_bias[:, :, None], scale=scale))
    return torch.stack([r.out for r in results], 2), torch.stack([r.lse for r in results], 2)


def to(argument, device):
    """Move a tensor, detached and wanting a gradient where it is floating point; leave anything else."""
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().to(device).requires_grad_(argument.is_floating_point())


PARTS = {
    "plain": {},
    "causal": {"causal": True},
    "mask": {"mask": randn(2, 1, 19, 70, seed=4) > 0},
    "weighted": {"key_bias": True, "weighted_part": 2, "scale": 0.3},
    "positions": {
        "causal": True,
        "query_positions": torch.tensor([range(30, 49), range(3, 60, 3)]).flip(1),
        "key_positions": (torch.arange(70) - 12).clamp(min=0)[None],
        "key_bias": True,
        "weighted_part": 0,
    },
}


@pytest.mark.parametrize(("name", "order_heads"), [*((name, 1) for name in PARTS), ("weighted", 4), ("positions", 4)])
def test_parts_equal_attention_to_each_part_alone(name, order_heads):
    tensors, labels, order, bounds = parts_problem(19, 70, order_heads=order_heads)
    options = dict(PARTS[name])
    if "key_bias" in options:
        options["key_bias"] = randn(2, order_heads, 70, seed=5)
        options["key_bias"][1, :, ::3] = -torch.inf
    given = [to(t, DEVICE) for t in tensors]
    moved = {option: to(argument, DEVICE) for option, argument in options.items()}
    outputs = softmax_parts(*given, order.to(DEVICE), bounds.to(DEVICE), **moved)
    wanted = [*given, *(moved[option] for option in moved if option == "key_bias")]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    if "key_bias" in options:
        options["key_bias"] = options["key_bias"].double().requires_grad_()
    expected = literal_parts(exact, labels, 3, options)
    wanted_exact = [*exact, *(options[option] for option in options if option == "key_bias")]
    expected_grads = gradients(list(expected), wanted_exact)
    for got, want in zip([*outputs, *gradients(list(outputs), wanted)], [*expected, *expected_grads], strict=True):
        assert_close(got, want)
