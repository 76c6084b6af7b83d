"""Which blocks of keys each block of queries attends to: geometry, selection, and the order of tokens it asks for.

A block is a run of consecutive tokens. For images the tokens come region by region (:func:`grid_to_regions`), so that a
square region is a block too.
"""

# No `from __future__ import annotations` here: TorchScript does not resolve quoted annotations of a NamedTuple.
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import ShapeError

__all__ = ["BlockGeometry", "BlockSelection", "grid_to_regions", "regions_to_grid", "regions_valid", "select_blocks"]


class BlockGeometry(NamedTuple):
    """How queries and keys are cut into blocks; the last block of each may be shorter.

    Args:
        block_q: Queries in a block; 1 = a selection for every query.
        block_k: Keys in a block.
        q_len: L, number of queries.
        kv_len: S, number of keys.
        q_offset: Position of query 0 in the numbering of the keys; ``kv_len - q_len`` for the last queries of a text.
        causal: Query ``i`` sees keys ``j <= q_offset + i`` only.

    Example:
        >>> BlockGeometry(block_q=64, block_k=64, q_len=200, kv_len=200).q_blocks
        4
    """

    block_q: int
    block_k: int
    q_len: int
    kv_len: int
    q_offset: int = 0
    causal: bool = False

    @property
    def q_blocks(self) -> int:
        """Number of query blocks, NQ."""
        return ceil_div(self.q_len, self.block_q)

    @property
    def k_blocks(self) -> int:
        """Number of key blocks, NB."""
        return ceil_div(self.kv_len, self.block_k)


class BlockSelection(NamedTuple):
    """The key blocks that each query block attends to.

    The query at position ``p = q_offset + i`` attends to key ``j`` if its block was selected, if ``j < sink``, or if
    ``|p - j| < window``; in a causal geometry only to ``j <= p``. Each key counts once.

    Args:
        indices: Block numbers, int ``(B, Hs, NQ, K)``, in any order, unique in a row, -1 where there is none; Hs is 1
            (the same for all heads), Hkv or H.
        counts: How many leading entries of a row count, int ``(B, Hs, NQ)``.
        geometry: See :class:`BlockGeometry`.
        sink: Leading keys that every query attends to.
        window: Reach around a query's own position within which it attends to every key.
    """

    indices: Tensor
    counts: Tensor
    geometry: BlockGeometry
    sink: int = 0
    window: int = 0


def select_blocks(scores: Tensor, geometry: BlockGeometry, top_k: int) -> BlockSelection:
    """Select the key blocks with the largest scores for every query block.

    Among equal scores the lower block number wins. No gradient flows through the choice.

    Args:
        scores: ``(B, Hs, NQ, NB)``, any floating dtype; ``-inf`` = not to be selected.
        geometry: See :class:`BlockGeometry`; decides NQ and NB.
        top_k: Blocks to select, at least 1; NB if there are fewer.

    Returns:
        A selection with ascending block numbers, padded with -1 where fewer than ``top_k`` scores are finite.

    Raises:
        ShapeError: If ``scores`` does not fit the geometry, or ``top_k`` is below 1.

    Example:
        >>> geometry = BlockGeometry(block_q=4, block_k=4, q_len=4, kv_len=12)
        >>> select_blocks(torch.tensor([[[[0.5, 2.0, 2.0]]]]), geometry, 1).indices
        tensor([[[[1]]]], dtype=torch.int32)
    """
    blocks = (ceil_div(geometry.q_len, geometry.block_q), ceil_div(geometry.kv_len, geometry.block_k))
    if scores.dim() != 4 or scores.shape[2] != blocks[0] or scores.shape[3] != blocks[1]:
        raise ShapeError(
            f"scores must be (B, Hs, NQ, NB) with (NQ, NB) = {blocks} by the geometry; got {scores.shape}."
        )
    if top_k < 1:
        raise ShapeError(f"top_k must be at least 1; got {top_k}.")
    best, order = largest(scores.detach(), min(top_k, blocks[1]))
    live = best > -torch.inf
    indices = torch.sort(order.masked_fill(~live, blocks[1]), dim=-1)[0]
    indices = indices.masked_fill(indices == blocks[1], -1).to(torch.int32)
    return BlockSelection(indices, live.sum(-1).to(torch.int32), geometry)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores of each row and where they stand; among equal ones the first."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript knows this condition on its own only)
        if torch.onnx.is_in_onnx_export():  # which has no stable sort, but whose TopK takes the first among equals
            return torch.topk(scores, count)
    best, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    return best[..., :count], order[..., :count]


