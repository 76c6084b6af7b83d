"""Problems that every softmax operator must solve alike, shared by its tests: odd sizes, masks, layouts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers import randn


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem and what is masked in it."""

    queries: int
    keys: int
    head_dim: int
    value_dim: int
    heads: int = 2
    kv_heads: int = 2
    batch: int = 2
    causal: bool = False
    mask: str = ""  # "", "padding" (B, 1, 1, S), "full" (B, H, L, S), "rows" (L, S) with blind rows
    bias: str = ""  # "", "heads" (H, L, S), "padding" (B, 1, 1, S) with -inf, "grad" (1, H, L, S) wanting a gradient

    def __str__(self) -> str:
        parts = [f"L{self.queries}-S{self.keys}-D{self.head_dim}-Dv{self.value_dim}-H{self.heads}x{self.kv_heads}"]
        parts += (
            ["causal"] * self.causal + [f"mask_{self.mask}"] * bool(self.mask) + [f"bias_{self.bias}"] * bool(self.bias)
        )
        return "-".join(parts)


SHAPES = [
    Shape(1, 1, 8, 8),
    Shape(15, 16, 24, 24, causal=True),
    Shape(16, 15, 24, 8, causal=True),
    Shape(17, 63, 32, 64, mask="padding"),
    Shape(64, 64, 64, 64, heads=4, kv_heads=2, causal=True),
    Shape(65, 17, 8, 24, heads=6, kv_heads=2, causal=True, mask="full"),
    Shape(63, 65, 64, 32, bias="heads"),
    Shape(1, 197, 64, 64, heads=4, kv_heads=1, causal=True),
    Shape(197, 197, 32, 32, batch=1, causal=True, bias="heads", mask="padding"),
    Shape(197, 64, 24, 24, batch=1, mask="rows"),
    Shape(15, 17, 8, 8, mask="rows", bias="padding"),
    Shape(16, 16, 8, 8, bias="grad", mask="full", causal=True),
    Shape(9, 4, 8, 16, bias="grad", causal=True),
    Shape(5, 6, 8, 8, bias="padding", causal=True),
    Shape(0, 5, 8, 8),
    Shape(5, 0, 8, 16, causal=True),
    Shape(5, 7, 8, 8, batch=0),
]


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict]:
    """Return query, key and value as strided views of ``(B, N, H, D)`` tensors, all wanting gradients, and options."""
    s = shape
    query = randn(s.batch, s.queries, s.heads, s.head_dim, seed=1, dtype=dtype).transpose(1, 2)
    key = randn(s.batch, s.keys, s.kv_heads, s.head_dim, seed=2, dtype=dtype).transpose(1, 2)
    value = randn(s.batch, s.keys, s.kv_heads, s.value_dim, seed=3, dtype=dtype).transpose(1, 2)
    options: dict = {"causal": s.causal, "scale": 0.4}
    if s.mask == "padding":
        options["mask"] = torch.arange(s.keys) < torch.tensor([s.keys - 2, 1])[: s.batch, None, None, None]
    elif s.mask == "full":
        options["mask"] = randn(s.batch, s.heads, s.queries, s.keys, seed=4) > 0
    elif s.mask == "rows":
        options["mask"] = (randn(s.queries, s.keys, seed=4) > 0) & (torch.arange(s.queries) % 3 > 0)[:, None]
    if s.bias == "heads":
        options["bias"] = randn(s.heads, s.queries, s.keys, seed=5, dtype=dtype)
    elif s.bias == "padding":
        options["bias"] = torch.zeros(s.batch, 1, 1, s.keys, dtype=dtype)
        options["bias"][0] = -torch.inf  # the first sample sees nothing
    elif s.bias == "grad":
        options["bias"] = randn(1, s.heads, s.queries, s.keys, seed=5, dtype=dtype).requires_grad_()
    return [tensor.requires_grad_() for tensor in (query, key, value)], options


def visible(shape: Shape, options: dict) -> Tensor:
    """Return which keys each query sees, bool ``(B, H, L, S)``, by the conventions and not by an operator."""
    scores = (shape.batch, shape.heads, shape.queries, shape.keys)
    seen = torch.ones(scores, dtype=torch.bool)
    if shape.causal:
        last = torch.arange(shape.queries)[:, None] + shape.keys - shape.queries
        seen = seen & (torch.arange(shape.keys) <= last)
    if "mask" in options:
        seen = seen & options["mask"]
    if "bias" in options:
        seen = seen & (options["bias"] > -torch.inf)
    return seen


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss that weighs every element of every output differently, ``-inf`` left out."""
    loss = sum(
        (out.masked_fill(out == -torch.inf, 0.0) * randn(*out.shape, seed=9 + i, dtype=out.dtype).to(out.device)).sum()
        for i, out in enumerate(outputs)
    )
    return list(torch.autograd.grad(loss, inputs))
