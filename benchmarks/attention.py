"""The attention core against what a model would do without it, on one CPU thread or on the GPU.

``saccade bench attention`` times every backend of every operator on one shape; here each operator stands beside its
peer on the shapes that the models have.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import compare, save
from saccade.attention import (
    BlockGeometry,
    BlockSelection,
    attention_diversification,
    block_sparse_attention,
    context_mixing,
    linear_attention,
    partitioned_attention,
    select_blocks,
    token_average_pooling,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Call = Callable[[], object]
Case = tuple[str, dict[str, Call]]


def randn(*shape: int) -> Tensor:
    """Return normal numbers that want a gradient."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_()


def forward(function: Callable[..., object], *inputs: object) -> Call:
    """Return a call without gradients."""

    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


def training(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """Return a call of forward and backward through the sum of the output."""

    def call() -> object:
        return torch.autograd.grad(function(*inputs).sum(), inputs)

    return call


def partitioned_cases() -> Iterator[Case]:
    """Three classes of keys: before, in and after the image tokens."""
    labels = torch.zeros(1, 1024, dtype=torch.int64, device=DEVICE)
    labels[:, 35:611] = 1
    labels[:, 611:] = 2

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return partitioned_attention(query, key, value, labels, 3).class_out

    query, key, value = randn(1, 8, 1024, 64), randn(1, 8, 1024, 64), randn(1, 8, 1024, 64)
    sdpa = F.scaled_dot_product_attention
    for name, run in (("forward", forward), ("forward + backward", training)):
        title = f"partitioned, 3 classes, H 8, 1024 x 1024, d 64, {name}"
        yield title, {"saccade": run(ours, query, key, value), "sdpa": run(sdpa, query, key, value)}
    row = randn(1, 8, 1, 64)
    title = "partitioned, decode row, H 8, S 1024, d 64"
    yield title, {"saccade": forward(ours, row, key, value), "sdpa": forward(sdpa, row, key, value)}


def routed_cases() -> Iterator[Case]:
    """The first three stages of BiFormer-T: 7 x 7 regions, routes of 1, 4 and 16 of them."""
    for pixels in (224, 512, 1024):
        for stage, (heads, routes) in enumerate(((2, 1), (4, 4), (8, 16))):
            side = -(-pixels // (4 * 2**stage * 7))  # of a region, the map padded to whole ones
            tokens = side * side
            query, key, value = (randn(1, heads, 49 * tokens, 32) for _ in range(3))
            geometry = BlockGeometry(tokens, tokens, 49 * tokens, 49 * tokens)
            selection = select_blocks(torch.rand(1, 1, 49, 49, device=DEVICE), geometry, routes)

            def ours(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection = selection) -> Tensor:
                return block_sparse_attention(q, k, v, selection)

            def gathered(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection = selection) -> Tensor:
                q, k, v = (tensor.unflatten(2, (49, -1)) for tensor in (q, k, v))
                return peers.gathered_routing(q, k, v, selection.indices[:, 0].long())

            for name, run in (("forward", forward), ("forward + backward", training)):
                title = f"block routed, BiFormer-T stage {stage + 1} at {pixels} px, {name}"
                yield title, {"saccade": run(ours, query, key, value), "gathered": run(gathered, query, key, value)}


def mixing_cases() -> Iterator[Case]:
    """Stage 3 of OverLoCK-XT: 256 channels in 8 groups, 5 x 5 and 13 x 13 taps."""
    for pixels in (224, 512, 1024):
        side = pixels // 16
        inputs = (
            randn(1, 128, side, side),
            randn(1, 128, 7, 7),
            randn(1, 256, side, side),
            randn(194, 49),
            randn(194),
            randn(8, 9, 9),
            randn(8, 25, 25),
        )
        for name, run in (("forward", forward), ("forward + backward", training)):
            title = f"context mixing, OverLoCK-XT stage 3 at {pixels} px, {name}"
            peer = peers.unfolded_context_mixing
            yield title, {"saccade": run(context_mixing, *inputs), "unfolded": run(peer, *inputs)}


def linear_cases() -> Iterator[Case]:
    """A causal map of 56 x 56 tokens."""
    query, key, value = (randn(1, 4, 3136, 64) for _ in range(3))
    log_decay = -torch.tensor([0.5, 0.1, 0.02, 0.004], device=DEVICE)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, log_decay=log_decay, causal=True).out

    sdpa = partial(F.scaled_dot_product_attention, is_causal=True)
    for name, run in (("forward", forward), ("forward + backward", training)):
        title = f"linear attention, causal, N 3136, H 4, d 64, {name}"
        yield title, {"saccade": run(ours, query, key, value), "sdpa": run(sdpa, query, key, value)}


def diversification_cases() -> Iterator[Case]:
    """The loss of one layer by itself, and beside its attention."""
    for batch, tokens, width in ((8, 196, 56), (1, 4096, 56)):
        query, key, value = (randn(batch, 8, tokens, width) for _ in range(3))

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v).sum() + attention_diversification(q, k)

        def literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            maps = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
            return (maps @ v).sum() + peers.diversification_of_kept_maps(maps)

        def loss_only(q: Tensor, k: Tensor) -> Tensor:
            maps = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
            return peers.diversification_of_kept_maps(maps)

        title = f"ADL, B {batch}, H 8, N {tokens}, d {width}, forward + backward"
        calls = {"saccade": attention_diversification, "maps kept": loss_only}
        yield title, {name: training(function, query, key) for name, function in calls.items()}
        title = f"attention and ADL, B {batch}, H 8, N {tokens}, d {width}, forward + backward"
        yield title, {"saccade": training(ours, query, key, value), "maps kept": training(literal, query, key, value)}


def pooling_cases() -> Iterator[Case]:
    """Token-aware average pooling in FAN-B at 224 pixels."""
    tokens, weights = randn(8, 14 * 14, 448), randn(8, 4, 14, 14)
    title = "token average pooling, [8, 448, 14, 14], K 4, forward + backward"
    peer = peers.unfolded_token_average_pooling
    calls = {"saccade": token_average_pooling, "unfolded": peer}
    yield title, {name: training(function, tokens, weights) for name, function in calls.items()}


def main() -> None:
    """Run and save."""
    torch.manual_seed(0)
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    groups = (partitioned_cases, routed_cases, mixing_cases, linear_cases, diversification_cases, pooling_cases)
    save(f"attention_{DEVICE}", [compare(title, calls, repeats=5) for group in groups for title, calls in group()])


if __name__ == "__main__":
    main()