def grid_to_regions(grid: Tensor, region: tuple[int, int]) -> Tensor:
    """Order the tokens of an image region by region, each region a block of consecutive tokens.

    Token ``(y, x)`` of region ``(Y, X)`` comes at ``((Y * regions across + X) * h + y) * w + x``. Rows and columns that
    fill up the last regions are zero; :func:`regions_valid` says which tokens are real.

    Args:
        grid: ``(B, H, W, C)``, any dtype.
        region: Height and width of a region in tokens, ``(h, w)``.

    Returns:
        ``(B, ceil(H / h) * ceil(W / w) * h * w, C)``; a view where the strides allow.

    Raises:
        ShapeError: If ``grid`` is not 4-D or a side of the region is below 1.

    Example:
        >>> grid_to_regions(torch.arange(8).view(1, 2, 4, 1), (2, 2)).flatten().tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    check_region(region)
    if grid.dim() != 4:
        raise ShapeError(f"grid must be (B, H, W, C); got {grid.shape}.")
    height, width = region
    down, across = ceil_div(grid.shape[1], height), ceil_div(grid.shape[2], width)
    missing = (down * height - grid.shape[1], across * width - grid.shape[2])
    if missing[0] != 0 or missing[1] != 0:
        grid = F.pad(grid, [0, 0, 0, missing[1], 0, missing[0]])
    grid = grid.reshape(grid.shape[0], down, height, across, width, grid.shape[3])
    return grid.transpose(2, 3).reshape(grid.shape[0], down * across * height * width, grid.shape[-1])


def regions_to_grid(tokens: Tensor, size: tuple[int, int], region: tuple[int, int]) -> Tensor:
    """Undo :func:`grid_to_regions`.

    Args:
        tokens: ``(B, N, C)``, region by region.
        size: Height and width of the image in tokens, ``(H, W)``; what filled up the last regions is cut off.
        region: Height and width of a region in tokens, ``(h, w)``.

    Returns:
        ``(B, H, W, C)``.

    Raises:
        ShapeError: If ``tokens`` is not 3-D, or N is not that of the regions.

    Example:
        >>> tokens = grid_to_regions(torch.arange(15).view(1, 3, 5, 1), (2, 2))
        >>> regions_to_grid(tokens, (3, 5), (2, 2)).flatten().tolist() == list(range(15))
        True
    """
    check_region(region)
    height, width = region
    down, across = ceil_div(size[0], height), ceil_div(size[1], width)
    if tokens.dim() != 3 or tokens.shape[1] != down * across * height * width:
        raise ShapeError(
            f"tokens must be (B, N, C) with N = {down * across * height * width} for an image of {size} tokens "
            f"in regions of {region}; got {tokens.shape}."
        )
    grid = tokens.reshape(tokens.shape[0], down, across, height, width, tokens.shape[2]).transpose(2, 3)
    return grid.reshape(tokens.shape[0], down * height, across * width, tokens.shape[2])[:, : size[0], : size[1]]


def regions_valid(size: tuple[int, int], region: tuple[int, int], device: torch.device) -> Tensor:
    """Say which tokens of :func:`grid_to_regions` lie in the image: ``key_valid`` for one sample.

    Args:
        size: Height and width of the image in tokens, ``(H, W)``.
        region: Height and width of a region in tokens, ``(h, w)``.
        device: Where the result shall be.

    Returns:
        Bool ``(N,)``.

    Raises:
        ShapeError: If a side of the region is below 1.

    Example:
        >>> regions_valid((1, 3), (1, 2), torch.device("cpu"))
        tensor([ True,  True,  True, False])
    """
    inside = torch.ones(1, size[0], size[1], 1, dtype=torch.bool, device=device)
    return grid_to_regions(inside, region).flatten()


def check_region(region: tuple[int, int]) -> None:
    """Raise unless both sides of a region are positive."""
    if region[0] < 1 or region[1] < 1:
        raise ShapeError(f"a region must be at least 1 token high and wide; got {region}.")


def ceil_div(total: int, size: int) -> int:
    """Return how many parts of ``size`` cover ``total``."""
    return (total + size - 1) // size


def block_entries(selection: BlockSelection, block_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """List the key blocks that each query block has to read, whatever the reason, each once and in ascending order.

    Sinks and windows become further blocks of the list. A block is then either selected, and all its keys count, or
    only forced, and those count that are in reach; so no key counts twice.

    Args:
        selection: As the user gave it.
        block_weight: As ``selection.indices``, or ``None``.

    Returns:
        Codes ``2 * block + (0 if selected else 1)``, int64 ``(B, Hs, NQ, E)`` with E >= 1, -1 where there is none,
        mostly at the end; and the weight of each entry, 1 for one that is only forced.
    """
    g = selection.geometry
    k_blocks = ceil_div(g.kv_len, g.block_k)
    nothing = 2 * k_blocks  # sorts behind every block
    indices = selection.indices.long()
    device = indices.device
    listed = torch.arange(indices.shape[-1], device=device) < selection.counts.unsqueeze(-1)
    codes = torch.where(listed & (indices >= 0), 2 * indices, nothing)  # what is too large counts as nothing too
    extended = positional(selection)
    if extended:
        codes = extend(codes, selection, k_blocks)
    if codes.shape[-1] == 0:
        codes = F.pad(codes, [0, 1], value=float(nothing))
    codes, order = torch.sort(codes, dim=-1)
    blocks = codes >> 1 if extended else codes
    again = blocks[..., 1:] == blocks[..., :-1]  # selected sorts before forced
    codes = codes.masked_fill(F.pad(again, [1, 0]), nothing)
    weight = block_weight
    if weight is not None:
        weight = F.pad(weight, [0, codes.shape[-1] - weight.shape[-1]], value=1.0).gather(-1, order)
    if codes.shape[-1] > indices.shape[-1]:  # forced ones among them: many come twice
        codes, order = torch.sort(codes, dim=-1)
        codes = codes[..., :k_blocks]
        if weight is not None:
            weight = weight.gather(-1, order)[..., :k_blocks]
    return codes.masked_fill(codes >= nothing, -1), weight


def extend(codes: Tensor, selection: BlockSelection, k_blocks: int) -> Tensor:
    """Append to the codes of selected blocks those of forced ones, and drop what no query of the block may see.

    Args:
        codes: ``(B, Hs, NQ, K)``, see :func:`block_entries`; ``2 * k_blocks`` or more means nothing.
        selection: As the user gave it.
        k_blocks: Number of key blocks.
    """
    g = selection.geometry
    first = g.q_offset + g.block_q * torch.arange(codes.shape[2], device=codes.device)  # of each query block, (NQ,)
    last = (first + g.block_q - 1).clamp(max=g.q_offset + g.q_len - 1)
    forced = forced_blocks(selection, first, last, k_blocks)  # (NQ, F)
    if forced.shape[-1] > 0:
        forced = forced.expand(codes.shape[0], codes.shape[1], forced.shape[0], forced.shape[1])
        codes = torch.cat([codes, 2 * forced + 1], -1)
    if g.causal:  # what begins after the last query of the block is not read
        codes = codes.masked_fill((codes >> 1) * g.block_k > last.unsqueeze(-1), 2 * k_blocks)
    return codes


def forced_blocks(selection: BlockSelection, first: Tensor, last: Tensor, k_blocks: int) -> Tensor:
    """Return the numbers of the blocks that hold sinks or lie in the window of some query, ``(NQ, F)``.

    Args:
        selection: As the user gave it.
        first: Position of the first query of each query block, ``(NQ,)``.
        last: Position of the last one.
        k_blocks: Number of key blocks; stands for "none".
    """
    g, window = selection.geometry, selection.window
    sinks = torch.arange(ceil_div(min(selection.sink, g.kv_len), g.block_k), device=first.device)
    forced = sinks.expand(first.shape[0], sinks.shape[0])
    if window > 0:
        start = (first - window + 1).clamp(min=0)
        end = (last if g.causal else last + window - 1).clamp(max=g.kv_len - 1)
        reach = g.block_q + (window - 1) * (1 if g.causal else 2)  # keys from start to end, at most
        near = start.unsqueeze(-1) // g.block_k + torch.arange(ceil_div(reach - 1, g.block_k) + 1, device=first.device)
        near = near.masked_fill(near * g.block_k > end.unsqueeze(-1), k_blocks)
        forced = torch.cat([forced, near], -1)
    return forced


def positional(selection: BlockSelection) -> bool:
    """Whether queries of one block may see different keys."""
    return selection.geometry.causal or selection.sink > 0 or selection.window > 0


def key_tokens(entries: Tensor, block_k: int) -> Tensor:
    """Return which tokens query blocks read: ``(B, Hs, C, T)``, T = E * block_k, from codes ``(B, Hs, C, E)``.

    They are negative where an entry is none, and S or more where the last block is shorter; :func:`visible_tokens` says
    no to both.
    """
    return ((entries >> 1).unsqueeze(-1) * block_k + torch.arange(block_k, device=entries.device)).flatten(-2)


def visible_tokens(
    tokens: Tensor, entries: Tensor, selection: BlockSelection, key_valid: Tensor | None, first: int, rows: int
) -> Tensor:
    """Return which of the tokens that query blocks read each query sees.

    Args:
        tokens: ``(B, Hs, C, T)``, of :func:`key_tokens`.
        entries: ``(B, Hs, C, E)``, from which they were made.
        selection: As the user gave it.
        key_valid: Bool ``(B, S)``.
        first: Number of the first of these C query blocks.
        rows: Queries in each of them.

    Returns:
        Bool ``(B, Hs, C, 1 or rows, T)``.
    """
    g = selection.geometry
    visible = (tokens >= 0) & (tokens < g.kv_len)
    if key_valid is not None:
        by_head = key_valid.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        visible = visible & by_head.gather(2, tokens.clamp(min=0, max=g.kv_len - 1).flatten(2)).view(tokens.shape)
    visible = visible.unsqueeze(-2)
    if positional(selection):
        blocks = first + torch.arange(entries.shape[2], device=entries.device)
        row = torch.arange(rows, device=entries.device)
        position = g.q_offset + blocks.unsqueeze(-1) * g.block_q + row  # (C, rows)
        j = tokens.unsqueeze(-2)
        distance = position.unsqueeze(-1) - j  # (B, Hs, C, rows, T)
        selected = (entries % 2 == 0).repeat_interleave(g.block_k, -1).unsqueeze(-2)
        visible = visible & (selected | (j < selection.sink) | (distance.abs() < selection.window))
        if g.causal:
            visible = visible & (distance >= 0)
    return visible


def gather_rows(tensor: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """Return rows of keys or values.

    Args:
        tensor: ``(B, Hkv, S, D)``.
        tokens: Token numbers ``(B, Hs, C, T)``, all within S; Hs 1, Hkv or H.
        heads: Heads of the result: H if each query head has tokens of its own, else Hkv.

    Returns:
        ``(B, heads, C, T, D)``.
    """
    batch, shared, blocks, count = tokens.shape
    width = tensor.shape[-1]
    if batch == 1 and shared == 1:
        if tensor.stride(1) == width and tensor.stride(3) == 1:  # the heads of a token side by side: copied as one row
            table = tensor[0].transpose(0, 1).flatten(1)
            rows = table.index_select(0, tokens.flatten()).view(blocks, count, tensor.shape[1], width)
            return rows.permute(2, 0, 1, 3).unsqueeze(0)
        rows = tensor.index_select(2, tokens.flatten())
    else:
        b = torch.arange(batch, device=tokens.device).view(-1, 1, 1)
        h = (torch.arange(heads, device=tokens.device) // (heads // tensor.shape[1])).view(1, -1, 1)
        rows = tensor[b, h, tokens.flatten(2)]
    return rows.view(batch, heads, blocks, count, width)
