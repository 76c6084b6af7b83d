"""Large depthwise convolutions that train as several branches and run as one, and what else can be folded away.

A branch is a depthwise convolution and its batch norm. In evaluation mode that is linear, and so is their sum: one
kernel can hold all branches, the dilated ones with gaps. Zero padding is the same for all, so borders agree too.
"""

from __future__ import annotations

import copy

import torch
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from saccade.errors import ConfigError

__all__ = ["BRANCHES", "DilatedReparamConv", "ResidualDepthwise", "fuse_for_inference", "translate_branches"]

# Kernel size and dilation of the branches beside the large kernel, by its size.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def depthwise(channels: int, kernel_size: int, *, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a depthwise convolution that keeps the size of a map."""
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias)


class DilatedReparamConv(nn.Sequential):
    """Computes ``BN(dwK(x)) + sum_b BN_b(dw_b(x))`` over the branches that ``BRANCHES`` lists for K.

    Children in this order: ``lk_origin``, ``origin_bn``, then ``dil_conv_k{k}_{r}``, ``dil_bn_k{k}_{r}`` for a branch
    of kernel size k and dilation r; after :meth:`reparameterize`, ``lk_origin`` alone, with a bias.

    Args:
        channels: C.
        kernel_size: K, a key of ``BRANCHES``.
        deploy: Build the merged form.

    Raises:
        ConfigError: If there are no branches for this kernel size.

    Source:
        Ding et al., "UniRepLKNet", CVPR 2024 (arXiv:2311.15599), as used by OverLoCK.
    """

    def __init__(self, channels: int, kernel_size: int, *, deploy: bool = False) -> None:
        if kernel_size not in BRANCHES:
            raise ConfigError(f"kernel_size must be one of {', '.join(map(str, BRANCHES))}; got {kernel_size}.")
        super().__init__()
        self.lk_origin = depthwise(channels, kernel_size, bias=deploy)
        if not deploy:
            self.origin_bn = nn.BatchNorm2d(channels)
            for size, dilation in BRANCHES[kernel_size]:
                self.add_module(f"dil_conv_k{size}_{dilation}", depthwise(channels, size, dilation=dilation))
                self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``(B, C, H, W)``; the size stays."""
        out = x
        branch = x
        for i, layer in enumerate(self):
            if i < 2:
                out = layer(out)
            elif i % 2 == 0:
                branch = layer(x)
            else:
                out = out + layer(branch)
        return out

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the branches into one convolution with a bias, in place; for inference, as it uses running statistics.

        timm's ``reparameterize_model`` finds this method.
        """
        convolutions = [child for child in self if isinstance(child, nn.Conv2d)]
        norms = [child for child in self if isinstance(child, nn.BatchNorm2d)]
        if not norms:
            return
        weight = torch.zeros_like(self.lk_origin.weight)
        bias = weight.new_zeros(len(weight))
        for convolution, norm in zip(convolutions, norms, strict=True):
            scale, shift = affine(norm)
            step, size = convolution.dilation[0], convolution.kernel_size[0]
            first = (weight.shape[-1] - step * (size - 1)) // 2
            taps = slice(first, weight.shape[-1] - first, step)
            weight[:, :, taps, taps] += convolution.weight * scale[:, None, None, None]
            bias += shift
        for name in list(self._modules):
            delattr(self, name)
        self.lk_origin = depthwise(len(weight), weight.shape[-1], bias=True)
        self.lk_origin.weight, self.lk_origin.bias = nn.Parameter(weight), nn.Parameter(bias)


