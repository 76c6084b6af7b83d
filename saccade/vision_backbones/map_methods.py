"""Which map can be made of a model, and how: rollout, last-layer attention, class activation, or what a place does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from saccade.errors import ConfigError, suggest
from saccade.vision_backbones.attention_maps import (
    Rollout,
    attention_points,
    check_head,
    merge_heads,
    query_rows,
    stitch_windows,
    token_grid,
    watch_attention,
)
from saccade.vision_backbones.class_activation import FeatureLayout, class_map, eigen_map, reads_positions_alike
from saccade.vision_backbones.features import top_names
from saccade.vision_backbones.point_maps import PointReader, kernel_reader, route_reader

__all__ = ["METHODS", "MapMethod", "choose_method"]

AUTO = ("rollout", "last-layer", "cam")
METHODS = ("auto", *AUTO, "routes", "kernels")


@dataclass(frozen=True)
class MapMethod:
    """A way to make maps with one model.

    Args:
        name: ``"rollout"``, ``"last-layer"``, ``"cam"``, ``"eigencam"``, ``"routes"`` or ``"kernels"``.
        layer: Name of the module that was read, or what stands for several.
        grid: Rows and columns of the maps.
        run: From images ``(B, 3, Y, X)`` to logits ``(B, K)`` and maps ``(B, gy, gx)``, float32. ``K`` is 0 for a model
            without a classifier.
        reader: Of the methods for one place; ``run`` then gives what its ``panels`` takes instead of maps.
    """

    name: str
    layer: str
    grid: tuple[int, int]
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    reader: PointReader | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what ``run`` gives for one image beside its logits."""
        return self.grid if self.reader is None else self.reader.shape


@dataclass(frozen=True)
class Request:
    """What is asked for, and what one forward pass of the model on noise has shown.

    Args:
        model: In evaluation mode.
        noise: The image, ``(1, 3, Y, X)``.
        shapes: Shape of each attention matrix by module name, in order of use.
        layer: Module to read.
        class_index: Class to map.
        heads: How attention heads are merged, or the number of one.
    """

    model: nn.Module
    noise: Tensor
    shapes: Mapping[str, tuple[int, ...]]
    layer: str | None
    class_index: int | None
    heads: str

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of the image."""
        return self.noise.shape[2], self.noise.shape[3]

    @property
    def body(self) -> Any:  # noqa: ANN401 - timm's contract is not in nn.Module's type
        """The model itself, or the timm model inside an open_clip image tower."""
        return getattr(self.model, "trunk", self.model)

    @property
    def prefix(self) -> int:
        """Class and register tokens that the model declares."""
        return int(getattr(self.body, "num_prefix_tokens", 0))

    def logits(self, output: Tensor) -> Tensor:
        """Return the model's output as float32 logits, ``(B, 0)`` if it has no classifier."""
        return output.float() if getattr(self.model, "num_classes", 0) else output.new_zeros(len(output), 0).float()


