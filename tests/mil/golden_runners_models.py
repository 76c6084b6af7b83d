"""Runners of the golden cases of MIL models: outputs, losses and every gradient."""

import torch

from saccade.mil import ABMIL, ACMILGA, ACMILMHA, CLAMSB, DSMIL, MILModel, TransMIL
from tests.golden.case import Case
from tests.golden.runners import runner


def load(model: MILModel, case: Case) -> MILModel:
    """Load the case's weights under their official names and set the mode."""
    model.load_state_dict(case.group("state"))
    return model.train(case.entry["mode"].startswith("train"))


def bag(case: Case) -> torch.Tensor:
    """Return the features as a batch of one that takes a gradient."""
    features = case.tensors["input.features"].clone()
    return features.reshape(1, *features.shape[-2:]).requires_grad_()


def gradients(case: Case, model: MILModel, bags: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the stored gradients of a loss, as far as the case has any."""
    names = case.group("grad")
    if not names:
        return {}
    parameters = dict(model.named_parameters())
    wanted = {name: bags if name == "features" else parameters[name] for name in names}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {f"grad.{n}": g.reshape(names[n].shape) for n, g in zip(wanted, grads, strict=True)}


def acmil_results(case, output, losses):
    wanted = {name for name in case.expected() if name.startswith("output.")}
    got = {
        "output.branch_logits": output.branch_logits[0],
        "output.bag_logits": output.logits,
        "output.bag_feature": output.features,
        "output.loss": losses["loss"],
        "output.loss_branch": losses["branch"],
        "output.loss_bag": losses["bag"],
        "output.loss_diversity": losses["diversity"],
    }
    return {name: tensor for name, tensor in got.items() if name in wanted}


@runner("mil.acmil_ga")
def acmil_ga(case: Case) -> None:
    c = case.config
    sizes = (c["D_feat"], c["n_classes"], c["D_inner"], c["D_attn"], c["n_branches"], c["n_masked"], c["mask_ratio"])
    model, bags = load(ACMILGA(*sizes), case), bag(case)
    noise = case.tensors.get("input.mask_noise")
    output = model(bags, noise=None if noise is None else noise[None])
    losses = model.loss(output, case.tensors["input.label"])
    got = acmil_results(case, output, losses)
    got["output.attn_scores"], got["output.bag_attention"] = output.scores, output.attention
    case.compare(got | gradients(case, model, bags, losses["loss"]))
    if noise is not None:
        check_dropped(case, output.dropped[0])


@runner("mil.acmil_mha")
def acmil_mha(case: Case) -> None:
    c = case.config
    model = ACMILMHA(
        c["D_feat"],
        c["n_classes"],
        c["D_inner"],
        c["heads"],
        c["n_branches"],
        c["n_masked"],
        c["mask_ratio"],
        c["dropout"],
    )
    model, bags = load(model, case), bag(case)
    noise = case.tensors.get("input.mask_noise")  # (M, H, K)
    output = model(bags, noise=None if noise is None else noise[None])
    losses = model.loss(output, case.tensors["input.label"])
    got = acmil_results(case, output, losses)
    got["output.attn_scores"] = output.scores[0].transpose(0, 1)  # (H, M, N)
    got["output.bag_attention"] = output.branch_attention[0].mean(0)  # (H, N)
    case.compare(got | gradients(case, model, bags, losses["loss"]))
    if noise is not None:
        check_dropped(case, output.dropped[0].transpose(0, 1))


def check_dropped(case: Case, dropped: torch.Tensor) -> None:
    expected = case.tensors["input.masked_indices"]
    indices = dropped.nonzero()[:, -1].reshape(expected.shape)
    assert torch.equal(indices, expected.sort(-1).values)


@runner("mil.abmil")
def abmil(case: Case) -> None:
    c = case.config
    gated = "attention.attention_U.0.weight" in case.group("state")
    model = load(ABMIL(c["D_feat"], c["n_classes"], c["D_inner"], c["D_attn"], gated=gated), case)
    bags = bag(case)
    output = model(bags)
    loss = model.loss(output, case.tensors["input.label"])["loss"]
    got = {"output.bag_logits": output.logits, "output.attn_scores": output.scores[0], "output.loss": loss}
    case.compare(got | gradients(case, model, bags, loss))


@runner("mil.clam_sb")
def clam_sb(case: Case) -> None:
    c = case.config
    model = CLAMSB(
        c["embed_dim"],
        c["n_classes"],
        (c["hidden"], c["attn_dim"]),
        gated=c["gate"],
        dropout=0.25 if any(".module.3." in name for name in case.group("state")) else 0.0,
        instances=c["k_sample"],
        subtyping=c["subtyping"],
    )
    model, bags = load(model, case), bag(case)
    label = case.tensors["input.label"]
    output = model(bags)
    losses = model.loss(output, label)
    logits, targets, counts = model.instance_predictions(output, label)
    # The official lists go class by class, the tiles with target 1 first.
    chosen = counts[0].nonzero(as_tuple=True)
    got = {
        "output.bag_logits": output.logits,
        "output.attn_scores": output.scores[0],
        "output.bag_feature": output.features,
        "output.instance_loss": losses["instance"],
        "output.bag_loss": losses["bag"],
        "output.loss": losses["loss"],
        "output.instance_preds": logits[0].argmax(-1)[chosen],
        "output.instance_targets": targets[0][chosen],
    }
    case.compare(got | gradients(case, model, bags, losses["loss"]))


@runner("mil.transmil")
def transmil(case: Case) -> None:
    c = case.config
    model, bags = load(TransMIL(c["D_feat"], c["n_classes"], c["D_inner"], c["heads"]), case), bag(case)
    output = model(bags)
    loss = model.loss(output, case.tensors["input.label"])["loss"]
    case.compare({"output.bag_logits": output.logits, "output.loss": loss} | gradients(case, model, bags, loss))


@runner("mil.dsmil")
def dsmil(case: Case) -> None:
    c = case.config
    model = DSMIL(c["feats"], c["n_classes"], nonlinear=c["nonlinear"], project_values=c["passing_v"])
    model, bags = load(model, case), bag(case)
    output = model(bags)
    got = {
        "output.instance_logits": output.instance_logits[0],
        "output.bag_logits": output.logits,
        "output.attention": output.branch_attention[0].T,
        "output.bag_feature": output.features,
        "output.max_logits": output.instance_logits[0].amax(0),
    }
    if "input.target" not in case.tensors:
        case.compare({name: got[name].reshape(case.tensors[name].shape) for name in case.expected()})
        return
    loss = model.loss(output, case.tensors["input.target"].float())["loss"]
    got["output.loss"] = loss
    case.compare(got | gradients(case, model, bags, loss))
