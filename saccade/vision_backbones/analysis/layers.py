"""The layers of a model whose attention can be analysed: all tokens attend to all tokens of one grid of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention import reference
from saccade.errors import ConfigError
from saccade.vision_backbones.attention_maps import attention_points, token_grid, watch_attention
from saccade.vision_backbones.diversity import DiversityPoint

__all__ = ["AttentionLayer", "find_layers", "noise_images", "watch_layers"]

GATES = ("norm", "proj", "attn_out_proj")  # timm's names for what the heads' outputs go into


@dataclass(frozen=True)
class AttentionLayer:
    """One layer of global attention.

    Args:
        name: The module that attends, by its name in the model.
        point: The module at which its matrix is seen.
        block: The residual block that it is part of.
        gate: The module that the outputs of the heads enter side by side, ``(B, N, H * D)``; ``None`` if there is none,
            as in ``nn.MultiheadAttention``.
        num_heads: H.
        prefix_tokens: Class and register tokens in front of the patches.
        grid: Rows and columns of patches.
    """

    name: str
    point: str
    block: str
    gate: str | None
    num_heads: int
    prefix_tokens: int
    grid: tuple[int, int]


def find_layers(model: nn.Module, input_size: Sequence[int]) -> list[AttentionLayer]:
    """Find the layers of global attention by running the model once, on noise.

    Attention of a class token alone (CaiT, the end of FAN) is left out.

    Args:
        model: timm model, saccade's included, or open_clip image tower, in evaluation mode.
        input_size: Channels, rows and columns of its input.

    Returns:
        The layers, in the order in which they run.

    Raises:
        ConfigError: If there is no such layer, or attention is of another kind: in windows, to a coarser map, over
            channels; the message names it.
    """
    modules = dict(model.named_modules())
    points = [name for name, module in modules.items() if isinstance(module, DiversityPoint)]
    points = points or attention_points(model)
    if not points:
        raise ConfigError(f"{type(model).__name__} shows no attention over places; `analyze` is for transformers.")
    shapes: dict[str, tuple[int, ...]] = {}
    gates: dict[str, str] = {}
    waiting: list[str] = []

    def note(point: str, maps: Tensor) -> None:
        if point in shapes:
            raise ConfigError(f"{point} runs twice in one pass; the analysis is for layers that run once.")
        shapes[point] = tuple(maps.shape)
        waiting[:] = [point]

    def follow(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for point in waiting:
            if owner_of(point, modules) == name.rpartition(".")[0]:
                gates.setdefault(point, name)

    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            if name.rpartition(".")[2] in GATES and not isinstance(module, nn.Identity):
                stack.callback(module.register_forward_pre_hook(partial(follow, name)).remove)
        with watch_points(model, points, note):
            model(noise_images(input_size))
    image_size = (input_size[1], input_size[2])
    declared = int(getattr(getattr(model, "trunk", model), "num_prefix_tokens", 0))
    owners = [owner_of(point, modules) for point in shapes]
    parents = [owner.rpartition(".")[0] for owner in owners]
    found = []
    for (point, shape), owner, parent in zip(shapes.items(), owners, parents, strict=True):
        if len(shape) == 4 and shape[2] == 1:
            continue  # of a class token alone
        square = len(shape) == 4 and shape[0] == 2 and shape[2] == shape[3]
        place = token_grid(shape[-1], image_size, declared) if square else None
        if place is None:
            kind = type(modules[owner])
            raise ConfigError(
                f"{owner} ({kind.__module__}.{kind.__name__}) does not attend from all patches to all patches: its "
                f"matrices for two images are {' x '.join(map(str, shape))}. The analysis is for global attention "
                "(ViT, DeiT, BEiT, EVA, FAN, RVT, ...)."
            )
        block = owner if parents.count(parent) > 1 else parent
        found.append(AttentionLayer(owner, point, block, gates.get(point), shape[1], *place))
    if not found:
        raise ConfigError(f"{type(model).__name__} shows no attention from patches to patches.")
    return found


def owner_of(point: str, modules: dict[str, nn.Module]) -> str:
    """Return the name of the module whose attention is seen at a point."""
    return point if isinstance(modules[point], nn.MultiheadAttention) else point.rpartition(".")[0]


def noise_images(input_size: Sequence[int]) -> Tensor:
    """Return two images of noise, ``(2, C, Y, X)``, always the same."""
    return torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))


@contextmanager
def watch_layers(
    model: nn.Module, layers: Sequence[AttentionLayer], receive: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Hand the attention of each layer to ``receive(index, maps)`` while the model runs inside the block.

    Args:
        model: The model that the layers are of.
        layers: From :func:`find_layers`.
        receive: Gets the position of the layer, and its matrices ``(B, H, N, N)``, float32. What it does not keep is
            gone before the next layer runs.
    """
    index = {layer.point: i for i, layer in enumerate(layers)}

    def hand_on(name: str, maps: Tensor) -> None:
        with torch.autocast(maps.device.type, enabled=False):  # sums over maps need float32
            receive(index[name], maps)

    with watch_points(model, list(index), hand_on):
        yield


@contextmanager
def watch_points(model: nn.Module, points: Sequence[str], receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Do what ``watch_attention`` does, for saccade's own layers too: they show query and key before they attend."""
    own = [name for name in points if isinstance(model.get_submodule(name), DiversityPoint)]
    before: dict[str, Any] = {}

    def show(name: str, query: Tensor, key: Tensor, **facts: Any) -> None:  # noqa: ANN401 - DiversityReceiver's
        multiplier = facts["logit_multiplier"]
        with torch.autocast(query.device.type, enabled=False):
            maps, _ = reference.softmax_weights(query, key, None, None, False, facts["scale"], multiplier)
        receive(name, maps)

    point: Any
    try:
        for name in own:
            point = model.get_submodule(name)
            before[name], point.receiver = point.receiver, partial(show, name)
        with watch_attention(model, [name for name in points if name not in own], receive):
            yield
    finally:
        for name, receiver in before.items():
            point = model.get_submodule(name)
            point.receiver = receiver