def choose_method(
    model: nn.Module,
    *,
    input_size: tuple[int, int, int],
    method: str = "auto",
    layer: str | None = None,
    class_index: int | None = None,
    heads: str = "mean",
) -> MapMethod:
    """Find out what the model allows, by running it once on noise.

    Args:
        model: timm model or open_clip image tower, in evaluation mode.
        input_size: Channels, rows and columns of its input.
        method: ``"rollout"``, ``"last-layer"``, ``"cam"``, or ``"auto"``: the first of these that fits; ``"routes"`` or
            ``"kernels"``.
        layer: Module to read, as in ``model.named_modules()``: attention inside it, or its output for ``"cam"``.
        class_index: Class to map with ``"cam"``; ``None`` means the top class of each image.
        heads: ``"mean"`` or ``"max"`` over attention heads, or the number of one.

    Raises:
        ConfigError: If the method does not fit the model, with the reason and what fits; or an argument is unknown.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if heads not in ("mean", "max") and not heads.isdecimal():
        raise ConfigError(f"heads must be mean, max or the number of a head, got {heads!r}.")
    modules = dict(model.named_modules())
    if layer is not None and (not layer or layer not in modules):
        raise ConfigError(f"The model has no layer {layer!r}.{suggest(layer, modules)} Its blocks: {top_names(model)}.")
    noise = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, attention: Tensor) -> None:
        shapes.pop(name, None)  # a module used twice counts where it is used last
        shapes[name] = tuple(attention.shape)

    with torch.inference_mode():
        with watch_attention(model, attention_points(model), note):
            model(noise)
        request = Request(model, noise, shapes, layer, class_index, heads)
        reasons: dict[str, str] = {}
        for name in AUTO if method == "auto" else (method,):
            try:
                return BUILDERS[name](request)
            except ConfigError as error:
                reasons[name] = str(error)
        if method == "auto":
            told = " ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ConfigError(f"No map can be made of this model as asked. {told}")
        fitting = ", ".join(name for name in BUILDERS if fits(name, request)) or "none"
        raise ConfigError(f"Method {method!r} does not fit this model: {reasons[method]} Methods that fit: {fitting}.")


def fits(method: str, request: Request) -> bool:
    """Tell whether a method can do what is asked."""
    try:
        BUILDERS[method](request)
    except ConfigError:
        return False
    return True


def rollout(request: Request) -> MapMethod:
    """Build attention rollout, for models in which every layer attends from all tokens to all tokens."""
    model, shapes = request.model, request.shapes
    if request.layer is not None:
        raise ConfigError("rollout takes all layers together; leave --layer out.")
    refuse_class(request)
    sizes = {shape[-2:] for shape in shapes.values()}
    strides = {info["reduction"] for info in getattr(request.body, "feature_info", ())}
    if not shapes:
        raise ConfigError("the model shows no attention matrices.")
    points = attention_points(model)
    tokens = next(iter(sizes))[1]
    found = token_grid(tokens, request.image_size, request.prefix)
    if len(sizes) > 1 or len(strides) > 1 or sizes != {(tokens, tokens)} or len(shapes) < len(points) or found is None:
        listed = " and ".join(" x ".join(map(str, size)) for size in sorted(sizes))
        raise ConfigError(f"its layers do not all attend from all tokens to all tokens (matrices of {listed}).")
    for name, shape in shapes.items():
        check_head(request.heads, shape[-3], name.removesuffix(".attn_drop"))
    prefix, grid = found
    rows = query_rows(request.body, prefix)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        product = Rollout(request.heads)
        with watch_attention(model, points, lambda name, attention: product(name, by_head(attention, len(images)))):
            output = model(images)
        if product.product is None:
            raise RuntimeError("the model showed attention to one image but not to this batch")
        shares = product.product[:, rows, prefix:].mean(1)
        return request.logits(output), shares.unflatten(1, grid)

    return MapMethod("rollout", f"{len(points)} layers", grid, run)


def last_layer(request: Request) -> MapMethod:
    """Build the attention of the last layer: what the class token attends to, or what all positions attend to."""
    model = request.model
    refuse_class(request)
    inside = [name for name in request.shapes if within(name, request.layer)]
    if not inside:
        where = "the model" if request.layer is None else f"layer {request.layer!r}"
        raise ConfigError(f"{where} shows no attention matrices.")
    name = inside[-1]
    shape = request.shapes[name]
    check_head(request.heads, shape[-3], name.removesuffix(".attn_drop"))
    block: Any = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    windows = isinstance(block, SwinTransformerBlock | SwinTransformerV2Block)
    found = token_grid(shape[-1], request.image_size, request.prefix)
    if windows:
        prefix, grid = 0, (block.input_resolution[0], block.input_resolution[1])
    elif found is not None and (len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)):
        prefix, grid = found
    else:
        raise ConfigError(f"the attention of {name} {shape} looks at parts of the image that cannot be put together.")
    rows = query_rows(request.body, prefix) if shape[-2] == shape[-1] else slice(None)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def keep(_: str, attention: Tensor) -> None:
            merged = merge_heads(attention if windows else by_head(attention, len(images)), request.heads)
            seen[:] = [merged[:, rows, prefix:].mean(1)]

        with watch_attention(model, [name], keep):
            output = model(images)
        maps = stitch_windows(seen[0], block) if windows else seen[0].unflatten(1, grid)
        return request.logits(output), maps

    return MapMethod("last-layer", name.removesuffix(".attn_drop"), grid, run)


def activation(request: Request) -> MapMethod:
    """Build class activation where the head judges positions, else the first principal component of the features."""
    model, body = request.model, request.body
    has_classes = body is model and bool(getattr(model, "num_classes", 0))
    if request.layer is not None:
        if request.class_index is not None:
            raise ConfigError("class activation is read from the last features; leave --class or --layer out.")
        return eigen(request, request.layer)
    if not hasattr(body, "forward_features"):
        raise ConfigError("the model does not offer its last features; name a layer with --layer.")
    features = body.forward_features(request.noise)
    layout = FeatureLayout.of(last_branch(features), body, request.image_size)
    if not (has_classes and isinstance(features, Tensor) and reads_positions_alike(model, layout, features)):
        if request.class_index is not None:
            raise ConfigError("class activation needs a classifier on the average of the last features.")
        return eigen(request, None)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features = body.forward_features(images)
        logits = body.forward_head(features).float()
        index = request.class_index
        classes = logits.argmax(1) if index is None else torch.full((len(images),), index, device=logits.device)
        return logits, class_map(model, layout, features, classes)

    return MapMethod("cam", "last features", layout.grid, run)


def eigen(request: Request, layer: str | None) -> MapMethod:
    """Build the first principal component of a layer's output, or of the last features."""
    body = request.body

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = with_features(request, images, layer)
        return logits, eigen_map(layout, features)

    layout = FeatureLayout.of(with_features(request, request.noise, layer)[1], body, request.image_size)
    return MapMethod("eigencam", layer or "last features", layout.grid, run)