@register_notrace_module  # a node of torch.fx, as any convolution is
class ResidualDepthwise(nn.Conv2d):
    """Computes ``x + dw3(x)``, with a bias.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``(B, C, H, W)``; the size stays."""
        out: Tensor = x + self._conv_forward(x, self.weight, self.bias)
        return out

    @torch.no_grad()
    def plain(self) -> nn.Conv2d:
        """Return a convolution of the same result: the identity is one more in the middle of the kernel."""
        convolution = depthwise(self.in_channels, 3, bias=True).to(self.weight)
        convolution.load_state_dict(self.state_dict())
        convolution.weight[:, :, 1, 1] += 1
        return convolution


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of each channel in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def fold_after(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution that does ``norm(convolution(x))`` in evaluation mode."""
    folded = copy.deepcopy(convolution)
    scale, shift = affine(norm)
    folded.weight.mul_(scale[:, None, None, None])
    folded.bias = nn.Parameter(shift if convolution.bias is None else torch.addcmul(shift, scale, convolution.bias))
    return folded


@torch.no_grad()
def fold_before(norm: nn.BatchNorm2d, convolution: nn.Conv2d) -> nn.Conv2d:
    """Return a 1 x 1 convolution that does ``convolution(norm(x))`` in evaluation mode."""
    folded = copy.deepcopy(convolution)
    scale, shift = affine(norm)
    folded.weight.mul_(scale[:, None, None])
    bias = convolution.weight.flatten(1) @ shift
    folded.bias = nn.Parameter(bias if convolution.bias is None else bias + convolution.bias)
    return folded


def fuse_for_inference(model: nn.Module) -> None:
    """Do away, in place, with what evaluation does not need: branches, batch norms, identities beside convolutions.

    Results stay the same up to rounding. Training the model further afterwards is another optimisation problem.

    Args:
        model: Any model whose :class:`nn.Sequential` modules run their children one after the other.
    """
    for module in list(model.modules()):
        if isinstance(module, DilatedReparamConv):
            module.reparameterize()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, ResidualDepthwise):
                setattr(module, name, child.plain())
        if isinstance(module, nn.Sequential):
            fold_batch_norms(module)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):  # or it would be laid out anew in every call
            module.to(memory_format=torch.channels_last)


def fold_batch_norms(layers: nn.Sequential) -> None:
    """Fold each batch norm into the convolution before it, or the 1 x 1 convolution behind it, in place."""
    for i in range(len(layers) - 1):
        first, second = layers[i], layers[i + 1]
        if isinstance(first, nn.BatchNorm2d) and isinstance(second, nn.Conv2d) and second.kernel_size == (1, 1):
            layers[i], layers[i + 1] = nn.Identity(), fold_before(first, second)
        elif isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            layers[i], layers[i + 1] = fold_after(first, second), nn.Identity()
        elif isinstance(first, DilatedReparamConv) and isinstance(second, nn.BatchNorm2d):
            first.lk_origin, layers[i + 1] = fold_after(first.lk_origin, second), nn.Identity()


def translate_branches(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translate weights between the merged and the branched form, whichever the model has.

    Merged weights in a branched model: the large kernel holds everything, the branches start at zero (their batch norms
    scale with 0, their kernels stay as they are in the model).

    Args:
        state: Weights by key.
        model: Decides the form.

    Returns:
        Weights by key; those of other layers as they are.
    """
    state = dict(state)
    for name, block in model.named_modules():
        prefix = f"{name}."
        if not isinstance(block, DilatedReparamConv) or f"{prefix}lk_origin.weight" not in state:
            continue
        branched, merged = len(block) > 1, f"{prefix}lk_origin.bias" in state
        if branched != merged:
            continue
        given = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        translated = split_branches(given, block) if merged else merge_branches(given)
        state |= {prefix + key: value for key, value in translated.items()}
    return state


def merge_branches(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the merged form of the weights of one block."""
    weight = state["lk_origin.weight"]
    block = DilatedReparamConv(weight.shape[0], weight.shape[-1]).to(weight)
    block.load_state_dict(state)
    block.reparameterize()
    return block.state_dict()


def split_branches(state: dict[str, Tensor], block: DilatedReparamConv) -> dict[str, Tensor]:
    """Return the merged weights of one block as those of the branched block."""
    own = {key: value.clone() for key, value in block.state_dict().items()}
    for key, value in own.items():
        if "_bn" in key:
            value.fill_(1 if key.endswith("running_var") else 0)
    own["origin_bn.weight"] = torch.sqrt(own["origin_bn.running_var"] + block.origin_bn.eps)  # undoes the division
    own["lk_origin.weight"], own["origin_bn.bias"] = state["lk_origin.weight"], state["lk_origin.bias"]
    return own
