"""Golden runners of TAP, FAN and RVT: tiny models with their attention, ADL and gradients; full-size models."""

import zlib
from typing import Any

import timm
import torch
from torch import Tensor, nn

from saccade.attention import attention_diversification, reference
from saccade.vision_backbones.diversity import DiversityPoint
from saccade.vision_backbones.fan import FAN
from saccade.vision_backbones.rvt import RVT
from saccade.vision_backbones.token_pooling import TokenAveragePooling
from tests.golden.case import Case
from tests.golden.runners import runner


@runner("robust.tap_module")
def tap_module(case: Case) -> None:
    """Pooling in both modes: weights, output, gradients, and the statistics after one step of training."""
    branches = case.entry["K"]
    for mode in ("eval", "train"):
        holder = nn.ModuleDict({"dilation_predictor": TokenAveragePooling(case.entry["C"], branches)})
        holder.load_state_dict(case.group("state"))
        layer = holder.train(mode == "train")["dilation_predictor"]
        x = case.tensors["input.x"].clone().requires_grad_()
        batch, channels, height, width = x.shape
        seen = []
        hook = layer.proj.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        y = layer(x.flatten(2).transpose(1, 2), (height, width)).transpose(1, 2).reshape(x.shape)
        hook.remove()
        got = {f"output.{mode}.y": y, f"output.{mode}.mask": seen[0].softmax(1).permute(0, 2, 3, 1).unsqueeze(1)}
        tensors = {f"grad.{mode}.{name}": parameter for name, parameter in holder.named_parameters()}
        tensors[f"grad.{mode}.x"] = x
        grads = torch.autograd.grad((y * case.tensors["input.grad_y"]).sum(), list(tensors.values()))
        got |= dict(zip(tensors, grads, strict=True))
        after = {f"output.{mode}.after.{name}": value for name, value in holder.state_dict().items()}
        case.compare(got | {name: value for name, value in after.items() if name in case.tensors})
    tokens = case.tensors["input.x"].flatten(2).transpose(1, 2)
    for branch in range(branches):  # alone: all weight on it
        weights = torch.zeros(batch, branches, height, width)
        weights[:, branch] = 1
        pooled = reference.token_average_pooling(tokens, weights).transpose(1, 2)
        case.compare({f"output.branch{branch}": pooled.reshape(batch, channels, height, width)})


def compare_model(case: Case, model: nn.Module) -> None:
    """Compare logits, attention and ADL of each layer, and the stored gradients of the loss that the index describes.

    In float64: the stored values are up to half a tolerance away from it, and float32 is as far on the other side.
    """
    model.load_state_dict(case.group("state"))
    model.eval().double()
    layers: list[tuple[Tensor, Tensor]] = []

    def receive(query: Tensor, key: Tensor, **facts: Any) -> None:
        scale, multiplier = facts["scale"], facts["logit_multiplier"]
        maps, _ = reference.softmax_weights(query, key, None, None, False, scale, multiplier)
        layers.append((maps, attention_diversification(query, key, **facts)))

    for module in model.modules():
        if isinstance(module, DiversityPoint):
            module.receiver = receive
    x = case.tensors["input.x"].double().requires_grad_()
    logits = model(x)
    diversification = sum(value for _, value in layers) / (len(layers) + 1e-6)
    rows, columns = (torch.arange(float(n)) for n in logits.shape)
    loss = (logits * torch.cos(0.7 * rows[:, None] + 0.3 * columns)).sum() + diversification
    got = {"output.logits": logits, "output.adl": diversification, "output.loss": loss}
    for i, (maps, value) in enumerate(layers):
        got |= {f"output.attn{i}": maps, f"output.adl_layer{i}": value}
    tensors = {f"grad.{name}": parameter for name, parameter in model.named_parameters()} | {"grad.input": x}
    wanted = [name for name in case.expected() if name.startswith("grad.")]
    got |= dict(zip(wanted, torch.autograd.grad(loss, [tensors[name] for name in wanted]), strict=True))
    case.compare(got)


def branches(case: Case) -> int | None:
    """Return the branches of TAP; the official default of one has a predictor too."""
    has_tap = any("dilation_predictor" in name for name in case.tensors)
    return case.config.get("num_scales", 1) if has_tap else None