def with_features(request: Request, images: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    """Run the model and return its logits and the output of a layer, or the last features."""
    model: Any = request.model
    body = request.body
    if layer is None:
        features = body.forward_features(images)
        return request.logits(body.forward_head(features) if body is model else model(images)), last_branch(features)
    outputs: list[Any] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        logits = request.logits(model(images))
    finally:
        handle.remove()
    if not outputs or not isinstance(outputs[-1], Tensor):
        raise ConfigError(f"layer {layer!r} gives no tensor when the model runs; choose another one.")
    return logits, outputs[-1]


def routes(request: Request) -> MapMethod:
    """Build what a place reads under bi-level routing: shares of the attention of its region."""
    return of_place("routes", request, route_reader)


def kernels(request: Request) -> MapMethod:
    """Build the two kernels that a place makes from context."""
    return of_place("kernels", request, kernel_reader)


def of_place(
    name: str, request: Request, make: Callable[[nn.Module, Tensor, str | None, str], PointReader]
) -> MapMethod:
    """Build a method for one place."""
    refuse_class(request)
    reader = make(request.model, request.noise, request.layer, request.heads)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        output, values = reader.run(images)
        return request.logits(output), values

    return MapMethod(name, reader.layer, reader.grid, run, reader)


BUILDERS: dict[str, Callable[[Request], MapMethod]] = {
    "rollout": rollout,
    "last-layer": last_layer,
    "cam": activation,
    "routes": routes,
    "kernels": kernels,
}


def last_branch(features: Any) -> Any:  # noqa: ANN401 - what forward_features returns is the model's choice
    """Return the features of the last branch, for models with several (CoaT, CrossViT)."""
    return features[-1] if isinstance(features, list | tuple) else features


def by_head(attention: Tensor, batch: int) -> Tensor:
    """Return attention as ``(B, H, N, M)``; some modules fold the heads into the batch."""
    return attention.unflatten(0, (batch, -1)) if attention.ndim == 3 else attention


def within(name: str, layer: str | None) -> bool:
    """Tell whether a module is a layer or inside it."""
    return layer is None or name == layer or name.startswith(layer + ".")


def refuse_class(request: Request) -> None:
    """Raise if a class is asked of attention, which is the same for all classes."""
    if request.class_index is not None:
        raise ConfigError("attention does not depend on the class; use --method cam, or leave --class out.")
