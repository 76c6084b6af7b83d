"""Golden runners of BiFormer. Where official maps have channels first, ours are permuted."""

import torch
from torch import Tensor, nn

from saccade.vision_backbones.bi_level_routing import (
    AttentionLePE,
    BiLevelRoutingAttention,
    PointwiseLinear,
    RaggedRoutingAttention,
)
from saccade.vision_backbones.biformer import BiFormer, BiFormerSTL
from tests.golden.case import Case
from tests.golden.runners import runner
from tests.vision_backbones.golden_runners import prepared, wanted_gradients


def run_attention(case: Case, block: nn.Module, order: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """Compare output and gradients of attention; return its input, ``(B, H, W, C)``."""
    back = [order.index(axis) for axis in range(4)]
    x = case.tensors["input.x"].requires_grad_()
    maps = x.permute(order)
    out = prepared(block, case)(maps).permute(back)
    loss = (out * case.tensors["input.cotangent"]).sum()
    case.compare({"output.out": out} | wanted_gradients(case, loss, block, {"x": x}))
    return maps.detach()


NHWC = (0, 2, 3, 1)


@runner("biformer.bra")
def routing_attention(case: Case) -> None:
    """Routing with padding before the projection: output, gradients, selected regions and their weights."""
    block = BiLevelRoutingAttention(**{"auto_pad": False} | case.entry["kwargs"])
    x = run_attention(case, block)
    got = {}
    if "output.r_idx_sorted" in case.tensors:  # absent where regions of padding are tied
        got["output.r_idx_sorted"] = block.routes(x)
    block.soft_routing = True  # the official code computes the weights in any case
    query, key, _ = block.project(block.cut(x)[0])
    weight = block.route(query, key)[1].squeeze(1)
    case.compare(got | {"output.r_weight": weight.sort(-1, descending=True)[0]})


@runner("biformer.bra_nchw")
def ragged_routing_attention(case: Case) -> None:
    """Routing with padding after the projection: output, gradients and selected regions."""
    block = RaggedRoutingAttention(**case.entry["kwargs"])
    x = run_attention(case, block, NHWC)
    case.compare({"output.r_idx_sorted": block.routes(x)})


@runner("biformer.attention_lepe")
def attention_lepe(case: Case) -> None:
    """Full attention with the local term of the input."""
    run_attention(case, AttentionLePE(**case.entry["kwargs"]))


@runner("biformer.attention_lepe_nchw")
def attention_lepe_on_value(case: Case) -> None:
    """Full attention with the local term of the values."""
    run_attention(case, AttentionLePE(**case.entry["kwargs"], lepe_on_value=True, linear=PointwiseLinear), NHWC)


@runner("biformer.model", "biformer.model_stl_nchw")
def biformer_model(case: Case) -> None:
    """A small network: the map before and after each stage, and what follows; folded for inference, the same logits."""
    if case.row["runner"] == "biformer.model":
        model = prepared(BiFormer(**model_kwargs(case)), case)
    else:
        kwargs = case.entry["kwargs"] | {"norm_layer": nn.BatchNorm2d, "ragged": True}
        model = prepared(BiFormerSTL(**kwargs), case)
    x = case.tensors["input.x"]
    got = {}
    with torch.inference_mode():
        for i, (shrink, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True), start=1):
            got[f"output.down{i}"] = shrink(x)
            got[f"output.stage{i}"] = x = stage(got[f"output.down{i}"])
        features = model.forward_features(case.tensors["input.x"])
        got["output.features"], got["output.pooled"] = features, model.forward_head(features, pre_logits=True)
        case.compare(got | {"output.logits": model(case.tensors["input.x"])})
        model.reparameterize()
        case.compare({"output.logits": model(case.tensors["input.x"])})


@runner("biformer.dense")
def biformer_dense(case: Case) -> None:
    """The four maps for dense tasks."""
    model = prepared(BiFormer(**model_kwargs(case), dense=True), case)
    maps = model.forward_intermediates(case.tensors["input.x"], norm=True, intermediates_only=True)
    case.compare({f"output.dense{i}": y for i, y in enumerate(maps, start=1)})


def model_kwargs(case: Case) -> dict[str, object]:
    """Return our constructor's arguments for an official one's."""
    kwargs = {"auto_pad": False} | case.entry["kwargs"]
    assert kwargs.pop("pe") is None
    return kwargs
