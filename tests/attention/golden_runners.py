"""Golden runners of the attention core."""

import torch

from saccade.attention import (
    AttentionLSE,
    BlockGeometry,
    BlockSelection,
    attention,
    attention_diversification,
    attention_diversification_from_maps,
    attention_lse,
    attention_statistics_from_maps,
    block_sparse_attention_lse,
    context_mixing,
    decay_slopes,
    linear_attention,
    merge_partials,
    partitioned_attention,
    pointwise_attention,
    prefix_softmax_mean,
    reference,
)
from tests.golden.case import Case
from tests.golden.runners import runner


@runner("attention.sink.logit")
def sink_logit(case: Case) -> None:
    """A learned logit per head in the denominator only: ``out * sigmoid(lse - sink)``."""
    inputs = {name: tensor.requires_grad_() for name, tensor in case.group("input").items()}
    sink = inputs["sink_logit"][:, None]  # (H, 1)
    out, lse = attention_lse(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        causal=case.config.get("causal", False),
        scale=case.config.get("scale"),
    )
    got = {
        "output.lse": lse,
        "output.sink_mass": torch.sigmoid(sink - lse),
        "output.y": out * torch.sigmoid(lse - sink).unsqueeze(-1),
    }
    case.compare(got | case.gradients(got, {f"input.{name}": tensor for name, tensor in inputs.items()}))


@runner("attention.sink.k_bias_headwise", "attention.sink.kv_bias")
def sink_key(case: Case) -> None:
    """A learned key that every query sees, its value learned or zero: one more part, merged."""
    inputs = {name: tensor.requires_grad_() for name, tensor in case.group("input").items()}
    query = inputs["q"]
    sink = inputs["k_bias"].expand(query.shape[1], -1)[:, :, None]  # (H, D, 1), shared by the heads or not
    logit = (query @ sink).squeeze(-1) * query.shape[-1] ** -0.5
    value = inputs.get("v_bias", torch.zeros(()))
    keys = attention_lse(query, inputs["k"], inputs["v"], causal=case.config["causal"])
    out, lse = merge_partials([keys, AttentionLSE(value.expand_as(keys.out), logit)])
    got = {"output.y": out, "output.sink_mass": torch.exp(logit - lse)}
    case.compare(got | case.gradients(got, {f"input.{name}": tensor for name, tensor in inputs.items()}))


@runner("overlock.context_mixing_core")
def context_mixing_core(case: Case) -> None:
    """The dynamic-kernel part of a ContMix block, between its projections."""
    inputs = {f"input.{name}": tensor.requires_grad_() for name, tensor in case.group("input").items()}
    cotangent = inputs.pop("input.cotangent")
    query, key, value = (inputs[f"input.{name}"] for name in ("query", "key", "value"))
    projection, bias = (inputs[f"input.weight_proj.{name}"] for name in ("weight", "bias"))
    tables = inputs["input.rpb1"], inputs["input.rpb2"]
    for backend in ("tiles", "reference"):
        out = context_mixing(
            query,
            key,
            value,
            projection[:, :, 0, 0],
            bias,
            *tables,
            scale=case.entry["kwargs"]["scale"],
            backend=backend,
        )
        grads = torch.autograd.grad((out * cotangent).sum(), list(inputs.values()))
        case.compare({"output.out": out} | {f"grad.{name}": grad for name, grad in zip(inputs, grads, strict=True)})


@runner("robust.adl")
def diversification_of_maps(case: Case) -> None:
    """The loss of several layers, from maps; their sum is divided by the number of layers + 1e-6."""
    maps = {name: tensor.requires_grad_() for name, tensor in case.group("input").items()}
    layers = [attention_diversification_from_maps(m, threshold=case.config["threshold"]) for m in maps.values()]
    loss = sum(layers) / (len(layers) + 1e-6)
    grads = torch.autograd.grad(loss, list(maps.values()))
    case.compare(
        {"output.adl": loss}
        | {f"output.layer{i}": layer for i, layer in enumerate(layers)}
        | {f"grad.{name}": grad for name, grad in zip(maps, grads, strict=True)}
    )


@runner("robust.adl_qk")
def diversification_beside_attention(case: Case) -> None:
    """The loss from query and key, alone and added to attention; the maps' means come from the literal form."""
    tensors = case.group("input")
    grad_out = tensors.pop("grad_out")
    query, key, value = (tensors[name].requires_grad_() for name in ("q", "k", "v"))
    multiplier = None
    if "att_mask" in tensors:  # RVT's, stored for a larger grid
        tokens = query.shape[2]
        multiplier = tensors["att_mask"].requires_grad_()[:, :tokens, :tokens].sigmoid()
    maps, lse = reference.softmax_weights(query, key, None, None, False, None, multiplier)
    out = attention(query, key, value) if multiplier is None else maps @ value
    loss = attention_diversification(
        query, key, lse=lse, threshold=case.config["threshold"], logit_multiplier=multiplier
    )
    got = {
        "output.adl": loss,
        "output.lse": lse,
        "output.out": out,
        "output.attn_head_mean": maps.mean(1),
        "output.column_mean": maps.mean((1, 2)),
    }
    for kind, total in {"adl_only": loss, "joint": (out * grad_out).sum() + 3 * loss}.items():
        wanted = [name for name in tensors if f"grad.{kind}.{name}" in case.tensors]
        grads = torch.autograd.grad(total, [tensors[name] for name in wanted], retain_graph=True)
        got |= {f"grad.{kind}.{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    case.compare(got)


@runner("attention.lightning.operator")
def lightning(case: Case) -> None:
    """Linear attention with a decay for each head; the state carried in and out."""
    inputs = case.group("input")
    slopes = inputs.pop("slopes")
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out, state = linear_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        log_decay=-slopes,
        causal=True,
        scale=case.config["scale"],
        initial_state=inputs.get("initial_state"),
    )
    got = {"output.y": out, "output.final_state": state}
    case.compare(got | case.gradients(got, {f"input.{name}": tensor for name, tensor in inputs.items()}))


