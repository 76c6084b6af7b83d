"""Golden runners of the attention core."""

import torch

from saccade.attention import attention_lse, context_mixing
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
