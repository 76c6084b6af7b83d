"""How much a model's answer changes without one attention head: by pruning it, and by one backward pass.

For a head of layer ``l`` nothing before that layer changes, so the blocks before it run once. The model is then called
with one image, the blocks before ``l`` answer with what they gave before, and the input of block ``l`` is replaced by
the batch, once for each pruned head. So ``sum_l H (L - l)`` block evaluations are needed for each image, about half of
running the model anew for every head, whatever the model does before, between and behind its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import ConfigError
from saccade.vision_backbones.analysis.layers import AttentionLayer, noise_images

__all__ = ["PRUNING_METRICS", "HeadPruning", "gate_gradients", "mean_head_outputs"]

PRUNING_METRICS = ("probability_drop", "accuracy_drop", "js_divergence", "cosine_distance")
STACK = 128  # samples per pass
GRADIENT_STACK = 8  # a pass that keeps its activations

Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]


class HeadPruning:
    """Prunes each head of a model in turn and measures what becomes of the output.

    A pruned head's slice of the attention output, before the output projection, is set to zero, or to its mean over a
    data set. Metrics, per image: the drop of the probability of the true class; of accuracy (1, 0 or -1); the
    Jensen-Shannon divergence of the class distributions, base 2, 0..1; the cosine distance of the pooled features. A
    model without a classifier has the last one only, the others are NaN.

    Args:
        model: In evaluation mode, on the device of the images.
        layers: From :func:`saccade.vision_backbones.analysis.find_layers`.
        input_size: Channels, rows and columns of its input.
        means: What replaces a pruned head's output, per layer ``(N, H, D)``, from :func:`mean_head_outputs`; ``None``
            means zero.

    Raises:
        ConfigError: If the heads' outputs cannot be reached, or running the model from a block on does not reproduce
            its output.

    Example:
        >>> import timm
        >>> from saccade.vision_backbones.analysis import find_layers
        >>> model = timm.create_model("test_vit", img_size=32).eval()
        >>> pruning = HeadPruning(model, find_layers(model, (3, 32, 32)), (3, 32, 32))
        >>> effects, logits = pruning.measure(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
        >>> effects.shape, logits.shape  # six blocks of two heads, four metrics
        (torch.Size([2, 12, 4]), torch.Size([2, 1000]))
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[AttentionLayer],
        input_size: Sequence[int],
        *,
        means: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.layers, self.means = model, list(layers), means
        self.blocks = [model.get_submodule(layer.block) for layer in layers]
        self.gates = [gate_of(model, layer) for layer in layers]
        self.classifier = classifier_of(model)
        self.inputs: list[Tensor] = []  # of each block, (B, ...)
        self.outputs: list[Tensor] = []  # of each block, first image
        self.check(noise_images(input_size).to(next(model.parameters())))

    def check(self, noise: Tensor) -> None:
        """Raise unless running on from each block gives what the whole model gives."""
        with torch.no_grad():
            logits, features = self.record(noise)
            places = {(x.data_ptr(), x.shape) for x in self.inputs}
            if len(places) < len(self.layers):
                raise ConfigError(
                    f"blocks of {type(self.model).__name__} run side by side on the same input; heads of this "
                    "architecture cannot be pruned here. Leave importance out (none)."
                )
            last = len(self.layers) - 1
            for index in sorted({0, last // 2, last}):
                again, pooled = self.run_from(index, 1, noise[:1], None)
                if not (close(logits, again) and close(features, pooled)):
                    raise ConfigError(
                        f"running {type(self.model).__name__} on from {self.layers[index].block} does not reproduce "
                        "its output; heads of this architecture cannot be pruned here. Leave importance out (none)."
                    )

    @torch.no_grad()
    def measure(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prune every head in turn.

        Args:
            images: ``(B, C, Y, X)``.
            labels: True classes, ``(B,)``; ``None`` means those that the whole model predicts.

        Returns:
            The metrics, ``(B, T, 4)`` float64 on the CPU, for the T heads of all layers, layer by layer; and the logits
            of the whole model, ``(B, K)`` float32 on the CPU.
        """
        logits, features = self.record(images)
        size = len(images)
        truth = labels
        if truth is None and logits.shape[1] > 0:
            truth = logits.argmax(-1)
        found = []
        for index, layer in enumerate(self.layers):
            heads = torch.arange(layer.num_heads)
            for chunk in heads.split(max(1, STACK // size)):
                prune = partial(self.prune, index, chunk)
                pruned, pooled = self.run_from(index, len(chunk), images[:1], prune)
                pruned, pooled = (x.unflatten(0, (len(chunk), size)) for x in (pruned, pooled))
                distance = 1 - F.cosine_similarity(pooled.double(), features.double(), dim=-1)  # (g, B)
                if truth is not None and logits.shape[1] > 0:
                    found.append(torch.stack([*class_metrics(logits, pruned, truth.cpu()), distance], -1))
                else:
                    nothing = torch.full_like(distance, torch.nan)
                    found.append(torch.stack([nothing, nothing, nothing, distance], -1))
        return torch.cat(found).transpose(0, 1), logits

    def record(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the whole model and keep what goes into each block."""
        self.inputs, self.outputs = [], []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(f"{type(module).__name__} returns no tensor; its heads cannot be pruned here.")
            self.inputs.append(inputs[0])
            self.outputs.append(output[:1])

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_hook(keep).remove)
            return self.run(images)

    def run_from(self, index: int, copies: int, image: Tensor, prune: Hook | None) -> tuple[Tensor, Tensor]:
        """Run block ``index`` and all behind it, on the recorded batch repeated ``copies`` times."""

        def start(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            batch = self.inputs[index]
            return (batch.repeat(copies, *[1] * (batch.ndim - 1)), *args[1:])

        with ExitStack() as stack:
            for block, output in zip(self.blocks[:index], self.outputs, strict=False):
                stack.callback(partial(restore, block, vars(block).get("forward")))
                block.forward = partial(answer, output)
            stack.callback(self.blocks[index].register_forward_pre_hook(start).remove)
            if prune is not None:
                stack.callback(self.gates[index].register_forward_pre_hook(prune).remove)
            return self.run(image)

    def prune(self, index: int, heads: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace one head in each copy of the batch; a hook of the gate."""
        layer = self.layers[index]
        x = args[0].unflatten(0, (len(heads), -1)).unflatten(-1, (layer.num_heads, -1)).clone()  # (g, B, N, H, D)
        for copy, head in enumerate(heads.tolist()):
            x[copy, ..., head, :] = 0 if self.means is None else self.means[index][..., head, :].to(x)
        return (x.flatten(-2).flatten(0, 1), *args[1:])

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(B, K)``, K = 0 without a classifier, and pooled features, float32 on the CPU."""
        pooled: list[Tensor] = []
        with ExitStack() as stack:
            if self.classifier is not None:
                hook = self.classifier.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
                stack.callback(hook.remove)
            out = self.model(images).float().cpu()
        features = pooled[0].float().cpu() if pooled else out
        return (out if has_classes(self.model) else out[:, :0]), features


def close(one: Tensor, other: Tensor) -> bool:
    """Tell whether two results are one, computed in another order."""
    if one.shape != other.shape:
        return False
    return one.numel() == 0 or bool((one - other).abs().max() <= 1e-2 * one.abs().max())


def answer(output: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Stand in for the forward of a block that need not run."""
    return output


def restore(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a block its forward back."""
    del block.forward
    if forward is not None:
        block.forward = forward


def class_metrics(logits: Tensor, pruned: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return drop of the true class's probability, drop of accuracy and Jensen-Shannon divergence, ``(g, B)`` each."""
    before, after = logits.double().softmax(-1), pruned.double().softmax(-1)
    of_truth = truth.expand(len(after), -1).unsqueeze(-1)
    drop = before.gather(-1, truth.unsqueeze(-1)).squeeze(-1) - after.gather(-1, of_truth).squeeze(-1)
    right = (before.argmax(-1) == truth).double() - (after.argmax(-1) == truth).double()
    middle = (before + after) / 2
    bits = entropy_bits(middle) - (entropy_bits(before) + entropy_bits(after)) / 2
    return drop, right, bits.clamp(min=0)


def entropy_bits(probabilities: Tensor) -> Tensor:
    """Return the entropy of the last axis, base 2."""
    return -torch.xlogy(probabilities, probabilities).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def has_classes(model: nn.Module) -> bool:
    """Tell whether the output of a model is logits."""
    return bool(getattr(model, "num_classes", 0))


def gate_of(model: nn.Module, layer: AttentionLayer) -> nn.Module:
    """Return the module that the heads' outputs enter.

    Raises:
        ConfigError: If there is none.
    """
    if layer.gate is None:
        kind = type(model.get_submodule(layer.name)).__name__
        raise ConfigError(
            f"the outputs of the heads of {layer.name} ({kind}) cannot be reached. Leave importance out (none)."
        )
    return model.get_submodule(layer.gate)


def classifier_of(model: nn.Module) -> nn.Module | None:
    """Return the classifier, whose input is the pooled features; the first of several."""
    body: Any = getattr(model, "trunk", model)
    if not hasattr(body, "get_classifier"):
        return None
    found: Any = body.get_classifier()
    module: nn.Module = found[0] if isinstance(found, tuple | list) else found
    return module


def mean_head_outputs(
    model: nn.Module, layers: Sequence[AttentionLayer], batches: Iterable[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Average the outputs of all heads over a data set, token by token.

    Args:
        model: In evaluation mode, on the device of the images.
        layers: From :func:`saccade.vision_backbones.analysis.find_layers`.
        batches: Pairs of images ``(B, C, Y, X)`` and which of them count, ``(B,)`` bool.

    Returns:
        Per layer ``(N, H, D)``, float32.

    Raises:
        ConfigError: If the heads' outputs cannot be reached, or no image counts.
    """
    sums: list[Tensor | None] = [None] * len(layers)
    counts = 0
    valid = torch.zeros(0)

    def add(index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        chosen = args[0][valid].double() if args[0].device.type != "mps" else args[0][valid].float()
        total = chosen.sum(0)
        before = sums[index]
        sums[index] = total if before is None else before + total

    with ExitStack() as stack, torch.no_grad():
        for index, layer in enumerate(layers):
            stack.callback(gate_of(model, layer).register_forward_pre_hook(partial(add, index)).remove)
        for images, mask in batches:
            valid = mask.to(images.device)
            model(images)
            counts += int(mask.sum())
    if counts == 0:
        raise ConfigError("no image to average the outputs of heads over.")
    return [
        (total / counts).float().unflatten(-1, (layer.num_heads, -1))
        for total, layer in zip(sums, layers, strict=True)
        if total is not None
    ]


def gate_gradients(
    model: nn.Module, layers: Sequence[AttentionLayer], images: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Return the derivative of each image's cross entropy with respect to a gate of 1 on every head.

    Its mean over many images, without its sign, is the first-order estimate of a head's importance; see
    :func:`saccade.attention.head_importance`, which takes the absolute value sample by sample.

    Args:
        model: In evaluation mode, on the device of the images.
        layers: From :func:`saccade.vision_backbones.analysis.find_layers`.
        images: ``(B, C, Y, X)``.
        labels: True classes, ``(B,)``; ``None`` means those that the model predicts.

    Returns:
        ``(B, T)``, float32 on the CPU, for the T heads of all layers, layer by layer.

    Raises:
        ConfigError: If the heads' outputs cannot be reached, or the model has no classifier.

    Source:
        Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019 (arXiv:1905.10650).
    """
    if not has_classes(model):
        raise ConfigError("a model without a classifier has no loss to differentiate.")
    modules = [gate_of(model, layer) for layer in layers]
    found = []
    for start in range(0, len(images), GRADIENT_STACK):
        part = images[start : start + GRADIENT_STACK]
        gates = [part.new_ones(len(part), layer.num_heads, requires_grad=True) for layer in layers]
        with ExitStack() as stack, torch.enable_grad():
            for module, gate in zip(modules, gates, strict=True):
                stack.callback(module.register_forward_pre_hook(partial(apply_gate, gate)).remove)
            logits = model(part).float()
            truth = logits.detach().argmax(-1) if labels is None else labels[start : start + GRADIENT_STACK]
            loss = F.cross_entropy(logits, truth.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, gates)
        found.append(torch.cat(gradients, -1).float().cpu())
    return torch.cat(found)


def apply_gate(gate: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Multiply each head by its gate ``(B, H)``; a hook of the module that the heads' outputs enter."""
    x = args[0].unflatten(-1, (gate.shape[1], -1))  # (B, ..., H, D)
    x = x * gate.to(x.dtype).view(len(gate), *[1] * (x.ndim - 3), gate.shape[1], 1)
    return (x.flatten(-2), *args[1:])