@runner("robust.fan_tap_vit", "robust.fan_tap_hybrid")
def fan(case: Case) -> None:
    """A tiny FAN behind convolutions or ConvNeXt stages."""
    config, stem = case.config, case.entry["backbone"]
    same = ["patch_size", "depth", "num_heads", "mlp_ratio", "eta", "hybrid_patch_size"]
    same += ["cls_attn_layers", "tokens_norm", "num_classes"]
    options = {name: config[name] for name in same if name in config}
    if config.get("c_head_num") is not None:
        options["channel_heads"] = config["c_head_num"]
    if stem is not None:
        options |= {"convnext_depths": stem["depths"], "convnext_dims": stem["dims"][:2]}
    dims = config.get("channel_dims") or config["embed_dim"]
    model = FAN(embed_dim=dims, num_scales=branches(case), **options)
    compare_model(case, model)
    if "output.logits_unbiased_ln" in case.tensors:  # the official code's variance where its input is not contiguous
        for norm in list(model.patch_embed.backbone.modules())[1:]:
            if isinstance(norm, nn.LayerNorm) and norm is not model.patch_embed.backbone.stem[1]:
                norm.forward = lambda x, norm=norm: unbiased_norm(x, norm)
        with torch.no_grad():
            case.compare({"output.logits_unbiased_ln": model(case.tensors["input.x"].double())})


@runner("robust.rvt_tap")
def rvt(case: Case) -> None:
    """A tiny RVT in stages; masks are made for 14 x 14 tokens, of which smaller maps use the first."""
    config = case.config
    same = ("patch_size", "base_dims", "depth", "heads", "mlp_ratio", "num_classes")
    options = {name: config[name] for name in same if name in config}
    masked = config.get("masked_block") if config.get("use_mask") else 0
    options["masked_blocks"] = config["depth"][0] if masked is None else masked
    first = case.tensors["state.transformers.0.blocks.0.mlp.fc1.weight"]
    options["mlp_type"] = "linear" if first.ndim == 2 else "conv"
    compare_model(case, RVT(num_scales=branches(case), compat=True, **options))


def unbiased_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Normalise the channels of ``(B, C, H, W)`` with the unbiased variance."""
    variance, mean = torch.var_mean(x, 1, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def scheme_weight(key: str, like: Tensor, scheme: str) -> Tensor:
    """Return the weight that the specification prescribes for a key."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    value = 0.02 * torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith("running_var"):
        return 1 + value.abs()
    if key.endswith(".weight") and like.ndim == 1:
        return 1 + value
    if scheme == "B":
        if key.endswith(("gamma", "gamma1", "gamma2", "temperature")):
            return 1 + value
        if key.endswith(("attn.q.weight", "attn.kv.weight", "attn.qkv.weight")):
            return 8 * value
        if key.startswith("patch_embed.") and like.ndim == 4:
            return 4 * value
    return value


@runner("robust.full_size")
def full_size(case: Case) -> None:
    """A registered model with weights made from their names: keys, shapes, number of weights, ADL, logits."""
    document = case.document()
    name, config = document["name"], document["config"]
    options = {"num_scales": config["num_scales"]} if name.startswith("tap_") else {}
    if "rvt" in name:
        options["compat"] = True
    model = timm.create_model(name, num_classes=config["num_classes"], **options).eval()
    assert sum(p.numel() for p in model.parameters()) == document["params"]
    own = model.state_dict()
    described = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in own.items()]
    assert sorted(described) == sorted(document["keys"])
    side = config["img_size"]
    b, c, h, w = (torch.arange(1.0, n + 1) for n in (2, 3, side, side))
    image = torch.sin(0.01 * c[:, None, None] * h[:, None] + 0.02 * b[:, None, None, None] * w)
    for scheme, facts in document["schemes"].items():
        state = {key: scheme_weight(key, value, scheme) for key, value in own.items()}
        model.load_state_dict(state)
        assert abs(float(sum(v.double().sum() for v in state.values())) - facts["param_sum"]) < 0.1
        layers: list[float] = []
        for module in model.modules():
            if isinstance(module, DiversityPoint):
                module.receiver = lambda query, key, layers=layers, **facts: layers.append(
                    float(attention_diversification(query, key, **facts))
                )
        with torch.inference_mode():
            case.compare({f"logits_{scheme}": model(image)})
        assert torch.allclose(torch.tensor(layers), torch.tensor(facts["adl_per_layer"]), atol=1e-4)
