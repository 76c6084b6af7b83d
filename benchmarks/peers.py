"""Forms that the attention operators are measured against: what a model would do without them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def unfolded_context_mixing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    small_table: Tensor,
    large_table: Tensor,
) -> Tensor:
    """Mix literally: full logits, full bias, values unfolded; arguments as ``context_mixing``."""
    batch, _, height, width = query.shape
    groups = small_table.shape[0]
    query = query.unflatten(1, (groups, -1)).flatten(3) * (value.shape[1] // groups) ** -0.5
    affinity = torch.einsum("bgcn,bgcl->bgnl", query, key.unflatten(1, (groups, -1)).flatten(3))
    logits = F.linear(affinity, projection, projection_bias)  # (B, G, N, S S + K K)
    halves = []
    start = 0
    for table, half in zip((small_table, large_table), value.chunk(2, 1), strict=True):
        kernel = (table.shape[1] + 1) // 2
        rows, columns = (relative_positions(length, kernel) for length in (height, width))
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).flatten(1, 2)  # (G, N, K K)
        weights = torch.softmax(logits[..., start : start + kernel**2] + bias, -1)
        weights = weights.transpose(2, 3).reshape(batch, groups, 1, kernel**2, height, width)
        windows = F.unfold(half, kernel).unflatten(2, (height - kernel + 1, width - kernel + 1))
        windows = F.pad(windows, [kernel // 2] * 4, mode="replicate")  # the window at the border is shifted inside
        windows = windows.view(batch, groups, -1, kernel**2, height, width)
        halves.append((windows * weights).sum(3).flatten(1, 2))
        start += kernel**2
    return torch.cat(halves, 1)


def relative_positions(length: int, kernel: int) -> Tensor:
    """Return the row of the bias table of each tap at each position along one side, ``(length, kernel)``."""
    position = torch.arange(length)
    start = (position - kernel // 2).clamp(0, length - kernel)
    return start[:, None] + torch.arange(kernel) - position[:, None] + kernel - 1


def diversification_of_kept_maps(maps: Tensor) -> Tensor:
    """Compute the loss of one layer from softmax maps ``(B, H, N, N)``, step by step; right for any batch size."""
    mean = maps.clone().mean(1)  # the official layers are said to hand a clone to the loss
    column_mean = mean.mean(1, keepdim=True)  # (B, 1, N)
    threshold = 2.0 / maps.shape[-1]
    kept = torch.where(mean > threshold, mean, torch.zeros_like(mean))
    target = torch.where(column_mean > threshold, column_mean, torch.zeros_like(column_mean))
    return F.cosine_similarity(kept, target, dim=-1, eps=1e-8).mean()


def unfolded_token_average_pooling(tokens: Tensor, weights: Tensor) -> Tensor:
    """Pool literally: nine copies of the map for each branch, branches side by side, then weighed."""
    batch, branches, height, width = weights.shape
    image = tokens.transpose(1, 2).reshape(batch, -1, height, width)
    maps = [image]
    for dilation in range(1, branches):
        windows = F.unfold(image, 3, dilation=dilation, padding=dilation)  # (B, 9 C, H W)
        maps.append(windows.view(batch, -1, 9, height, width).mean(2))
    pooled = (torch.stack(maps, -1) * weights.permute(0, 2, 3, 1).unsqueeze(1)).sum(-1)  # (B, C, H, W)
    return pooled.flatten(2).transpose(1, 2)


def gathered_routing(query: Tensor, key: Tensor, value: Tensor, routes: Tensor) -> Tensor:
    """Attend from each region to the regions it is routed to, as BiFormer's code does: gather, then a full softmax.

    Args:
        query: ``(B, H, R, T, D)``, R regions of T tokens.
        key: Likewise.
        value: Likewise.
        routes: Region numbers ``(B, R, K)``, the same for all heads.

    Returns:
        ``(B, H, R, T, D)``.
    """
    batch, heads, regions, tokens, width = query.shape
    top_k = routes.shape[-1]
    table = torch.cat([key, value], -1).permute(0, 2, 3, 1, 4).flatten(3)  # (B, R, T, 2 H D)
    table = table.unsqueeze(1).expand(-1, regions, -1, -1, -1)
    index = routes[..., None, None].expand(-1, -1, -1, tokens, table.shape[-1])
    gathered = table.gather(2, index).view(batch * regions, top_k * tokens, heads, 2 * width).transpose(1, 2)
    keys, values = gathered.split(width, -1)  # (B R, H, K T, D)
    queries = query.transpose(1, 2).reshape(batch * regions, heads, tokens, width)
    weights = torch.softmax((queries * width**-0.5) @ keys.transpose(-1, -2), -1)
    return (weights @ values).view(batch, regions, heads, tokens, width).transpose(1, 2)
