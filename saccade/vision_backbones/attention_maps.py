"""Attention matrices of a model, read while it runs, and the maps over image positions that follow from them.

timm sends every attention matrix that it computes through a module named ``attn_drop``; these are the points that its
``timm.utils.AttentionExtract`` hooks too. That class keeps the matrices of all layers, and its hooks stay on the model.
Here each matrix is handed on as soon as it exists, and afterwards the model is as it was before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.utils import AttentionExtract
from torch import Tensor, nn

from saccade.errors import ConfigError

__all__ = [
    "Rollout",
    "attention_points",
    "check_head",
    "merge_heads",
    "query_rows",
    "stitch_windows",
    "token_grid",
    "watch_attention",
]

# Parameters that give away attention whose matrices do not weigh places: cross-covariance attention (XCiT, EdgeNeXt)
# weighs channels, and differential attention uses the difference of two matrices.
NOT_PLACES = ("temperature", "lambda_init")


def attention_points(model: nn.Module) -> list[str]:
    """Return the names of the modules whose output or weights are attention over places, in order of definition."""
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        or (
            any(fnmatch(name, pattern) for pattern in AttentionExtract.default_module_names)
            and not any(hasattr(modules[name.rpartition(".")[0]], sign) for sign in NOT_PLACES)
        )
    ]


@contextmanager
def watch_attention(
    model: nn.Module, points: Collection[str], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Hand every attention matrix of ``points`` to ``receive(name, matrix)`` while the model runs inside the block.

    Fused attention, which never forms the matrix, is switched off in the modules concerned. They and the hooks are put
    back when the block ends, also after an exception.

    Args:
        model: Any model.
        points: Names from ``attention_points``.
        receive: Gets float32 matrices as the module lays them out: ``(B, H, N, M)``, or ``(B * windows, H, n, n)``.
    """
    handles = []
    fused = []

    def watch(name: str, module: nn.Module) -> None:
        def take_output(module: nn.Module, inputs: object, output: Tensor) -> None:
            receive(name, output.float())

        def ask_for_weights(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

        def take_weights(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
            receive(name, output[1].float())

        if isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(ask_for_weights, with_kwargs=True))
            handles.append(module.register_forward_hook(take_weights))
            return
        handles.append(module.register_forward_hook(take_output))
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        if getattr(owner, "fused_attn", False):
            fused.append(owner)
            owner.fused_attn = False

    try:
        for name in points:
            watch(name, model.get_submodule(name))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner in fused:
            owner.fused_attn = True


def check_head(heads: str, count: int, name: str) -> None:
    """Raise if ``heads`` is the number of a head that a module does not have.

    Raises:
        ConfigError: See there.
    """
    if heads.isdecimal() and int(heads) >= count:
        raise ConfigError(f"{name} has heads 0 to {count - 1}; there is no head {heads}.")


def merge_heads(attention: Tensor, heads: str) -> Tensor:
    """Reduce attention ``(B, H, N, M)`` to ``(B, N, M)`` with rows that sum to 1.

    Args:
        attention: Weights per head.
        heads: ``"mean"``; ``"max"``: the largest weight of any head, rows normalised again; or the number of a head.
    """
    if heads == "mean":
        return attention.mean(1)
    if heads.isdecimal():
        return attention[:, int(heads)]
    largest = attention.amax(1)
    return largest / largest.sum(-1, keepdim=True)


class Rollout:
    """Multiplies up attention layer by layer; pass it to ``watch_attention``.

    Computes ``R_l = (0.5 I + 0.5 A_l) R_{l-1}`` with ``R_0 = I``, where ``A_l`` is the attention of layer ``l`` with
    its heads merged and the identity stands for the residual connection. Row ``i`` of ``R`` says how much of each input
    token has reached token ``i``; rows sum to 1.

    Args:
        heads: How heads are merged, see ``merge_heads``.

    Source:
        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (arXiv:2005.00928), section 3.
    """

    def __init__(self, heads: str = "mean") -> None:
        self.heads = heads
        self.product: Tensor | None = None

    def __call__(self, name: str, attention: Tensor) -> None:
        """Add the next layer, ``(B, H, N, N)``."""
        step = 0.5 * merge_heads(attention, self.heads)
        step.diagonal(dim1=1, dim2=2).add_(0.5)
        self.product = step if self.product is None else step @ self.product


def token_grid(tokens: int, image_size: tuple[int, int], prefix: int) -> tuple[int, tuple[int, int]] | None:
    """Find the grid of image positions in a sequence of tokens.

    Args:
        tokens: Length of the sequence.
        image_size: Rows and columns of the image.
        prefix: Class and register tokens that the model declares. Some models declare none but have one or two, and
            some attend to the patches alone, so 0, 1 and 2 are tried too.

    Returns:
        ``(prefix, (gy, gx))``, or ``None`` if no grid of the image's proportions has that many cells.
    """
    ratio = image_size[0] / image_size[1]
    for before in dict.fromkeys((prefix, 0, 1, 2)):
        cells = tokens - before
        if cells < 2:
            continue
        for rows in sorted({math.floor(math.sqrt(cells * ratio)), math.ceil(math.sqrt(cells * ratio))}):
            # patch embeddings round the two sides on their own: allow one row or column
            if rows > 0 and cells % rows == 0 and abs(rows - cells // rows * ratio) < max(1.0, ratio):
                return before, (rows, cells // rows)
    return None


def query_rows(model: nn.Module, prefix: int) -> slice:
    """Return the tokens that the classifier reads: class token (and distillation token), or all patches."""
    pooling = str(getattr(model, "global_pool", getattr(model, "pool_type", "token")))
    if prefix == 0 or not pooling.startswith("tok"):
        return slice(prefix, None)
    return slice(0, 2) if hasattr(model, "head_dist") else slice(0, 1)


def stitch_windows(received: Tensor, block: SwinTransformerBlock | SwinTransformerV2Block) -> Tensor:
    """Lay values per window position out on the image, undoing the cyclic shift of a Swin block.

    Args:
        received: One value per position of each window, ``(B * windows, wy * wx)``.
        block: The block that made the windows.

    Returns:
        ``(B, gy, gx)``.
    """
    (gy, gx), (wy, wx) = block.input_resolution, block.window_size
    padded = (math.ceil(gy / wy) * wy, math.ceil(gx / wx) * wx)
    whole: Tensor = window_reverse(received.reshape(-1, wy, wx, 1), (wy, wx), *padded)
    return torch.roll(whole[:, :gy, :gx, 0], shifts=tuple(block.shift_size), dims=(1, 2))
