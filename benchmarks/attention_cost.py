"""Time and memory of the attention operators against length, one picture for each page of the docs.

Forward and backward on one CPU thread; at every length ours and its peer in one run.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks import peers
from benchmarks.attention import Call, training
from benchmarks.harness import compare, save
from saccade import attention as core

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
HEADS, WIDTH = 8, 64


def tokens(length: int, count: int = 3) -> tuple[Tensor, ...]:
    """Return query, key and value of one sample."""
    return tuple(torch.randn(1, HEADS, length, WIDTH).requires_grad_() for _ in range(count))


def softmax(length: int) -> dict[str, Call]:
    """Attention with its log-sum-exp beside torch's attention and the literal form."""
    functions = {
        "attention_lse": lambda q, k, v: core.attention_lse(q, k, v).out,
        "torch SDPA": F.scaled_dot_product_attention,
        "literal": lambda q, k, v: core.attention_lse(q, k, v, backend="reference").out,
    }
    return {name: training(function, *tokens(length)) for name, function in functions.items()}


def partitioned(length: int) -> dict[str, Call]:
    """Three classes beside plain attention."""
    labels = torch.arange(length)[None] * 3 // length
    functions = {
        "partitioned_attention": lambda q, k, v: core.partitioned_attention(q, k, v, labels, 3).class_out,
        "torch SDPA": F.scaled_dot_product_attention,
    }
    return {name: training(function, *tokens(length)) for name, function in functions.items()}


def block_sparse(length: int) -> dict[str, Call]:
    """Four of all blocks of 64 keys for each block of queries, beside gathering them and beside attending to all."""
    geometry = core.BlockGeometry(64, 64, length, length)
    selection = core.select_blocks(torch.rand(1, 1, length // 64, length // 64), geometry, 4)

    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.unflatten(2, (-1, 64)) for tensor in (q, k, v))
        return peers.gathered_routing(q, k, v, selection.indices[:, 0].long())

    functions = {
        "block_sparse_attention": lambda q, k, v: core.block_sparse_attention(q, k, v, selection),
        "gathered": gathered,
        "torch SDPA, all keys": F.scaled_dot_product_attention,
    }
    return {name: training(function, *tokens(length)) for name, function in functions.items()}


def linear(length: int) -> dict[str, Call]:
    """Causal with decay, beside causal softmax attention."""
    decay = -core.decay_slopes(HEADS)
    functions = {
        "linear_attention": lambda q, k, v: core.linear_attention(q, k, v, log_decay=decay, causal=True).out,
        "torch SDPA, causal": partial(F.scaled_dot_product_attention, is_causal=True),
    }
    return {name: training(function, *tokens(length)) for name, function in functions.items()}


def pointwise(length: int) -> dict[str, Call]:
    """Sigmoid attention beside its literal form and softmax attention."""
    functions = {
        "pointwise_attention": core.pointwise_attention,
        "literal": partial(core.pointwise_attention, backend="reference"),
        "torch SDPA": F.scaled_dot_product_attention,
    }
    return {name: training(function, *tokens(length)) for name, function in functions.items()}


def diversification(length: int) -> dict[str, Call]:
    """The loss of one layer beside the same from kept maps."""

    def kept(q: Tensor, k: Tensor) -> Tensor:
        return peers.diversification_of_kept_maps(torch.softmax(q @ k.transpose(-1, -2) * WIDTH**-0.5, -1))

    functions = {"attention_diversification": core.attention_diversification, "maps kept": kept}
    return {name: training(function, *tokens(length, 2)) for name, function in functions.items()}


def mixing(length: int) -> dict[str, Call]:
    """Stage 3 of OverLoCK-XT on square maps of ``length`` positions."""
    side = round(length**0.5)
    shapes = [(1, 128, side, side), (1, 128, 7, 7), (1, 256, side, side), (194, 49), (194,), (8, 9, 9), (8, 25, 25)]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    functions = {"context_mixing": core.context_mixing, "unfolded": peers.unfolded_context_mixing}
    return {name: training(function, *inputs) for name, function in functions.items()}


def pooling(length: int) -> dict[str, Call]:
    """Five branches over a bag of half-precision features."""
    scores, value = torch.randn(1, 5, length), torch.randn(1, length, 512, dtype=torch.bfloat16)
    inputs = scores.requires_grad_(), value.requires_grad_()
    functions: dict[str, Callable[..., Tensor]] = {
        "attention_pooling": lambda s, v: core.attention_pooling(s, v).out.float(),
        "literal": lambda s, v: s.softmax(-1) @ v.float(),
    }
    return {name: training(function, *inputs) for name, function in functions.items()}


def analysis(length: int) -> dict[str, Call]:
    """Figures of one layer, no gradients, beside the same from its maps."""
    query, key, _ = tokens(length)

    def streamed() -> object:
        with torch.no_grad():
            return core.attention_statistics(query, key)

    def from_maps() -> object:
        with torch.no_grad():
            return core.attention_statistics_from_maps(torch.softmax(query @ key.transpose(-1, -2) * WIDTH**-0.5, -1))

    return {"attention_statistics": streamed, "from maps": from_maps}


MAPS = (14**2, 20**2, 28**2, 40**2, 56**2, 64**2)
TEXT = (64, 128, 256, 512, 1024, 2048, 4096)
PAGES: dict[str, tuple[Callable[[int], dict[str, Call]], tuple[int, ...], str]] = {
    "softmax": (softmax, TEXT, "tokens"),
    "partitioned": (partitioned, TEXT, "tokens"),
    "block-sparse": (block_sparse, TEXT[2:], "tokens"),
    "linear": (linear, TEXT, "tokens"),
    "pointwise": (pointwise, TEXT, "tokens"),
    "diversification": (diversification, TEXT, "tokens"),
    "context-mixing": (mixing, MAPS, "positions of the map"),
    "pooling": (pooling, (1000, 10_000, 100_000, 300_000), "instances of the bag"),
    "analysis": (analysis, TEXT, "tokens"),
}


def draw(page: str, unit: str, rows: dict[int, dict[str, dict[str, float]]]) -> None:
    """Draw time and memory against length, both axes logarithmic."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, column, label in zip(panels, ("median_ms", "peak_mib"), ("ms", "MiB beyond the inputs"), strict=True):
        for name in next(iter(rows.values())):
            panel.plot(list(rows), [row[name][column] for row in rows.values()], marker="o", markersize=3, label=name)
        panel.set(xscale="log", yscale="log", xlabel=unit, ylabel=label)
        panel.set_xticks(list(rows), [f"{n:,}" for n in rows], rotation=30, fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(IMAGES / f"attention-{page}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Run, draw and save."""
    mpl.use("agg")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = []
    for page, (make, lengths, unit) in PAGES.items():
        found = {n: compare(f"{make.__name__}, {n} {unit}", make(n), repeats=3) for n in lengths}
        draw(page, unit, {n: case["rows"] for n, case in found.items()})
        cases += found.values()
    save("attention_cost", cases)


if __name__ == "__main__":
    main()
