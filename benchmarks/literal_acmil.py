"""ACMIL as its equations read, for one bag: every projection made, each branch on its own, pairs of branches in a loop.

The modules, and so the weights, are those of the model that it is measured against.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.mil import ACMILGA, ACMILMHA

__all__ = ["literal_ga_loss", "literal_mha_loss"]


def masked(scores: Tensor, noise: Tensor, top: int, share: float) -> Tensor:
    """Return scores ``(R, N)`` with ``int(K share)`` of the K best of each row at -1e9."""
    best = scores.topk(min(top, scores.shape[-1]), dim=-1).indices
    chosen = noise.argsort(-1)[:, : int(best.shape[-1] * share)]
    random_mask = torch.ones_like(scores)
    random_mask.scatter_(-1, best.gather(-1, chosen), 0)
    return scores.masked_fill(random_mask == 0, -1e9)


def total_loss(branch_logits: Tensor, bag_logits: Tensor, attention: Tensor, target: Tensor) -> Tensor:
    """Return the loss of branches ``(M, C)``, bag ``(1, C)`` and attention ``(M, H, N)``."""
    branches = len(branch_logits)
    pairs = [(i, j) for i in range(branches) for j in range(i + 1, branches)]
    similar = [torch.cosine_similarity(attention[i], attention[j], dim=-1).mean() for i, j in pairs]
    diversity = torch.stack(similar).sum() / len(pairs)
    return diversity + F.cross_entropy(branch_logits, target.expand(branches)) + F.cross_entropy(bag_logits, target)


def literal_ga_loss(model: ACMILGA, bag: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    """Return the training loss of ACMIL-GA for one bag ``(N, D)``; noise ``(M, K)``."""
    hidden = torch.relu(F.linear(bag, model.dimreduction.fc1.weight))
    gate = model.attention
    product = gate.attention_V(hidden) * gate.attention_U(hidden)  # (N, A)
    scores = masked(gate.attention_weights(product).T, noise, model.mask_top, model.mask_share)
    attention = torch.softmax(scores, -1)
    embeddings = attention @ hidden
    branches = [head(embeddings[m]) for m, head in enumerate(model.classifier)]
    bag_logits = model.Slide_classifier(attention.mean(0, keepdim=True) @ hidden)
    return total_loss(torch.stack(branches), bag_logits, attention[:, None], target)


def literal_mha_loss(model: ACMILMHA, bag: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    """Return the training loss of ACMIL-MHA for one bag ``(N, D)`` without dropout; noise ``(M, H, K)``."""
    hidden = torch.relu(F.linear(bag, model.dimreduction.fc1.weight))
    heads = model.num_heads

    def split(rows: Tensor) -> Tensor:
        return rows.view(len(rows), heads, -1).transpose(0, 1)  # (H, N, d)

    def readout(block: torch.nn.Module, weights: Tensor) -> Tensor:
        out = (weights @ split(block.v_proj(hidden))).transpose(0, 1).flatten(1)  # (1, D)
        return block.layer_norm(block.out_proj(out))

    branches, attention = [], []
    for m, block in enumerate(model.sub_attention):
        query = split(block.q_proj(model.q[0, m : m + 1]))
        scores = (query @ split(block.k_proj(hidden)).transpose(1, 2)) * query.shape[-1] ** -0.5  # (H, 1, N)
        rows = masked(scores[:, 0], noise[m], model.mask_top, model.mask_share)
        attention.append(torch.softmax(rows, -1))
        branches.append(model.classifier[m](readout(block, attention[-1][:, None]))[0])
    together = torch.stack(attention)  # (M, H, N)
    bag_logits = model.Slide_classifier(readout(model.bag_attention, together.mean(0)[:, None]))
    return total_loss(torch.stack(branches), bag_logits, together, target)
