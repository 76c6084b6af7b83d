"""Golden runners of OverLoCK."""

import torch
import torch.nn.functional as F

from saccade.vision_backbones.overlock import OverLoCK
from saccade.vision_backbones.overlock_blocks import ContMixBlock, FocusBlock
from saccade.vision_backbones.reparam import DilatedReparamConv
from tests.golden.case import Case
from tests.golden.runners import runner
from tests.vision_backbones.golden_runners import prepared, run_block, wanted_gradients


@runner("overlock.dilated_reparam")
def dilated_reparam(case: Case) -> None:
    """A large convolution with its branches, and merged."""
    kwargs = case.entry["kwargs"]
    block = DilatedReparamConv(kwargs["channels"], kwargs["kernel_size"])
    run_block(case, block, ["x"])
    block.reparameterize()
    merged = block.state_dict()
    assert list(merged) == case.entry["merged_state_keys"]
    deployed = DilatedReparamConv(kwargs["channels"], kwargs["kernel_size"], deploy=True)
    deployed.load_state_dict(merged)
    case.compare(
        {
            "output.merged_weight": merged["lk_origin.weight"],
            "output.merged_bias": merged["lk_origin.bias"],
            "output.out_merged": deployed(case.tensors["input.x"]),
        }
    )


@runner("overlock.context_mixing_block")
def context_mixing_block(case: Case) -> None:
    """A block of the Focus-Net; features and context arrive as one map here."""
    kwargs = dict(case.entry["kwargs"])
    kwargs.pop("is_last", None)
    block = prepared(FocusBlock(kwargs.pop("dim"), kwargs.pop("ctx_dim") // 4, **kwargs), case)
    inputs = {word: case.tensors[f"input.{word}"].requires_grad_() for word in ("x", "h_x", "h_r")}
    joined = torch.cat([inputs["x"], inputs["h_x"]], 1)
    out = block(joined, inputs["h_r"])
    gradients = wanted_gradients(case, (out * case.tensors["input.cotangent"]).sum(), block, inputs)
    for module in block.modules():
        if isinstance(module, DilatedReparamConv):
            module.reparameterize()
    case.compare({"output.out": out, "output.out_merged": block(joined, inputs["h_r"])} | gradients)


@runner("overlock.contmix_plug_and_play")
def contmix_plug_and_play(case: Case) -> None:
    """The block on its own."""
    kwargs = dict(case.entry["kwargs"])
    run_block(case, ContMixBlock(kwargs.pop("dim"), **kwargs), ["x"])


@runner("overlock.model")
def overlock_model(case: Case) -> None:
    """A small network: every stage in evaluation, or both outputs, gradients and statistics in training."""
    model = prepared(OverLoCK(**case.entry["kwargs"], aux_head=True), case)
    x = case.tensors["input.x"].requires_grad_()
    if model.training:
        main, aux = model(x)
        loss = (main * case.tensors["input.w_main"]).sum() + 0.4 * (aux * case.tensors["input.w_aux"]).sum()
        buffers = {
            f"output.{name}": model.get_buffer(name.removeprefix("after."))
            for name in case.group("output")
            if name.startswith("after.")
        }
        gradients = wanted_gradients(case, loss, model, {"x": x})
        case.compare({"output.main": main, "output.aux": aux} | buffers | gradients)
        return
    channels = case.entry["kwargs"]["embed_dim"]
    features, (stage1, stage2, focus3, _) = model.forward_intermediates(x)
    base3 = model.blocks3(model.patch_embed3(stage2))
    overview4 = model.blocks4(model.patch_embed4(base3))
    context = F.interpolate(model.high_level_proj(overview4), base3.shape[2:], mode="bilinear")
    got = {
        "stage1": stage1,
        "stage2": stage2,
        "base3": base3,
        "overview4": overview4,
        "context_up": context,
        "focus3": focus3[:, : channels[2]],
        "focus3_context": focus3[:, channels[2] :],
        "features": features,
        "logits": model(x),
        "aux_logits": model.aux_head(overview4),
    }
    model.reparameterize()
    got["logits_merged"] = model(x)
    case.compare({f"output.{name}": tensor for name, tensor in got.items()})


@runner("overlock.dense_segmentation", "overlock.dense_detection")
def overlock_dense(case: Case) -> None:
    """The four maps for dense tasks."""
    model = prepared(OverLoCK(**case.entry["kwargs"], dense=case.id.rpartition("_")[2]), case)
    maps = model.forward_intermediates(case.tensors["input.x"], norm=True, intermediates_only=True)
    case.compare({f"output.dense{i}": y for i, y in enumerate(maps, start=1)})
