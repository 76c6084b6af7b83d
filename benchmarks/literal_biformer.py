"""BiFormer as its equations read, gathered keys and attention matrices in full: what ours is measured against."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.vision_backbones.bi_level_routing import AttentionLePE, BiLevelRoutingAttention
from saccade.vision_backbones.recompute import Stage


class LiteralRouting(nn.Module):
    """Bi-level routing attention in which each region holds copies of the keys and values it reads."""

    def __init__(self, ours: BiLevelRoutingAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        """Attend within a map ``(B, H, W, C)``; as published: no pooling, hard routing."""
        batch, height, width, channels = x.shape
        n, m, qk_dim, scale = self.ours.n_win, self.ours.num_heads, self.ours.qk_dim, self.ours.scale
        x = F.pad(x, [0, 0, 0, -width % n, 0, -height % n])
        rows, columns = x.shape[1] // n, x.shape[2] // n
        qkv = self.ours.qkv(x).view(batch, n, rows, n, columns, -1).transpose(2, 3)
        qkv = qkv.reshape(batch, n * n, rows * columns, -1)  # (B, regions, tokens, 3 C)
        q, kv = qkv.split([qk_dim, qk_dim + channels], -1)
        scores = q.detach().mean(2) * scale @ kv[..., :qk_dim].detach().mean(2).transpose(1, 2)
        selected = scores.topk(min(self.ours.topk, n * n))[1]  # (B, regions, k)
        index = selected[..., None, None].expand(-1, -1, -1, *kv.shape[2:])
        kv_of_region = torch.gather(kv[:, None].expand(-1, n * n, -1, -1, -1), 2, index)  # (B, regions, k, tokens, ..)
        k, v = kv_of_region.flatten(2, 3).flatten(0, 1).split([qk_dim, channels], -1)
        k, v = (t.unflatten(-1, (m, -1)).transpose(1, 2) for t in (k, v))  # (B regions, heads, k tokens, width)
        q = q.flatten(0, 1).unflatten(-1, (m, -1)).transpose(1, 2)
        out = torch.softmax(q * scale @ k.transpose(-1, -2), -1) @ v
        out = out.transpose(1, 2).flatten(2)  # (B regions, tokens, C)
        out, v = (self.grid(t, batch, rows, columns) for t in (out, kv[..., qk_dim:]))
        return self.ours.wo(out + local_term(self.ours.lepe, v))[:, :height, :width]

    def grid(self, tokens: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        """Put regions together as a map ``(B, H, W, C)``."""
        n = self.ours.n_win
        tokens = tokens.reshape(batch, n, n, rows, columns, -1).transpose(2, 3)
        return tokens.reshape(batch, n * rows, n * columns, -1)


class LiteralAttention(nn.Module):
    """Full attention with its matrix."""

    def __init__(self, ours: AttentionLePE) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        """Attend within a map ``(B, H, W, C)``."""
        qkv = self.ours.qkv(x).flatten(1, 2).unflatten(-1, (3, self.ours.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), -1)
        out = (weights @ v).transpose(1, 2).reshape(x.shape)
        return self.ours.proj(out + local_term(self.ours.lepe, x))


def local_term(lepe: nn.Conv2d | None, x: Tensor) -> Tensor:
    """Filter a map ``(B, H, W, C)`` with channels first in memory, as the official code lays it out."""
    if lepe is None:
        return torch.zeros_like(x)
    x = x.permute(0, 3, 1, 2).contiguous()
    return F.conv2d(x, lepe.weight, lepe.bias, padding=lepe.padding, groups=lepe.groups).permute(0, 2, 3, 1)


def literal(model: nn.Module) -> nn.Module:
    """Return the literal form of a BiFormer (T, S, B or STL); it shares the model's weights and statistics.

    Args:
        model: As built by ``timm.create_model``; not yet fused by ``reparameterize``.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    forms = {BiLevelRoutingAttention: LiteralRouting, AttentionLePE: LiteralAttention}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in forms:
                setattr(module, name, forms[type(child)](child))
            elif isinstance(child, Stage):
                setattr(module, name, nn.Sequential(*child))
    return model
