"""OverLoCK as its official code runs it: values unfolded for mixing, layer scale as a depthwise convolution."""

import copy
import types

import torch
from timm.models import reparameterize_model
from torch import Tensor, nn

from benchmarks.peers import unfolded_context_mixing
from saccade.vision_backbones.overlock_blocks import LayerScale, MixingBlock, enlarge, pool_back


def literal_form(model: nn.Module, *, merged: bool = False) -> nn.Module:
    """Return a copy of an OverLoCK, weights included, in its literal form.

    Args:
        model: Of any variant, before ``reparameterize``.
        merged: Merge the branches of large convolutions, as the official code does for inference; no more than that.
    """
    twin = reparameterize_model(model) if merged else copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, MixingBlock):
            module.mix = types.MethodType(literal_mix, module)
        for name, child in module.named_children():
            if isinstance(child, LayerScale):
                setattr(module, name, as_convolution(child))
    return twin


def literal_mix(self: MixingBlock, z: Tensor, value: Tensor) -> Tensor:
    """Mix with every affinity, logit, bias and window held in memory."""
    z = enlarge(z, self.kernel_size)
    mixed = unfolded_context_mixing(
        self.weight_query(z[:, : self.query_channels]),
        self.weight_key(z[:, -self.key_channels :]),
        enlarge(value, self.kernel_size),
        self.weight_proj.weight.flatten(1),
        self.weight_proj.bias,
        self.rpb1,
        self.rpb2,
    )
    return pool_back(mixed, value)


def as_convolution(scale: LayerScale) -> nn.Conv2d:
    """Return a layer scale as the depthwise 1 x 1 convolution that it is stored as."""
    channels = len(scale.bias)
    convolution = nn.Conv2d(channels, channels, 1, groups=channels)
    with torch.no_grad():
        convolution.load_state_dict(scale.state_dict())
    return convolution