@runner("attention.lightning.slopes")
def lightning_slopes(case: Case) -> None:
    """Slopes for numbers of heads that are powers of two and that are not."""
    case.compare({name: decay_slopes(int(name.rpartition("_")[2])) for name in case.tensors})


@runner("attention.diagnostics.sink_and_entropy")
def sink_and_entropy(case: Case) -> None:
    """Figures of causal maps ``(samples, layers, heads, T, T)``."""
    maps = case.tensors["input.attention"]
    layers = [attention_statistics_from_maps(maps[:, i], causal=True) for i in range(maps.shape[1])]

    def every(name: str) -> torch.Tensor:
        return torch.stack([getattr(layer, name) for layer in layers], 1)

    rates = torch.stack([layer.sink_rate(case.config["epsilon"]) for layer in layers])
    focus = every("local_focus")
    case.compare(
        {
            "output.concentration": every("concentration"),
            "output.entropy_rows": every("row_entropy"),
            "output.first_token_mass": every("first_token_mass"),
            "output.head_diversity": every("head_diversity"),
            "output.importance": every("importance"),
            "output.sink_rate_percent": rates.mean((0, 1)),
        }
        | {f"output.loc_foc_{n}": focus[..., n] for n in range(4)}
    )


@runner("attention.primitive.partitioned_attention")
def primitive_partitioned_attention(case: Case) -> None:
    """Classes by label; a bias in full becomes L more columns of query and key, ``(I b)[i, j] = b[i, j]``."""
    inputs = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in case.group("input").items()}
    for backend in ("reference", "auto"):
        query, key, scale = inputs["q"], inputs["k"], inputs["q"].shape[-1] ** -0.5
        if "bias" in inputs:
            columns = torch.eye(query.shape[2]).expand(*query.shape[:2], -1, -1)
            query, key = torch.cat([query, columns], -1), torch.cat([key, inputs["bias"].mT / scale], -1)
        out, lse, class_out, class_mass, *_ = partitioned_attention(
            query,
            key,
            inputs["v"],
            inputs["key_class"],
            case.config["num_classes"],
            causal=case.config["causal"],
            scale=scale,
            backend=backend,
        )
        got = {"output.out": out, "output.lse": lse}
        got |= {"output.class_out": class_out.movedim(2, 0), "output.class_mass": class_mass.movedim(2, 0)}
        floating = {f"input.{name}": tensor for name, tensor in inputs.items() if tensor.is_floating_point()}
        case.compare(got | case.gradients(got, floating))


@runner("attention.deconstructed.non_approximate")
def non_approximate(case: Case) -> None:
    """Causal softmax whose scores do not depend on the query, also with scores that overflow without a running max."""
    inputs = {name: tensor.requires_grad_() for name, tensor in case.group("input").items()}
    query, key = inputs["q"], inputs["k"]
    scores = (torch.nn.functional.silu(query) * key).sum(-1) * query.shape[-1] ** -0.5
    got = {"output.y": prefix_softmax_mean(scores, inputs["v"]).out}
    case.compare(got | case.gradients(got, {f"input.{name}": tensor for name, tensor in inputs.items()}))


@runner(
    "attention.pointwise_similarity.elu",
    "attention.pointwise_similarity.sigmoid",
    "attention.pointwise_similarity.sigmoid_bias",
    "attention.pointwise_similarity.sigmoid_normalised",
)
def pointwise(case: Case) -> None:
    """Weights that are functions of their own score; the bias is one number."""
    inputs = {name: tensor.requires_grad_() for name, tensor in case.group("input").items()}
    bias = case.config.get("bias")
    out = pointwise_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        activation="elu1" if case.config.get("similarity") == "elu" else "sigmoid",
        bias=None if bias is None else torch.tensor(bias),
        causal=case.config.get("causal", False),
        normalise=case.config.get("normalise", False),
        scale=case.config["scale"],
    )
    got = {"output.y": out}
    case.compare(got | case.gradients(got, {f"input.{name}": tensor for name, tensor in inputs.items()}))


@runner("attention.primitive.block_routed_attention")
def block_routed_attention(case: Case) -> None:
    """Each query region attends to the key regions it is routed to; regions of both sizes are blocks."""
    inputs = {name: case.tensors[f"input.{name}"].requires_grad_() for name in ("q", "k", "v")}
    routes = case.tensors["input.routes"]
    routes = routes if routes.dim() == 4 else routes.unsqueeze(1)  # (B, 1 or H, R, K)
    (regions, queries), keys = inputs["q"].shape[2:4], inputs["k"].shape[3]
    geometry = BlockGeometry(queries, keys, regions * queries, regions * keys)
    counts = torch.full(routes.shape[:3], routes.shape[3])
    scale = float(case.tensors["input.scale"])
    tensors = [tensor.flatten(2, 3) for tensor in inputs.values()]
    for backend in ("auto", "gather", "reference"):
        out, lse = block_sparse_attention_lse(
            *tensors, BlockSelection(routes, counts, geometry), scale=scale, backend=backend
        )
        sizes = (regions, queries)
        got = {"output.y": out.unflatten(2, sizes), "output.lse": lse.unflatten(2, sizes)}
        case.compare(got | case.gradients(got, {f"input.{name}": tensor for name, tensor in inputs.items()}))
