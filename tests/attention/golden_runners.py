"""Golden runners of the attention core."""

import torch

from saccade.attention import attention_lse
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
